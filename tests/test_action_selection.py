from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from qsm_rl import (
    BestOfN,
    DiffusionActor,
    GaussianExploration,
    NoiseSchedule,
    QScoreMatchingLoss,
    QValueCrossQ,
    ScoreMLP,
)
from qsm_rl.training.environments.make_environment import make_environment
from tests.loss_contract import (
    ACTION_DIM,
    NESTED_KEYS,
    OBSERVATION_DIM,
    evaluate,
    make_actor,
    make_critics,
    make_transitions,
)


def critic(function, in_keys=("observation", "action")):
    return TensorDictModule(function, list(in_keys), ["state_action_value"])


def uniform_actor(action_dim=1):
    def sample(observation):
        return torch.rand(*observation.shape[:-1], action_dim)

    return TensorDictModule(sample, ["observation"], ["action"])


def observations(*batch_size):
    return TensorDict({"observation": torch.randn(*batch_size, OBSERVATION_DIM)}, batch_size)


def test_takes_the_sample_with_the_largest_value():
    actions = torch.tensor([[[0.1], [0.8]], [[0.5], [0.2]], [[-0.9], [0.4]]])  # three samples for two observations
    actor = TensorDictModule(lambda observation: actions, ["observation"], ["action"])
    td = TensorDict({"observation": torch.tensor([[1.0], [-1.0]])}, [2])
    best = BestOfN(actor, critic(lambda observation, action: observation * action), num_samples=3)
    torch.testing.assert_close(best(td)["action"], torch.tensor([[0.5], [0.2]]))  # the largest, the smallest
    assert set(td.keys()) == {"observation", "action"}


@pytest.mark.parametrize(
    ("aggregation", "chosen"),
    # Values (1, 7), (3, 4), (2, 5.5): means 4, 3.5, 3.75; minima 1, 3, 2; means less half the std 2.5, 3.25, 2.875
    [("mean", 0.0), ("min", 1.0), (0.5, 1.0)],
)
def test_critics_are_joined_as_asked(aggregation, chosen):
    actions = torch.tensor([[0.0], [1.0], [2.0]])
    actor = TensorDictModule(lambda observation: actions, ["observation"], ["action"])
    values = torch.tensor([[1.0, 3.0, 2.0], [7.0, 4.0, 5.5]])
    critics = [critic(lambda action, v=v: v[action.long()], ["action"]) for v in values]
    best = BestOfN(actor, critics, num_samples=3, aggregation=aggregation)
    assert best(TensorDict({"observation": torch.zeros(1)}, []))["action"].item() == chosen


def test_the_best_of_n_uniform_samples_has_the_law_of_their_maximum():
    """The maximum of N uniform draws is below x with probability x^N, and N / (N + 1) on average."""
    torch.manual_seed(0)
    best = BestOfN(uniform_actor(), critic(lambda action: 2 * action, ["action"]), num_samples=4)
    action = best(observations(20_000))["action"]
    assert action.mean().item() == pytest.approx(0.8, abs=0.005)
    assert (action < 0.5).float().mean().item() == pytest.approx(0.5**4, abs=0.007)


@pytest.mark.parametrize("batch_size", [(), (1,), (5,), (2, 3)])
def test_one_sample_is_the_actor_itself(batch_size):
    torch.manual_seed(0)
    actor, critics, td = make_actor(), make_critics(), observations(*batch_size)
    actions = []
    for policy in (actor, BestOfN(actor, critics, num_samples=1)):
        torch.manual_seed(1)
        actions.append(policy(td.clone())["action"].detach())
    assert actions[0].shape == (*batch_size, ACTION_DIM)
    torch.testing.assert_close(actions[1], actions[0], rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [(), (5,), (2, 3)])
