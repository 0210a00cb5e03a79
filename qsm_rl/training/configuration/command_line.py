"""Turns the command line, a YAML file and a preset into one checked configuration."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from lightning.pytorch.loggers import Logger

from qsm_rl.atomic_files import read_bounded
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.errors import UserError
from qsm_rl.version import __version__

__all__ = ["CONFIGURATION_FILE", "parse_configuration", "saved_text"]

CONFIGURATION_FILE = "config.yaml"
LARGEST, DEEPEST = 1 << 20, 20  # bytes and levels of a YAML file
NOT_SAVED = ("run_dir", "resume")  # a run's location is not one of its settings: config.yaml can start another run

Configuration = TypeVar("Configuration", bound=TrainingConfiguration)


def parse_configuration(
    configuration_class: type[Configuration],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
) -> Configuration:
    """Reads the configuration: flags override ``--config FILE``, which overrides the preset.

    A flag that has no effect given the other settings is named in a line on stderr.

    With ``--resume RUN_DIR`` all settings come from that run's config.yaml. Only ``--total_frames``, not smaller than
    before, and ``--stop_at_return`` may be given with it.

    Args:
        configuration_class: the dataclass that has the flags as fields, and the presets.
        arguments: the command line; ``sys.argv[1:]`` when not given.
        description: text at the top of ``--help``.

    Returns:
        The checked configuration.

    Raises:
        SystemExit: with ``--print_config``, after it is printed.
        UserError: for an unknown flag or YAML key, a value of the wrong type or range, or a run that cannot be resumed.
    """
    parser = _parser(configuration_class, description)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for path in _config_files(arguments):
        _check_names(path, parser)
    given = _parse(parser, arguments)
    print_config = given.pop("print_config", False)
    if given.get("resume") is not None:
        if _config_files(arguments):
            raise UserError("--resume takes every setting from the run; remove --config.")
        configuration = _resumed(parser, configuration_class, given)
    else:
        preset = given.get("preset", _default(configuration_class, "preset"))
        env = given.get("env", _default(configuration_class, "env"))
        values = configuration_class.preset_values(preset, env)
        configuration = configuration_class(**{**values, **given})
        for name, flag in configuration.without_effect().items():
            # Files and the runs of a grid hold every setting; only a flag that changes a value was given on purpose.
            by_itself = values.get(name, _default(configuration_class, name))
            if getattr(configuration, name) != by_itself and _is_flag(name, arguments):
                _warn(f"--{name} has no effect without {flag}")
    if print_config:
        print(saved_text(configuration), end="")
        sys.exit(0)
    return configuration


def saved_text(configuration: TrainingConfiguration) -> str:
    """The configuration as YAML, in the form that a run folder stores and ``--config`` reads."""
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in asdict(configuration).items() if name not in NOT_SAVED]
    return "".join(lines)


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Prints the description line by line, so that a recipe's example commands stay on separate lines."""


def _parser(configuration_class: type[TrainingConfiguration], description: str | None) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description=description,
        print_config=None,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the settings below; flags override it."
    )
    parser.add_argument(  # jsonargparse's own prints without the preset's values
        "--print_config", action="store_true", help="Print all resulting settings as YAML for --config, and exit."
    )
    parser.add_class_arguments(configuration_class, skip={"logger"})
    parser.add_subclass_arguments(
        Logger,
        "logger",
        required=False,
        skip={"save_dir"},  # files go to the run's folder
        help="A logger in addition to metrics.csv and TensorBoard: a Lightning class such as WandbLogger, or the "
        "import path of any other class; its arguments follow as --logger.NAME VALUE.",
    )
    return parser


