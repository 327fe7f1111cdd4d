"""One micro-batch: noise, prediction, loss and gradient. The order of the lines is the order of the computation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.config.options import TrainConfig
from engine.data.samples.loader import Batch
from engine.kernels import add_noise, diffusion_loss
from engine.kernels.add_noise import per_sample
from engine.models.family import Family


def predict_and_compare(
    model: Callable[..., Any], family: Family, batch: Batch, config: TrainConfig, seed: Tensor, gradient_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass of a micro-batch, up to the gradient of the loss with respect to the prediction.

    Everything that differs between micro-batches is read from the device, so that the pass can be captured.

    Args:
        model: calls the trained module.
        seed: int64 [1] on the device.
        gradient_scale: fp32 [1] on the device: loss scale / (micro-batch * accumulation).

    Returns:
        The loss of each sample, fp32 [B]; the prediction, to be differentiated; and its gradient, complete.
    """
    mean = batch.record[family.mean]
    std = batch.record[family.std] if family.std else None
    coefficients = batch.coefficients
    noisy = add_noise(mean, std, coefficients, seed, batch.slots, config.noise_offset, config.input_perturbation)
    correction = None
    if config.dream_training:
        noisy, correction, coefficients = _dream(model, family, batch, config, seed, noisy)
    prediction = family.predict(model, noisy, batch.timesteps, batch.record)
    compared = prediction.detach() if correction is None else prediction.detach() + correction
    loss, gradient = diffusion_loss(compared, mean, std, coefficients, seed, batch.slots, config.noise_offset, gradient_scale)
    return loss, prediction, gradient.to(prediction.dtype)


@torch.no_grad()
def _dream(
    model: Callable[..., Any], family: Family, batch: Batch, config: TrainConfig, seed: Tensor, noisy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """DREAM (arXiv:2312.00210): with d = lambda (e - model(x_t)), lambda = s^p, train on x_t + s d against e + d.

    The target e + d is (1 + lambda) e - lambda model(x_t): the noise keeps its fused form with c_e = 1 + lambda, and the
    rest moves to the prediction's side of the difference, so that the noise is not stored here either.

    Returns:
        The new noisy input, what to add to the prediction before comparing (fp32), and the coefficients of the loss.
    """
    _, sigma, c_x, _, weight = batch.coefficients
    strength = sigma**config.dream_detail_preservation
    first = family.predict(model, noisy, batch.timesteps, batch.record).float()
    mean = batch.record[family.mean]
    # The first two rows make the noise's part of s d, with none of x0; the others are those of the loss.
    coefficients = torch.stack([torch.zeros_like(sigma), sigma * strength, c_x, 1 + strength, weight])
    shift = add_noise(mean.float(), None, coefficients, seed, batch.slots, config.noise_offset, 0.0)
    correction = per_sample(strength, first) * first
    moved = noisy.float() + shift - per_sample(sigma, first) * correction
    return moved.to(noisy.dtype), correction, coefficients
