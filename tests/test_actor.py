from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import ExplorationType, set_exploration_type

from qsm_rl import ActionBox, DDIMSampler, DDPMSampler, DiffusionActor, GaussianExploration, NoiseSchedule, ScoreMLP

LOW, HIGH = torch.tensor([-3.0, -0.4, 0.0]), torch.tensor([3.0, 0.4, 10.0])
SPEC = Bounded(LOW, HIGH, shape=(3,))
SAMPLERS = [DDPMSampler(), DDPMSampler(clip=None), DDPMSampler(clip="clean", temperature=2.0), DDIMSampler(num_steps=3)]


def make_actor(spec=SPEC, **kwargs):
    network = kwargs.pop("network", None) or ScoreMLP(4, spec.shape[-1], (16, 16))
    kwargs.setdefault("noise_schedule", NoiseSchedule.vp(5))
    return DiffusionActor(network, action_spec=spec, **kwargs)


class Constant(nn.Module):
    """Predicts a fixed noise, however large."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, noisy_action, observation, t):
        return self.value.expand_as(noisy_action)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 1e30, float("inf")])
@pytest.mark.parametrize("mode", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_actions_lie_in_the_spec_whatever_the_network_says(sampler, value, mode):
    actor = make_actor(network=Constant(value), sampler=sampler)
    with set_exploration_type(mode):
        action = actor(TensorDict({"observation": torch.randn(64, 4)}, [64]))["action"]
    assert SPEC.is_in(action)
    assert actor.spec["action"].is_in(action)


@pytest.mark.parametrize("high", [0.1, 0.3, 0.4, 1.7, 3.0])
def test_rounding_never_leaves_the_bounds(high):
    spec = Bounded(-high / 3, high, shape=(1,))
    for value in (1e4, -1e4):
        action = make_actor(spec, network=Constant(value))(observation=torch.randn(8, 4))
        assert spec.is_in(action)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3)])
def test_all_batch_shapes(shape):
    actor = make_actor()
    td = actor(TensorDict({"observation": torch.randn(*shape, 4)}, shape))
    assert td["action"].shape == (*shape, 3)
    assert actor.sample(torch.randn(*shape, 4)).shape == (*shape, 3)


def test_chain_is_the_samplers_steps_on_the_given_noise():
    torch.manual_seed(0)
    actor = make_actor()
    observation, start, noise = torch.randn(6, 4), torch.randn(6, 3), torch.randn(5, 6, 3)
    expected = start
    for z, step in zip(noise, actor.sampler.steps(actor.noise_schedule), strict=True):
        predicted = actor.score_network(expected, observation, torch.full((6,), step.t))
        expected = actor.sampler.step(expected, predicted, step, z)
    torch.testing.assert_close(actor.sample(observation, start, noise), expected)


def test_exploration_types():
    actor = make_actor()
    td = TensorDict({"observation": torch.randn(6, 4)}, [6])

    def act():
        return actor(td.clone())["action"]

    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN):
        with set_exploration_type(mode):
            first = act()
            assert torch.equal(first, act())
    mean_path = actor.sample(td["observation"], torch.zeros(6, 3), [None] * 5)
    torch.testing.assert_close(first, actor.box.clamp(actor.box.from_box(mean_path)))
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(act(), act())
    assert not torch.equal(act(), act())
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert not torch.equal(actor.sample(td["observation"]), actor.sample(td["observation"]))


def test_several_and_nested_keys_are_joined_in_order():
    actor = make_actor(in_keys=["first", ("agent", "second")], out_keys=[("agent", "action")])
    first, second = torch.randn(5, 3), torch.randn(5, 1)
    td = TensorDict({"second": first, "first": first, "agent": {"second": second}}, [5])
    torch.testing.assert_close(actor.observation(td), torch.cat([first, second], -1))
    assert actor(td)["agent", "action"].shape == (5, 3)
    with pytest.raises(KeyError, match="second"):
        actor.observation(td.exclude(("agent", "second")))


def test_same_policy_under_other_bounds_gives_the_same_box_action():
    torch.manual_seed(0)
    wide, narrow = make_actor(Bounded(-3.0, 3.0, (2,))), make_actor(Bounded(-1.0, 1.0, (2,)))
    narrow.load_state_dict({**wide.state_dict(), **{k: v for k, v in narrow.state_dict().items() if "box" in k}})
    observation = torch.randn(9, 4)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        torch.testing.assert_close(wide(observation=observation), 3 * narrow(observation=observation))


def test_lazy_network_and_copies():
    actor = make_actor(network=ScoreMLP(None, 3, (16,)))
    actor(observation=torch.randn(2, 7))
    twin = copy.deepcopy(actor)
    observation = torch.randn(4, 7)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(twin(observation=observation), actor(observation=observation))


def test_every_weight_is_registered_once():
    actor = make_actor()
    names = [name for name, _ in actor.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in actor.parameters()})
    assert len(names) == len(list(ScoreMLP(4, 3, (16, 16)).parameters()))


def test_half_precision_network_keeps_the_chain_in_float32():
    actor = make_actor().to(torch.bfloat16)
    observation = torch.randn(8, 4)
    action = actor(observation=observation.bfloat16())
    assert action.dtype == torch.bfloat16
    assert actor.box.low.dtype == actor.noise_schedule.betas.dtype == torch.float32
    assert actor.sample(observation.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Unbounded((3,)), "bounded continuous"),
        (Categorical(4), "bounded continuous"),
        (Bounded(0, 5, (2,), dtype=torch.int64), "bounded continuous"),
        (Bounded(torch.tensor([-1.0, -float("inf")]), torch.ones(2)), "low < high"),
        (Bounded(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), "low < high"),
        (Composite(a=SPEC, b=SPEC), "one leaf"),
        (Bounded(torch.tensor([[-1.0], [-2.0]]), torch.ones(2, 1)), "differ between the environments"),
    ],
)
def test_bad_action_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        ActionBox.from_spec(spec)


def test_vectorised_and_composite_specs():
    batched = Bounded(LOW.expand(4, 3).clone(), HIGH.expand(4, 3).clone())
    for spec in (batched, Composite(action=batched, shape=(4,)), Composite(agent=Composite(action=SPEC))):
        box = ActionBox.from_spec(spec)
        assert torch.equal(box.low, LOW)
        assert torch.equal(box.high, HIGH)


def test_box_maps_bounds_to_one_and_back():
    box = ActionBox(LOW, HIGH)
    torch.testing.assert_close(box.to_box(HIGH), torch.ones(3))
    torch.testing.assert_close(box.to_box(LOW), -torch.ones(3))
    torch.testing.assert_close(box.from_box(torch.tensor([2.0, 0.5, 0.0])), torch.tensor([6.0, 0.2, 5.0]))
    action = torch.randn(50, 3)
    torch.testing.assert_close(box.to_box(box.from_box(action)), action, atol=1e-6, rtol=1e-6)


def test_actor_needs_one_out_key():
    with pytest.raises(ValueError, match="out_keys"):
        make_actor(out_keys=["a", "b"])


def test_exploration_noise_is_in_box_units_and_clipped():
    torch.manual_seed(0)
    explore = GaussianExploration(SPEC, std=0.1)
    middle = ((LOW + HIGH) / 2).expand(20_000, 3)
    noised = explore(TensorDict({"action": middle}, [20_000]))["action"]
    torch.testing.assert_close((noised - middle).std(0), 0.1 * (HIGH - LOW) / 2, rtol=0.03, atol=0)
    at_bound = explore(TensorDict({"action": HIGH.expand(20_000, 3)}, [20_000]))["action"]
    assert SPEC.is_in(at_bound)
    assert (at_bound == HIGH).float().mean().item() == pytest.approx(0.5, abs=0.02)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(explore(TensorDict({"action": middle}, [20_000]))["action"], middle)
    with pytest.raises(ValueError, match="std"):
        GaussianExploration(SPEC, std=-0.1)
