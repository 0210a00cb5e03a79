from __future__ import annotations

import pytest
import torch

from qsm_rl import (
    BoltzmannQScore,
    NoiseSchedule,
    NormalizedQScore,
    PosteriorGradientQScore,
    PosteriorQScore,
    ScaledQScore,
)
from qsm_rl import functional as F

SCHEDULE = NoiseSchedule([0.36, 0.99])  # sigmas 0.6 and sqrt(0.9936)
NOISY = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
T = torch.tensor([0, 1])


def q_value(action):
    """Q = -|a|^2 for actions (K, B, A), so dQ/da = -2 a."""
    return -(action**2).sum(-1)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (ScaledQScore(50.0), 100 * NOISY),
        (BoltzmannQScore(0.5), torch.tensor([[0.6], [0.9936**0.5]]) * 4 * NOISY),
        # mean |dQ/da| = (1 + 2 + 4 + 0) / 4
        (NormalizedQScore(0.1), torch.tensor([[0.6], [0.9936**0.5]]) * 20 * NOISY / 1.75),
    ],
    ids=["scaled", "boltzmann", "normalized"],
)
def test_targets_equal_their_formulas(target, expected):
    value, info = target(q_value, NOISY, T, SCHEDULE)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(info["q_score"], -2 * NOISY)
    assert set(info) == set(target.info_keys)
    assert not value.requires_grad


@pytest.mark.parametrize(
    "target",
    [ScaledQScore(max_norm=1.0), NormalizedQScore(), PosteriorQScore(1.0), PosteriorGradientQScore(1.0)],
    ids=lambda target: type(target).__name__,
)
def test_a_batch_of_several_dimensions_gives_what_its_rows_give(target):
    noisy, t, schedule = torch.randn(2, 3, 2), torch.randint(5, (2, 3)), NoiseSchedule.vp(5)
    torch.manual_seed(0)
    shaped, _ = target(q_value, noisy, t, schedule)
    torch.manual_seed(0)  # the posterior's particles: as many, in the same order
    flat, _ = target(q_value, noisy.flatten(0, 1), t.flatten(), schedule)
    torch.testing.assert_close(shaped, flat.unflatten(0, (2, 3)))


def test_normalized_target_ignores_the_scale_of_q_and_a_flat_critic_is_zero():
    target = NormalizedQScore(0.1)
    expected, _ = target(q_value, NOISY, T, SCHEDULE)
    for scaled in (lambda a: 1e-6 * q_value(a), lambda a: 1e6 * q_value(a)):
        torch.testing.assert_close(target(scaled, NOISY, T, SCHEDULE)[0], expected, rtol=1e-5, atol=1e-6)
    assert not target(lambda a: 0 * q_value(a), NOISY, T, SCHEDULE)[0].any()


def test_clipping_keeps_the_direction_and_reports_the_gradient_itself():
    """dQ/da is (-1, 2) and (-4, 0); its mean absolute value is 1.75."""
    value, info = ScaledQScore(10.0, max_norm=2.0)(q_value, NOISY, T, SCHEDULE)
    torch.testing.assert_close(value, torch.tensor([[10.0, -20.0], [10 * 5**0.5, 0.0]]) * (2 / 5**0.5))
    torch.testing.assert_close(info["q_score"], -2 * NOISY)
    value, _ = NormalizedQScore(1.0, max_norm=2.0)(q_value, NOISY, T, SCHEDULE)
    expected = torch.tensor([[0.6 / 1.75, -1.2 / 1.75], [2 * 0.9936**0.5, 0.0]])
    torch.testing.assert_close(value, expected)
    with pytest.raises(ValueError, match="max_norm"):
        BoltzmannQScore(1.0, max_norm=0.0)


