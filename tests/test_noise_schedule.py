from __future__ import annotations

import copy
import warnings

import pytest
import torch

from qsm_rl import NoiseSchedule

SCHEDULES = [NoiseSchedule.vp(5), NoiseSchedule.cosine(20), NoiseSchedule.linear(4, 0.3, 0.99), NoiseSchedule([0.995])]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "cosine", "linear", "own"])
def test_buffers_follow_from_the_betas(schedule):
    betas = schedule.betas.double()
    torch.testing.assert_close(schedule.alphas.double(), 1 - betas, atol=1e-7, rtol=0)
    torch.testing.assert_close(schedule.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-6, rtol=0)
    variance = schedule.alphas_cumprod + schedule.sigmas**2
    torch.testing.assert_close(variance, torch.ones(schedule.num_steps), atol=1e-6, rtol=0)
    assert all(b.dtype == torch.float32 and b.shape == (schedule.num_steps,) for b in schedule.buffers())


def test_two_steps_by_hand():
    schedule = NoiseSchedule([0.36, 0.99])
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.64, 0.0064]))
    torch.testing.assert_close(schedule.sigmas, torch.tensor([0.6, 0.9968]), atol=1e-5, rtol=0)
    noisy, noise = schedule.add_noise(torch.tensor([[1.0, -1.0]]), torch.tensor([0]), torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(noisy, torch.tensor([[0.8 + 0.3, -0.8]]))
    assert noise.tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "cosine", "linear", "own"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4)])
def test_predict_clean_inverts_add_noise(schedule, shape):
    clean = torch.rand(*shape, 3) * 2 - 1
    t = torch.randint(schedule.num_steps, shape)
    noisy, noise = schedule.add_noise(clean, t)
    # The last steps divide by sqrt(alphas_cumprod), a thousandth for the cosine schedule.
    tolerance = 2e-6 / schedule.alphas_cumprod.min().sqrt().item()
    torch.testing.assert_close(schedule.predict_clean(noisy, noise, t), clean, atol=tolerance, rtol=0)


def test_a_thousand_linear_steps_are_those_of_ho_et_al():
    betas = NoiseSchedule.linear(1000).betas
    torch.testing.assert_close(betas[[0, 1, 999]], torch.tensor([1e-4, 1e-4 + 0.0199 / 999, 0.02]))


def test_noised_actions_have_the_variance_of_the_forward_process():
    torch.manual_seed(0)
    schedule = NoiseSchedule.vp(5)
    clean = torch.full((200_000, 1), 0.7)
    for t in range(5):
        noisy, _ = schedule.add_noise(clean, torch.full((200_000,), t))
        assert noisy.mean().item() == pytest.approx(0.7 * schedule.alphas_cumprod[t].sqrt().item(), abs=0.01)
        assert noisy.std().item() == pytest.approx(schedule.sigmas[t].item(), abs=0.01)


def test_stays_float32_and_follows_the_device():
    schedule = NoiseSchedule.vp(5)
    before = schedule.alphas_cumprod.clone()
    holder = torch.nn.ModuleList([schedule, torch.nn.Linear(2, 2)]).to(torch.bfloat16)
    assert holder[1].weight.dtype == torch.bfloat16
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert torch.equal(schedule.alphas_cumprod, before)
    assert schedule.to("meta").betas.device.type == "meta"


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "at least one value"),
        ([[0.1]], "one-dimensional"),
        ([0.5, 1.0], "got 1"),
        ([0.5, 1 - 1e-9], "got 1"),  # which float32 rounds to 1
        ([0.5, 0.0, 0.99], "strictly between 0 and 1, got 0"),
        ([0.5, -0.1, 0.99], "got -0.1"),
        ([float("nan")], "nan"),
    ],
)
def test_bad_betas_are_refused(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(betas)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True])
def test_bad_num_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match="num_steps must be an integer"):
        NoiseSchedule.vp(num_steps)


def test_warns_exactly_when_signal_is_left_at_the_end():
    with pytest.warns(UserWarning, match="pure noise"):
        NoiseSchedule.linear(100)
    with pytest.warns(UserWarning, match=r"is 0\.100: .* pure noise"):
        NoiseSchedule([1 - 0.0101])  # whose root is 0.1005
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoiseSchedule([1 - 0.0099])
        for num_steps in (1, 5, 100):
            NoiseSchedule.vp(num_steps)
            NoiseSchedule.cosine(num_steps)


def test_a_state_dict_cannot_change_the_schedule():
    schedule = NoiseSchedule.vp(5)
    schedule.load_state_dict(copy.deepcopy(schedule).state_dict())
    schedule.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="different noise schedule"):
        schedule.load_state_dict(NoiseSchedule.vp(4).state_dict())
    with pytest.raises(RuntimeError, match="different noise schedule"):
        schedule.load_state_dict(NoiseSchedule.cosine(5).state_dict())


def test_a_beta_that_float32_cannot_tell_from_none_is_refused():
    with pytest.raises(ValueError, match="first beta must be at least 1e-05, got 1e-08"):
        NoiseSchedule([1e-8, 0.5, 0.99])


@pytest.mark.parametrize("t", [-1, 5])
def test_timesteps_that_there_are_not_are_refused(t):
    schedule, action = NoiseSchedule.vp(5), torch.zeros(3, 2)
    for use in (schedule.add_noise, lambda a, t: schedule.predict_clean(a, a, t)):
        with pytest.raises(RuntimeError, match=f"index {t} is out of bounds .* size 5"):
            use(action, torch.full((3,), t))
