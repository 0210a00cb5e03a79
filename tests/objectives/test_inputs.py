from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from qsm_rl import QValueMLP
from qsm_rl.objectives.inputs import live_entries, live_mask, network_output

KEYS = (["observation", "action"], ["value"])


def batch():
    torch.manual_seed(0)
    return TensorDict({"observation": torch.randn(5, 3), "action": torch.randn(5, 2)}, [5])


class Subtraction(nn.Module):
    def forward(self, a, b):
        return a - b

    def reversed(self, a, b):
        return b - a


def test_a_plain_network_gives_what_it_would_write():
    critic = TensorDictModule(QValueMLP(3, 2, (8,)), *KEYS)
    torch.testing.assert_close(network_output(critic, batch(), "value"), critic(batch())["value"])


@pytest.mark.parametrize(
    ("network", "sign"),
    [
        (TensorDictModule(Subtraction(), ["x", "y"], ["value"]), 1),
        (TensorDictModule(Subtraction(), ["x", "y"], ["value"], method="reversed"), -1),
        (TensorDictModule(Subtraction(), {"b": "x", "a": "y"}, ["value"]), -1),
        (TensorDictSequential(TensorDictModule(Subtraction(), ["x", "y"], ["value"])), 1),
        (TensorDictModule(lambda x, y: (y, x - y), ["x", "y"], ["other", "value"]), 1),
    ],
    ids=["plain", "method", "keywords", "sequential", "two outputs"],
)
def test_every_kind_of_network_is_called_as_it_says(network, sign):
    td = TensorDict({"x": torch.tensor([5.0]), "y": torch.tensor([3.0])}, [1])
    assert network_output(network, td, "value").item() == 2 * sign


def test_hooks_of_a_network_run():
    network = TensorDictModule(Subtraction(), ["x", "y"], ["value"])
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    network_output(network, TensorDict({"x": torch.ones(1), "y": torch.ones(1)}, [1]), "value")
    assert calls == [1]


def test_a_missing_entry_is_named():
    critic = TensorDictModule(QValueMLP(3, 2, (8,)), *KEYS)
    with pytest.raises(KeyError, match="lacks action; it has observation"):
        network_output(critic, batch().exclude("action"), "value")


def test_a_sample_is_live_by_all_of_its_masks():
    masks = {"one": torch.tensor([[True], [True], [False]]), "two": torch.tensor([True, False, True])}
    assert live_mask(TensorDict(masks, [3]), ["one", "missing", "two"]).tolist() == [True, False, False]
    assert live_mask(TensorDict(masks, [3]), ["missing"]) is None


def test_a_trajectory_ends_where_it_ended_and_before_what_is_masked():
    done = torch.tensor([False, True, False, False, False]).unsqueeze(-1)
    mask = torch.tensor([True, True, True, True, False])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, float("nan")])
    live = live_entries(TensorDict({"x": x, "next": {"done": done}}, [5]), mask, ("next", "done"))
    assert live["next", "done"].flatten().tolist()[:4] == [False, True, False, True]
    assert live["x"].tolist() == [1.0, 2.0, 3.0, 4.0, 0.0]