def _parse(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """The values given on the command line and in the YAML file (already checked to be plain), without defaults."""
    try:
        given = parser.parse_args(_config_first(arguments), defaults=False).as_dict()
    except ArgumentError as error:
        raise UserError(_readable(str(error), parser)) from error
    given.pop("config", None)
    for path in _config_files(arguments):
        _check_preset(path, given.get("preset"))
    return given


def _is_flag(name: str, arguments: list[str]) -> bool:
    return any(argument.partition("=")[0] == f"--{name}" for argument in arguments)


@cache
def _warn(text: str) -> None:
    """Prints a warning once per process: a grid parses the flags of each of its cells before it runs."""
    print(f"warning: {text}", file=sys.stderr)


def _config_files(arguments: list[str]) -> list[Path]:
    return [
        Path(option.partition("=")[2] or value)
        for option, value in zip(arguments, [*arguments[1:], ""], strict=False)
        if option == "--config" or option.startswith("--config=")
    ]


def _check_names(path: Path, parser: ArgumentParser) -> None:
    """Refuses a settings file with an unknown name; lets a missing file pass, since the parser reports it.

    Raises:
        UserError: naming the file, who wrote it, and the setting.
    """
    check_plain_yaml(path)
    if not path.is_file():
        return
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"{path} contains no settings; write lines such as total_frames: 30000.")
    known = [action.dest for action in parser._actions]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the settings."
            raise UserError(f"{path}{_written_by(path)}: there is no setting {name}; {hint}")


def _check_preset(path: Path, preset: str | None) -> None:
    """Refuses ``--preset`` with a file of another preset, whose values would override everything but the name.

    Raises:
        UserError: if the file names another preset than the command line.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    named = values.get("preset") if isinstance(values, dict) else None
    if named is not None and named != preset:
        raise UserError(
            f"--preset {preset}: {path} contains the settings of the preset {named}, which would override it; "
            "remove --preset or --config."
        )


def _config_first(arguments: list[str]) -> list[str]:
    """Moves ``--config FILE`` to the front: later arguments win, and flags should win wherever they are."""
    front: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        width = 2 if argument == "--config" else 1
        (front if argument.startswith("--config=") or width == 2 else rest).extend(
            arguments[position : position + width]
        )
        position += width
    return front + rest


def _readable(message: str, parser: ArgumentParser) -> str:
    """The parser's message in the terms of the command line, with the closest flag for an unknown one."""
    message = re.sub(r'Parser key "(\w+)":\s*', r"--\1: ", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"Expected an? typing\.Literal\[(.*?)\]\. Got value:", r"expected one of \1, got", message)
    message = re.sub(r"Expected an? (.*?)\. Got value:", r"expected \1, got", message)
    message = re.sub(r"\s*\n\s*", " ", message).strip()
    if "_hidden_dims:" in message:
        message += '; give a list of widths, such as "[256, 256]".'
    logger = re.search(r"Errors: - (?:Problem with given class_path )?(.*?) - Expected a .*Given value", message)
    if message.startswith("--logger") and logger is not None:
        return (
            f"--logger: {logger.group(1)}; give the import path of a Lightning logger; --logger.help PATH lists its "
            "arguments."
        )
    several = re.search(
        r"Does not validate against any of the Union .*?\[(.*)\] Errors: .* Given value: (.*)$", message
    )
    if several is not None:
        kinds = re.findall(r"typing\.Literal\[(.*?)\]|(tuple)\[.*?\]|(\w+)", several.group(1))
        words = {"NoneType": "null", "tuple": 'two numbers such as "[-10, 10]"'}
        choices = [words.get(kind, kind) for kind in map("".join, kinds)]
        message = f"{message[: several.start()]}expected {' or '.join(choices)}, got {several.group(2)}"
    unknown = re.search(r"unrecognized arguments: (--[\w-]+)|Option '(\w+)' is not accepted", message)
    if unknown is not None:
        name = (unknown.group(1) or unknown.group(2)).lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, [action.dest for action in parser._actions], n=1)
        message += f"; did you mean --{near[0]}?" if near else "; --help lists all flags."
    return message


def _default(configuration_class: type, name: str) -> Any:
    default = next(field.default for field in fields(configuration_class) if field.name == name)
    assert default is not MISSING
    return default


