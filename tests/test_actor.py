from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.objectives import DiffusionBCLoss

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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_observations_in_integers_leave_actions_as_they_are(dtype):
    class Own(nn.Module):
        def forward(self, noisy_action, observation, t):
            assert noisy_action.dtype == torch.float32
            return 0.1 * noisy_action

    actor = DiffusionActor(Own(), action_spec=Bounded(-1.0, 1.0, (2,)), noise_schedule=NoiseSchedule.vp(5))
    observation = torch.ones(5, 4, dtype=dtype)
    action = actor(observation=observation)
    assert action.dtype == torch.float32 and len(action.unique()) > 2
    noisy = torch.tensor([[0.7, -1.6]]).expand(5, 2)
    torch.testing.assert_close(actor.predict_noise(noisy, observation, torch.zeros(5, dtype=torch.long)), 0.1 * noisy)


def test_an_observation_of_more_dimensions_than_the_batch_has_is_named():
    actor = make_actor()
    images = TensorDict({"observation": torch.zeros(2, 3, 8, 4)}, [2])
    with pytest.raises(ValueError, match=r"'observation' has shape \(2, 3, 8, 4\), expected \(2, 'size'\).*encoder"):
        actor.observation(images)


@pytest.mark.parametrize("bound", [0.4, 0.1, 1.0])
def test_no_action_lies_outside_bounds_that_float32_cannot_hold(bound):
    """0.4 in float32 is 0.4000000059, outside the spec of an environment in float64."""
    spec = Bounded(-bound, bound, (3,), dtype=torch.float64)
    box = ActionBox.from_spec(spec)
    ends = box.clamp(box.from_box(torch.tensor([[-1.0, 0.0, 1.0]])))
    assert spec.is_in(ends.double())
    assert ends[0, 2].item() == pytest.approx(bound, rel=2e-7)


def test_chain_is_the_samplers_steps_on_the_given_noise():
    torch.manual_seed(0)
    actor = make_actor()
    observation, start, noise = torch.randn(6, 4), torch.randn(6, 3), torch.randn(5, 6, 3)
    expected = start
    for z, step in zip(noise, actor.sampler.steps(actor.noise_schedule), strict=True):
        predicted = actor.score_network(expected, observation, torch.full((6,), step.t))
        expected = actor.sampler.step(expected, predicted, step, z)
    torch.testing.assert_close(actor.sample(observation, start, noise), expected)


@pytest.mark.parametrize("steps", [0, 4, 6])
def test_noise_for_another_number_of_steps_is_refused(steps):
    actor = make_actor()
    with pytest.raises(ValueError, match=f"step_noise has noise for {steps} steps, expected 5"):
        actor.sample(torch.zeros(4, 4), torch.zeros(4, 3), torch.zeros(steps, 4, 3))


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


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_several_and_nested_keys_are_joined_in_order(shape):
    actor = make_actor(in_keys=["first", ("agent", "second")], out_keys=[("agent", "action")])
    first, second = torch.randn(*shape, 3), torch.randn(*shape, 1)
    td = TensorDict({"second": first, "first": first, "agent": {"second": second}}, shape)
    torch.testing.assert_close(actor.observation(td), torch.cat([first, second], -1))
    assert actor(td)["agent", "action"].shape == (*shape, 3)
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


def test_a_sampler_cannot_be_exchanged_beside_its_steps():
    actor = make_actor()
    with pytest.raises(AttributeError, match="sampler"):
        actor.module.sampler = DDIMSampler()
    with pytest.raises(AttributeError, match="sampler"):
        actor.sampler = DDIMSampler()
    assert isinstance(actor.sampler, DDPMSampler)


def test_half_precision_network_keeps_the_chain_in_float32():
    actor = make_actor().to(torch.bfloat16)
    observation = torch.randn(8, 4)
    action = actor(observation=observation.bfloat16())
    assert action.dtype == torch.float32 and actor.spec.is_in(TensorDict({"action": action}, [8]))
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
        (Bounded(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max, (2,)), "low < high"),
        (Composite(a=SPEC, b=SPEC), "one leaf"),
        (Bounded(torch.tensor([[-1.0], [-2.0]]), torch.ones(2, 1)), "differ between the environments"),
        (Bounded(-torch.ones(2, 1), torch.tensor([[1.0], [2.0]])), "differ between the environments"),
        (Bounded(2e38, 3e38, (1,)), "must be bounded"),  # whose middle is beyond float32
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
    assert make_actor(in_keys="state", out_keys="motor").in_keys == ["state"]
    with pytest.raises(TypeError, match=r"in_keys must be a list of entries, got \{'observation'"):
        make_actor(in_keys={"observation": "obs"})


