"""Schedules and targets against diffusers' own functions."""

import pytest
import torch
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler

from engine.diffusion.schedules import PLAIN, CosineSchedule, DiscreteSchedule, Objective
from engine.diffusion.weights import min_snr
from engine.errors import UserError
from tests import reference

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO_TERMINAL = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
TIMESTEPS = torch.arange(1000)
MIN_SNR = Objective(min_snr(5.0))


def test_forward_process_is_that_of_ddpm():
    schedule = DiscreteSchedule(SCHEDULER.alphas_cumprod, "epsilon")
    alpha, sigma, *_ = schedule.coefficients(TIMESTEPS)
    clean, noise = torch.randn(1000, 3), torch.randn(1000, 3)
    expected = SCHEDULER.add_noise(clean, noise, TIMESTEPS)
    torch.testing.assert_close(alpha[:, None] * clean + sigma[:, None] * noise, expected, atol=1e-6, rtol=1e-6)


def test_velocity_is_that_of_diffusers():
    _, _, c_x, c_e, _ = DiscreteSchedule(SCHEDULER.alphas_cumprod, "v_prediction").coefficients(TIMESTEPS)
    clean, noise = torch.randn(1000, 3), torch.randn(1000, 3)
    expected = SCHEDULER.get_velocity(clean, noise, TIMESTEPS)
    torch.testing.assert_close(c_x[:, None] * clean + c_e[:, None] * noise, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("objective", [PLAIN, MIN_SNR])
def test_epsilon_is_refused_on_zero_terminal_snr(objective):
    with pytest.raises(UserError, match="zero terminal SNR.*--prediction_type v_prediction"):
        DiscreteSchedule(ZERO_TERMINAL.alphas_cumprod, "epsilon", objective)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_targets_stay_finite_on_zero_terminal_snr(prediction):
    table = DiscreteSchedule(ZERO_TERMINAL.alphas_cumprod, prediction, MIN_SNR).table
    assert bool(table.isfinite().all())
    assert float(table[4, -1]) == 0.0


def test_unknown_prediction_type_is_named():
    with pytest.raises(UserError, match="'flow'"):
        DiscreteSchedule(SCHEDULER.alphas_cumprod, "flow")


REALS = torch.linspace(0, 1, 1001)


def test_the_continuous_schedule_is_that_of_wuerstchen():
    scheduler = DDPMWuerstchenScheduler()
    alpha, sigma, c_x, c_e, weight = CosineSchedule().coefficients(REALS)
    clean, noise = torch.randn(1001, 3), torch.randn(1001, 3)
    expected = scheduler.add_noise(clean, noise, REALS)
    # diffusers subtracts from 1 in fp32, where s^2 = 1e-4 has three digits.
    torch.testing.assert_close(alpha[:, None] * clean + sigma[:, None] * noise, expected, atol=2e-5, rtol=0)
    assert torch.equal(c_x, torch.zeros(1001))
    assert torch.equal(c_e, torch.ones(1001))
    assert torch.equal(weight, torch.ones(1001))
    assert alpha.square().min() == pytest.approx(1e-4)
    assert alpha.square().max() == pytest.approx(0.9999)


def test_the_continuous_schedule_has_min_snr_weights():
    alpha, sigma, _, _, weight = CosineSchedule(MIN_SNR).coefficients(REALS)
    snr = (alpha / sigma).double().square()
    torch.testing.assert_close(weight.double(), snr.clamp(max=5.0) / snr, rtol=1e-5, atol=0)


def test_continuous_timesteps_are_uniform_and_functions_of_the_slot():
    seed, slots = torch.tensor([2**40 + 1]), torch.arange(4096)
    drawn = CosineSchedule().draw(seed, slots, 8)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn[100:200], CosineSchedule().draw(seed, slots[100:200], 8))
    expected = [(int(reference.words(2**40 + 1, slot, 2, 1)[0]) // 256 + 0.5) / 2**24 for slot in range(64)]
    assert drawn[:64].tolist() == torch.tensor(expected, dtype=torch.float32).tolist()
    assert drawn.unique().numel() > 4000
    histogram = torch.histc(drawn, 16, 0, 1)
    assert ((histogram - 256).abs() < 5 * 16).all()
