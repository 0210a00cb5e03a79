from __future__ import annotations

import torch
from torch.autograd import gradcheck

from qsm_rl.activations import _Mish, mish


def test_mish_equals_torch_in_value_and_gradient():
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.randn(4000), torch.tensor([0.0, -1e30, 1e30])])
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    value, expected = mish(ours), torch.nn.functional.mish(theirs)
    torch.testing.assert_close(value.double(), expected, atol=2e-6, rtol=1e-6)
    grad = torch.randn_like(x)
    value.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(ours.grad.double()[:-2], theirs.grad[:-2], atol=5e-6, rtol=1e-5)


def test_mish_backward_formula_is_the_derivative():
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert gradcheck(_Mish.apply, (x,), check_forward_ad=True)


def test_mish_works_under_vmap_and_func_grad():
    x = torch.randn(4, 3)
    expected = torch.func.vmap(torch.func.grad(lambda row: torch.nn.functional.mish(row).sum()))(x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda row: mish(row).sum()))(x), expected)


def test_mish_has_second_derivatives_by_forward_mode():
    """``torch.func.hessian`` takes forward mode over a gradient; a batch above 2,048 values comes to our own form."""
    x = torch.randn(3000)

    def hessian(activation):
        return torch.func.hessian(lambda scale: activation(scale * x).square().mean())(torch.tensor(1.5))

    torch.testing.assert_close(hessian(mish), hessian(torch.nn.functional.mish))
