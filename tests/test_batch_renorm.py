from __future__ import annotations

import pytest
import torch
from torch import nn

from qsm_rl import BatchRenorm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_training_by_hand():
    """Batch (1, 5): mean 3, std 2, unbiased variance 8. Running mean 2, std 4: r = 2/4, d = (3 - 2)/4."""
    layer = BatchRenorm(1, momentum=0.1, eps=1e-12, warmup=0)
    layer.running_mean.fill_(2.0), layer.running_var.fill_(16.0)
    with torch.no_grad():
        layer.weight.fill_(3.0), layer.bias.fill_(1.0)
    x = torch.tensor([[1.0], [5.0]])
    # Nothing is clipped, so it is what evaluation gives: (1 - 2)/4 and (5 - 2)/4, times 3 plus 1.
    expected = torch.tensor([[0.25], [3.25]])
    torch.testing.assert_close(layer.eval()(x), expected)
    torch.testing.assert_close(layer.train()(x), expected)
    torch.testing.assert_close(layer.running_mean, torch.tensor([2.1]))  # 2 + 0.1 (3 - 2)
    torch.testing.assert_close(layer.running_var, torch.tensor([15.2]))  # 16 + 0.1 (8 - 16)
    assert layer.num_batches == 1


def test_clipping_by_hand():
    """Batch (1, 5) against running mean 0 and std 0.1: r = 20 is cut to 3, d = 30 to 5; normalised -1 and 1."""
    layer = BatchRenorm(1, eps=1e-12, warmup=0)
    layer.running_var.fill_(0.01)
    torch.testing.assert_close(layer(torch.tensor([[1.0], [5.0]])), torch.tensor([[2.0], [8.0]]))
    # And from the other side: running std 20, so r = 0.1 becomes 1/3; d = (3 - 203)/20 = -10 becomes -5.
    layer = BatchRenorm(1, eps=1e-12, warmup=0)
    layer.running_mean.fill_(203.0), layer.running_var.fill_(400.0)
    torch.testing.assert_close(layer(torch.tensor([[1.0], [5.0]])), torch.tensor([[-5 - 1 / 3], [-5 + 1 / 3]]))


@pytest.mark.parametrize("options", [{"r_max": 1.0, "d_max": 0.0, "warmup": 0}, {"warmup": 100}])
def test_batch_normalisation_is_the_limit(options):
    mine, theirs = BatchRenorm(4, eps=1e-3, momentum=0.1, **options), nn.BatchNorm1d(4, eps=1e-3, momentum=0.1)
    with torch.no_grad():
        for name in ("weight", "bias"):
            value = torch.randn(4)
            getattr(mine, name).copy_(value), getattr(theirs, name).copy_(value)
    for _ in range(5):
        x = 2 + 3 * torch.randn(16, 4)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(one) for layer, one in zip((mine, theirs), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        gradient = torch.randn(16, 4)
        for output in outputs:
            output.backward(gradient)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(mine.running_mean, theirs.running_mean)
        torch.testing.assert_close(mine.running_var, theirs.running_var)
    torch.testing.assert_close(mine.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(mine.bias.grad, theirs.bias.grad)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


def test_the_warmup_ends_after_as_many_batches():
    layer = BatchRenorm(1, warmup=2)
    layer.running_mean.fill_(1.0)
    x = torch.tensor([[0.0], [2.0], [7.0]])
    means = [layer(x).mean().item() for _ in range(3)]
    assert means[:2] == pytest.approx([0.0, 0.0], abs=1e-6)  # batch normalisation
    assert means[2] > 0.5  # the batch's mean 3 against the running one, near 1


def test_all_leading_dimensions_are_the_batch():
    flat, shaped = BatchRenorm(3), BatchRenorm(3)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(shaped(x).reshape(10, 3), flat(x.reshape(10, 3)))
    torch.testing.assert_close(shaped.running_var, flat.running_var)
    for layer in (flat, shaped):
        layer.eval()
    torch.testing.assert_close(shaped(x[0, 0]), flat(x.reshape(10, 3))[0])


def test_running_statistics_in_bfloat16_arrive_where_the_batches_are():
    """In bfloat16 a mean of 4 plus 1 % of its distance to 5 is 4 again."""
    layer = BatchRenorm(1).to(torch.bfloat16)
    for _ in range(1000):
        layer(torch.tensor([[2.0], [8.0]], dtype=torch.bfloat16))
    assert layer.running_mean.item() == pytest.approx(5, abs=0.01)
    assert layer.running_var.item() == pytest.approx(18, abs=0.01)  # unbiased
    assert layer.eval()(torch.tensor([[5.0]], dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bfloat16_is_computed_in_float32():
    layer = BatchRenorm(2)
    x = (300 + torch.randn(64, 2)).bfloat16()
    output = layer(x)
    assert output.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(output, BatchRenorm(2)(x.float()).bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"momentum": 0.0}, "momentum must be above 0 and at most 1, got 0.0"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"r_max": 0.5}, "r_max must be at least 1, got 0.5"),
        ({"d_max": -1.0}, "d_max must be at least 0, got -1.0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchRenorm(**{"num_features": 2, **arguments})


def test_one_sample_has_no_batch_statistics():
    with pytest.raises(ValueError, match=r"at least 2 samples, got shape \(1, 2\)"):
        BatchRenorm(2)(torch.zeros(1, 2))
