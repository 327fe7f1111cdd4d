"""Pyramid noise: noise whose coarser levels have the colours and shapes that noise of single elements does not have.

The noise is (e + d n_1 + d^2 n_2 + ...) / r: every level n_i is drawn on half the side of the one before and brought to full
size bilinearly, d is the discount, and r makes the variance one. The sum of the levels is a tensor beside the fused operations,
which draw e as ever: their coefficients of the noise are divided by r, and the rest is added to the noisy input and, as part of
the target, taken from the prediction. Every level's interpolation is scaled place by place, so that its variance is the same
everywhere, and with it that of the noise.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from engine.kernels import add_noise
from engine.kernels.add_noise import per_sample

# Levels are drawn under seeds of their own, so many times this apart.
SEEDS_APART = 0x7079_7261_6D69


@dataclass(frozen=True)
class Pyramid:
    """The coarse part of a micro-batch's noise.

    coarse: fp32 [B, C, H, W], the levels over r.
    share: 1 / r, which the noise of single elements is multiplied by.
    """

    coarse: Tensor
    share: float

    def fine(self, coefficients: Tensor) -> Tensor:
        """The coefficients of everything but `coarse`, for the fused operations."""
        alpha, sigma, c_x, c_e, *of_the_loss = coefficients
        return torch.stack([alpha, sigma * self.share, c_x, c_e * self.share, *of_the_loss])

    def take_from(self, prediction: Tensor, coefficients: Tensor) -> Tensor:
        """A prediction [B, C', H, W], C' >= C, in fp32, less the coarse part of its target."""
        compared = prediction.to(torch.float32, copy=True)
        compared[:, : self.coarse.shape[1]] -= per_sample(coefficients[3], self.coarse) * self.coarse
        return compared


def draw_pyramid(seed: Tensor, slots: Tensor, shape: torch.Size, discount: float, levels: int) -> Pyramid:
    """The coarse noise of samples of `shape` (C, H, W), a pure function of seed (int64 [1]) and slots [B].

    Args:
        levels: at most so many; the last one that there can be has a side of a single element.
    """
    channels, height, width = shape
    coarse, variance = torch.zeros(len(slots), *shape, device=slots.device), 1.0
    unit = torch.ones(5, len(slots), device=slots.device)
    for level, (rows, columns) in enumerate(sizes(height, width, levels), 1):
        nothing = torch.zeros(len(slots), channels, rows, columns, device=slots.device)
        noise = add_noise(nothing, None, unit, seed + level * SEEDS_APART, slots, 0.0, 0.0)
        (down, of_down), (across, of_across) = (
            evenness(rows, height, slots.device), evenness(columns, width, slots.device),
        )  # fmt: skip
        large = interpolate(noise, (height, width), mode="bilinear")
        coarse += discount**level * large * down[:, None] * across
        variance += discount ** (2 * level) * of_down * of_across
    share = 1 / math.sqrt(variance)
    return Pyramid(coarse * share, share)


def sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Those of the levels: halves, down to a single element in one direction."""
    halves = itertools.takewhile(lambda level: min(height, width) >> level, range(1, levels + 1))
    return [(height >> level, width >> level) for level in halves]


@functools.cache
def evenness(few: int, many: int, device: torch.device) -> tuple[Tensor, float]:
    """What makes linear interpolation of independent numbers from `few` to `many` places vary alike at all of them.

    Returns:
        A factor for every place, fp32 [many], and the variance of numbers of variance one afterwards: the mean of that before.
    """
    weights = interpolate(torch.eye(few, dtype=torch.float64)[None], many, mode="linear")[0]
    variances = weights.square().sum(0)
    mean = float(variances.mean())
    return (mean / variances).sqrt().float().to(device), mean
