from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qsm_rl import QValueCrossQ, QValueMLP, QValueSimBa, ScoreMLP
from qsm_rl.networks import FourierTimeEmbedding, LazyXavierLinear, SinusoidalTimeEmbedding, XavierLinear, mlp


def test_sizes_are_the_authors():
    assert sum(p.numel() for p in ScoreMLP(24, 6).parameters()) == 372_006
    assert sum(p.numel() for p in QValueMLP(24, 6).parameters()) == 279_041


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    network = ScoreMLP(24, 6)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert layer.weight.abs().max().item() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert not layer.bias.any()
    frequencies = FourierTimeEmbedding(20_000).frequencies
    assert frequencies.mean().item() == pytest.approx(0, abs=0.01)
    assert frequencies.std().item() == pytest.approx(0.2, rel=0.03)


def test_fourier_features_by_hand():
    embedding = FourierTimeEmbedding(4)
    embedding.frequencies.data = torch.tensor([[0.25], [0.5]])
    # Angles at t = 1: pi / 2 and pi.
    torch.testing.assert_close(embedding(torch.tensor(1)), torch.tensor([0.0, -1.0, 1.0, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("embedding", [FourierTimeEmbedding(64), SinusoidalTimeEmbedding(64)])
def test_time_features_are_those_of_float32_under_autocast(embedding):
    """Updates run under autocast and acting does not: a timestep has to mean the same in both."""
    timesteps = torch.arange(50)
    with torch.autocast("cpu", torch.bfloat16):
        features = embedding(timesteps)
    torch.testing.assert_close(features, embedding(timesteps))


def test_sinusoidal_features_by_hand():
    embedding = SinusoidalTimeEmbedding(4, max_period=100.0)
    expected = torch.tensor([2.0, 0.2])
    torch.testing.assert_close(embedding(torch.tensor([2]))[0], torch.cat([expected.cos(), expected.sin()]))


@pytest.mark.parametrize("time_embedding", ["fourier", "sinusoidal"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
def test_all_batch_shapes_give_the_rows_alone(time_embedding, shape):
    torch.manual_seed(0)
    network = ScoreMLP(4, 2, (16, 16), time_embedding=time_embedding, layer_norm=True)
    critic = QValueMLP(4, 2, (16,), layer_norm=True)
    action, observation, t = torch.randn(*shape, 2), torch.randn(*shape, 4), torch.randint(5, shape)
    noise, value = network(action, observation, t), critic(observation, action)
    assert noise.shape == (*shape, 2)
    assert value.shape == (*shape, 1)
    flat = zip(
        action.view(-1, 2), observation.view(-1, 4), t.view(-1), noise.view(-1, 2), value.view(-1, 1), strict=True
    )
    for a, o, i, n, v in flat:
        torch.testing.assert_close(network(a, o, i), n)
        torch.testing.assert_close(critic(o, a), v)


@pytest.mark.parametrize("observation_dim", [4, None])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shape", [(), (6,), (3, 5)])
def test_chain_equals_forward_at_each_step(observation_dim, layer_norm, shape):
    torch.manual_seed(0)
    network = ScoreMLP(observation_dim, 2, (16, 16), layer_norm=layer_norm)
    observation = torch.randn(*shape, 4)
    predict = network.reverse_chain(observation, torch.tensor([7, 3, 0]))
    for index, t in enumerate([7, 3, 0]):
        noisy = torch.randn(*shape, 2)
        expected = network(noisy, observation, torch.full(shape, t))
        torch.testing.assert_close(predict(index, noisy), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda network: nn.utils.parametrizations.weight_norm(network.mlp[0]),
        lambda network: network.mlp.__setitem__(0, nn.Sequential(network.mlp[0], nn.Dropout(0.0))),
        lambda network: network.mlp[0].register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda network: network.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda network: network.mlp.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda network: network.mlp[-1].register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda network: network.time_mlp.register_forward_hook(lambda module, inputs, output: 2 * output),
    ],
    ids=["parametrised", "replaced", "hooked", "network hooked", "mlp hooked", "last hooked", "time hooked"],
)
def test_a_chain_calls_what_was_changed_about_the_layers(change):
    torch.manual_seed(0)
    network = ScoreMLP(4, 2, (16,))
    change(network)
    noisy, observation = torch.randn(6, 2), torch.randn(6, 4)
    expected = network(noisy, observation, torch.full((6,), 3))
    torch.testing.assert_close(network.reverse_chain(observation, torch.tensor([3]))(0, noisy), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_observations_in_integers_are_as_those_in_floats(dtype):
    network, noisy, observation = ScoreMLP(4, 2, (16,)).to(dtype), torch.randn(6, 2), torch.randint(5, (6, 4))
    own, t = (noisy.to(dtype), observation.to(dtype)), torch.full((6,), 3)
    torch.testing.assert_close(network(noisy, observation, t), network(*own, t))
    chains = [network.reverse_chain(o, t[:1])(0, a) for a, o in ((noisy, observation), own)]
    torch.testing.assert_close(*chains)


@pytest.mark.parametrize(
    "call", [lambda n, o: n(o[:, :2], o, o[:, 0]), lambda n, o: n.reverse_chain(o, torch.arange(5))]
)
def test_observations_of_another_size_are_named(call):
    with pytest.raises(ValueError, match="observations of size 6, expected 4: the sum of the sizes of all in_keys"):
        call(ScoreMLP(4, 2, (16,)), torch.zeros(8, 6))


@pytest.mark.parametrize("kind", [QValueMLP, QValueSimBa, QValueCrossQ])
def test_a_critic_s_inputs_of_another_size_are_named(kind):
    with pytest.raises(ValueError, match=r"inputs of sizes \[6, 2\], expected 5 in total"):
        kind(3, 2)(torch.zeros(8, 6), torch.zeros(8, 2))


def test_widths_are_a_sequence():
    with pytest.raises(TypeError, match=r"a sequence of widths such as \(256, 256\), got 256"):
        ScoreMLP(4, 2, 256)


def test_gradients_flow_through_the_chain():
    network = ScoreMLP(4, 2, (16,))
    network.reverse_chain(torch.randn(3, 4), torch.tensor([1]))(0, torch.randn(3, 2)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


def test_several_observations_are_joined_before_the_action():
    critic = QValueMLP(5, 2, (8,))
    first, second, action = torch.randn(3, 4), torch.randn(3, 1), torch.randn(3, 2)
    torch.testing.assert_close(critic(first, second, action), critic(torch.cat([first, second], -1), action))


def test_lazy_first_layers_take_their_size_from_the_first_batch():
    torch.manual_seed(0)
    network, critic = ScoreMLP(None, 2, (16,)), QValueMLP(None, 2, (16,))
    network(torch.zeros(3, 2), torch.zeros(3, 7), torch.zeros(3))
    critic(torch.zeros(3, 7), torch.zeros(3, 2))
    for layer, in_features in ((network.mlp[0], 2 + 7 + 128), (critic.mlp[0], 7 + 2)):
        assert type(layer) is XavierLinear
        bound = math.sqrt(6 / (in_features + 16))
        assert layer.weight.shape == (16, in_features)
        assert 0.8 * bound < layer.weight.abs().max().item() <= bound
        assert not layer.bias.any()
    assert isinstance(mlp(None, (), 2, torch.nn.ReLU)[0], LazyXavierLinear)


def test_layer_norm_bounds_the_features():
    critic = QValueMLP(4, 2, (32, 32), layer_norm=True)
    near, far = critic(torch.ones(1, 4), torch.ones(1, 2)), critic(1e6 * torch.ones(1, 4), 1e6 * torch.ones(1, 2))
    assert (far - near).abs().item() < 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreMLP(0, 2), "observation_dim"),
        (lambda: ScoreMLP(4, -1), "action_dim must be at least 1, got -1"),
        (lambda: ScoreMLP(4, 2, (0,)), "hidden_dims"),
        (lambda: ScoreMLP(4, 2, time_embedding="rff"), "time_embedding must be one of"),
        (lambda: ScoreMLP(4, 2, time_features=7), "even"),
        (lambda: QValueMLP(-3, 2), "observation_dim"),
        (lambda: QValueMLP(3, 2, (-5,)), "hidden_dims"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("network", [mlp(3, (4,), 2, nn.ReLU), mlp(None, (), 2, nn.ReLU)])
def test_the_last_layer_keeps_float32_under_autocast(network):
    """100.3 in bfloat16 is 100.5."""
    network(torch.zeros(1, 3))
    with torch.no_grad():
        network[-1].weight.zero_()
        network[-1].bias.copy_(torch.tensor([100.3, -3e-5]))
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.ones(5, 3))
    assert torch.equal(out, torch.tensor([100.3, -3e-5]).expand(5, 2))
