from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict

from qsm_rl import DiffusionPolicyGradientLoss, DiffusionQLLoss, QScoreMatchingLoss
from qsm_rl.training import DiffusionUpdate, StackedUpdate
from qsm_rl.training.updates.update import NonFiniteLossError
from tests.training.small_trainer import build

SEEDS = (3, 4, 5)


def make_updates(**options):
    """An update for each seed, alike but for their weights."""
    updates = []
    for seed in SEEDS:
        update = build("Slide", **options)[1].update
        torch.manual_seed(seed)
        update.loss.reset_parameters_recursive()
        updates.append(update)
    return updates


def make_batch(rows=32):
    following = {"observation": torch.randn(rows, 2), "reward": torch.randn(rows, 1)}
    following |= {name: torch.zeros(rows, 1, dtype=torch.bool) for name in ("done", "terminated")}
    entries = {"observation": torch.randn(rows, 2), "action": torch.rand(rows, 2) * 2 - 1, "next": following}
    return TensorDict(entries, [rows])


def weights(params, index, network):
    return {key: value[index] for key, value in params[f"{network}_network_params"].flatten_keys(".").items()}


@pytest.fixture
def same_draws(monkeypatch):
    """Every random tensor is a function of its shape, so that an agent draws the same with others and alone."""

    def ramp(shape):
        return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)

    monkeypatch.setattr(torch, "randn", lambda *size, **_: ramp(size if isinstance(size[0], int) else tuple(size[0])))
    monkeypatch.setattr(torch, "randn_like", lambda x, **_: ramp(tuple(x.shape)))
    monkeypatch.setattr(
        torch, "randint", lambda high, size, **_: (torch.arange(math.prod(size)) % high).reshape(tuple(size))
    )


@pytest.mark.parametrize("clipping", [None, 0.1])
def test_each_agent_learns_what_it_would_have_learned_alone(same_draws, clipping):
    options = {"gradient_clipping": clipping, "policy_delay": 2, "actor_learning_rate_decay": 10}
    alone, stacked = make_updates(**options), StackedUpdate(make_updates(**options), SEEDS)
    before = alone[0].loss.state_dict()["actor_network_params.module.score_network.network.mlp.0.weight"].clone()
    generator = torch.Generator().manual_seed(0)
    batches = [make_batch() for _ in SEEDS]
    for batch in batches:  # which are ramps, too
        batch["observation"].normal_(generator=generator)
        batch["next", "reward"].normal_(generator=generator)
    for _ in range(7):  # the last one of the critics alone
        losses = stacked(torch.stack(batches, 1))
        own = [update(batch.copy()) for update, batch in zip(alone, batches, strict=True)]
        for name, value in losses.items():
            torch.testing.assert_close(value, torch.stack([loss[name] for loss in own]).mean(), rtol=1e-5, atol=1e-6)
    for index, update in enumerate(alone):
        for network in ("actor", "qvalue", "target_qvalue"):
            theirs = getattr(update.loss, f"{network}_network_params").flatten_keys(".")
            for key, value in weights(stacked.params, index, network).items():
                torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6, msg=f"{network} {key}")
    after = stacked.params["actor_network_params", "module", "score_network", "network", "mlp", "0", "weight"]
    assert not torch.allclose(after[0], before, atol=1e-3), "nothing was learned"
    shared = {name: value for name, value in stacked.diagnostics().items() if name != "target_clipped"}
    for name, value in shared.items():
        theirs = torch.stack(
            [update.loss.diagnostics(update._qvalue_info, update._actor_info)[name] for update in alone]
        )
        torch.testing.assert_close(value, theirs.mean(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (QScoreMatchingLoss, {"delay_actor": True}),
        (QScoreMatchingLoss, {"delay_qvalue": False}),
        (QScoreMatchingLoss, {"delay_qvalue": False, "score_critics": "target"}),  # the same, there being no others
        (DiffusionQLLoss, {}),
        (DiffusionPolicyGradientLoss, {}),
    ],
)
def test_every_loss_can_be_stacked(same_draws, kind, options):
    def make():
        losses = [kind(x.loss.actor_network, x.loss.trained_critics(), **options) for x in make_updates()]
        rates = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "tau": 0.05}
        return [DiffusionUpdate(loss.make_value_estimator(gamma=0.9), **rates) for loss in losses]

    alone, stacked = make(), StackedUpdate(make(), SEEDS)
    batches = [make_batch() for _ in SEEDS]
    for _ in range(3):
        stacked(torch.stack(batches, 1))
        for update, batch in zip(alone, batches, strict=True):
            update(batch.copy())
    for index, update in enumerate(alone):
        for network in ("actor", "qvalue"):
            theirs = getattr(update.loss, f"{network}_network_params").flatten_keys(".")
            for key, value in weights(stacked.params, index, network).items():
                torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=f"{network} {key}")