def test_scale_and_temperature_are_buffers_that_can_be_scheduled():
    scaled, boltzmann = ScaledQScore(50.0), BoltzmannQScore(1.0)
    scaled.scale.fill_(10.0)
    boltzmann.temperature.mul_(0.25)
    torch.testing.assert_close(scaled(q_value, NOISY, T, SCHEDULE)[0], 20 * NOISY)
    torch.testing.assert_close(boltzmann(q_value, NOISY, T, SCHEDULE)[0][0], 0.6 * 8 * NOISY[0])
    assert scaled.state_dict()["scale"].item() == 10.0
    assert ScaledQScore().scale.item() == 50.0  # the authors'


@pytest.mark.parametrize(
    "make", [lambda: ScaledQScore(0.0), lambda: BoltzmannQScore(-1.0), lambda: NormalizedQScore(float("nan"))]
)
def test_bad_scales_are_refused(make):
    with pytest.raises(ValueError, match="must be positive"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 1}, "num_particles must be at least 2, got 1"),
        ({"uniform_fraction": 1.1}, r"uniform_fraction must lie in \[0, 1\], got 1.1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 or None, got 0"),
    ],
)
def test_bad_particles_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PosteriorQScore(1.0, **options)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_norms_are_refused(max_norm):
    with pytest.raises(ValueError, match=f"max_norm must be positive and finite, or None, got {max_norm}"):
        ScaledQScore(max_norm=max_norm)


ONE_DIMENSION = {
    "quadratic": lambda a: -2 * (a - 0.3) ** 2,
    "linear": lambda a: 4 * a,
    "bimodal": lambda a: torch.log(torch.exp(-((a - 0.6) ** 2) / 0.02) + 0.5 * torch.exp(-((a + 0.5) ** 2) / 0.02)),
}


def exact_target(q, noisy, cumprod):
    """The posterior's target for one action dimension by quadrature over the box."""
    clean = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    log_weight = q(clean) - (noisy - cumprod**0.5 * clean) ** 2 / (2 * (1 - cumprod))
    weight = torch.softmax(log_weight, 0)
    weight[0] /= 2
    weight[-1] /= 2
    return (noisy - cumprod**0.5 * (weight * clean).sum() / weight.sum()) / (1 - cumprod) ** 0.5


@pytest.mark.parametrize("uniform_fraction", [0.5, 0.0, 1.0])
@pytest.mark.parametrize("name", ONE_DIMENSION)
def test_posterior_target_converges_to_quadrature(name, uniform_fraction):
    """Within 5e-3 at 10^6 particles, and the error falls as one over the root of their number."""
    torch.manual_seed(0)
    q, schedule = ONE_DIMENSION[name], NoiseSchedule.cosine(5)
    noisy, t = torch.tensor([-1.5, 0.1, 0.7]).repeat(3), torch.tensor([0, 2, 4]).repeat_interleave(3)
    exact = torch.stack(
        [exact_target(q, a, c) for a, c in zip(noisy.double(), schedule.alphas_cumprod[t].double(), strict=True)]
    )

    def error(num_particles, repeats):
        target = PosteriorQScore(1.0, num_particles, uniform_fraction=uniform_fraction)
        values = torch.stack(
            [
                target(lambda a: q(a.squeeze(-1)), noisy.unsqueeze(-1), t, schedule)[0].squeeze(-1)
                for _ in range(repeats)
            ]
        )
        return values.double() - exact

    if uniform_fraction == 0.5:
        assert error(1_000_000, 1).abs().max().item() < 5e-3
    few, many = error(100, 200).square().mean().sqrt(), error(10_000, 20).square().mean().sqrt()
    assert few / many == pytest.approx(10, rel=0.35)