def test_any_batch_gets_the_best_of_its_own_samples(batch_size):
    torch.manual_seed(0)
    actor, critics, td = make_actor(), make_critics(), observations(*batch_size)
    best = BestOfN(actor, critics, num_samples=6)
    torch.manual_seed(1)
    action = best(td)["action"]
    torch.manual_seed(1)
    samples = actor(td.select("observation").expand(6, *batch_size))
    value = sum(c(samples.clone())["state_action_value"] for c in critics).detach()
    chosen = sum(c(td.clone())["state_action_value"] for c in critics)
    assert action.shape == (*batch_size, ACTION_DIM) and not action.requires_grad
    torch.testing.assert_close(chosen.detach(), value.amax(0))
    assert (samples["action"] == action).all(-1).any(0).all()  # it is one of the samples, not a mixture


def test_keys_are_the_actors_and_the_critics():
    keys = NESTED_KEYS
    privileged = critic(lambda extra, action: extra.sum(-1, keepdim=True) * action[..., :1], ["extra", keys.action])
    best = BestOfN(make_actor(keys), [*make_critics(keys), privileged], num_samples=3)
    assert best.in_keys == [keys.observation, "extra"] and best.out_keys == [keys.action]
    td = TensorDict({"agent": {"observation": torch.randn(4, OBSERVATION_DIM)}, "extra": torch.ones(4, 2)}, [4])
    assert best(td)[keys.action].shape == (4, ACTION_DIM)


def test_an_encoder_before_the_actor_is_part_of_what_acts():
    encoder = TensorDictModule(lambda pixels: 2 * pixels, ["pixels"], ["observation"])
    actor = TensorDictSequential(encoder, make_actor())
    with pytest.raises(ValueError, match=r"the actor writes \['observation', 'action'\], .* set it to the entry"):
        BestOfN(actor, make_critics(), num_samples=4)
    for several_or_one in (actor, make_actor()):
        with pytest.raises(ValueError, match="action_key is 'motor'"):
            BestOfN(several_or_one, make_critics(), num_samples=4, action_key="motor")
    best = BestOfN(actor, make_critics(), num_samples=4, action_key="action")
    assert (best.in_keys, best.out_keys) == (["pixels"], ["action"])
    acted = best(TensorDict({"pixels": torch.randn(5, OBSERVATION_DIM)}, [5]))
    assert acted["action"].shape == (5, ACTION_DIM) and set(acted.keys()) == {"pixels", "action"}


@pytest.mark.parametrize("batch_size", [(), (5,), (2, 3)])
def test_calls_by_keyword(batch_size):
    torch.manual_seed(0)
    td = observations(*batch_size)
    best, explore = BestOfN(make_actor(), make_critics(), num_samples=4), GaussianExploration(make_actor().spec)
    torch.manual_seed(1)
    expected = explore(best(td))["action"]
    torch.manual_seed(1)
    chosen = best(observation=td["observation"])
    torch.testing.assert_close(explore(action=chosen), expected, rtol=0, atol=0)


def test_a_deterministic_actor_stays_what_it_is():
    actor, td = make_actor(), observations(5)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = actor(td.clone())["action"]
        action = BestOfN(actor, make_critics(), num_samples=4)(td)["action"]
    torch.testing.assert_close(action, expected.detach())


def test_follows_the_critics_as_they_train():
    torch.manual_seed(0)
    loss, data = QScoreMatchingLoss(make_actor(), make_critics()), make_transitions((8,))
    updater = SoftUpdate(loss, tau=0.5)
    live, copies = loss.trained_critics(live=True), loss.trained_critics()
    optimizer = torch.optim.Adam(loss.parameters(), 0.1, fused=True)
    evaluate(loss, data)["loss_qvalue"].backward()
    optimizer.step()
    updater.step()
    other = QScoreMatchingLoss(make_actor(), make_critics())
    for change in (lambda: None, lambda: loss.load_state_dict(other.state_dict())):
        change()
        for mine, copied, trained in zip(live, copies, loss.trained_critics(), strict=True):
            for name, parameter in trained.named_parameters():
                torch.testing.assert_close(mine.get_parameter(name), parameter, rtol=0, atol=0)
                assert not mine.get_parameter(name).requires_grad
            assert not torch.equal(copied.module.mlp[0].weight, trained.module.mlp[0].weight)


