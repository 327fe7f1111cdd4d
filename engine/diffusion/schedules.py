"""Noise schedules: what makes noisy samples, targets and losses of timesteps.

The forward process is x_t = a x0 + s e. Every training target is c_x x0 + c_e e, and every loss is the mean over the batch of
w(t) times the mean loss of an element in fp32: its squared error, or a Huber loss with the constant c(t). A schedule draws
timesteps and turns them into those coefficients. It works on the host, in double precision, for the few numbers that a batch
needs; they travel to the device with it.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.config.options import TrainConfig
from engine.diffusion.timesteps import UNIFORM, Draw, Sampling, sampling
from engine.diffusion.weights import Huber, Weighting, huber, unweighted, weighting
from engine.errors import UserError

# What a scheduler's configuration says of a schedule whose last timestep is pure noise, where sampling then has to start
# (arXiv:2305.08891, sections 3.1 and 3.3).
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


WEIGHT = 4  # the row of w in coefficients


class Objective(NamedTuple):
    """What is asked of training, whatever the schedule: how errors are weighed and measured, and how timesteps are drawn."""

    weighting: Weighting = unweighted
    sampling: Sampling = UNIFORM
    huber: Huber | None = None


PLAIN = Objective()


def objective(config: TrainConfig) -> Objective:
    """What the options ask for."""
    return Objective(weighting(config), sampling(config), huber(config))


class Schedule(Protocol):
    """What the loop needs of a noise schedule.

    draw: gives the timesteps [B] of slots [B], as the model takes them.
    """

    draw: Draw

    def coefficients(self, timesteps: Tensor, weighed: bool = True) -> Tensor:
        """a, s, c_x, c_e and w of timesteps [B]: fp32 [5, B]; for a Huber loss also c, [6, B].

        Args:
            weighed: as the objective weighs timesteps, else all alike.
        """
        ...


class DiscreteSchedule:
    """A schedule with integer timesteps 0 .. T - 1, tabulated once.

    Args:
        alphas_cumprod: [T], the cumulative product of 1 - beta.
        prediction_type: `epsilon`, `v_prediction` or `sample`.

    Raises:
        UserError: `epsilon` on a schedule whose last signal-to-noise ratio is zero, where the noise says nothing about
            the image and the Min-SNR weight is 0/0; or timesteps that the schedule does not have.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, objective: Objective = PLAIN) -> None:
        self.prediction_type = prediction_type
        count = len(alphas_cumprod)
        self.table, self.unweighed = (
            coefficient_rows(alphas_cumprod, prediction_type, of, torch.arange(count).double() / count)
            for of in (objective, objective._replace(weighting=unweighted))
        )
        self.draw = Draw(objective.sampling, count, integers=True)

    @property
    def timesteps(self) -> int:
        return self.table.shape[1]

    def coefficients(self, timesteps: Tensor, weighed: bool = True) -> Tensor:
        return (self.table if weighed else self.unweighed)[:, timesteps]


class CosineSchedule:
    """The continuous schedule of Wuerstchen (arXiv:2306.00637), for epsilon prediction: timesteps are real numbers in [0, 1].

    They are drawn in fp32: from 0.5 to 1 there are only 1024 numbers in fp16 and 128 in bf16. The cumulative product is the
    cosine schedule of arXiv:2102.09672, section 3.2, with s = 0.008 and clamped to [0.0001, 0.9999], so that its
    signal-to-noise ratio stays between 1e-4 and 1e4.
    """

    OFFSET = 0.008

    def __init__(self, objective: Objective = PLAIN) -> None:
        self.objective = objective
        self.draw = Draw(objective.sampling, 1.0, integers=False)

    def coefficients(self, timesteps: Tensor, weighed: bool = True) -> Tensor:
        angle = (timesteps.double() + self.OFFSET) / (1 + self.OFFSET) * (math.pi / 2)
        first = math.cos(self.OFFSET / (1 + self.OFFSET) * (math.pi / 2)) ** 2
        signal = (angle.cos().square() / first).clamp(0.0001, 0.9999)
        objective = self.objective if weighed else self.objective._replace(weighting=unweighted)
        return coefficient_rows(signal, "epsilon", objective, timesteps)


def coefficient_rows(alphas_cumprod: Tensor, prediction_type: str, objective: Objective, progress: Tensor) -> Tensor:
    """fp32 [5, T] or [6, T]: a, s, c_x, c_e, the weight w and a Huber loss's c for every entry of `alphas_cumprod` [T].

    The targets are those of DDPM (arXiv:2006.11239) and of v-prediction (arXiv:2202.00512).

    Args:
        progress: [T], where the entries lie between the beginning of the schedule, 0, and its end, 1.
    """
    signal = alphas_cumprod.double()
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    # A first timestep without noise, which is one in fp32, has the largest ratio that fp32 can tell from none.
    snr = torch.where(signal < 1, signal / (1 - signal), 2.0**24)
    zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
    if prediction_type == "epsilon":
        if bool((snr == 0).any()):
            raise UserError(
                "prediction type epsilon cannot be trained on a schedule with zero terminal SNR "
                "(rescale_betas_zero_snr): use --prediction_type v_prediction or sample"
            )
        c_x, c_e, divisor = zeros, ones, snr
    elif prediction_type == "v_prediction":
        c_x, c_e, divisor = -sigma, alpha, snr + 1
    elif prediction_type == "sample":
        c_x, c_e, divisor = ones, zeros, ones
    else:
        raise UserError(f"unknown prediction type {prediction_type!r}: use epsilon, v_prediction or sample")
    weight = objective.weighting(snr, divisor)
    if objective.huber is None:
        return torch.stack([alpha, sigma, c_x, c_e, weight]).float()
    threshold = objective.huber.thresholds(snr, progress.double())
    weight = weight / threshold if objective.huber.smooth_l1 else weight
    return torch.stack([alpha, sigma, c_x, c_e, weight, threshold]).float()
