from __future__ import annotations

import sys
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.spaces import Box, Dict, Discrete
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from qsm_rl.training.environments.make_environment import check_registered, make_environment, sub_environment_seeds
from qsm_rl.training.environments.observation_statistics import RunningObservationNorm, copy_observation_statistics

SHORT_HALF_CHEETAH = "qsm_rl_test/HalfCheetah-v0"  # truncated after 7 steps
SHORT_HOPPER = "qsm_rl_test/Hopper-v0"  # falls after 10 to 60 random steps, truncated after 20
TERMINATING = "InvertedPendulum-v5"
DM_CONTROL = "dm_control/cartpole-swingup"


class SpacesEnv(gymnasium.Env):
    """Nothing but the spaces it is given; it records the actions that reach it."""

    def __init__(self, action_space=None, observation_space=None):
        self.action_space = action_space or Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = observation_space or Box(-1.0, 1.0, (3,), np.float32)
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.actions.append(action)
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.fixture(autouse=True, scope="module")
def _registered_environments():
    before = set(gymnasium.registry)  # other test modules have environments of their own there
    gymnasium.register(SHORT_HALF_CHEETAH, entry_point=HalfCheetahEnv, max_episode_steps=7)
    gymnasium.register(SHORT_HOPPER, entry_point=HopperEnv, max_episode_steps=20)
    gymnasium.register("qsm_rl_test/Spaces-v0", entry_point=SpacesEnv, disable_env_checker=True)
    yield
    for name in set(gymnasium.registry) - before:
        del gymnasium.registry[name]


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a log there when plain Gymnasium loads HalfCheetah


def register_spaces(action_space=None, observation_space=None) -> str:
    name = f"qsm_rl_test/Spaces{len(gymnasium.registry)}-v0"
    kwargs = {"action_space": action_space, "observation_space": observation_space}
    gymnasium.register(name, entry_point=SpacesEnv, kwargs=kwargs, disable_env_checker=True)
    return name


def step_through(environment: EnvBase, actions: torch.Tensor) -> TensorDict:
    """Resets, plays the actions ``(T, num_envs, A)`` with resets where done; returns the steps ``(T, num_envs)``."""
    tensordict, steps = environment.reset(), []
    for action in actions:
        step, tensordict = environment.step_and_maybe_reset(tensordict.set("action", action))
        steps.append(step.clone())
    return torch.stack(steps)


