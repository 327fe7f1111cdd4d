"""The mathematics that all families share: noise schedules, targets and loss weights.

The forward process is x_t = a x0 + s e. Every training target is c_x x0 + c_e e, and every loss is the mean over the batch of
w(t) times the mean squared error in fp32. A schedule turns timesteps into those five coefficients.
"""

import torch
from torch import Tensor

from engine.errors import UserError


class DiscreteSchedule:
    """A schedule with integer timesteps 0 .. T - 1, tabulated once in double precision.

    Args:
        alphas_cumprod: [T], the cumulative product of 1 - beta.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
        snr_gamma: gamma of the Min-SNR weights, or None for weight 1.

    Raises:
        UserError: `epsilon` on a schedule whose last signal-to-noise ratio is zero, where the noise says nothing about
            the image and the Min-SNR weight is 0/0.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, snr_gamma: float | None) -> None:
        self.prediction_type = prediction_type
        self.table = coefficient_table(alphas_cumprod, prediction_type, snr_gamma)

    @property
    def timesteps(self) -> int:
        return self.table.shape[1]

    def to(self, device: torch.device) -> "DiscreteSchedule":
        self.table = self.table.to(device)
        return self

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """a, s, c_x, c_e and w of `timesteps` [B], each fp32 [B]."""
        alpha, sigma, c_x, c_e, weight = self.table[:, timesteps]
        return alpha, sigma, c_x, c_e, weight


def coefficient_table(alphas_cumprod: Tensor, prediction_type: str, snr_gamma: float | None) -> Tensor:
    """fp32 [5, T]: a, s, c_x, c_e and the weight w for every timestep.

    The targets are those of DDPM (arXiv:2006.11239) and of v-prediction (arXiv:2202.00512); the weights are Min-SNR-gamma
    (arXiv:2303.09556, section 3.4), divided by the factor between the squared error of the prediction and that of x0.
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
    weight = ones if snr_gamma is None else snr.clamp(max=snr_gamma) / divisor
    return torch.stack([alpha, sigma, c_x, c_e, weight]).float()
