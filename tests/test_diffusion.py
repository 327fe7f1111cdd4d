"""Schedules, targets and Min-SNR weights against diffusers' own functions."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from engine.diffusion import DiscreteSchedule, coefficient_rows
from engine.errors import UserError

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO_TERMINAL = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
TIMESTEPS = torch.arange(1000)


def test_forward_process_is_that_of_ddpm():
    schedule = DiscreteSchedule(SCHEDULER.alphas_cumprod, "epsilon", None)
    alpha, sigma, *_ = schedule.coefficients(TIMESTEPS)
    clean, noise = torch.randn(1000, 3), torch.randn(1000, 3)
    expected = SCHEDULER.add_noise(clean, noise, TIMESTEPS)
    torch.testing.assert_close(alpha[:, None] * clean + sigma[:, None] * noise, expected, atol=1e-6, rtol=1e-6)


def test_velocity_is_that_of_diffusers():
    _, _, c_x, c_e, _ = DiscreteSchedule(SCHEDULER.alphas_cumprod, "v_prediction", None).coefficients(TIMESTEPS)
    clean, noise = torch.randn(1000, 3), torch.randn(1000, 3)
    expected = SCHEDULER.get_velocity(clean, noise, TIMESTEPS)
    torch.testing.assert_close(c_x[:, None] * clean + c_e[:, None] * noise, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("prediction", "divisor"), [("epsilon", 0), ("v_prediction", 1), ("sample", None)])
def test_min_snr_weights_follow_the_paper(prediction, divisor):
    snr = compute_snr(SCHEDULER, TIMESTEPS).double()
    expected = snr.clamp(max=5.0)
    if divisor is not None:
        expected = expected / (snr + divisor)
    weight = DiscreteSchedule(SCHEDULER.alphas_cumprod, prediction, 5.0).coefficients(TIMESTEPS)[4]
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=0)


def test_weights_are_one_without_gamma():
    for prediction in ("epsilon", "v_prediction", "sample"):
        assert torch.equal(coefficient_rows(SCHEDULER.alphas_cumprod, prediction, None)[4], torch.ones(1000))


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_epsilon_is_refused_on_zero_terminal_snr(gamma):
    with pytest.raises(UserError, match="zero terminal SNR.*--prediction_type v_prediction"):
        DiscreteSchedule(ZERO_TERMINAL.alphas_cumprod, "epsilon", gamma)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_targets_stay_finite_on_zero_terminal_snr(prediction):
    table = DiscreteSchedule(ZERO_TERMINAL.alphas_cumprod, prediction, 5.0).table
    assert bool(table.isfinite().all())
    assert float(table[4, -1]) == 0.0


def test_unknown_prediction_type_is_named():
    with pytest.raises(UserError, match="'flow'"):
        DiscreteSchedule(SCHEDULER.alphas_cumprod, "flow", None)
