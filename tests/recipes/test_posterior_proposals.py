from __future__ import annotations

import pytest
import torch

from recipes import posterior_proposals as proposals


def test_quadrature_against_the_closed_form():
    """Q = -20 (a - 0.3)^2 is a Gaussian of variance 1/40 around 0.3, so the posterior mean is one of Gaussians."""
    noisy = torch.tensor([-0.2, 0.1, 0.4])
    for cumprod in (0.5, 0.1):
        precision = 40 + cumprod / (1 - cumprod)
        clean = (40 * 0.3 + cumprod**0.5 * noisy / (1 - cumprod)) / precision
        expected = (noisy - cumprod**0.5 * clean) / (1 - cumprod) ** 0.5
        for form in (proposals.exact_target, proposals.gradient_form):
            value = form(proposals.CRITICS["quadratic"], noisy, cumprod).float()
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)


def test_the_gradient_form_ignores_the_faces():
    noisy = torch.zeros(1)
    for cumprod, gradient, exact in ((0.5, -4.0, -0.72), (0.1, -12.0, -0.25)):
        linear = proposals.CRITICS["linear"]
        assert proposals.gradient_form(linear, noisy, cumprod).item() == pytest.approx(gradient, rel=1e-3)
        assert proposals.exact_target(linear, noisy, cumprod).item() == pytest.approx(exact, abs=0.01)


def test_draws_of_the_boltzmann_law_have_its_mean():
    """exp(4 a) on [-1, 1] has the mean 1 / tanh(4) - 1 / 4."""
    torch.manual_seed(0)
    draws = proposals.boltzmann_draws(proposals.CRITICS["linear"], 1.0, (100_000,))
    assert draws.mean().item() == pytest.approx(0.7507, abs=0.003)
    assert draws.abs().max() <= 1


@pytest.mark.parametrize("repeats", [40])
def test_a_converged_policy_counts_every_particle_at_high_noise_and_another_one_is_biased(repeats, monkeypatch):
    monkeypatch.setattr(proposals, "REPEATS", repeats)
    rows = {(row["critic"], row["t"], row["proposal"]): row for row in proposals.compare(32, seed=0)}
    high = [rows["linear", "4", name] for name in ("policy, converged", "policy, at 4 times the temperature")]
    assert all(float(row["effective_sample_size"]) > 20 for row in high)
    assert float(high[0]["bias"]) < 0.05 < 0.3 < float(high[1]["bias"])
    assert float(rows["linear", "4", "uniform"]["bias"]) < 0.05


def test_everything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(proposals, "REPEATS", 2)
    with pytest.raises(SystemExit) as ended:
        proposals.main(["--particles", "4", "--output", str(tmp_path)])
    assert ended.value.code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"proposals.csv", "table.md", "faces.png"}
    with pytest.raises(SystemExit) as ended:
        proposals.main(["--particles", "1", "--output", str(tmp_path)])
    assert ended.value.code == 2
