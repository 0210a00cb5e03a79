from __future__ import annotations

import math

import pytest
import torch

from qsm_rl import DDIMSampler, DDPMSampler, NoiseSchedule

SAMPLERS = [
    DDPMSampler(clip=None),
    DDPMSampler(clip="clean"),
    DDIMSampler(clip=None),
    DDIMSampler(eta=1.0),
    DDIMSampler(num_steps=4, eta=0.5),
]


def run_chain(sampler, schedule, predict_noise, start, noisy=True):
    sample = start
    for step in sampler.steps(schedule):
        noise = torch.randn_like(sample) if noisy else None
        sample = sampler.step(sample, predict_noise(sample, step), step, noise)
    return sample


def test_ddpm_step_is_the_authors_formula():
    schedule = NoiseSchedule([0.36, 0.99])
    noisy, predicted, noise = torch.tensor([0.4]), torch.tensor([-0.2]), torch.tensor([0.3])
    last, first = DDPMSampler(clip="sample").steps(schedule)
    beta, alpha, cumprod = 0.99, 0.01, 0.0064
    expected = (0.4 - beta / math.sqrt(1 - cumprod) * -0.2) / math.sqrt(alpha) + math.sqrt(beta) * 0.3
    assert expected > 1
    assert DDPMSampler(clip="sample").step(noisy, predicted, last, noise).item() == 1.0
    unclipped = DDPMSampler(clip=None).step(noisy, predicted, last, noise).item()
    assert unclipped == pytest.approx(expected, rel=1e-5)
    # At t = 0 the noise is not used.
    expected = (0.4 - 0.36 / 0.6 * -0.2) / 0.8
    assert DDPMSampler().step(noisy, predicted, first, noise).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:sqrt")
def test_ddpm_clean_step_is_the_posterior_mean_and_variance():
    schedule = NoiseSchedule([0.36, 0.5])
    step = DDPMSampler(clip="clean").steps(schedule)[0]
    cumprod, previous, beta = 0.32, 0.64, 0.5
    # The implied clean action, (0.9 + sqrt(.68)) / sqrt(.32) > 1, is clipped to 1.
    mean = math.sqrt(previous) * beta / (1 - cumprod) * 1 + math.sqrt(0.5) * (1 - previous) / (1 - cumprod) * 0.9
    std = math.sqrt(beta * (1 - previous) / (1 - cumprod))
    out = DDPMSampler(clip="clean").step(torch.tensor([0.9]), torch.tensor([-1.0]), step, torch.tensor([2.0]))
    assert out.item() == pytest.approx(mean + 2 * std, rel=1e-6)


@pytest.mark.filterwarnings("ignore:sqrt")
def test_ddim_step_recomputes_the_noise_from_the_clipped_clean_action():
    schedule = NoiseSchedule([0.36, 0.5])
    step = DDIMSampler().steps(schedule)[0]
    noisy, cumprod, previous = 0.9, 0.32, 0.64
    noise = (noisy - math.sqrt(cumprod) * 1.0) / math.sqrt(1 - cumprod)
    expected = math.sqrt(previous) * 1.0 + math.sqrt(1 - previous) * noise
    out = DDIMSampler().step(torch.tensor([noisy]), torch.tensor([-1.0]), step, torch.tensor([5.0]))
    assert out.item() == pytest.approx(expected, rel=1e-6)


def test_implicit_sampling_with_all_its_noise_is_ancestral_sampling():
    schedule = NoiseSchedule.vp(5)
    both = zip(DDIMSampler(eta=1.0).steps(schedule), DDPMSampler(clip="clean").steps(schedule), strict=True)
    for implicit, ancestral in both:
        assert implicit == pytest.approx(ancestral)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_the_true_noise_of_one_point_leads_back_to_it(sampler):
    """With the exact noise of a point mass every sampler ends at the point, whatever noise it adds on the way."""
    torch.manual_seed(0)
    point = torch.tensor([0.3, -0.8])
    predict = lambda sample, step: (sample - step.sqrt_alpha_cumprod * point) / step.sigma  # noqa: E731
    end = run_chain(sampler, NoiseSchedule.cosine(8), predict, torch.randn(50, 2))
    torch.testing.assert_close(end, point.expand(50, 2), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "std"),
    [
        (DDPMSampler(clip=None), 0.3),
        (DDPMSampler(clip="clean"), 0.3),
        (DDIMSampler(clip=None), 0.3),
        (DDIMSampler(eta=1.0), 0.3),
    ],
    ids=repr,
)
def test_the_exact_noise_of_a_gaussian_samples_that_gaussian(sampler, std):
    """For clean actions N(m, s^2) the exact noise prediction is linear in the noised action."""
    torch.manual_seed(0)
    mean = 0.2

    def predict(sample, step):
        variance = step.sqrt_alpha_cumprod**2 * std**2 + step.sigma**2
        return step.sigma * (sample - step.sqrt_alpha_cumprod * mean) / variance

    # 400 fine steps: the discretisation error is then below the tolerance.
    samples = run_chain(sampler, NoiseSchedule.cosine(400), predict, torch.randn(20_000, 1))
    assert samples.mean().item() == pytest.approx(mean, abs=0.01)
    assert samples.std().item() == pytest.approx(std, abs=0.015)


def test_timesteps():
    schedule = NoiseSchedule.cosine(10)
    assert [s.t for s in DDPMSampler().steps(schedule)] == list(range(9, -1, -1))
    assert [s.t for s in DDIMSampler().steps(schedule)] == list(range(9, -1, -1))
    assert [s.t for s in DDIMSampler(num_steps=4).steps(schedule)] == [9, 6, 3, 0]
    assert [s.t for s in DDIMSampler(num_steps=5).steps(schedule)] == [9, 7, 4, 2, 0]  # of 9, 6.75, 4.5, 2.25, 0
    assert [s.t for s in DDIMSampler(num_steps=1).steps(schedule)] == [9]


def test_temperature_scales_the_fresh_noise_only():
    schedule = NoiseSchedule.vp(5)
    for hot, cold in zip(DDPMSampler().steps(schedule), DDPMSampler(temperature=0.5).steps(schedule), strict=True):
        assert cold.noise_std == pytest.approx(hot.noise_std / 2)
        assert cold._replace(noise_std=hot.noise_std) == hot
    assert all(s.noise_std == 0 for s in DDPMSampler(temperature=0.0).steps(schedule))
    assert all(s.noise_std == 0 for s in DDIMSampler().steps(schedule))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPMSampler(clip="box"), "clip must be one of"),
        (lambda: DDPMSampler(temperature=-1), "temperature"),
        (lambda: DDIMSampler(num_steps=0), "num_steps"),
        (lambda: DDIMSampler(eta=1.5), "eta"),
        (lambda: DDIMSampler(clip="box"), "clip must be one of"),
        (lambda: DDIMSampler(num_steps=6).steps(NoiseSchedule.vp(5)), "has more steps than the schedule"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
