"""What an error of a timestep counts for: loss weights, and where a Huber loss turns from squares to absolute values.

Papers weigh the squared error of x0, or that of the noise, which is the former times the signal-to-noise ratio. Here all are
weights of the error of x0, divided by the factor between it and the error of what is predicted: a paper's objective is the same
whatever the model predicts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.options import TrainConfig

# Loss weights [T] from signal-to-noise ratios [T], and from the factors [T] between the squared error of the prediction and
# that of x0, all in double precision.
Weighting = Callable[[Tensor, Tensor], Tensor]
GAMMA = 5.0  # of both kinds of Min-SNR, as the paper recommends


def weighting(config: TrainConfig) -> Weighting:
    """The loss weights that the options ask for."""
    gamma = config.snr_gamma or GAMMA
    chosen = config.loss_weighting or ("min_snr" if config.snr_gamma is not None else None)
    weigh = {
        None: unweighted,
        "min_snr": min_snr(gamma),
        "soft_min_snr": soft_min_snr(gamma),
        "p2": p2(config.p2_gamma, config.p2_k),
        "debiased": debiased,
        "edm": edm(config.edm_sigma_data),
    }[chosen]
    floor = config.min_loss_weight
    return (lambda snr, divisor: weigh(snr, divisor).clamp(min=floor)) if floor else weigh


def unweighted(snr: Tensor, divisor: Tensor) -> Tensor:
    return torch.ones_like(snr)


def min_snr(gamma: float) -> Weighting:
    """Min-SNR-gamma (arXiv:2303.09556, section 3.4)."""
    return lambda snr, divisor: snr.clamp(max=gamma) / divisor


def soft_min_snr(gamma: float) -> Weighting:
    """Soft-Min-SNR (arXiv:2401.11605): 1 / (sigma^2 + 1 / gamma) with sigma^2 = 1 / SNR; Min-SNR without its corner."""
    return lambda snr, divisor: snr * gamma / (snr + gamma) / divisor


def p2(gamma: float, k: float) -> Weighting:
    """P2 (arXiv:2204.00227, equation 8): 1 / (k + SNR)^gamma on the error of the noise."""
    return lambda snr, divisor: snr / (k + snr) ** gamma / divisor


def debiased(snr: Tensor, divisor: Tensor) -> Tensor:
    """Debiased estimation (arXiv:2310.08442): 1 / sqrt(SNR) on the error of the noise."""
    return snr.sqrt() / divisor


def edm(sigma_data: float) -> Weighting:
    """EDM (arXiv:2206.00364, table 1): (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with sigma^2 = 1 / SNR."""
    return lambda snr, divisor: (snr + sigma_data**-2) / divisor


@dataclass(frozen=True)
class Huber:
    """The pseudo-Huber loss of scheduled Huber (arXiv:2403.16728): 2 c (sqrt(e^2 + c^2) - c), about e^2 below c, 2 c |e| above.

    smooth_l1: divided by c, so that large errors count the same at every timestep.
    """

    c: float
    schedule: str
    smooth_l1: bool

    def thresholds(self, snr: Tensor, progress: Tensor) -> Tensor:
        """c [T] where the signal-to-noise ratio is `snr` [T], at `progress` [T] of the schedule from 0 to 1; fp64."""
        if self.schedule == "exponential":
            return torch.exp(math.log(self.c) * progress)
        if self.schedule == "snr":
            root = snr.sqrt()  # 1 / sigma
            return (1 - self.c) * (root / (1 + root)).square() + self.c
        return torch.full_like(snr, self.c)


def huber(config: TrainConfig) -> Huber | None:
    """The Huber loss that the options ask for; None for the squared error."""
    if config.loss_type == "l2":
        return None
    return Huber(config.huber_c, config.huber_schedule, config.loss_type == "smooth_l1")
