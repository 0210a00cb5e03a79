"""Which critics may be stacked: those that the first one's code evaluates as they would themselves."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from qsm_rl import QScoreMatchingLoss, QValueMLP, TwoHotHead, ValueHead
from tests.loss_contract import ACTION_DIM, OBSERVATION_DIM, make_actor, make_transitions


def wrap(critic: nn.Module) -> TensorDictModule:
    return TensorDictModule(critic, ["observation", "action"], ["state_action_value"])


def make_loss(*critics: nn.Module) -> QScoreMatchingLoss:
    return QScoreMatchingLoss(make_actor(), [wrap(critic) for critic in critics], delay_qvalue=False)


class Network(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.layer = nn.Linear(OBSERVATION_DIM + ACTION_DIM, 1)
        self.scale, self.squash, self.last = 1.0, lambda x: self.scale * x, torch.tanh
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, observation, action):
        return self.last(self.squash(self.layer(torch.cat([observation, action], -1))))


class Distance(ValueHead):
    """A head that says nothing of itself."""

    num_outputs = 1

    def __init__(self, size=1.0):
        self.size = size

    def value(self, outputs):
        return self.size * outputs.squeeze(-1)

    def td_loss(self, outputs, target):
        return (self.value(outputs) - target).abs()


class ScaledDistance(nn.Module, Distance):
    def __init__(self, size, kind):
        super().__init__()
        if kind == "buffer":
            self.register_buffer("size", torch.tensor(size))
        else:
            self.size = nn.Parameter(torch.tensor(size), requires_grad=kind == "parameter")


def headed(head):
    return QValueMLP(OBSERVATION_DIM, ACTION_DIM, (8,), head=head)


@pytest.mark.parametrize(
    "make",
    [
        Network,
        lambda: Network(squash=spectral_norm(nn.Linear(1, 1))),
        lambda: Network(squash=partial(torch.clamp, min=0)),
        lambda: Network(lowest=float("nan"), look_up={}.get),
        lambda: torch.compile(Network(), backend="eager"),
        lambda: headed(Distance()),
        lambda: headed(ScaledDistance(2.0, "frozen")),
        lambda: headed(TwoHotHead(-1.0, 1.0, 11)),
    ],
    ids=["closure", "parametrised", "partial", "numbers", "compiled", "head", "frozen", "two-hot"],
)
def test_critics_of_one_making_keep_their_values(make):
    critics, data = [make(), make()], make_transitions((4,))
    q_value = make_loss(*critics).eval().qvalue_loss(data.clone())[1]["q_value"]
    for critic, values in zip(critics, q_value, strict=True):
        torch.testing.assert_close(critic.eval()(data["observation"], data["action"]).squeeze(-1).detach(), values)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Network(scale=100.0), r"critic 1\.module\.scale is 100\.0, expected 1\.0"),
        (Network(last=torch.sin), r"critic 1\.module\.last is .*sin', expected .*tanh'"),
        (Network(squash=lambda x: -x), r"critic 1\.module\.squash"),
        (Network(squash=nn.ReLU()), r"critic 1\.module\.squash"),
        (Network(layer=nn.Linear(5, 1, bias=False)), r"critic 1\.module\.layer\.bias is missing"),
        (QValueMLP(OBSERVATION_DIM, ACTION_DIM, (8,)), r"critic 1\.module\."),
    ],
)
def test_critics_that_compute_otherwise_are_refused(other, difference):
    with pytest.raises(ValueError, match=f"critics must be identical except for their weights.* {difference}"):
        make_loss(Network(), other)


def test_defaults_of_a_function_count():
    """By them a loop gives each critic a number of its own."""
    critics = [Network(last=lambda x, scale=scale: scale * x) for scale in (1.0, 2.0)]
    with pytest.raises(ValueError, match=r"critic 1\.module\.last\.2\.0 is 2\.0, expected 1\.0"):
        make_loss(*critics)


def test_layers_that_know_one_another_are_compared_once():
    """Each holds all of them: every path through them would be more than a million."""

    def make():
        blocks = [Network() for _ in range(10)]
        for block in blocks:
            block.siblings = blocks
        return Network(squash=blocks[0])

    make_loss(make(), make())


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((Distance(), Distance(2.0)), "the critics must have the same value head"),
        ((Distance(), None), "the critics must have the same value head"),
        ([ScaledDistance(size, "buffer") for size in (1.0, 2.0)], "the critics must have the same value head"),
        ([ScaledDistance(size, "frozen") for size in (1.0, 2.0)], "the critics must have the same value head"),
        ([ScaledDistance(1.0, "parameter") for _ in range(2)], "the value head ScaledDistance has weights"),
    ],
)
def test_heads_that_read_otherwise_or_learn_are_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        make_loss(*map(headed, heads))


@pytest.mark.parametrize("options", [{}, {"num_qvalue_nets": 1, "delay_qvalue": False}])
def test_a_critic_with_tied_weights_is_refused(options):
    """Stacked, each place would get weights of its own."""
    network = Network(squash=nn.Linear(1, 1, bias=False), last=nn.Linear(1, 1))
    QScoreMatchingLoss(make_actor(), wrap(network), **options)
    network.last.weight = network.squash.weight
    with pytest.raises(
        ValueError, match=r"one weight under two names, module\.squash\.weight and module\.last\.weight"
    ):
        QScoreMatchingLoss(make_actor(), wrap(network), **options)


@pytest.mark.parametrize("count", [1, 2])
def test_a_layer_under_two_names_stays_one(count):
    """As where an encoder is an attribute and a part of what the critic runs."""

    class Encoded(Network):
        def __init__(self):
            super().__init__(squash=nn.Linear(1, 1))
            self.body = nn.Sequential(self.layer, nn.Tanh(), self.squash)

        def forward(self, observation, action):
            return self.body(torch.cat([observation, action], -1)) + super().forward(observation, action)

    critics, data = [Encoded() for _ in range(count)], make_transitions((4,))
    loss, own = make_loss(*deepcopy(critics)), nn.ModuleList(critics)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (loss.qvalue_network_params, own)]
    for _ in range(3):
        value, info = loss.qvalue_loss(data.clone())
        outputs = [critic(data["observation"], data["action"]).squeeze(-1) for critic in critics]
        hand = sum((output - info["target_value"]).square().mean() for output in outputs)
        for optimizer, objective in zip(optimizers, (value, hand), strict=True):
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
    for one, critic in zip(loss.trained_critics(), critics, strict=True):
        expected = critic(data["observation"], data["action"])
        torch.testing.assert_close(one(data.clone())["state_action_value"], expected)


def test_hooks_on_a_critic_with_a_head_are_refused():
    critic, calls = headed(Distance()), []
    critic.mlp[0].register_forward_hook(lambda *_: calls.append(1))  # of a layer inside they run
    make_loss(critic)(make_transitions((4,)))
    assert calls
    critic.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"QValueMLP with a value head has hooks.* register the hooks on the layers inside it\."
    ):
        make_loss(critic)(make_transitions((4,)))
