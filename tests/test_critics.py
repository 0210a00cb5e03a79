from __future__ import annotations

import pytest
import torch

from qsm_rl import QValueCrossQ, QValueMLP, QValueSimBa, TwoHotHead
from qsm_rl.critics import HeadLinear, ResidualBlock

HEAD = TwoHotHead(-5.0, 20.0, 26)
LAZY = ("mlp", "simba")
CRITICS = {
    "mlp": lambda observation_dim, **options: QValueMLP(observation_dim, 2, (16, 16), **options),
    "simba": lambda observation_dim, **options: QValueSimBa(observation_dim, 2, 16, 2, **options),
    "crossq": lambda observation_dim, **options: QValueCrossQ(observation_dim, 2, (16, 16), **options),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scramble(critic):
    """Weights of a trained critic: none is at its start, the last layer's least of all."""
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return critic


@pytest.mark.parametrize("head", [None, HEAD], ids=["scalar", "two-hot"])
@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_all_batch_shapes_give_the_rows_alone(name, head, shape):
    critic = scramble(CRITICS[name](4, head=head)).eval()
    observation, action = torch.randn(*shape, 4), torch.randn(*shape, 2)
    value, outputs = critic(observation, action), critic.outputs(observation, action)
    assert value.shape == (*shape, 1)
    assert outputs.shape == (*shape, 1 if head is None else HEAD.num_bins)
    torch.testing.assert_close(value.squeeze(-1), outputs.squeeze(-1) if head is None else HEAD.value(outputs))
    for o, a, v in zip(observation.view(-1, 4), action.view(-1, 2), value.view(-1, 1), strict=True):
        torch.testing.assert_close(critic(o, a), v)


@pytest.mark.parametrize("head", [None, HEAD], ids=["scalar", "two-hot"])
@pytest.mark.parametrize("name", CRITICS)
def test_the_action_gradient_is_that_of_finite_differences(name, head):
    critic = scramble(CRITICS[name](4, head=head)).double().eval()
    observation, action = torch.randn(3, 4).double(), torch.randn(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: critic(observation, a), (action,))


@pytest.mark.parametrize("name", CRITICS)
def test_a_critic_with_a_head_starts_near_zero_and_flat_and_learns(name):
    critic = CRITICS[name](4, head=HEAD)
    observation, action = torch.randn(64, 4), torch.randn(64, 2)
    value = critic(observation, action)
    assert (value == value[0]).all() and value[0].abs() < 0.2
    target = 3 + 4 * action[:, 0]
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        HEAD.td_loss(critic.outputs(observation, action), target).mean().backward()
        optimizer.step()
    error = critic(observation, action).squeeze(-1) - target.clamp(-5, 20)
    assert error.abs().mean() < 0.3


@pytest.mark.parametrize("head", [None, HEAD], ids=["scalar", "two-hot"])
@pytest.mark.parametrize("name", LAZY)
def test_lazy_critics_take_their_size_from_the_first_batch(name, head):
    critic = CRITICS[name](None, head=head)
    critic(torch.zeros(3, 7), torch.zeros(3, 2))
    assert {key: value.shape for key, value in critic.state_dict().items()} == {
        key: value.shape for key, value in CRITICS[name](7, head=head).state_dict().items()
    }


def test_residual_block_by_hand():
    """x = (1, -1) is normalised already; its first half is expanded by 2, then contracted by 3: 1 + 6, -1."""
    block = ResidualBlock(2)
    with torch.no_grad():
        for layer in (block.expand, block.contract):
            layer.weight.zero_()
        block.expand.weight[0, 0], block.expand.weight[1, 1] = 2.0, 1.0  # relu stops the second, -1
        block.contract.weight[0, 0], block.contract.weight[1, 1] = 3.0, 5.0
    torch.testing.assert_close(block(torch.tensor([1.0, -1.0])), torch.tensor([7.0, -1.0]), rtol=1e-4, atol=1e-4)


def test_size_of_simba_by_hand():
    """Input 30 x 512, two blocks of norm, 512 x 2048 and 2048 x 512, a norm, and the output."""
    blocks = 2 * (2 * 512 + 512 * 2048 + 2048 + 2048 * 512 + 512)
    assert sum(p.numel() for p in QValueSimBa(24, 6).parameters()) == 30 * 512 + 512 + blocks + 2 * 512 + 512 + 1


def test_the_last_layer_of_a_head_is_reset_for_stacked_weights():
    layer = HeadLinear(4, HEAD)
    layer.weight, layer.bias = (torch.nn.Parameter(torch.ones(3, *p.shape)) for p in (layer.weight, layer.bias))
    layer.reset_parameters()
    assert not layer.weight.any()
    torch.testing.assert_close(layer.bias.data, HEAD.initial_outputs().expand(3, -1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QValueSimBa(-3, 2), "observation_dim must be at least 1 or None, got -3"),
        (lambda: QValueSimBa(3, 0), "action_dim must be at least 1, got 0"),
        (lambda: QValueSimBa(3, 2, width=0), "width must be at least 1, got 0"),
        (lambda: QValueSimBa(3, 2, num_blocks=0), "num_blocks must be at least 1, got 0"),
        (lambda: QValueMLP(3, 2, (), head=HEAD), "a hidden layer"),
        (lambda: QValueCrossQ(None, 2), r"needs observation_dim .* got None and \(2048, 2048\)"),
        (lambda: QValueCrossQ(3, 2, ()), r"got 3 and \(\)"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