def random_actions(environment: EnvBase, num_steps: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.stack([environment.action_spec.rand() for _ in range(num_steps)])


class PlainGymnasium:
    """A task as Gymnasium gives it, one environment."""

    def __init__(self, name: str, seed: int):
        self.env = gymnasium.make(name)
        self.env.reset(seed=seed)

    def reset(self):
        return self.env.reset()[0]

    def step(self, action):
        return self.env.step(action)[:4]


class PlainDmControl:
    """A task as dm_control gives it; its entries joined by hand."""

    def __init__(self, domain: str, task: str, keys: tuple[str, ...], seed: int):
        from dm_control import suite

        self.env = suite.load(domain, task, task_kwargs={"random": seed})
        self.keys = keys
        self.env.reset()

    def flat(self, timestep):
        return np.concatenate([np.atleast_1d(timestep.observation[key]).ravel() for key in self.keys])

    def reset(self):
        return self.flat(self.env.reset())

    def step(self, action):
        timestep = self.env.step(action)
        terminated = timestep.last() and timestep.discount == 0
        return self.flat(timestep), timestep.reward, terminated, timestep.last() and not terminated


def assert_equals_plain(steps: TensorDict, plain, action_repeat: int = 1) -> dict[str, int]:
    """Compares the steps ``(T,)`` of one environment with a plain rollout; returns how its episodes ended."""
    ends = {"terminated": 0, "truncated": 0}
    observation, episode_reward, step_count = plain.reset(), 0.0, 0
    for step in steps:
        np.testing.assert_array_equal(step["observation"].numpy(), observation.astype(np.float32))
        reward = 0.0
        for _ in range(action_repeat):
            observation, simulator_reward, terminated, truncated = plain.step(step["action"].numpy())
            reward += simulator_reward
            if terminated or truncated:
                break
        episode_reward, step_count = episode_reward + reward, step_count + 1
        np.testing.assert_array_equal(step["next", "observation"].numpy(), observation.astype(np.float32))
        assert step["next", "reward"].item() == np.float32(reward)
        assert step["next", "terminated"].item() == terminated
        assert step["next", "truncated"].item() == truncated
        assert step["next", "done"].item() == (terminated or truncated)
        assert step["next", "episode_reward"].item() == pytest.approx(episode_reward, rel=1e-4, abs=1e-4)
        assert step["next", "step_count"].item() == step_count
        if terminated or truncated:
            ends["terminated"] += terminated
            ends["truncated"] += truncated and not terminated
            observation, episode_reward, step_count = plain.reset(), 0.0, 0
    return ends


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(
    ("name", "expected_ends"),
    [(SHORT_HALF_CHEETAH, {"truncated"}), (SHORT_HOPPER, {"terminated", "truncated"}), (TERMINATING, {"terminated"})],
)
def test_steps_equal_plain_gymnasium(name, expected_ends, num_envs):
    # The pendulum's plain episodes end at different times in different environments, so resets are partial.
    environment = make_environment(name, num_envs=num_envs, seed=3)
    steps = step_through(environment, random_actions(environment, 80))
    seen = set()
    for i, seed in enumerate(sub_environment_seeds(3, num_envs)):
        ends = assert_equals_plain(steps[:, i], PlainGymnasium(name, seed))
        seen |= {end for end, count in ends.items() if count}
    assert seen == expected_ends


@pytest.mark.parametrize(
    ("domain", "task", "keys"),
    [
        ("cartpole", "swingup", ("position", "velocity")),
        ("walker", "walk", ("orientations", "height", "velocity")),
        ("ball_in_cup", "catch", ("position", "velocity")),
    ],
)
def test_steps_equal_plain_dm_control(domain, task, keys):
    pytest.importorskip("dm_control")
    environment = make_environment(f"dm_control/{domain}-{task}", num_envs=2, seed=3)
    steps = step_through(environment, random_actions(environment, 30))
    for i, seed in enumerate(sub_environment_seeds(3, 2)):
        assert_equals_plain(steps[:, i], PlainDmControl(domain, task, keys, seed))


def test_dm_control_time_limit_is_a_truncation():
    pytest.importorskip("dm_control")
    environment = make_environment(DM_CONTROL, seed=0)
    steps = step_through(environment, random_actions(environment, 1002))
    (seed,) = sub_environment_seeds(0, 1)
    ends = assert_equals_plain(steps[:, 0], PlainDmControl("cartpole", "swingup", ("position", "velocity"), seed))
    assert ends == {"terminated": 0, "truncated": 1}
    assert steps["next", "truncated"].flatten().nonzero().item() == 999


def test_dm_control_discount_zero_is_a_termination(monkeypatch):
    pytest.importorskip("dm_control")
    from dm_control.suite import cartpole

    monkeypatch.setattr(cartpole.Balance, "get_termination", lambda self, physics: 0.0)
    environment = make_environment(DM_CONTROL, seed=0)
    step = step_through(environment, random_actions(environment, 1))[0]
    assert step["next", "terminated"].item() and step["next", "done"].item()
    assert not step["next", "truncated"].item()


@pytest.mark.parametrize("name", [SHORT_HALF_CHEETAH, SHORT_HOPPER, TERMINATING])
def test_action_repeat_sums_rewards_and_stops_at_the_end(name):
    # 7 and 20 are no multiples of 3: the last frame of a truncated episode is shorter than the others.
    environment = make_environment(name, num_envs=2, seed=1, action_repeat=3)
    steps = step_through(environment, random_actions(environment, 40))
    for i, seed in enumerate(sub_environment_seeds(1, 2)):
        assert sum(assert_equals_plain(steps[:, i], PlainGymnasium(name, seed), action_repeat=3).values()) > 1


def test_one_frame_is_one_decision():
    environment = make_environment(SHORT_HALF_CHEETAH, action_repeat=3, seed=0)
    steps = step_through(environment, random_actions(environment, 3))
    assert steps["next", "step_count"].flatten().tolist() == [1, 2, 3]
    assert steps["next", "truncated"].flatten().tolist() == [False, False, True]  # after 3 + 3 + 1 simulator steps


NAMES = ["HalfCheetah-v5", "Hopper-v5", TERMINATING, DM_CONTROL, "dm_control/quadruped-walk"]


@pytest.mark.parametrize("name", NAMES)
def test_reseeding_equals_a_fresh_environment(name):
    if name.startswith("dm_control/"):
        pytest.importorskip("dm_control")
    environment = make_environment(name, num_envs=2, seed=5)
    actions = random_actions(environment, 25)
    first = step_through(environment, actions)
    again = step_through(environment, actions)
    assert not (again["observation"][0] == first["observation"][0]).all()  # resets are random, ...
    environment.set_seed(5)
    reseeded = step_through(environment, actions)
    fresh = step_through(make_environment(name, num_envs=2, seed=5), actions)
    other = step_through(make_environment(name, num_envs=2, seed=6), actions)
    assert (reseeded == first).all() and (fresh == first).all()  # ... and repeat with the seed, to the bit
    assert not (other["observation"][0] == first["observation"][0]).all(-1).any()
    assert not (first["observation"][0, 0] == first["observation"][0, 1]).all()  # each environment has its own seed


def test_sub_environment_seeds_are_distinct_across_batches():
    seeds = [seed for batch_seed in range(100) for seed in sub_environment_seeds(batch_seed, 16)]
    assert len(set(seeds)) == 1600
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert sub_environment_seeds(7, 4) == sub_environment_seeds(7, 16)[:4]


def test_without_a_seed_environments_differ():
    first, second = make_environment(TERMINATING).reset(), make_environment(TERMINATING).reset()
    assert not (first["observation"] == second["observation"]).all()


@pytest.mark.parametrize("normalize_observation", [False, True])
@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_specs_hold(name, num_envs, normalize_observation):
    if name.startswith("dm_control/"):
        pytest.importorskip("dm_control")
    environment = make_environment(name, num_envs=num_envs, seed=0, normalize_observation=normalize_observation)
    check_env_specs(environment)
    assert environment.batch_size == (num_envs,)
    assert environment.observation_spec["observation"].dtype == torch.float32
    assert environment.action_spec_unbatched.shape == environment.action_spec.shape[1:]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        (TERMINATING, [-3.0], [3.0]),
        ("Humanoid-v5", [-0.4] * 17, [0.4] * 17),
        ("dm_control/quadruped-walk", [-1.0, -1.0, -0.8] * 4, [1.0, 1.1, 0.8] * 4),
    ],
)
def test_actions_keep_the_bounds_of_the_environment(name, low, high):
    if name.startswith("dm_control/"):
        pytest.importorskip("dm_control")
    spec = make_environment(name).action_spec_unbatched
    assert spec.dtype == torch.float32
    torch.testing.assert_close(spec.space.low, torch.tensor(low), atol=0, rtol=0)
    torch.testing.assert_close(spec.space.high, torch.tensor(high), atol=0, rtol=0)


