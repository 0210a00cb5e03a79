from __future__ import annotations

import json
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from qsm_rl.training import DeterministicPolicy, TanhActor, TanhGaussianActor, UserError, load_actor

LOW, HIGH = torch.tensor([-3.0, 0.0]), torch.tensor([3.0, 1.0])


def observations(count: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(count, 4)}, [count])


@pytest.mark.parametrize("kind", [TanhActor, TanhGaussianActor])
def test_actions_lie_inside_the_bounds_and_reach_them(kind):
    torch.manual_seed(0)
    actor = kind(4, Bounded(LOW, HIGH), (16,))
    for parameter in actor.parameters():
        parameter.data.mul_(100.0)
    action = actor(observations(200))["action"]
    assert bool(((action >= LOW) & (action <= HIGH)).all())
    assert torch.allclose(action.amax(0), HIGH) and torch.allclose(action.amin(0), LOW)


@pytest.mark.parametrize("kind", [TanhActor, TanhGaussianActor])
def test_an_unbounded_space_is_refused(kind):
    with pytest.raises(ValueError, match="bounded"):
        kind(4, Unbounded((2,)), (16,))


def test_the_density_is_that_of_a_squashed_gaussian_in_box_units():
    """log N(u; mean, std) - sum log(1 - tanh(u)^2), by hand, whatever the bounds are."""
    torch.manual_seed(0)
    actor = TanhGaussianActor(4, Bounded(LOW, HIGH), (16,))
    for parameter in actor.parameters():
        parameter.data.mul_(0.5)
    dist = actor.get_dist(observations(50))
    action, log_prob = dist.rsample_and_log_prob()
    box = (action - (HIGH + LOW) / 2) / ((HIGH - LOW) / 2)
    assert bool((box.abs().amax(-1) < 0.999).all()), "atanh has lost its digits: draw others"
    squashed = torch.atanh(box.double())
    mean, std = dist.loc.double(), dist.scale.double()
    gaussian = -0.5 * ((squashed - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    expected = (gaussian - torch.log1p(-(box.double() ** 2))).sum(-1)
    assert torch.allclose(log_prob.double(), expected, atol=1e-3)
    assert torch.allclose(dist.log_prob(action.detach()).double(), expected, atol=1e-3)


def test_spread_depends_on_the_observation_and_the_deterministic_policy_is_the_squashed_mean():
    torch.manual_seed(0)
    actor = TanhGaussianActor(4, Bounded(LOW, HIGH), (16,))
    td = observations(20)
    dist = actor.get_dist(td.copy())
    assert dist.scale.std(0).min() > 0.01
    expected = (dist.loc.tanh() + 1) / 2 * (HIGH - LOW) + LOW
    with set_exploration_type(ExplorationType.RANDOM):
        action = DeterministicPolicy(actor)(td.copy())["action"]
        samples = torch.stack([actor(td.copy())["action"] for _ in range(2)])
    assert torch.allclose(action, expected, atol=1e-6)
    assert not torch.equal(*samples)


@pytest.mark.parametrize("kind", [TanhActor, TanhGaussianActor])
def test_files_bring_the_actor_back_with_its_statistics(tmp_path, kind):
    mean, variance = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 1.0, 9.0, 1.0])
    plain = kind(4, Bounded(LOW, HIGH), (16, 8))
    plain.normalized(mean, variance).save_pretrained(tmp_path, {"env": "some"})
    loaded = load_actor(tmp_path)
    assert type(loaded) is kind
    raw = torch.randn(20, 4)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = loaded(TensorDict({"observation": raw}, [20]))["action"]
        seen = (raw - mean) / variance.sqrt()
        expected = plain(TensorDict({"observation": seen}, [20]))["action"]
    assert torch.allclose(action, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_dims", [16, 9], "size mismatch"),
        ("observation_dim", 5, "size mismatch"),
        ("actor", "TanhActor", "unexpected|size mismatch|Missing"),
        ("format", 7, "7"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, key, value, message):
    TanhGaussianActor(4, Bounded(LOW, HIGH), (16, 8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=message) as raised:
        load_actor(tmp_path)
    assert str(tmp_path) in str(raised.value)
