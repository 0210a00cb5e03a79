"""The folder of a run: where its files are. It is created once, and no other run overwrites it."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from qsm_rl.atomic_files import sweep_temporaries
from qsm_rl.training.configuration.command_line import CONFIGURATION_FILE, saved_text
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.errors import UserError
from qsm_rl.training.folders import take_lock
from qsm_rl.training.ranks import rank
from qsm_rl.training.runs.loggers import RUN_ID
from qsm_rl.version import __version__

__all__ = ["RunFolder"]

# An environment variable by which the processes that rank 0 starts find its folder.
FOLDER_OF_RANK_0 = "QSM_RL_RUN_FOLDER"


@dataclass
class RunFolder:
    """Paths inside the folder of a run.

    Attributes:
        path: the folder.
        recipe: name of the recipe.
        resumed: whether the run in it is being continued.
    """

    path: Path
    recipe: str
    resumed: bool = False
    _lock: TextIO = field(init=False, repr=False, compare=False)

    @classmethod
    def open(cls, configuration: TrainingConfiguration, recipe: str) -> RunFolder:
        """Creates the folder of a new run with its config.yaml, or opens the one that ``configuration.resume`` names.

        A process of a higher rank joins the one that rank 0 has opened.

        Args:
            configuration: ``run_dir`` names the folder; ``runs/RECIPE/ENV/TIME-sSEED`` if not given.
            recipe: name of the recipe.

        Raises:
            UserError: if the folder is not empty, cannot be made, or is in use by another process; if a resumed one
                holds symbolic links in place of its files; or if this process was started by anything other than rank
                0.
        """
        if rank() > 0:
            if FOLDER_OF_RANK_0 not in os.environ:
                raise UserError(
                    f"LOCAL_RANK is {rank()}, but this process was not started by --devices, which starts all "
                    "processes itself; start the run once, without torchrun."
                )
            return cls(Path(os.environ[FOLDER_OF_RANK_0]), recipe, resumed=configuration.resume is not None)
        if configuration.resume is not None:
            folder = cls(Path(configuration.resume), recipe, resumed=True)
            folder._refuse_links()
            folder._locked()
            sweep_temporaries(folder.path)  # of killed processes; no other process is using the folder now
            return folder
        default = Path("runs") / recipe / configuration.env / f"{time.strftime('%Y%m%d-%H%M%S')}-s{configuration.seed}"
        path = default if configuration.run_dir is None else Path(configuration.run_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / CONFIGURATION_FILE).exists():
                raise UserError(
                    f"{path} already holds a run; choose another --run_dir, or continue it with --resume {path}."
                )
            if any(path.iterdir()):
                raise UserError(f"{path} is not empty; choose a new folder as --run_dir.")
            # The actual warm-up of the run: raising total_frames on resuming must not move its end.
            settings = replace(configuration, warmup_frames=configuration.capped_warmup)
            with (path / CONFIGURATION_FILE).open("x", encoding="utf-8") as file:
                file.write(f"# python recipes/{recipe}.py --config {CONFIGURATION_FILE}\n")
                file.write(f"# written by qsm_rl {__version__}\n")
                file.write(saved_text(settings))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"--run_dir {path} cannot be created: {error.strerror}; choose another folder.") from error
        return cls(path, recipe)._locked()

    @property
    def settings(self) -> dict[str, Any]:
        """The content of config.yaml: the settings at the start of the run, without changes made on resuming."""
        return yaml.safe_load((self.path / CONFIGURATION_FILE).read_text(encoding="utf-8"))

    @property
    def metrics(self) -> Path:
        """metrics.csv, one row for every ``log_every`` frames and every evaluation."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def faults(self) -> Path:
        """Folder of dumps of non-finite values; it exists only if there were any."""
        return self.path / "faults"

    @property
    def actor(self) -> Path:
        """Folder of the saved actor, with model.safetensors and config.json."""
        return self.path / "actor"

    @property
    def published(self) -> list[Path]:
        """Folders of the saved actors: ``actor``, or ``seed_N/actor`` for agents that shared the run."""
        folders = [self.actor, *sorted(self.path.glob(f"seed_*/{self.actor.name}"))]
        return [folder for folder in folders if (folder / "config.json").is_file()]

    @property
    def learning_curve(self) -> Path:
        """Picture of the returns over frames."""
        return self.path / "learning_curve.png"

    @property
    def videos(self) -> Path:
        """Folder of the videos of evaluations."""
        return self.path / "videos"

    def discard(self) -> None:
        """Removes the folder of a run that could not start."""
        self.close()
        (self.path / CONFIGURATION_FILE).unlink()
        with contextlib.suppress(OSError):  # something else has appeared in it
            self.path.rmdir()

    def close(self) -> None:
        """Releases the folder, so that other processes can continue the run."""
        if rank() == 0:
            self._lock.close()

    def _refuse_links(self) -> None:
        """A link in a run folder from someone else could give away any file of the reader's."""
        own = [self.path / CONFIGURATION_FILE, self.metrics, self.checkpoints, self.actor, self.learning_curve]
        agents = [*self.path.glob("seed_*")]
        own += [self.videos, self.faults, self.path / RUN_ID, self.path / "tensorboard", *agents]
        inside = (path for folder in (self.checkpoints, self.actor, *agents) for path in folder.rglob("*"))
        for path in itertools.chain(own, inside):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link, which a run never creates; replace it with the file itself."
                )

    def _locked(self) -> RunFolder:
        # The lock belongs to the open file, so it is released however the process ends.
        path = self.path / CONFIGURATION_FILE
        try:
            file = path.open("r+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; a run needs a writable folder.") from error
        if not take_lock(file, path):
            file.close()
            raise UserError(f"{self.path} is in use by another process; stop that run first.")
        self._lock = file
        os.environ[FOLDER_OF_RANK_0] = str(self.path)
        return self