def test_float64_actions_reach_the_environment_inside_its_bounds():
    name = register_spaces(Box(np.array([-0.7, -2.0]), np.array([0.1, 1.1]), dtype=np.float64))
    environment = make_environment(name, seed=0)
    high = environment.action_spec_unbatched.space.high
    assert high.dtype == torch.float32
    assert (high.double() > torch.tensor([0.1, 1.1], dtype=torch.float64)).all()  # rounding leads past the bounds
    environment.step(environment.reset().set("action", high.expand(1, 2)))
    (inner,) = environment.vector_env.envs
    np.testing.assert_array_equal(inner.unwrapped.actions[0], [0.1, 1.1])


def test_an_environment_that_changes_the_actions_it_is_given_changes_nothing_else():
    space = Box(-1.0, 1.0, (2,), np.float32)

    class Scaling(SpacesEnv):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(3, np.float32), {}

        def step(self, action):
            action *= 2  # in place, to torques say
            return super().step(action)

    gymnasium.register(
        "qsm_rl_test/Scaling-v0", entry_point=lambda: Scaling(space), max_episode_steps=5, disable_env_checker=True
    )
    check_registered("qsm_rl_test/Scaling-v0")
    assert space == Box(-1.0, 1.0, (2,), np.float32)
    environment = make_environment("qsm_rl_test/Scaling-v0", action_repeat=2)
    step = environment.step(environment.reset().set("action", torch.full((1, 2), 0.25)))
    assert step["action"].tolist() == [[0.25, 0.25]]
    (inner,) = environment.vector_env.envs
    assert [action.tolist() for action in inner.unwrapped.actions] == [[0.5, 0.5]] * 2  # a repeat is not scaled again


