"""Critics with a value head of their own in a loss."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.objectives import SoftUpdate

from qsm_rl import QScoreMatchingLoss, QValueMLP, QValueSimBa, ScalarHead, ScaledQScore, TwoHotHead, ValueHead
from tests.loss_contract import (
    ACTION_DIM,
    OBSERVATION_DIM,
    assert_same,
    evaluate,
    gradients,
    make_actor,
    make_transitions,
)

HEAD = TwoHotHead(-10.0, 10.0, 21)


def wrap(critic: nn.Module) -> TensorDictModule:
    return TensorDictModule(critic, ["observation", "action"], ["state_action_value"])


def head_critics(count: int = 2, head: TwoHotHead = HEAD) -> list[TensorDictModule]:
    critics = [wrap(QValueMLP(OBSERVATION_DIM, ACTION_DIM, (16, 16), head=head)) for _ in range(count)]
    for critic in critics:  # away from the flat start
        nn.init.normal_(critic.module.mlp[-1].weight, std=0.3)
    return critics


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("deactivate_vmap", [True, False])
def test_cross_entropy_by_the_formula(deactivate_vmap):
    critics, data = head_critics(3), make_transitions((8,))
    loss = QScoreMatchingLoss(make_actor(), critics, deactivate_vmap=deactivate_vmap, target_action_noise_std=0.0)
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.5)
    start, steps = torch.randn(8, ACTION_DIM), torch.randn(5, 8, ACTION_DIM)
    value, info = loss.qvalue_loss(data, start, steps)
    action = loss.actor_network.box.from_box(info["next_action"]).detach()
    following = torch.stack([c.module(data["next", "observation"], action) for c in critics]).amin(0)
    target = (data["next", "reward"] + 0.9 * following).squeeze(-1).detach()
    torch.testing.assert_close(info["target_value"], target)
    inputs = data["observation"], data["action"]
    for index, critic in enumerate(critics):
        log_probabilities = critic.module.outputs(*inputs).log_softmax(-1)
        mean = log_probabilities.exp() @ torch.linspace(-10, 10, 21)
        torch.testing.assert_close(info["q_value"][index], mean.detach())
        # by linear interpolation between the two neighbours of the target, one unit apart
        below = target.floor().long() + 10
        share = target - target.floor()
        picked = [log_probabilities.gather(1, (below + i).unsqueeze(1)).squeeze(1) for i in (0, 1)]
        expected = -((1 - share) * picked[0] + share * picked[1]).mean()
        torch.testing.assert_close(info["critic_losses"][index], expected.detach())
    torch.testing.assert_close(value.detach(), info["critic_losses"].sum())


def test_the_score_is_the_gradient_of_the_mean():
    critics, data = head_critics(), make_transitions((6,))
    loss = QScoreMatchingLoss(make_actor(), critics, score_target=ScaledQScore(1.0), delay_qvalue=False)
    _, info = loss.actor_loss(data, t=torch.arange(6) % 5)
    box_action = info["noisy_action"].requires_grad_()
    action = loss.actor_network.box.from_box(box_action)
    mean = sum(c.module(data["observation"], action) for c in critics) / 2
    torch.testing.assert_close(info["q_score"], torch.autograd.grad(mean.sum(), box_action)[0])


@pytest.mark.parametrize("deactivate_vmap", [True, False])
@pytest.mark.parametrize(
    "make", [lambda head: QValueMLP(3, 2, (16,), head=head), lambda head: QValueSimBa(3, 2, 16, 1, head=head)]
)
@pytest.mark.parametrize("head", [None, HEAD], ids=["scalar", "two-hot"])
def test_every_critic_trains(make, head, deactivate_vmap):
    loss, data = (
        QScoreMatchingLoss(make_actor(), wrap(make(head)), deactivate_vmap=deactivate_vmap),
        make_transitions((16,)),
    )
    data["next", "reward"] = data["action"][:, :1]
    loss.make_value_estimator(gamma=0.0)  # the targets are the rewards
    updater = SoftUpdate(loss, tau=0.1)
    optimizer = torch.optim.Adam(loss.parameters(), 2e-2)
    first = None
    for _ in range(60):
        out = evaluate(loss, data)
        first = out["td_error"] if first is None else first
        optimizer.zero_grad()
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        optimizer.step()
        updater.step()
    assert out["td_error"] < 0.5 * first
    assert all(p.grad is not None and p.grad.any() for p in loss.qvalue_network_params.parameters())
    loss.reset_parameters_recursive()
    for critic in loss.trained_critics():
        value = critic(data.clone())["state_action_value"]
        assert value.isfinite().all() and (head is None or value.abs().max() < 0.11)


def test_vmap_equals_the_loop():
    data = make_transitions((8,))
    loop, vmapped = (
        QScoreMatchingLoss(make_actor(), head_critics(), deactivate_vmap=flag, delay_qvalue=False)
        for flag in (True, False)
    )
    vmapped.load_state_dict(loop.state_dict())
    outputs = [evaluate(loss, data) for loss in (loop, vmapped)]
    assert_same(outputs[1], outputs[0])
    pairs = zip(
        *(gradients(x, out["loss_qvalue"]).items() for x, out in zip((loop, vmapped), outputs, strict=True)),
        strict=True,
    )
    for (name, expected), (_, actual) in pairs:
        torch.testing.assert_close(actual, expected, msg=name)


def test_a_head_of_ones_own():
    """A critic of two outputs, whose difference is the Q-value, trained by the absolute error."""

    class Difference(ScalarHead):
        num_outputs = 2

        def value(self, outputs):
            return outputs[..., 0] - outputs[..., 1]

        def td_loss(self, outputs, target):
            return (self.value(outputs) - target).abs()

    class TwoHeaded(nn.Module):
        head = Difference()

        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.tensor([3.0, 1.0]))

        def outputs(self, observation, action):
            return self.weights.expand(*action.shape[:-1], 2)

        def forward(self, observation, action):
            return self.head.value(self.outputs(observation, action)).unsqueeze(-1)

    loss = QScoreMatchingLoss(make_actor(), [wrap(TwoHeaded())], delay_qvalue=False).make_value_estimator(gamma=0.5)
    data = make_transitions((4,))
    data["next", "reward"].fill_(4.0)
    value, info = loss.qvalue_loss(data)
    torch.testing.assert_close(info["target_value"], torch.full((4,), 5.0))  # 4 + 0.5 * (3 - 1)
    torch.testing.assert_close(value.item(), 3.0)


def test_trained_critics_have_what_the_head_has_gathered():
    """A head that keeps the outputs near 1 by the size of the targets seen so far."""

    class Sized(ValueHead, nn.Module):
        num_outputs = 1

        def __init__(self):
            super().__init__()
            self.register_buffer("size", torch.ones(()))

        def value(self, outputs):
            return self.size * outputs.squeeze(-1)

        def td_loss(self, outputs, target):
            self.size.copy_(torch.maximum(self.size, target.abs().amax()))
            return (outputs.squeeze(-1) - target / self.size).square()

    def build():
        critics = [wrap(QValueMLP(OBSERVATION_DIM, ACTION_DIM, (8,), head=Sized())) for _ in range(2)]
        return QScoreMatchingLoss(make_actor(), critics, delay_qvalue=False)

    loss, data = build(), make_transitions((6,))
    data["next", "reward"].fill_(50.0)
    loss.qvalue_loss(data)
    loss.reset_parameters_recursive()
    nn.init.normal_(loss.qvalue_network_params["module", "mlp", "2", "weight"])
    size = loss.value_head.size.clone()
    assert size >= 50
    again = build()
    again.load_state_dict(loss.state_dict())
    for one in (loss, again, deepcopy(loss)):
        outputs = [critic.module.mlp for critic in one.trained_critics()]
        inputs = torch.cat([data["observation"], data["action"]], -1)
        for live in (False, True):
            for critic, network in zip(one.trained_critics(live=live), outputs, strict=True):
                torch.testing.assert_close(critic(data.clone())["state_action_value"], size * network(inputs))
    copied, live = loss.trained_critics()[0].module.head, loss.trained_critics(live=True)[0].module.head
    loss.value_head.size.fill_(7.0)
    assert copied.size == size and live.size == 7


def test_a_module_called_head_is_no_value_head():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(OBSERVATION_DIM + ACTION_DIM, 1)

        def forward(self, observation, action):
            return self.head(torch.cat([observation, action], -1))

    loss = QScoreMatchingLoss(make_actor(), [wrap(Network())], delay_qvalue=False)
    assert loss.value_head == ScalarHead("l2")
    assert loss(make_transitions((4,)))["loss_qvalue"] > 0


def test_heads_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match=r"the critics must have the same value head, got .*21.*11"):
        QScoreMatchingLoss(make_actor(), [*head_critics(1), *head_critics(1, TwoHotHead(-10.0, 10.0, 11))])
    with pytest.raises(ValueError, match=r"QValueMLP with a value head must be .* inside a TensorDictSequential"):
        QScoreMatchingLoss(make_actor(), [TensorDictSequential(*head_critics(1))])


def test_state_dict_and_copies_keep_the_value():
    data = make_transitions((5,))
    loss, fresh = (QScoreMatchingLoss(make_actor(), head_critics(), delay_qvalue=False) for _ in range(2))
    fresh.load_state_dict(loss.state_dict())
    assert_same(evaluate(fresh, data), evaluate(loss, data))
    stacked = loss.qvalue_loss(data)[1]["q_value"]
    for live in (False, True):
        for index, critic in enumerate(loss.trained_critics(live=live)):
            td = TensorDict({key: data[key] for key in ("observation", "action")}, [5])
            torch.testing.assert_close(critic(td)["state_action_value"].squeeze(-1).detach(), stacked[index])


def test_the_support_is_chosen_once_and_goes_where_the_weights_go():
    def build():
        loss = QScoreMatchingLoss(make_actor(), head_critics(2, TwoHotHead(num_bins=21)), delay_qvalue=False)
        return loss.make_value_estimator(gamma=0.5)

    loss, data = build(), make_transitions((8,))
    live, early = loss.trained_critics(live=True), deepcopy(loss)
    with pytest.raises(RuntimeError, match="no value support yet"):
        loss.qvalue_loss(data)
    data["next", "reward"].fill_(1.0)
    # As TransitionWriter and TorchRL's MultiStep write it, without a last dimension. A sum of 1.5 over two steps stands
    # for 1.5 / (1 - 0.5^2) = 2, a last step's reward of 1 for 1 / (1 - 0.5) = 2: paired wrongly they would give 3.
    n_step = data.clone().set("steps_to_next_obs", torch.tensor([2] * 7 + [1]))
    n_step["next", "reward"][:7] = 1.5
    early.choose_value_support(n_step)
    assert early.value_head.high == pytest.approx(20)
    assert not loss.value_head.has_support
    loss.choose_value_support(data)
    assert loss.value_head.high == pytest.approx(20)
    # Targets 1 + 0.5 Q stay within; a reward of 100 does not.
    data["next", "reward"][:2] = 100.0
    _, info = loss.qvalue_loss(data)
    assert info["target_clipped"].tolist() == [True, True] + [False] * 6
    out = evaluate(loss, data)
    assert list(out.keys()) == loss.out_keys and out["target_clipped"] == 0.25
    # Copies, live critics, state_dict and deep copies value as the loss does.
    fresh = build()
    fresh.load_state_dict(loss.state_dict())
    td = TensorDict({key: data[key] for key in ("observation", "action")}, [8])
    expected = info["q_value"]
    for critics in (live, loss.trained_critics(), fresh.trained_critics(), deepcopy(loss).trained_critics(live=True)):
        for critic, values in zip(critics, expected, strict=True):
            torch.testing.assert_close(critic(td.clone())["state_action_value"].squeeze(-1).detach(), values)
    assert_same(evaluate(fresh, data), out, rtol=0, atol=0)


def test_critics_begin_near_zero_on_a_support_set_later():
    loss = QScoreMatchingLoss(make_actor(), head_critics(2, TwoHotHead(num_bins=101)), delay_qvalue=False)
    loss.value_head.set_support(0.0, 100.0)
    loss.reset_parameters_recursive()
    _, info = loss.qvalue_loss(make_transitions((8,)))
    # 99 % on 0 and 1 % on all points, whose mean is 50
    torch.testing.assert_close(info["q_value"], torch.full((2, 8), 0.5), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Using lock_")  # TorchRL's own, while it is compiled
@pytest.mark.parametrize("half", ["qvalue_loss", "actor_loss"])
def test_both_halves_compile_as_one_graph(half):
    options = {"target_aggregation": 0.5, "bc_weight": 0.5}
    loss, data = QScoreMatchingLoss(make_actor(), head_critics(3), **options), make_transitions((8,))
    SoftUpdate(loss, tau=0.1)
    arguments = {
        "qvalue_loss": (torch.randn(8, ACTION_DIM), torch.randn(5, 8, ACTION_DIM), torch.zeros(8, ACTION_DIM)),
        "actor_loss": (torch.arange(8) % 5, torch.randn(8, ACTION_DIM)),
    }[half]
    results = []
    for function in (getattr(loss, half), torch.compile(getattr(loss, half), fullgraph=True)):
        loss.zero_grad()
        value, info = function(data.clone(), *arguments)
        value.backward()
        results.append(
            (value.detach(), info, {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_support_is_chosen_from_live_rewards():
    data = make_transitions((2, 8))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 3:] = False
    padded = data.clone().set(("collector", "mask"), mask)
    padded["next", "reward"][~mask] = 1e6
    ends = []
    for batch in (data[mask], padded):
        loss = QScoreMatchingLoss(make_actor(), head_critics(2, TwoHotHead(num_bins=11)), delay_qvalue=False)
        loss.choose_value_support(batch)
        ends.append(loss.value_head.high)
    assert ends[1] == pytest.approx(ends[0])
