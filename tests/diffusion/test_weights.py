"""Loss weights and Huber's constants against the formulas of their papers, in double precision, for every target."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from pydantic import ValidationError

from engine.config.options import TrainConfig
from engine.diffusion.schedules import CosineSchedule, DiscreteSchedule, objective
from tests.objectives import threshold, weight

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO_TERMINAL = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
TARGETS = ("epsilon", "v_prediction", "sample")
SNR = (SCHEDULER.alphas_cumprod.double() / (1 - SCHEDULER.alphas_cumprod.double())).tolist()

WEIGHTINGS = {
    "min_snr": {},
    "snr_gamma alone": {"loss_weighting": None, "snr_gamma": 3.0},
    "soft_min_snr": {"snr_gamma": 4.0},
    "p2": {"p2_gamma": 0.5, "p2_k": 2.0},
    "debiased": {},
    "edm": {},
}


def options(**given) -> TrainConfig:
    return TrainConfig(family="wuerstchen", **given)


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_those_of_their_papers_whatever_is_predicted(name, prediction):
    config = options(**{"loss_weighting": name} | WEIGHTINGS[name])
    weights = DiscreteSchedule(SCHEDULER.alphas_cumprod, prediction, objective(config)).coefficients(torch.arange(1000))[4]
    assert weights.tolist() == pytest.approx([weight(config, snr, prediction) for snr in SNR], rel=1e-6)


def test_min_snr_is_that_of_diffusers():
    snr = compute_snr(SCHEDULER, torch.arange(1000)).double()
    for prediction, divisor in zip(TARGETS, (snr, snr + 1, torch.ones(())), strict=True):
        table = DiscreteSchedule(SCHEDULER.alphas_cumprod, prediction, objective(options(snr_gamma=5.0))).table
        torch.testing.assert_close(table[4].double(), snr.clamp(max=5.0) / divisor, rtol=1e-4, atol=0)


def test_nothing_is_weighed_unless_it_is_asked_for():
    for prediction in TARGETS:
        table = DiscreteSchedule(SCHEDULER.alphas_cumprod, prediction, objective(options())).table
        assert torch.equal(table[4], torch.ones(1000))
        assert len(table) == 5


@pytest.mark.parametrize("prediction", TARGETS[1:])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_stay_finite_without_signal_and_can_be_given_a_floor(name, prediction):
    given = {"loss_weighting": name} | WEIGHTINGS[name]
    free, floored = (
        DiscreteSchedule(ZERO_TERMINAL.alphas_cumprod, prediction, objective(options(**given, min_loss_weight=floor))).table[4]
        for floor in (0.0, 0.125)
    )
    assert bool(free.isfinite().all())
    assert float(free[-1]) == (4.0 if name == "edm" else 0.0)
    assert torch.equal(floored, free.clamp(min=0.125))


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("name", [None, *WEIGHTINGS])
def test_all_is_finite_where_the_first_timestep_has_no_noise(name, prediction):
    signal = torch.tensor([1.0, 1 - 2**-24, 0.5])
    config = options(loss_type="huber", **{"loss_weighting": name} | WEIGHTINGS.get(name, {}))
    table = DiscreteSchedule(signal, prediction, objective(config)).table
    assert bool(table.isfinite().all())
    torch.testing.assert_close(table[4:, 0], table[4:, 1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("smooth_l1", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_thresholds_of_huber_are_those_of_the_paper(schedule, smooth_l1):
    kind = {"loss_type": "smooth_l1" if smooth_l1 else "huber", "huber_c": 0.2, "huber_schedule": schedule, "snr_gamma": 5.0}
    wanted = objective(options(**kind))
    discrete, weighed = (
        DiscreteSchedule(SCHEDULER.alphas_cumprod, "v_prediction", each).table
        for each in (wanted, objective(options(snr_gamma=5.0)))
    )
    reals = torch.linspace(0, 1, 101)
    continuous = CosineSchedule(wanted).coefficients(reals)
    alpha, sigma = CosineSchedule().coefficients(reals)[:2].double()
    for row, places, snr in (
        (discrete[5], [t / 1000 for t in range(1000)], SNR),
        (continuous[5], reals.tolist(), (alpha / sigma).square().tolist()),
    ):
        expected = [threshold(options(**kind), *each) for each in zip(snr, places, strict=True)]
        assert row.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(discrete[:4], weighed[:4])
    torch.testing.assert_close(discrete[4] * (discrete[5] if smooth_l1 else 1), weighed[4], rtol=1e-6, atol=0)


def test_a_threshold_without_signal_is_c():
    wanted = objective(options(loss_type="huber"))
    assert float(DiscreteSchedule(ZERO_TERMINAL.alphas_cumprod, "sample", wanted).table[5, -1]) == pytest.approx(0.1)


@pytest.mark.parametrize("c", [1e-20, 1e20])
def test_a_constant_whose_square_fp32_cannot_hold_is_refused(c):
    with pytest.raises(ValidationError, match="huber_c"):
        options(loss_type="huber", huber_c=c)
