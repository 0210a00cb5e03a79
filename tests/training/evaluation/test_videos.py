from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tensordict.nn import TensorDictModule

from qsm_rl.training import Film, UserError, check_filming, evaluate_policy, make_environment
from qsm_rl.training.evaluation import videos


class Brighter(gymnasium.Env):
    """Its picture grows brighter by 20 with each frame; the start of every episode has another brightness."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None, frames_per_second: float = 30.0, broken: bool = False) -> None:
        self.render_mode, self.broken, self.resets = render_mode, broken, 0
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": frames_per_second}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets, self.time = self.resets + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(1, np.float32), 1.0, self.time == 6, False, {}

    def render(self):
        if self.broken:
            raise RuntimeError("an OpenGL platform library\nhas not been loaded")
        return np.full((64, 96, 3), 20 * self.time + 5 * self.resets, np.uint8)


class Plain(gymnasium.Env):
    """It has no ``__init__``, which Python says in other words than of one that lacks ``render_mode``."""

    observation_space, action_space = Brighter.observation_space, Brighter.action_space


@pytest.fixture(params=[30.0, 90.0])
def name(request):
    gymnasium.register("qsm_rl_test/Brighter-v0", Brighter, kwargs={"frames_per_second": request.param})
    gymnasium.register("qsm_rl_test/Dark-v0", Brighter, kwargs={"broken": True})
    gymnasium.register("qsm_rl_test/Blind-v0", lambda: Brighter())
    gymnasium.register("qsm_rl_test/Plain-v0", Plain)
    yield "qsm_rl_test/Brighter-v0"
    for registered in ("Brighter-v0", "Dark-v0", "Blind-v0", "Plain-v0"):
        del gymnasium.registry[f"qsm_rl_test/{registered}"]


policy = TensorDictModule(torch.tanh, in_keys=["observation"], out_keys=["action"])


def test_a_film_shows_each_frame_of_the_first_episode(name, tmp_path):
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    environment = make_environment(name, filmed=True)
    with Film(tmp_path / "new" / "film.mp4", environment) as film:
        filmed = evaluate_policy(environment, policy, episodes=3, seed=0, film=film)
    assert filmed == evaluate_policy(make_environment(name), policy, episodes=3, seed=0)
    reader = imageio.get_reader(tmp_path / "new" / "film.mp4")
    pictures = [np.asarray(picture, float) for picture in reader]
    steps = [0, 3] if environment.vector_env.envs[0].metadata["render_fps"] == 90 else list(range(6))
    assert film.pictures == len(pictures) == len(steps)
    assert reader.get_meta_data()["fps"] == 30
    assert pictures[0].shape == (64, 96, 3)
    start = pictures[0].mean()
    assert [picture.mean() - start for picture in pictures] == pytest.approx([20 * step for step in steps], abs=4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["film.mp4"]


def test_what_is_left_by_an_exception_leaves_no_file(name, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    environment = make_environment(name, filmed=True)
    environment.reset()
    with pytest.raises(KeyboardInterrupt), Film(tmp_path / "film.mp4", environment) as film:
        for step in range(5):
            film.watch(step)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_is_said_in_a_line(name, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(videos.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=1))
    monkeypatch.setattr(videos.importlib.util, "find_spec", lambda package: package)
    with pytest.raises(UserError, match=r"Dark-v0: an OpenGL platform library has not.*apt-get install"):
        check_filming("qsm_rl_test/Dark-v0", partial(make_environment, "qsm_rl_test/Dark-v0"))
    for blind in ("qsm_rl_test/Blind-v0", "qsm_rl_test/Plain-v0"):
        with pytest.raises(ValueError, match=f"cannot record a video of {blind}: it does not accept a render_mode"):
            check_filming(blind, partial(make_environment, blind))
    check_filming(name, partial(make_environment, name))  # it does not need OpenGL
    monkeypatch.setattr(videos.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r'pip install "qsm_rl\[video\]"'):
        check_filming(name, partial(make_environment, name))


def test_a_film_has_the_simulator_s_own_speed(tmp_path):
    """Of slow ones every frame is a picture; where none is told it counts as that of the film."""
    for told, speed in ((10.0, 10.0), (60.0, 30.0), (100.0, 100 / 3), (None, 30.0)):
        metadata = {} if told is None else {"render_fps": told}
        environment = SimpleNamespace(vector_env=SimpleNamespace(envs=[SimpleNamespace(metadata=metadata)]))
        assert Film(tmp_path / "film.mp4", environment)._pictures_per_second == pytest.approx(speed)


def test_a_film_of_an_episode_of_one_frame_has_its_picture_and_one_of_none_no_file(name, tmp_path):
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    environment = make_environment(name, filmed=True)
    environment.reset()
    with Film(tmp_path / "none.mp4", environment):
        pass
    with pytest.raises(KeyboardInterrupt), Film(tmp_path / "stopped.mp4", environment) as film:
        film.watch(0)
        raise KeyboardInterrupt
    with Film(tmp_path / "one.mp4", environment) as film:
        film.watch(0)
        film.watch(0)
    assert [path.name for path in tmp_path.iterdir()] == ["one.mp4"]
    assert film.pictures == sum(1 for _ in imageio.get_reader(tmp_path / "one.mp4")) == 1


def test_what_no_video_can_be_made_of_is_refused_before_there_is_a_folder(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"an mp4 file, got .*film\.avi"):
        Film(tmp_path / "new" / "film.avi", None)
    with pytest.raises(TypeError, match=r"its render\(\) returned list"):
        videos.render(SimpleNamespace(vector_env=SimpleNamespace(envs=[SimpleNamespace(render=lambda: [])])))
    monkeypatch.setattr(videos.importlib.util, "find_spec", lambda package: package if package == "imageio" else None)
    with pytest.raises(UserError, match=r'pip install "qsm_rl\[video\]"'):
        Film(tmp_path / "new" / "film.mp4", None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "displays", "works", "tried", "chosen"),
    [
        ("egl", {}, "osmesa", [], "egl"),
        ("", {}, "osmesa", ["egl", "osmesa"], "osmesa"),
        ("", {"DISPLAY": ":0"}, "glfw", ["glfw"], "glfw"),
        ("", {"WAYLAND_DISPLAY": "wayland-0"}, "egl", ["glfw", "egl"], "egl"),
        ("", {}, "none", ["egl", "osmesa"], ""),
    ],
)
def test_the_first_renderer_that_works_is_chosen(monkeypatch, told, displays, works, tried, chosen):
    names = []

    def run(command, env, **options):
        names.append(env["MUJOCO_GL"])
        return SimpleNamespace(returncode=int(names[-1] != works))

    monkeypatch.setattr(videos.subprocess, "run", run)
    monkeypatch.setattr(videos.sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", told)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, displays.get(name, ""))
    videos.choose_renderer()
    assert (names, videos.os.environ["MUJOCO_GL"]) == (tried, chosen)


def test_mujoco_is_drawn_without_a_display(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    videos.choose_renderer()
    if not videos.os.environ["MUJOCO_GL"]:
        pytest.skip("no OpenGL here")
    environment = make_environment("InvertedPendulum-v5", filmed=True, action_repeat=2, normalize_observation=True)
    environment.set_seed(0)
    environment.reset()
    picture = videos.render(environment)
    assert picture.shape == (480, 480, 3) and picture.std() > 5
    assert environment.vector_env.envs[0].metadata["render_fps"] == 12.5  # of 25 steps a second
    environment.close()