def test_collector_takes_it_and_counts_frames():
    environment = make_environment(SHORT_HOPPER, num_envs=2, seed=0)
    collector = Collector(environment, frames_per_batch=40, total_frames=80)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    steps = torch.cat(batches, -1)
    assert steps.batch_size == (2, 40)
    goes_on = ~steps["next", "done"][:, :-1, 0]
    assert goes_on.any() and not goes_on.all()
    same = (steps["next", "observation"][:, :-1] == steps["observation"][:, 1:]).all(-1)
    assert (same == goes_on).all()  # consecutive within episodes, a fresh start after each


def test_collector_reseeded_and_reset_equals_a_fresh_one():
    def batch_after_seeding(collector):
        collector.env.set_seed(7)
        collector.reset()
        torch.manual_seed(0)
        return next(iter(collector)).clone()

    def new_collector(seed):
        environment = make_environment(SHORT_HOPPER, num_envs=2, seed=seed)
        return Collector(environment, frames_per_batch=60, total_frames=-1)

    used, fresh = new_collector(seed=0), new_collector(seed=1)
    next(iter(used))
    batch, expected = batch_after_seeding(used), batch_after_seeding(fresh)
    used.shutdown()
    fresh.shutdown()
    assert batch["next", "done"].any()
    for key in ("observation", "action", "step_count", ("next", "observation"), ("next", "episode_reward")):
        torch.testing.assert_close(batch[key], expected[key], atol=0, rtol=0)


