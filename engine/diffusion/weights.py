"""What the squared error of a timestep counts for in the loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config.options import TrainConfig

# Loss weights [T] from signal-to-noise ratios [T], and from the factors [T] between the squared error of the prediction and
# that of x0, all in double precision.
Weighting = Callable[[Tensor, Tensor], Tensor]


def weighting(config: TrainConfig) -> Weighting:
    """The loss weights that the options ask for."""
    if config.snr_gamma is not None:
        return min_snr(config.snr_gamma)
    return unweighted


def unweighted(snr: Tensor, divisor: Tensor) -> Tensor:
    return torch.ones_like(snr)


def min_snr(gamma: float) -> Weighting:
    """Min-SNR-gamma (arXiv:2303.09556, section 3.4)."""
    return lambda snr, divisor: snr.clamp(max=gamma) / divisor