def test_parts_of_the_wrong_kind_are_refused_at_once():
    options = {"action_spec": SPEC, "noise_schedule": NoiseSchedule.vp(5)}
    with pytest.raises(ValueError, match="expects actions of size 2, but the action_spec has size 3"):
        DiffusionActor(ScoreMLP(4, 2), **options)
    with pytest.raises(TypeError, match=r"sampler must be an object such as DDPMSampler\(\), got <class"):
        DiffusionActor(ScoreMLP(4, 3), sampler=DDPMSampler, **options)
    with pytest.raises(TypeError, match=r"noise_schedule must be an object such as NoiseSchedule.cosine\(10\), got 5"):
        DiffusionActor(ScoreMLP(4, 3), action_spec=SPEC, noise_schedule=5)


def test_a_chain_of_another_shape_is_refused():
    class Narrow(ScoreMLP):
        def reverse_chain(self, observation, timesteps):
            return lambda index, noisy: noisy[..., :1]

    with pytest.raises(ValueError, match=r"returned shape \(8, 1\) for noised actions of shape \(8, 3\)"):
        make_actor(network=Narrow(4, 3, (8,))).sample(torch.zeros(8, 4))


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


# --- the chain and its likelihood ---


@pytest.mark.parametrize("min_std", [0.0, 0.3])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_the_returned_chain_is_how_the_action_came_about(sampler, min_std):
    torch.manual_seed(0)
    actor = make_actor(sampler=sampler)
    steps = sampler.steps(actor.noise_schedule)
    observation, start, noise = torch.randn(6, 4), torch.randn(6, 3), torch.randn(len(steps), 6, 3)
    action, chain = actor.sample(observation, start, noise, min_std=min_std, return_chain=True)
    assert torch.equal(action, actor.sample(observation, start, noise, min_std=min_std))
    assert torch.equal(chain.states[0], start) and torch.equal(chain.states[-1], action)
    assert chain.stds == pytest.approx([max(step.noise_std, min_std) for step in steps])
    for i, (step, std) in enumerate(zip(steps, chain.stds, strict=True)):
        predicted = actor.predict_noise(chain.states[i], observation, torch.full((6,), step.t))
        torch.testing.assert_close(chain.samples[i], sampler.mean(chain.states[i], predicted, step) + std * noise[i])
        clipped = sampler.clip == "sample" or i == len(steps) - 1
        torch.testing.assert_close(chain.states[i + 1], chain.samples[i].clamp(-1, 1) if clipped else chain.samples[i])
    if min_std == 0:
        torch.testing.assert_close(action, actor.sample(observation, start, noise))