def test_running_norm_statistics_count_every_observation_once():
    plain = make_environment(SHORT_HOPPER, num_envs=3, seed=2)
    normalized = make_environment(SHORT_HOPPER, num_envs=3, seed=2, normalize_observation=True)
    actions = random_actions(plain, 60)
    raw, steps = step_through(plain, actions), step_through(normalized, actions)
    ended = raw["next", "done"][:-1, :, 0]
    assert (ended.any(-1) & ~ended.all(-1)).any()  # some resets are partial
    starts = raw["observation"][1:][ended]
    # The last step's reset is not in the next step's observation: leave it out of this rollout.
    assert not raw["next", "done"][-1].any()
    seen = torch.cat([raw["observation"][0], starts, raw["next", "observation"].flatten(0, 1)]).double()
    norm = normalized.transform
    assert norm.count.item() == len(seen)
    torch.testing.assert_close(norm.mean, seen.mean(0))
    torch.testing.assert_close(norm.variance, seen.var(0, correction=0))
    expected = (raw["next", "observation"][-1] - seen.mean(0)) / (seen.var(0, correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(steps["next", "observation"][-1], expected.clamp(-10, 10).float())
    torch.testing.assert_close(steps["next", "reward"], raw["next", "reward"])


def test_running_norm_of_constant_and_far_features():
    norm = RunningObservationNorm(3)
    torch.manual_seed(0)
    for _ in range(500):
        noise = torch.randn(4, 1)
        observation = torch.cat([torch.full((4, 1), 2.0345), 1.25 + 0.1 * noise, 1e4 + 0.01 * noise], -1)
        norm.update(observation)
        assert norm.normalize(observation).isfinite().all()
    torch.testing.assert_close(norm.normalize(torch.tensor([2.0345, 1.25, 1e4])), torch.zeros(3), atol=0.2, rtol=0)
    torch.testing.assert_close(norm.variance[1].sqrt().item(), 0.1, atol=0.005, rtol=0)
    assert norm.normalize(torch.tensor([3.0, 9.0, 2e4])).tolist() == [10.0, 10.0, 10.0]


def test_running_norm_counts_on_beyond_what_float32_counts_and_nothing_seen_changes_nothing():
    norm = RunningObservationNorm(2)
    norm.count.fill_(2**24)
    norm.update(torch.empty(0, 2))
    assert norm.count == 2**24 and norm.mean.tolist() == [0, 0] and norm.variance.tolist() == [1, 1]
    norm.update(torch.ones(3, 2))
    assert norm.count == 2**24 + 3


def test_statistics_copy_to_the_evaluation_environment_and_stay():
    training = make_environment(TERMINATING, num_envs=2, seed=0, normalize_observation=True)
    evaluation = make_environment(TERMINATING, seed=1, normalize_observation=True)
    step_through(training, random_actions(training, 30))
    before = {key: value.clone() for key, value in training.state_dict().items()}
    copy_observation_statistics(training, evaluation)
    assert {k: v.tolist() for k, v in evaluation.state_dict().items()} == {k: v.tolist() for k, v in before.items()}

    step_through(evaluation, random_actions(evaluation, 30))
    for key, value in before.items():
        torch.testing.assert_close(evaluation.state_dict()[key], value, atol=0, rtol=0)
        torch.testing.assert_close(training.state_dict()[key], value, atol=0, rtol=0)
    step_through(training, random_actions(training, 30))
    assert training.transform.count > evaluation.transform.count
    copy_observation_statistics(training, evaluation)
    torch.testing.assert_close(evaluation.transform.mean, training.transform.mean, atol=0, rtol=0)


def test_statistics_reach_an_environment_that_is_wrapped_once_more():
    # TorchRL takes nested environments apart and copies their transforms.
    training = make_environment(TERMINATING, seed=0, normalize_observation=True)
    evaluation = make_environment(TERMINATING, seed=1, normalize_observation=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TorchRL's remark on it
        wrapped_training = TransformedEnv(training, StepCounter(step_count_key="steps"))
        wrapped_evaluation = TransformedEnv(evaluation, StepCounter(step_count_key="steps"))
    step_through(wrapped_training, random_actions(training, 10))
    copy_observation_statistics(training, evaluation)
    step_through(wrapped_evaluation, random_actions(training, 20))
    for norm in (wrapped_evaluation.transform[0], evaluation.transform):
        torch.testing.assert_close(norm.mean, wrapped_training.transform[0].mean, atol=0, rtol=0)
        assert norm.count == wrapped_training.transform[0].count >= 11


def test_statistics_restored_from_a_state_dict_continue_to_the_bit():
    environment = make_environment(TERMINATING, num_envs=2, seed=0, normalize_observation=True)
    actions = random_actions(environment, 20)
    step_through(environment, actions)
    state = {key: value.clone() for key, value in environment.state_dict().items()}
    environment.set_seed(9)
    expected = step_through(environment, actions)

    restored = make_environment(TERMINATING, num_envs=2, seed=9, normalize_observation=True)
    restored.load_state_dict(state)
    assert (step_through(restored, actions) == expected).all()


def test_copying_statistics_needs_them_on_both_sides():
    plain = make_environment(TERMINATING)
    normalized = make_environment(TERMINATING, normalize_observation=True)
    copy_observation_statistics(plain, make_environment(TERMINATING))
    with pytest.raises(ValueError, match="the source environment normalises its observations, but the target"):
        copy_observation_statistics(normalized, plain)
    with pytest.raises(ValueError, match="the target environment normalises its observations, but the source"):
        copy_observation_statistics(plain, normalized)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("HalfCheeta-v5", "Unknown environment 'HalfCheeta-v5'; did you mean HalfCheetah-v5"),
        ("Hopper-v6", "Unknown environment 'Hopper-v6'; did you mean Hopper-v5"),
        ("qqqqqq", "Unknown environment 'qqqqqq'; no known name is close"),
        ("", "Environment '' cannot be created: Malformed"),
        ("CartPole-v1", r"CartPole-v1 has the action space Discrete\(2\)"),
    ],
)
def test_unfit_names_are_refused(name, match):
    with pytest.raises(ValueError, match=match) as error:
        make_environment(name)
    assert len(str(error.value)) < 240 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("dm_control/walker-wlak", "did you mean dm_control/walker-walk"),
        ("walker-walk", "did you mean dm_control/walker-walk"),
        ("dm_control/walker", "Unknown environment 'dm_control/walker'"),
        ("dm_control/lqr-lqr_2_1", "unbounded"),
    ],
)
def test_unfit_dm_control_names_are_refused(name, match):
    pytest.importorskip("dm_control")
    with pytest.raises(ValueError, match=match):
        make_environment(name)


