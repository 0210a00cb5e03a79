"""Critics that normalise over the batch, in a loss without target critics."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded

from qsm_rl import (
    BatchRenorm,
    DiffusionActor,
    NoiseSchedule,
    QScoreMatchingLoss,
    QValueCrossQ,
    QValueMLP,
    ScaledQScore,
    TwoHotHead,
)
from tests.loss_contract import (
    ACTION_DIM,
    OBSERVATION_DIM,
    assert_same,
    evaluate,
    make_actor,
    make_transitions,
)

HEAD = TwoHotHead(-10.0, 10.0, 21)


def wrap(critic: nn.Module) -> TensorDictModule:
    return TensorDictModule(critic, ["observation", "action"], ["state_action_value"])


def make_critics(count: int = 2, head: TwoHotHead | None = None) -> list[TensorDictModule]:
    critics = [wrap(QValueCrossQ(OBSERVATION_DIM, ACTION_DIM, (16, 16), momentum=0.1, head=head)) for _ in range(count)]
    for critic in critics:  # away from a head's flat start
        nn.init.normal_(critic.module.body[-1].weight, std=0.3)
    return critics


def make_loss(critics: list[TensorDictModule] | None = None, **options) -> QScoreMatchingLoss:
    critics = make_critics() if critics is None else critics
    return QScoreMatchingLoss(make_actor(), critics, delay_qvalue=False, **options).make_value_estimator(gamma=0.9)


def chain(*batch_size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(*batch_size, ACTION_DIM), torch.randn(5, *batch_size, ACTION_DIM), torch.zeros(ACTION_DIM)


def statistics(loss: QScoreMatchingLoss) -> dict[str, torch.Tensor]:
    return {
        ".".join(key): value.clone()
        for key, value in loss.qvalue_network_params.items(True, True)
        if "running" in key[-1] or key[-1] == "num_batches"
    }


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("deactivate_vmap", [True, False])
@pytest.mark.parametrize("head", [None, HEAD], ids=["scalar", "two-hot"])
def test_one_forward_normalises_both_state_action_pairs_by_the_statistics_of_both(head, deactivate_vmap):
    critics, data = make_critics(2, head), make_transitions((8,))
    loss = make_loss(critics, deactivate_vmap=deactivate_vmap)
    given = deepcopy(critics)
    value, info = loss.qvalue_loss(data, *chain(8))
    next_action = loss.actor_network.box.from_box(info["next_action"])
    observation = torch.cat([data["observation"], data["next", "observation"]])
    action = torch.cat([data["action"], next_action])
    both = [critic.module.train()(observation, action).squeeze(-1) for critic in given]
    now, following = torch.stack([q[:8] for q in both]), torch.stack([q[8:] for q in both])
    target = data["next", "reward"].squeeze(-1) + 0.9 * following.amin(0)
    torch.testing.assert_close(info["q_value"], now.detach())
    torch.testing.assert_close(info["target_value"], target.detach())
    if head is None:
        torch.testing.assert_close(value.detach(), (now - target).square().mean(1).sum().detach())
    # The statistics of that one batch of 16 are in the stacked buffers.
    for index, critic in enumerate(given):
        for name, buffer in critic.named_buffers():
            torch.testing.assert_close(loss.qvalue_network_params[tuple(name.split("."))][index], buffer)
    # The gradient is that of the replayed half, through the statistics of both, with the target held fixed.
    value.backward()
    if head is None:
        (now - target.detach()).square().mean(1).sum().backward()
        for index, critic in enumerate(given):
            for name, parameter in critic.named_parameters():
                gradient = loss.qvalue_network_params[tuple(name.split("."))].grad[index]
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_encoder_gets_its_gradient_from_replayed_features_alone():
    loss, data = make_loss(), make_transitions((8,))
    replayed = data["observation"].requires_grad_()
    following = data["next", "observation"].requires_grad_()
    loss.qvalue_loss(data)[0].backward()
    assert replayed.grad.abs().sum() > 0 and following.grad is None


def test_in_evaluation_the_running_statistics_serve_and_stay():
    loss, data = make_loss(), make_transitions((8,))
    loss.qvalue_loss(data, *chain(8))
    before, critics = statistics(loss), loss.trained_critics(live=True)
    with torch.no_grad():
        _, info = loss.eval().qvalue_loss(data, *chain(8))
    for name, value in statistics(loss).items():
        assert torch.equal(value, before[name]), name
    td = TensorDict({key: data[key] for key in ("observation", "action")}, [8])
    values = torch.stack([critic(td.clone())["state_action_value"].squeeze(-1) for critic in critics])
    torch.testing.assert_close(info["q_value"], values)
    loss.train().qvalue_loss(data, *chain(8))
    assert any(not torch.equal(value, before[name]) for name, value in statistics(loss).items())


def test_critics_of_other_momentum_are_not_alike():
    critics = [wrap(QValueCrossQ(OBSERVATION_DIM, ACTION_DIM, (8,), momentum=momentum)) for momentum in (0.01, 0.9)]
    with pytest.raises(
        ValueError, match=r"identical except for their weights.*critic 1\..*momentum is 0\.9, expected 0\.01"
    ):
        make_loss(critics)


def test_the_score_and_acting_normalise_by_the_running_statistics_and_leave_them():
    loss, data = make_loss(score_target=ScaledQScore(1.0)), make_transitions((8,))
    for _ in range(3):
        loss.qvalue_loss(data, *chain(8))
    before = statistics(loss)
    _, info = loss.actor_loss(data, t=torch.arange(8) % 5)
    live = loss.trained_critics(live=True)
    assert not any(module.training for critic in live for module in critic.modules() if isinstance(module, BatchRenorm))
    box_action = info["noisy_action"].requires_grad_()
    action = loss.actor_network.box.from_box(box_action)
    # Each row alone, which batch statistics would not allow.
    mean = sum(c.module(o, a) for c in live for o, a in zip(data["observation"], action, strict=True)) / 2
    torch.testing.assert_close(info["q_score"], torch.autograd.grad(mean, box_action)[0])
    for name, value in statistics(loss).items():
        assert torch.equal(value, before[name]), name
    # Live critics follow, copies do not.
    copies = loss.trained_critics()
    td = TensorDict({key: data[key] for key in ("observation", "action")}, [8])
    values = [[c(td.clone())["state_action_value"].detach() for c in critics] for critics in (live, copies)]
    torch.testing.assert_close(*values)
    loss.qvalue_loss(data, *chain(8))
    after = [[c(td.clone())["state_action_value"].detach() for c in critics] for critics in (live, copies)]
    torch.testing.assert_close(after[1], values[1])
    assert not torch.equal(after[0][0], values[0][0])


def test_state_dict_copies_and_types_keep_the_statistics():
    loss, fresh, data = make_loss(), make_loss(), make_transitions((8,))
    for _ in range(3):
        loss.qvalue_loss(data)
    assert any(name.endswith("running_mean") for name in loss.state_dict())
    fresh.load_state_dict(loss.state_dict())
    copy = deepcopy(loss)
    assert_same(statistics(fresh), statistics(loss), rtol=0, atol=0)
    expected = evaluate(loss, data)
    for other in (fresh, copy):
        assert_same(evaluate(other, data), expected, rtol=0, atol=0)
        assert_same(statistics(other), statistics(loss), rtol=0, atol=0)
    loss.to(torch.float64)
    assert statistics(loss)["module.body.0.running_mean"].dtype == torch.float64
    before = statistics(loss)
    evaluate(loss, data.apply(lambda x: x.double() if x.is_floating_point() else x))
    assert not torch.equal(statistics(loss)["module.body.0.running_mean"], before["module.body.0.running_mean"])
    loss.reset_parameters_recursive()
    assert not statistics(loss)["module.body.0.running_mean"].any()
    assert not statistics(loss)["module.body.0.num_batches"].any()


def test_masked_and_terminated_steps_do_not_reach_the_statistics():
    data, mask, start = make_transitions((2, 4)), torch.arange(4).expand(2, 4) < 3, chain(2, 4)
    loss, other = make_loss(), make_loss()
    other.load_state_dict(loss.state_dict())
    live = data[mask]
    _, expected = other.qvalue_loss(live, start[0][mask], start[1][:, mask], start[2])
    data["collector", "mask"] = mask
    data["observation"][~mask] = torch.nan
    _, info = loss.qvalue_loss(data, *start)
    torch.testing.assert_close(info, expected)
    assert_same(statistics(loss), statistics(other))
    data = make_transitions((8,))
    data["next", "terminated"][3] = data["next", "done"][3] = True
    data["next", "observation"][3] = torch.nan
    out = evaluate(loss, data)
    assert all(value.isfinite().all() for value in (*out.values(), *statistics(loss).values()))


@pytest.mark.parametrize("batch_size", [(), (1,), (3,), (2, 3)])
def test_layouts(batch_size):
    loss, data = make_loss(reduction="none"), make_transitions(batch_size)
    out = evaluate(loss, data)
    assert out["loss_qvalue"].shape == out["loss_actor"].shape == batch_size


@pytest.mark.parametrize("head", [None, HEAD], ids=["scalar", "two-hot"])
def test_the_critics_learn(head):
    """Rewards of -5 to 5 that follow the action, no future: trained critics tell them apart in evaluation, too."""
    loss, data = make_loss(make_critics(2, head)), make_transitions((64,))
    data["next", "reward"] = data["action"][:, :1] * 2
    loss.make_value_estimator(gamma=0.0)
    optimizer = torch.optim.Adam(loss.qvalue_network_params.parameters(), 1e-2, betas=(0.5, 0.999))
    for _ in range(150):
        optimizer.zero_grad()
        loss.qvalue_loss(data)[0].backward()
        optimizer.step()
    assert evaluate(loss, data)["td_error"] < 0.5
    for critic in loss.trained_critics():
        error = critic(data.clone())["state_action_value"] - data["next", "reward"]
        assert error.abs().mean() < 1.0


def test_batch_normalisation_of_torch_is_refused():
    """With several batch dimensions its features are the second one, silently where the sizes are equal."""
    critic = wrap(QValueMLP(OBSERVATION_DIM, ACTION_DIM, (8, 8)))
    critic.module.mlp.insert(1, nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match=r"BatchNorm1d layers, .*use qsm_rl\.BatchRenorm"):
        make_loss([critic])


def test_target_critics_are_refused():
    with pytest.raises(ValueError, match=r"BatchRenorm layers, .*pass delay_qvalue=False"):
        QScoreMatchingLoss(make_actor(), make_critics())
    QScoreMatchingLoss(make_actor(), [wrap(QValueMLP(OBSERVATION_DIM, ACTION_DIM, (8,), layer_norm=True))])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Using lock_")  # TorchRL's own, while it is compiled
def test_the_joint_forward_compiles_as_one_graph():
    data, results, start, state = make_transitions((8,)), [], chain(8), None
    for compiled in (False, True):
        loss = make_loss(make_critics(2, HEAD))
        state = state or {name: value.clone() for name, value in loss.state_dict().items()}
        loss.load_state_dict(state)
        function = torch.compile(loss.qvalue_loss, fullgraph=True) if compiled else loss.qvalue_loss
        for _ in range(2):
            loss.zero_grad()
            value, info = function(data.clone(), *start)
            value.backward()
        gradients = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
        results.append((value.detach(), info, gradients, statistics(loss)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_loss_in_bfloat16_keeps_the_running_statistics_of_one_in_float32():
    """In bfloat16 they would stop where a batch's share of the distance is less than a rounding."""
    data = make_transitions((8,)).apply(lambda x: (10 + 0.1 * x).bfloat16() if x.is_floating_point() else x)
    means = []
    for dtype in (torch.float32, torch.bfloat16):
        loss = make_loss().to(dtype)
        for _ in range(100):
            loss.qvalue_loss(data.apply(lambda x, dtype=dtype: x.to(dtype) if x.is_floating_point() else x))
        means.append(statistics(loss)["module.body.0.running_mean"][:, :OBSERVATION_DIM])
    assert means[1].dtype == torch.float32
    torch.testing.assert_close(means[1], means[0])
    loss.actor_loss(data)  # by these statistics


def test_running_statistics_of_other_layers_move_with_their_weights():
    """PyTorch's layers, and one's own, compute in one type, whatever their buffers are called."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(ACTION_DIM))
            self.layer = nn.Linear(ACTION_DIM, 1)

        def forward(self, observation, action):
            return self.layer(action - self.running_mean)

    class ScoreNetwork(nn.Sequential):
        def forward(self, noisy_action, observation, t):
            return super().forward(noisy_action)

    network = ScoreNetwork(nn.BatchNorm1d(ACTION_DIM), nn.Linear(ACTION_DIM, ACTION_DIM))
    schedule = NoiseSchedule.vp(5)
    actor = DiffusionActor(network, action_spec=Bounded(-1.0, 1.0, (ACTION_DIM,)), noise_schedule=schedule)
    loss = QScoreMatchingLoss(actor, wrap(Critic()), delay_qvalue=False).to(torch.bfloat16)
    data = make_transitions((8,)).apply(lambda x: x.bfloat16() if x.is_floating_point() else x)
    assert all(value.isfinite() for value in loss(data).values())
