"""SAC and TD3: the order of their steps, and problems of seconds with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.objectives import SACLoss, TD3Loss

from qsm_rl.training import (
    SACConfiguration,
    SACUpdate,
    TanhActor,
    TanhGaussianActor,
    TD3Configuration,
    TD3Update,
    UserError,
)

RATES = {"actor_learning_rate": 3e-3, "critic_learning_rate": 1e-2, "tau": 0.05}


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, observation, action):
        return self.layers(torch.cat([observation, action], -1))


def critics():
    return [TensorDictModule(Critic(), ["observation", "action"], ["state_action_value"]) for _ in range(2)]


def sac(bound: float = 1.0, **options) -> SACUpdate:
    torch.manual_seed(0)
    actor = TanhGaussianActor(2, Bounded(-bound, bound, (1,)), (16,))
    loss = SACLoss(actor, critics(), loss_function="l2", deactivate_vmap=True, **{"target_entropy": -1.0, **options})
    loss.make_value_estimator(gamma=0.0)
    return SACUpdate(loss, **RATES)


def td3(**options) -> TD3Update:
    torch.manual_seed(0)
    spec = Bounded(-1.0, 1.0, (1,))
    loss = TD3Loss(TanhActor(2, spec, (16,)), critics(), action_spec=spec, loss_function="l2", deactivate_vmap=True)
    loss.make_value_estimator(gamma=0.0)
    return TD3Update(loss, **RATES, **options)


def bandit(reward, count: int = 64, bound: float = 1.0) -> TensorDict:
    """Random actions, rewarded at once."""
    observation, action = torch.randn(count, 2), bound * (2 * torch.rand(count, 1) - 1)
    done = torch.ones(count, 1, dtype=torch.bool)
    following = {"observation": observation, "reward": reward(action), "done": done, "terminated": done}
    return TensorDict({"observation": observation, "action": action, "next": following}, [count])


def weights(params) -> list[torch.Tensor]:
    return [value.clone() for value in params.values(True, True)]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_td3_moves_actor_and_targets_at_every_second_update_only():
    update = td3()
    batch = bandit(lambda action: action)
    loss = update.loss
    for number in range(1, 5):
        actor, critic = weights(loss.actor_network_params), weights(loss.qvalue_network_params)
        targets = weights(loss.target_actor_network_params), weights(loss.target_qvalue_network_params)
        losses = update(batch)
        assert not same(critic, weights(loss.qvalue_network_params))
        assert ("actor" in losses) == (number % 2 == 0)
        for before, params in zip(
            (actor, *targets),
            (loss.actor_network_params, loss.target_actor_network_params, loss.target_qvalue_network_params),
            strict=True,
        ):
            assert same(before, weights(params)) == (number % 2 == 1)


def step(optimizer, loss) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_sac_steps_critics_targets_actor_and_temperature_in_that_order():
    """The update against the same steps written out."""
    (update, other), batch = (sac(), sac()), bandit(lambda action: action)
    loss = other.loss
    target = loss.target_qvalue_network_params
    torch.manual_seed(7)
    losses = update(batch.copy())
    torch.manual_seed(7)
    qvalue, info = loss.qvalue_v2_loss(batch.copy())
    step(torch.optim.Adam(other.critic_parameters, RATES["critic_learning_rate"]), qvalue)
    for key, value in loss.qvalue_network_params.data.items(True, True):
        target.data[key].lerp_(value, RATES["tau"])
    actor, actor_info = loss.actor_loss(batch.copy())
    step(torch.optim.Adam(other.actor_parameters, RATES["actor_learning_rate"]), actor)
    temperature = loss.alpha_loss(actor_info["log_prob"]).mean()
    step(torch.optim.Adam([loss.log_alpha], RATES["actor_learning_rate"]), temperature)
    for (name, mine), theirs in zip(update.loss.state_dict().items(), loss.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    expected = {"qvalue": qvalue / 2, "actor": actor, "temperature": temperature}
    torch.testing.assert_close(losses, {name: value.detach() for name, value in expected.items()})
    row = update.diagnostics()
    assert row["temperature"].item() == pytest.approx(loss.log_alpha.exp().item())
    assert row["entropy"].item() == pytest.approx(-actor_info["log_prob"].mean().item())
    assert row["td_error"].item() == pytest.approx(info["td_error"].mean().item())


def test_td3_reports_means_over_critics_and_samples():
    """With gamma 0 the targets are the rewards."""
    update, other = td3(), td3()
    assert update.diagnostics() == {}
    batch = bandit(lambda action: action)
    q_values = other.loss.value_loss(batch.copy())[1]["pred_value"]  # (critics, batch)
    errors = q_values - batch["action"].squeeze(-1)
    assert update(batch)["qvalue"].item() == pytest.approx(errors.square().mean().item())
    row = update.diagnostics()
    assert row["q_value"].item() == pytest.approx(q_values.mean().item())
    assert row["target_value"].item() == pytest.approx(batch["action"].mean().item())


@pytest.mark.parametrize("make_update", [sac, td3])
def test_the_logged_td_error_is_that_of_the_critic_farther_off(make_update):
    """With a discount of 0 the target is the reward: the mean over samples of the larger of two distances to it."""
    update, batch = make_update(), bandit(lambda action: action)
    network, errors = update.loss.qvalue_network, []
    for params in update.loss.qvalue_network_params.data.unbind(0):
        with params.to_module(network):
            errors.append(
                network(batch.select("observation", "action"))["state_action_value"] - batch["next", "reward"]
            )
    update(batch)
    assert update.diagnostics()["td_error"].item() == pytest.approx(torch.stack(errors).abs().amax(0).mean().item())


@pytest.mark.slow
def test_td3_finds_the_best_action_of_a_bandit():
    update = td3()
    for _ in range(400):
        update(bandit(lambda action: -3 * (action - 0.4).abs()))
    action = update.policies[""](TensorDict({"observation": torch.randn(100, 2)}, [100]))["action"]
    assert (action - 0.4).abs().mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("bound", [1.0, 5.0])
def test_sac_tunes_its_temperature_to_the_target_entropy_whatever_the_bounds(bound):
    target = -0.5
    update = sac(bound, target_entropy=target, alpha_init=0.2)
    for _ in range(1200):
        update(bandit(lambda action: -((action / bound) ** 2), bound=bound))
    observation = TensorDict({"observation": torch.randn(4000, 2)}, [4000])
    _, log_prob = update.actor.get_dist(observation).rsample_and_log_prob()
    assert -log_prob.mean().item() == pytest.approx(target, abs=0.2)


@pytest.mark.slow
def test_sac_with_a_fixed_temperature_is_the_boltzmann_policy():
    """At Q = 0 the density exp(Q / temperature) is uniform: entropy log 2 in each dimension of the box."""
    update = sac(fixed_alpha=True, alpha_init=1.0)
    assert set(update.optimizers) == {"actor", "critic"}
    for _ in range(200):
        losses = update(bandit(torch.zeros_like))
    assert "temperature" not in losses
    _, log_prob = update.actor.get_dist(bandit(torch.zeros_like, 4000)).rsample_and_log_prob()
    assert -log_prob.mean().item() == pytest.approx(math.log(2), abs=0.05)
    assert update.diagnostics()["temperature"].item() == pytest.approx(1.0)


def test_sac_raises_its_temperature_below_the_target_entropy_and_lowers_it_above():
    for target, rises in ((5.0, True), (-5.0, False)):
        update = sac(target_entropy=target)
        update(bandit(torch.zeros_like))
        assert (update.loss.log_alpha.item() > 0) == rises


def test_sac_evaluates_its_mean_and_publishes_what_samples():
    update = sac()
    policy = update.policies[""]
    td = TensorDict({"observation": torch.randn(5, 2)}, [5])
    assert torch.equal(policy(td.copy())["action"], policy(td.copy())["action"])
    assert not torch.equal(update.actor(td.copy())["action"], update.actor(td.copy())["action"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SACConfiguration(entropy_temperature=0.0), "--entropy_temperature must be null or above 0, got 0.0"),
        (lambda: SACConfiguration(num_critics=0), "--num_critics must be at least 1, got 0"),
        (lambda: TD3Configuration(policy_delay=0), "--policy_delay must be at least 1, got 0"),
        (lambda: TD3Configuration(exploration_noise_std=-1.0), "--exploration_noise_std must be 0 or more, got -1.0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