@pytest.mark.parametrize(
    ("spaces", "match"),
    [
        ({"action_space": Box(-np.inf, 1.0, (2,), np.float32)}, "unbounded or empty action space"),
        ({"action_space": Box(np.float32([0, -1]), np.float32([0, 1]))}, "unbounded or empty action space"),
        ({"action_space": Box(1e8, 1e8 + 1, (2,), np.float64)}, "unbounded or empty action space .* also in float32"),
        ({"action_space": Box(np.float32(-3e38), np.float32(3e38), (2,))}, "unbounded or empty action space"),
        ({"action_space": Box(-1.0, 1.0, (0,), np.float32)}, "unbounded or empty action space"),
        ({"action_space": Box(-1.0, 1.0, (2, 2), np.float32)}, "expected a 1-D Box of real numbers"),
        ({"action_space": Box(0, 3, (2,), np.int64)}, "expected a 1-D Box of real numbers"),
        ({"observation_space": Discrete(4)}, r"observation space Discrete\(4\)"),
        ({"observation_space": Dict(a=Box(-1.0, 1.0, (2,)))}, "FlattenObservation"),
        ({"observation_space": Box(0, 255, (8, 8, 3), np.uint8)}, "FlattenObservation"),
        ({"observation_space": Box(-1.0, 1.0, (0,))}, "with at least one number"),
    ],
)
def test_unfit_spaces_are_refused(spaces, match):
    name = register_spaces(**spaces)
    with pytest.raises(ValueError, match=match) as error:
        make_environment(name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_envs": 0}, "num_envs must be an integer of at least 1, got 0"),
        ({"num_envs": 2.0}, "num_envs must be an integer of at least 1, got 2.0"),
        ({"action_repeat": 0}, "action_repeat must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        make_environment(TERMINATING, **arguments)


def test_missing_dm_control_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ImportError, match=r'dm_control/walker-walk needs dm_control.*pip install "qsm_rl\[dmc\]"'):
        make_environment("dm_control/walker-walk")


def test_environments_that_left_gymnasium_name_their_successor():
    with (
        warnings.catch_warnings(),
        pytest.raises(ImportError, match="'Hopper-v3' cannot be imported; did you mean Hopper-v5"),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # Gymnasium's own remark on the old version
        make_environment("Hopper-v3")


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "dm_control/walker-walk"])
def test_nothing_is_printed_or_left_in_the_working_directory(name, tmp_path, capfd, caplog):
    if name.startswith("dm_control/"):
        pytest.importorskip("dm_control")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_through(environment := make_environment(name, num_envs=2, seed=0), random_actions(environment, 3))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []  # dm_control, once imported, sends what MuJoCo says to the log


def test_a_module_that_is_not_found_is_named():
    with pytest.raises(ImportError, match=r"module nowhere_at_all not found; add its folder to PYTHONPATH"):
        make_environment("nowhere_at_all:Foo-v0")
