from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import Adam

from qsm_rl.training.updates.piecewise_adam import ALIGNED, BLOCK, PIECES, PiecewiseAdam

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def make_pair(device, **options):
    """Adam and the one under test on equal parameters: of several shapes, two types, one laid out otherwise."""
    pair = []
    for make in (Adam, PiecewiseAdam):
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        values = [draw(65, 47), draw(32), draw(()), draw(2, 33, 7), draw(5, 3, dtype=torch.float64)]
        values += [draw(4, 3, 5, 5).contiguous(memory_format=torch.channels_last), draw(3)]
        parameters = [nn.Parameter(value.to(device)) for value in values]
        optimizer = make(parameters, fused=True, capturable=device == "cuda", **options)
        optimizer.found_inf = torch.zeros((), device=device)
        pair.append((parameters, optimizer))
    return pair


def step_both(pair, seed):
    for parameters, optimizer in pair:
        draw = torch.Generator().manual_seed(seed)
        for parameter in parameters[:-1]:  # the last one has no gradient
            gradient = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype).to(parameter.device)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()


def assert_equal(pair):
    (own, one), (others, other) = pair
    for index, (a, b) in enumerate(zip(own, others, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=f"parameter {index}")
        assert one.state[a].keys() == other.state[b].keys()
        for name, value in one.state[a].items():
            torch.testing.assert_close(value, other.state[b][name], rtol=0, atol=0, msg=f"{name} of {index}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.999), "weight_decay": 0.1, "maximize": True}])
def test_it_is_adam_to_the_bit(device, options):
    pair = make_pair(device, lr=0.01, **options)
    assert pair[0][0][0].numel() > 20 * ALIGNED  # so that it is cut
    for step in range(4):
        step_both(pair, step)
    assert_equal(pair)
    assert pair[1][1].state[pair[1][0][0]]["step"].item() == 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_rate_in_a_tensor_is_read_where_it_lies(device):
    rates = [torch.tensor(0.01, device=device) for _ in range(2)]
    pair = make_pair(device, lr=0.01)
    for (_, optimizer), rate in zip(pair, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
    for step, value in enumerate((0.01, 0.5)):
        for rate in rates:
            rate.fill_(value)
        step_both(pair, step)
    assert_equal(pair)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_changes_nothing(device):
    pair = make_pair(device, lr=0.01)
    step_both(pair, 0)
    parameters, optimizer = pair[1]
    before = [value.clone() for value in (*parameters, *(x for s in optimizer.state.values() for x in s.values()))]
    optimizer.found_inf.fill_(1)
    step_both(pair[1:], 1)
    after = (*parameters, *(x for s in optimizer.state.values() for x in s.values()))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    optimizer.found_inf.fill_(0)
    step_both(pair, 2)
    assert_equal(pair)


def test_a_state_goes_from_adam_to_it_and_back():
    pair = make_pair("cpu", lr=0.01)
    step_both(pair, 0)
    (_, one), (_, other) = pair
    states = one.state_dict(), other.state_dict()
    one.load_state_dict(states[1])
    other.load_state_dict(states[0])
    step_both(pair, 1)
    assert_equal(pair)


def test_weights_are_cut_while_a_card_would_idle(monkeypatch):
    lengths = []
    monkeypatch.setattr(torch, "_fused_adam_", lambda weights, *_, **options: lengths.append([len(x) for x in weights]))
    for size in (100_000, PIECES * BLOCK, PIECES * BLOCK + 1):
        parameter = nn.Parameter(torch.zeros(size))
        parameter.grad = torch.zeros(size)
        optimizer = PiecewiseAdam([parameter], fused=True)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    assert lengths[0] == [3136] * 31 + [100_000 - 31 * 3136]
    assert lengths[1:] == [[PIECES * BLOCK], [PIECES * BLOCK + 1]]


def test_nothing_to_train_is_nothing_to_do():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = PiecewiseAdam([parameter], fused=True)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
