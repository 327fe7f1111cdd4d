"""Noise schedules: how timesteps are drawn, and what makes noisy samples, targets and loss weights of them.

The forward process is x_t = a x0 + s e. Every training target is c_x x0 + c_e e, and every loss is the mean over the batch of
w(t) times the mean squared error in fp32. A schedule draws timesteps and turns them into those five coefficients. It works on
the host, in double precision, for the few numbers that a batch needs; they travel to the device with it.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from engine import philox
from engine.diffusion.weights import Weighting
from engine.errors import UserError


class Schedule(Protocol):
    """What the loop needs of a noise schedule."""

    def draw(self, seed: Tensor, slots: Tensor, global_batch: int) -> Tensor:
        """The timesteps [B] of slots [B], as the model takes them: a pure function of seed (int64 [1]), slot
        and global batch.
        """
        ...

    def coefficients(self, timesteps: Tensor) -> Tensor:
        """a, s, c_x, c_e and w of timesteps [B]: fp32 [5, B]."""
        ...


class DiscreteSchedule:
    """A schedule with integer timesteps 0 .. T - 1, tabulated once.

    Args:
        alphas_cumprod: [T], the cumulative product of 1 - beta.
        prediction_type: `epsilon`, `v_prediction` or `sample`.

    Raises:
        UserError: `epsilon` on a schedule whose last signal-to-noise ratio is zero, where the noise says nothing about
            the image and the Min-SNR weight is 0/0.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, weighting: Weighting) -> None:
        self.prediction_type = prediction_type
        self.table = coefficient_rows(alphas_cumprod, prediction_type, weighting)

    @property
    def timesteps(self) -> int:
        return self.table.shape[1]

    def draw(self, seed: Tensor, slots: Tensor, global_batch: int) -> Tensor:
        """Uniform integers, int64."""
        return philox.choices(seed, slots, philox.TIMESTEP, self.timesteps)

    def coefficients(self, timesteps: Tensor) -> Tensor:
        return self.table[:, timesteps]


class CosineSchedule:
    """The continuous schedule of Wuerstchen (arXiv:2306.00637), for epsilon prediction: timesteps are real numbers in [0, 1].

    The cumulative product is the cosine schedule of arXiv:2102.09672, section 3.2, with s = 0.008 and clamped to
    [0.0001, 0.9999], so that its signal-to-noise ratio stays between 1e-4 and 1e4.
    """

    OFFSET = 0.008

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting

    def draw(self, seed: Tensor, slots: Tensor, global_batch: int) -> Tensor:
        """Uniform reals, fp32: from 0.5 to 1 there are only 1024 numbers in fp16 and 128 in bf16."""
        return philox.uniforms(seed, slots, philox.TIMESTEP)

    def coefficients(self, timesteps: Tensor) -> Tensor:
        angle = (timesteps.double() + self.OFFSET) / (1 + self.OFFSET) * (math.pi / 2)
        first = math.cos(self.OFFSET / (1 + self.OFFSET) * (math.pi / 2)) ** 2
        return coefficient_rows((angle.cos().square() / first).clamp(0.0001, 0.9999), "epsilon", self.weighting)


def coefficient_rows(alphas_cumprod: Tensor, prediction_type: str, weighting: Weighting) -> Tensor:
    """fp32 [5, T]: a, s, c_x, c_e and the weight w for every entry of `alphas_cumprod` [T].

    The targets are those of DDPM (arXiv:2006.11239) and of v-prediction (arXiv:2202.00512).
    """
    signal = alphas_cumprod.double()
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    snr = signal / (1 - signal)
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
    return torch.stack([alpha, sigma, c_x, c_e, weighting(snr, divisor)]).float()