def test_acts_in_a_collector_and_follows_there():
    """A critic that wants large actions, turned round in place: the best of 16 uniform ones changes sides."""
    environment = make_environment("InvertedPendulum-v5", num_envs=2, seed=0)
    spec = environment.action_spec_unbatched  # [-3, 3]
    torch.manual_seed(0)
    actor = DiffusionActor(ScoreMLP(4, 1, (8,)), action_spec=spec, noise_schedule=NoiseSchedule.vp(3))

    def uniform(observation):
        return 6 * torch.rand(*observation.shape[:-1], 1) - 3

    class Slope(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.ones(1))

        def forward(self, observation, action):
            return self.slope * action

    loss = QScoreMatchingLoss(actor, [critic(Slope())], delay_qvalue=False)
    policy = TensorDictModule(uniform, ["observation"], ["action"])
    best = BestOfN(policy, loss.trained_critics(live=True), num_samples=16)
    collector = Collector(
        environment,
        TensorDictSequential(best, GaussianExploration(spec, std=0.01)),
        frames_per_batch=100,
        total_frames=200,
        auto_register_policy_transforms=False,
    )
    means = []
    for frames in collector:
        assert frames["action"].shape == (2, 50, 1) and spec.is_in(frames["action"][0, 0])
        means.append(frames["action"].mean().item())
        loss.qvalue_network_params["module", "slope"].data.neg_()
    collector.shutdown()
    assert means == pytest.approx([3 * 15 / 17, -3 * 15 / 17], abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2, "critics": []}, "critics is empty"),
        (
            {"num_samples": 2, "aggregation": "max"},
            "aggregation must be 'min', 'mean' or a finite number rho, got 'max'",
        ),
        ({"num_samples": 2, "aggregation": float("nan")}, "a finite number rho, got nan"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BestOfN(make_actor(), **{"critics": make_critics(), **options})


@pytest.mark.parametrize(
    ("value_key", "values", "message"),
    [
        ("q", 1, "a critic wrote nothing as 'q', expected shape .2, 5, 1."),
        ("state_action_value", 2, r"wrote shape .2, 5, 2. as 'state_action_value', expected shape .2, 5, 1."),
    ],
)
def test_critics_of_another_shape_or_key_are_refused(value_key, values, message):
    actor = TensorDictModule(lambda observation: torch.rand(*observation.shape[:-1], 2), ["observation"], ["action"])
    critic = TensorDictModule(lambda action: action[..., :values], ["action"], ["state_action_value"])
    with pytest.raises(ValueError, match=message):
        BestOfN(actor, critic, num_samples=2, value_key=value_key)(TensorDict({"observation": torch.zeros(5, 1)}, [5]))


@pytest.mark.parametrize(("action", "found"), [({}, "none"), ({"action": torch.zeros(4, 2)}, r"shape \(4, 2\)")])
def test_exploration_without_actions_of_its_spec_is_refused(action, found):
    with pytest.raises(ValueError, match=f"'action' must contain actions of size 1, found {found}"):
        GaussianExploration(Bounded(-1.0, 1.0, (1,)))(TensorDict(action, [4]))


def test_critics_that_share_a_loss_s_statistics_stay_in_evaluation():
    critic = TensorDictModule(QValueCrossQ(3, 2, (8,)), ["observation", "action"], ["state_action_value"])
    actor = TensorDictModule(lambda observation: torch.rand(*observation.shape[:-1], 2), ["observation"], ["action"])
    best = BestOfN(actor, critic, num_samples=4)
    before = {name: value.clone() for name, value in critic.named_buffers()}
    best(TensorDict({"observation": torch.randn(5, 3)}, [5]))
    best.eval()
    best.train()
    best(TensorDict({"observation": torch.randn(5, 3)}, [5]))
    assert best.training and all(torch.equal(value, before[name]) for name, value in critic.named_buffers())