def test_likelihood_of_a_chain_of_two_steps_by_hand():
    """Alphas 0.64 and 0.01; the network predicts gain * x; both steps have the standard deviation sqrt(beta) or 0.5.

    t = 1: mean (x - 0.99 / sqrt(0.9936) * gain * x) / 0.1; t = 0: (x - 0.36 / 0.6 * gain * x) / 0.8, floored to 0.5.
    """

    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.25))

        def forward(self, noisy_action, observation, t):
            return self.gain * noisy_action

    network = Gain()
    actor = make_actor(Bounded(-1.0, 1.0, (1,)), network=network, noise_schedule=NoiseSchedule([0.36, 0.99]))
    start, noise = torch.tensor([[0.2]]), torch.tensor([[[-1.5]], [[0.4]]])
    with torch.no_grad():
        action, chain = actor.sample(torch.zeros(1, 1), start, noise, min_std=0.5, return_chain=True)
    share = 0.99 / 0.9936**0.5
    first = (0.2 - share * 0.25 * 0.2) / 0.1 - 1.5 * 0.99**0.5
    second = (first - 0.6 * 0.25 * first) / 0.8 + 0.5 * 0.4
    assert -1 < first < 1 and -1 < second < 1
    torch.testing.assert_close(chain.samples.flatten(), torch.tensor([first, second]))
    assert action.item() == pytest.approx(second, rel=1e-5)

    log_prob = actor.chain_log_prob(torch.zeros(1, 1), chain)
    constant = 0.5 * math.log(2 * math.pi)
    expected = [-(1.5**2) / 2 - math.log(0.99) / 2 - constant, -(0.4**2) / 2 - math.log(0.5) - constant]
    torch.testing.assert_close(log_prob, torch.tensor(expected).unsqueeze(-1))
    log_prob.sum().backward()
    # d/dgain: (draw - mean) / std^2 times d mean/dgain, the states held as they were drawn.
    slopes = [-share * 0.2 / 0.1, -0.6 * first / 0.8]
    gradient = -1.5 / 0.99**0.5 * slopes[0] + 0.4 / 0.5 * slopes[1]
    assert network.gain.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_likelihoods_are_of_the_draws_before_clipping():
    """With a mean far outside the box every state is clipped to its face, and the draws still tell their likelihood."""
    torch.manual_seed(0)
    actor = make_actor(network=Constant(-1e3))
    action, chain = actor.sample(torch.randn(2000, 4), min_std=0.1, return_chain=True)
    assert (action == 1).all() and (chain.samples > 1).all()
    log_prob = actor.chain_log_prob(torch.randn(2000, 4), chain)
    # E log N = -A (1/2 + log std + log(2 pi) / 2)
    entropy = torch.tensor([3 * (0.5 + math.log(std) + 0.5 * math.log(2 * math.pi)) for std in chain.stds])
    torch.testing.assert_close(log_prob.mean(1), -entropy, atol=0.1, rtol=0)


def test_a_chain_without_noise_has_no_likelihood():
    actor = make_actor()
    _, chain = actor.sample(torch.randn(2, 4), return_chain=True)
    with pytest.raises(ValueError, match=r"step at t = 0 adds no noise .* min_std"):
        actor.chain_log_prob(torch.randn(2, 4), chain)
    with pytest.raises(ValueError, match=r"min_std must be at least 0, got -0.1"):
        actor.sample(torch.randn(2, 4), min_std=-0.1)


class Shifted(ScoreMLP):
    """Overrides forward alone, so that the inherited reverse chain is not its own."""

    def forward(self, noisy_action, observation, t):
        return torch.zeros_like(super().forward(noisy_action, observation, t))


class Embedded(nn.Module):
    """Looks its timesteps up in a table, which takes integers only."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, noisy_action, observation, t):
        return self.table(t)


def test_a_subclass_that_overrides_forward_is_sampled_by_it():
    torch.manual_seed(0)
    start, noise, observation = torch.randn(8, 3), torch.randn(5, 8, 3), torch.randn(8, 4)
    zero = make_actor(network=Constant(0.0)).sample(observation, start, noise)
    torch.testing.assert_close(make_actor(network=Shifted(4, 3, (16, 16))).sample(observation, start, noise), zero)


def test_a_network_gets_integer_timesteps():
    actor, data = make_actor(network=Embedded()), TensorDict({"observation": torch.randn(4)}, [])
    assert SPEC.is_in(actor(data)["action"])
    assert DiffusionBCLoss(actor)(data)["loss_diffusion_bc"].isfinite()  # TorchRL's, which joins all inputs


def test_loading_an_actor_leaves_the_spec_it_was_made_of_alone():
    spec = Bounded(LOW.clone(), HIGH.clone(), shape=(3,))
    actor = make_actor(spec)
    with torch.no_grad():
        for buffer in actor.buffers():
            buffer.zero_()
    assert torch.equal(spec.space.low, LOW) and torch.equal(spec.space.high, HIGH)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_the_network_of_joined_inputs_predicts_the_same_noise(shape):
    actor = make_actor()
    noisy, observation, t = (
        torch.randn(*shape, 3),
        torch.randn(*shape, 4),
        torch.randint(actor.noise_schedule.num_steps, shape),
    )
    joined = actor.module.score_network(torch.cat([noisy, observation, t.unsqueeze(-1)], -1))
    torch.testing.assert_close(joined, actor.predict_noise(noisy, observation, t))