def test_posterior_target_in_chunks_is_the_same_and_bounds_the_memory():
    noisy, t, schedule = torch.randn(8, 2), torch.randint(5, (8,)), NoiseSchedule.vp(5)
    sizes = []

    def q(a):
        sizes.append(a.shape[0])
        return -(a**2).sum(-1)

    torch.manual_seed(0)
    whole, _ = PosteriorQScore(1.0, 100)(q, noisy, t, schedule)
    torch.manual_seed(0)
    chunked, info = PosteriorQScore(1.0, 100, chunk_size=30)(q, noisy, t, schedule)
    assert torch.equal(whole, chunked)
    assert sizes == [100, 30, 30, 30, 10]
    assert ((info["effective_sample_size"] >= 1) & (info["effective_sample_size"] <= 100.001)).all()


def test_effective_sample_size_is_full_for_a_flat_critic_and_collapses_with_dimensions():
    torch.manual_seed(0)
    schedule, target = NoiseSchedule.cosine(5), PosteriorQScore(1.0, 256, uniform_fraction=0.0)
    sizes = []
    for dim in (1, 4, 16):
        noisy, t = torch.randn(64, dim), torch.full((64,), 4)
        flat = target(lambda a: torch.zeros(a.shape[:-1]), noisy, t, schedule)[1]["effective_sample_size"]
        torch.testing.assert_close(flat, torch.full((64,), 256.0))
        sizes.append(target(lambda a: -(a**2).sum(-1) / 0.02, noisy, t, schedule)[1]["effective_sample_size"].mean())
    assert sizes[0] > 25 > 5 > sizes[2]


def test_normalized_posterior_has_its_temperature_in_units_of_the_spread_of_q():
    noisy, t, schedule = torch.randn(8, 2), torch.randint(5, (8,)), NoiseSchedule.vp(5)
    spreads = []

    def q(a):
        spreads.append(a.sum(-1).std(0).mean().item())
        return a.sum(-1)

    def target(q, temperature, normalize):
        torch.manual_seed(0)
        return PosteriorQScore(temperature, 64, normalize=normalize)(q, noisy, t, schedule)[0]

    normalized = target(q, 0.5, True)
    torch.testing.assert_close(target(lambda a: 1e4 * a.sum(-1), 0.5, True), normalized, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target(q, 0.5 * spreads[0], False), normalized)


def test_posterior_target_of_a_flat_critic_is_that_of_uniform_actions_whatever_its_value():
    """As critics with a value head are at first: their spread is 0, and with it the normalised temperature."""
    schedule, noisy, t = NoiseSchedule.cosine(10), torch.full((3, 1), 0.7), torch.tensor([0, 5, 9])
    exact = [exact_target(torch.zeros_like, noisy[0].double(), schedule.alphas_cumprod[index].item()) for index in t]
    for value in (0.0, 5.0, 1e6):
        torch.manual_seed(0)
        target, _ = PosteriorQScore(0.1, 20_000, normalize=True)(
            lambda a, value=value: torch.full(a.shape[:-1], value), noisy, t, schedule
        )
        torch.testing.assert_close(target.double(), torch.stack(exact).reshape(3, 1), atol=0.03, rtol=0)


def test_truncated_normal_matches_its_moments_and_reaches_far_tails():
    torch.manual_seed(0)
    uniform = torch.rand(200_000)
    for mean, std in ((0.0, 0.5), (0.9, 0.3), (-2.0, 0.7), (1.5, 5.0)):
        density = torch.distributions.Normal(mean, std)
        grid = torch.linspace(-1, 1, 20_001)
        weight = density.log_prob(grid).exp()
        expected_mean = (weight * grid).sum() / weight.sum()
        expected_std = ((weight * (grid - expected_mean) ** 2).sum() / weight.sum()).sqrt()
        sample = F.truncated_normal(torch.tensor(mean), torch.tensor(std), uniform)
        assert sample.mean().item() == pytest.approx(expected_mean.item(), abs=0.005)
        assert sample.std().item() == pytest.approx(expected_std.item(), rel=0.01)
        assert sample.abs().max() <= 1
    for side in (-1.0, 1.0):
        # 20 standard deviations from the face the mean lies phi(20) / Phi(-20) = 20.04975 of them inwards.
        for distance, inwards in ((3.0, 2.004975), (50.0, 49.0)):
            sample = side * F.truncated_normal(torch.tensor(side * distance), torch.tensor(0.1), uniform)
            assert sample.mean().item() == pytest.approx(distance - inwards, abs=1e-4)
            assert sample.min() > 0.9