def _resumed(parser: ArgumentParser, configuration_class: type[Configuration], given: dict[str, Any]) -> Configuration:
    run_dir = Path(given.pop("resume"))
    total_frames = given.pop("total_frames", None)
    end = {name: given.pop(name) for name in ("stop_at_return",) if name in given}
    if given:
        raise UserError(
            f"--resume takes every setting from the run; remove {', '.join(f'--{name}' for name in given)} "
            "(only --total_frames may be raised, and --stop_at_return changed)."
        )
    path = run_dir / CONFIGURATION_FILE
    if not path.is_file() or path.is_symlink():
        several = (
            ", or continue several seeds with the command that started them" if any(run_dir.glob("seed_*")) else ""
        )
        raise UserError(f"--resume {run_dir}: {path} does not exist; give the folder of a run{several}.")
    check_plain_yaml(path)
    _refuse_own_code(run_dir, yaml.safe_load(path.read_text(encoding="utf-8")))
    try:
        values = _parse(parser, ["--config", str(path)])
    except UserError as error:
        raise UserError(f"{path}{_written_by(path)}: {error}") from error
    names = {field.name for field in fields(configuration_class)} - set(NOT_SAVED)
    if missing := sorted(names - values.keys()):
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it comes from another version or recipe{_written_by(path)}, and "
            "cannot be resumed."
        )
    if strange := sorted(values.keys() - names):
        raise UserError(f"{path} contains settings that no run saves: {', '.join(strange)}; remove them.")
    if total_frames is not None:
        if total_frames < values["total_frames"]:
            raise UserError(
                f"--total_frames may only be raised when resuming: got {total_frames}, but the run has "
                f"{values['total_frames']}."
            )
        values["total_frames"] = total_frames
    try:
        return configuration_class(**{**values, **end}, resume=run_dir)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_plain_yaml(path: Path) -> None:
    """Refuses a YAML file with more than names and values, before anything reads it; lets anything but a file pass.

    Raises:
        UserError: for tags, which can name code; aliases, which can expand beyond all memory; deep nesting; or a large
            file.
    """
    if not path.is_file():  # missing, which the parser reports, or a pipe
        return
    depth = 0
    try:
        for event in yaml.parse(read_bounded(path, LARGEST, follow_links=True).decode("utf-8"), yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or depth > DEEPEST:
                line = event.start_mark.line + 1
                raise ValueError(f"line {line} contains a tag, an alias or deep nesting; use plain names and values")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not a plain YAML file: {' '.join(str(error).split())[:200]}.") from error


def _written_by(path: Path) -> str:
    """Which recipe and version of the package wrote a config.yaml, if it says so."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(400)
    recipe = re.search(r"^# python (recipes/\w{1,40}\.py) ", head, flags=re.MULTILINE)
    version = re.search(r"^# written by qsm_rl (\S{1,20})$", head, flags=re.MULTILINE)
    by = "" if recipe is None else f", written by {recipe[1]}"
    of = " of" if by else ", written by"
    return by if version is None else f"{by}{of} qsm_rl {version[1]} (this is {__version__})"


def _refuse_own_code(run_dir: Path, values: Any) -> None:
    """A run names modules to import for its environment and logger; none of them may lie in the run's folder.

    Raises:
        UserError: naming the module.
    """
    values = values if isinstance(values, dict) else {}
    env, separator, _ = str(values.get("env")).partition(":")
    logger = values.get("logger")
    paths = [env if separator else "", str(logger.get("class_path", "")) if isinstance(logger, dict) else str(logger)]
    for top in (path.partition(".")[0] for path in paths):
        try:
            spec = importlib.util.find_spec(top) if top else None
        except (ImportError, ValueError):  # reported when the environment or logger is made
            continue
        if spec and spec.origin and Path(spec.origin).resolve().is_relative_to(run_dir.resolve()):
            raise UserError(
                f"{run_dir} contains the module {top}; code in a run folder is never run, so move the module elsewhere."
            )