def test_an_agent_does_not_see_the_data_of_another():
    batches = [make_batch() for _ in range(4)]
    results = []
    for third in batches[2:]:
        stacked = StackedUpdate(make_updates(), SEEDS)
        torch.manual_seed(7)
        for _ in range(3):
            stacked(torch.stack([*batches[:2], third], 1))
        results.append(stacked.params.data.clone())
    for key, one in results[0].items(True, True):
        assert torch.equal(one[:2], results[1][key][:2]), key
    assert not torch.equal(
        results[0]["qvalue_network_params", "module", "critic", "mlp", "0", "weight"][2],
        results[1]["qvalue_network_params", "module", "critic", "mlp", "0", "weight"][2],
    )


def test_agents_draw_numbers_of_their_own():
    """Equal weights on equal data part ways."""
    updates = [build("Slide")[1].update for _ in SEEDS]
    stacked, batch = StackedUpdate(updates, SEEDS), make_batch()
    stacked(torch.stack([batch] * 3, 1))
    weight = stacked.params["actor_network_params", "module", "score_network", "network", "mlp", "0", "weight"]
    assert not torch.equal(weight[0], weight[1]) and not torch.equal(weight[1], weight[2])


def test_a_loss_that_is_not_finite_names_the_seed_and_leaves_the_weights_alone():
    stacked = StackedUpdate(make_updates(), SEEDS)
    good, bad = torch.stack([make_batch() for _ in SEEDS], 1), torch.stack([make_batch() for _ in SEEDS], 1)
    bad["next", "reward"][5, 1] = float("inf")
    stacked(good)
    stacked.check()
    networks = ("actor_network_params", "qvalue_network_params")
    now = stacked.params.data.items(True, True)
    before = {key: value.clone() for key, value in now if key[0] in networks}
    stacked(bad)
    stacked(good)
    stacked(good)
    with pytest.raises(NonFiniteLossError, match="loss_qvalue of seed_4 is inf") as raised:
        stacked.check()
    assert raised.value.updates_since == 2
    for key, value in before.items():
        assert torch.equal(stacked.params[key], value), key


def test_it_goes_on_from_its_state():
    stacked, again = StackedUpdate(make_updates(), SEEDS), StackedUpdate(make_updates(), SEEDS)
    batch = torch.stack([make_batch() for _ in SEEDS], 1)
    stacked(batch)
    again.restore_state(deepcopy(stacked.checkpoint_state()))
    for update in (stacked, again):
        torch.manual_seed(1)
        update(batch)
    for (name, one), other in zip(stacked.state_dict().items(), again.state_dict().values(), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other), name


def test_actors_follow_the_training_and_act_as_one_policy(same_draws):
    stacked = StackedUpdate(make_updates(), SEEDS)
    actors, together = stacked.actors, stacked.actor
    assert list(actors) == ["seed_3", "seed_4", "seed_5"]
    stacked(torch.stack([make_batch() for _ in SEEDS], 1))
    observation = torch.linspace(-1, 1, 36).reshape(3, 6, 2)
    action = together(TensorDict({"observation": observation}, [3, 6]))["action"]
    for index, actor in enumerate(actors.values()):
        torch.testing.assert_close(action[index], actor(observation=observation[index]))


def test_parts_that_cannot_be_stacked_are_refused():
    with pytest.raises(ValueError, match="averaged actor"):
        StackedUpdate(make_updates(actor_ema=0.9), SEEDS)