@pytest.mark.parametrize("deviations", [4.0, 9.0, 13.0, 30.0])
def test_a_noised_action_far_outside_the_box_has_the_noise_of_its_nearest_face(deviations):
    """A flat critic, and so many standard deviations of noise on the action 1; against a quadrature over the box."""
    torch.manual_seed(0)
    noisy, grid = 0.5**0.5 * (1 + deviations), torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    weight = torch.softmax(-((noisy - 0.5**0.5 * grid) ** 2), 0)
    expected = (noisy - 0.5**0.5 * (weight * grid).sum().item()) / 0.5**0.5
    target, _ = PosteriorQScore(1.0, 10_000)(
        lambda a: torch.zeros(a.shape[:-1]), torch.tensor([[noisy]]), torch.tensor([0]), NoiseSchedule([0.5, 0.99])
    )
    assert target.item() == pytest.approx(expected, abs=0.005)


def test_normalized_target_without_sigma_by_hand():
    """Gradients 2 and -4 have mean size 3; at temperature 0.5 the targets are -2/3/0.5 and 4/3/0.5 at every t."""
    schedule = NoiseSchedule.vp(5)
    slopes = torch.tensor([[2.0], [-4.0]])
    target, _ = NormalizedQScore(0.5, sigma=False)(
        lambda a: (slopes * a).sum(-1), torch.zeros(2, 1), torch.tensor([0, 4]), schedule
    )
    torch.testing.assert_close(target, torch.tensor([[-4 / 3], [8 / 3]]))


def test_gradient_form_agrees_inside_the_box_and_is_wrong_at_its_faces():
    """A narrow Gaussian well inside the box: both forms give (a_t - sqrt(ab) E[a_0 | a_t]) / sigma_t in closed form."""
    torch.manual_seed(0)
    schedule, t = NoiseSchedule([0.3, 0.6]), torch.tensor([0, 1])
    noisy, center, variance = torch.tensor([[0.4], [-0.2]]), 0.2, 0.01
    cumprod = schedule.alphas_cumprod[t].unsqueeze(-1)
    precision = 1 / variance + cumprod / (1 - cumprod)
    clean = (center / variance + cumprod.sqrt() * noisy / (1 - cumprod)) / precision
    expected = (noisy - cumprod.sqrt() * clean) / (1 - cumprod).sqrt()

    def q(a):
        return -((a.squeeze(-1) - center) ** 2) / (2 * variance)

    for kind in (PosteriorQScore, PosteriorGradientQScore):
        target, info = kind(1.0, 200_000, chunk_size=70_000)(q, noisy, t, schedule)
        torch.testing.assert_close(target, expected, atol=0.01, rtol=0, msg=kind.__name__)
        assert (info["effective_sample_size"] > 10_000).all()
    # Why only values of Q are used: for Q = 4 a and a_t = 0
    for cumprod, biased, truth in ((0.5, -4.0, -0.72), (0.1, -12.0, -0.25), (0.0064, -49.8, -0.06)):
        exact = exact_target(ONE_DIMENSION["linear"], torch.tensor(0.0, dtype=torch.float64), cumprod)
        assert exact.item() == pytest.approx(truth, abs=0.01)
        schedule = NoiseSchedule([1 - cumprod, 0.999])
        target, _ = PosteriorGradientQScore(1.0, 10)(
            lambda a: 4 * a.squeeze(-1), torch.zeros(1, 1), torch.tensor([0]), schedule
        )
        assert target.item() == pytest.approx(biased, rel=0.01)
