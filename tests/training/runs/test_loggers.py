from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pytest
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers.logger import DummyLogger

from qsm_rl.training import QSMConfiguration, UserError, parse_configuration, read_metrics
from qsm_rl.training.runs import loggers
from qsm_rl.training.runs.loggers import MetricsTable, check_logger, chosen_logger


def test_table_grows_by_rows_and_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    table.log_metrics({"a": 1.0}, step=100)
    table.log_metrics({"a": 1 / 3, "eval/b": -2.5}, step=200)
    table.log_metrics({"eval/b": 4.0}, step=300)
    assert path.read_text().splitlines() == ["frames,a,eval/b", "100,1.0,", "200,0.3333333333333333,-2.5", "300,,4.0"]
    columns = read_metrics(path)
    assert columns["frames"] == [100, 200, 300]
    assert columns["a"][:2] == [1.0, 1 / 3]  # to the bit
    assert math.isnan(columns["a"][2])


def test_continued_table_drops_what_lies_beyond_and_what_was_torn(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    for step in (100, 200, 300):
        table.log_metrics({"a": step / 10, "b": 1.0}, step=step)
    with path.open("a") as file:
        file.write("40")  # the process was killed while appending
    table = MetricsTable(path, last_frame=200)
    table.log_metrics({"a": 7.0}, step=300)
    assert read_metrics(path)["frames"] == [100, 200, 300]
    assert read_metrics(path)["a"] == [10, 20, 7]


def test_a_table_that_begins_anew_keeps_no_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsTable(path).log_metrics({"eval/return_mean": 1.0}, step=200)
    MetricsTable(path)
    assert read_metrics(path) == {"frames": []}


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("", {"frames": []}),
        ("a,b\n1,2\n", {"a": [], "b": []}),  # another table
        ("frames,a\nx,1\n5,2\n7\n", {"frames": [5], "a": [2]}),
    ],
)
def test_what_is_no_row_of_a_log_is_left_out(tmp_path, text, columns):
    (tmp_path / "metrics.csv").write_text(text)
    assert read_metrics(tmp_path / "metrics.csv") == columns


def test_a_table_that_was_removed_is_written_anew(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.log_metrics({"a": 1.0}, step=100)
    table.path.unlink()
    table.log_metrics({"a": 2.0}, step=200)
    assert read_metrics(table.path) == {"frames": [100, 200], "a": [1, 2]}


class Recorder(DummyLogger):
    """A logger as of another library: keeps what it is given in a list."""

    def __init__(self, save_dir: Path, project: str = "none", run_id: str | None = None) -> None:
        super().__init__()
        self.save_dir_given, self.project, self.run_id, self.rows = save_dir, project, run_id, []

    @property
    def version(self) -> str:
        return self.run_id or "the-service-s-id"

    def log_hyperparams(self, params, *args, **kwargs):
        if self.project == "unreachable":
            raise ConnectionError("no route\nto host")
        self.params = params


RECORDER = f"{__name__}.Recorder"


def choose(*flags: str):
    return parse_configuration(QSMConfiguration, ["--logger", RECORDER, *flags]).logger


def test_any_logger_by_class_path_gets_its_arguments_the_folder_and_the_settings(tmp_path):
    choice = choose("--logger.project", "pendulum")
    assert choice == {"class_path": RECORDER, "init_args": {"project": "pendulum"}}
    logger = chosen_logger(choice, tmp_path, {"seed": 3})
    assert (logger.project, logger.save_dir_given, logger.params) == ("pendulum", tmp_path, {"seed": 3})
    assert not (tmp_path / loggers.RUN_ID).exists(), "nobody knows how it names runs"
    check_logger(choice)
    (tmp_path / "a.yaml").write_text(json.dumps({"logger": choice}))
    assert parse_configuration(QSMConfiguration, ["--config", str(tmp_path / "a.yaml")]).logger == choice


def test_a_resumed_run_goes_on_in_the_service_s_record_of_it(tmp_path, monkeypatch):
    monkeypatch.setitem(loggers.SERVICES, RECORDER, loggers.Service("torch", "torch", "project", "run_id"))
    first = chosen_logger(choose(), tmp_path, {})
    assert (first.project, first.run_id) == (tmp_path.name, None)
    assert chosen_logger(choose(), tmp_path, {}).run_id == "the-service-s-id"
    assert chosen_logger(choose("--logger.project", "mine"), tmp_path, {}).project == "mine"


@pytest.mark.parametrize("given", [None, "mine"])
def test_a_project_of_weights_and_biases_is_the_user_s_or_the_kit_s(tmp_path, monkeypatch, given):
    monkeypatch.setenv("WANDB_PROJECT", given or "")
    if given is None:
        monkeypatch.delenv("WANDB_PROJECT")
    chosen_logger({"class_path": RECORDER}, tmp_path, {})
    assert loggers.os.environ["WANDB_PROJECT"] == (given or "qsm_rl")


def test_lightning_s_loggers_take_names_and_ids_as_they_are_given():
    for path, service in loggers.SERVICES.items():
        parameters = inspect.signature(getattr(lightning_loggers, path.rpartition(".")[2])).parameters
        free = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        assert service.id_argument in parameters and (free or service.name_argument in parameters)
        assert service.id_argument in ("id", "run_id", "experiment_key") and "name" in service.name_argument


def test_what_stands_in_the_way_of_a_logger_is_said_in_a_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Recorder could not be started: no route to host"):
        chosen_logger(choose("--logger.project", "unreachable"), tmp_path, {})
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    wandb = parse_configuration(QSMConfiguration, ["--logger", "WandbLogger", "--logger.offline", "true"]).logger
    with pytest.raises(UserError, match=r'--logger WandbLogger needs wandb: pip install "qsm_rl\[wandb\]"'):
        check_logger(wandb)
    check_logger(None)
    for flags, words in (
        (["--logger", "no.such.Logger"], "no.such.Logger.*No module named 'no'"),
        (["--logger", "torch.nn.Linear"], "not correspond to a subclass of Logger"),
        (["--logger", RECORDER, "--logger.colour", "red"], "Option 'colour' is not accepted.*--logger.help"),
        (["--logger", RECORDER, "--logger.save_dir", "here"], "Option 'save_dir' is not accepted"),
    ):
        with pytest.raises(UserError, match=f"^--logger: .*{words}") as caught:
            parse_configuration(QSMConfiguration, flags)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    choice = parse_configuration(QSMConfiguration, ["--logger", "WandbLogger", "--logger.offline", "true"]).logger
    runs = []
    for step in (100, 200):
        logger = chosen_logger(choice, tmp_path, {"seed": 3})
        logger.log_metrics({"eval/return_mean": 1.5}, step=step)
        run = logger.experiment
        runs.append((run.id, run.name, run.project, run.config["seed"], run.summary["eval/return_mean"]))
        wandb.finish()
    assert runs[0] == runs[1] == ((tmp_path / "logger_id.txt").read_text().strip(), tmp_path.name, "qsm_rl", 3, 1.5)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 1
