"""Videos of episodes: finds a renderer that works on this machine, and films an episode."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torchrl.envs import EnvBase

from qsm_rl.training.errors import UserError
from qsm_rl.training.folders import make_folder

__all__ = ["Film", "check_filming"]

PICTURES_PER_SECOND = 30
SECONDS_TO_TRY = 60
# Run in a separate process: a renderer that fails may end the process, and PyOpenGL keeps its first choice.
TRY_RENDERER = """
import os, sys
from importlib import import_module
import mujoco
context = import_module("mujoco." + os.environ["MUJOCO_GL"]).GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
os._exit(0)
"""


class Film:
    """A video of an environment's first episode, as an mp4 file.

    Inside the ``with`` block call [`watch`][qsm_rl.training.Film.watch] before each step. The file appears when the
    block ends, but not if an exception ends it. The video plays at the simulator's own speed, with at most about
    ``PICTURES_PER_SECOND``.

    Args:
        path: the file, ending in ``.mp4``; its folder is created.
        environment: from [`make_environment`][qsm_rl.training.make_environment] with ``filmed=True``; of a batch, the
            first environment is filmed.

    Attributes:
        pictures: number of pictures in the video so far.

    Raises:
        UserError: if the packages that write videos are missing, the path does not end in ``.mp4``, or its folder
            cannot be made.
    """

    def __init__(self, path: Path, environment: EnvBase) -> None:
        check_packages()
        if path.suffix != ".mp4":
            raise UserError(f"a video must be an mp4 file, got {path}; use a path that ends in .mp4.")
        make_folder(path.parent)
        self.path = path
        self.environment = environment
        self.pictures = 0
        frames_per_second = _gymnasium_env(environment).metadata.get("render_fps", PICTURES_PER_SECOND)
        self._frames_per_picture = max(1, round(frames_per_second / PICTURES_PER_SECOND))
        self._pictures_per_second = frames_per_second / self._frames_per_picture
        self._first: np.ndarray | None = None
        self._over = False
        self._writer: Any = None

    @property
    def _unfinished(self) -> Path:
        return self.path.with_name(f".{self.path.stem}-unfinished{self.path.suffix}")

    def watch(self, step: int) -> None:
        """Takes a picture of the environment's current state.

        Args:
            step: frames since the start of the episode; a 0 after other values ends the film.
        """
        if step == 0:
            # A collector may try the policy and reset again before it begins: the last start counts.
            self._over = self._writer is not None
            if not self._over:
                self._first, self.pictures = render(self.environment), 1
        elif not self._over:
            if self._writer is None:
                self._begin()
            if step % self._frames_per_picture == 0:
                self._writer.append_data(render(self.environment))
                self.pictures += 1

    def _begin(self) -> None:
        import imageio

        # The codec needs even sizes; imageio's default of 16 would rescale the picture.
        self._writer = imageio.get_writer(self._unfinished, fps=self._pictures_per_second, macro_block_size=2)
        self._writer.append_data(self._first)

    def __enter__(self) -> Film:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is None and error is None and self._first is not None:
            self._begin()  # an episode of one frame
        if self._writer is None:
            return
        self._writer.close()
        if error is None:
            os.replace(self._unfinished, self.path)
        else:
            self._unfinished.unlink(missing_ok=True)


def check_filming(env: str, make_environment: Callable[..., EnvBase]) -> None:
    """Takes one picture of an environment, so that obstacles to videos are reported before training.

    MuJoCo needs OpenGL. If ``MUJOCO_GL`` is not set, it is set to the first of ``glfw`` (only with a display), ``egl``
    and ``osmesa`` that works; dm_control reads it at its first import.

    Args:
        env: name of the environment, for the message.
        make_environment: makes an environment; called with ``seed`` and ``filmed``.

    Raises:
        UserError: with the command that installs what is missing.
    """
    check_packages()
    choose_renderer()
    environment = make_environment(seed=0, filmed=True)
    try:
        environment.reset()
        render(environment)
    except Exception as error:  # renderers can raise anything
        renderer = os.environ.get("MUJOCO_GL") or "none that works"
        raise UserError(
            f"cannot record a video of {env}: {' '.join(str(error).split())[:200]}. MuJoCo renders with OpenGL "
            f"(renderer here: {renderer}). Without a display, run apt-get install libegl1 libosmesa6, and set "
            "MUJOCO_GL to egl or osmesa."
        ) from error
    finally:
        environment.close()


def check_packages() -> None:
    """Raises a ``UserError`` if the packages that write videos are missing."""
    if any(importlib.util.find_spec(package) is None for package in ("imageio", "imageio_ffmpeg")):
        raise UserError('videos need imageio and ffmpeg: pip install "qsm_rl[video]".')


def choose_renderer() -> None:
    """Sets ``MUJOCO_GL`` to the first renderer that works, if there is one and the variable is not set yet."""
    if os.environ.get("MUJOCO_GL"):
        return
    display = sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    for name in [*(["glfw"] if display else []), "egl", "osmesa"]:
        try:
            done = subprocess.run(
                [sys.executable, "-c", TRY_RENDERER],
                env={**os.environ, "MUJOCO_GL": name},
                capture_output=True,
                timeout=SECONDS_TO_TRY,
                check=False,
            )
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return


def render(environment: EnvBase) -> np.ndarray:
    """A picture of the first environment of a batch, ``(height, width, 3)``, dtype uint8."""
    picture = _gymnasium_env(environment).render()
    if not isinstance(picture, np.ndarray):
        raise TypeError(
            f"its render() returned {type(picture).__name__}, expected an array of shape (height, width, 3)"
        )
    return picture


def _gymnasium_env(environment: EnvBase) -> Any:
    return environment.vector_env.envs[0]
