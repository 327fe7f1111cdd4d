"""One optimizer step: noise, prediction, loss, backward pass and update, in the order of the computation."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.options import TrainConfig
from engine.data.samples.batch import Batch
from engine.kernels import add_noise, diffusion_loss
from engine.kernels.add_noise import per_sample
from engine.loop.capture import Captured
from engine.loop.metrics import Metrics
from engine.loop.optimizers.rates import peak_rate, rate_factors
from engine.loop.pyramid import Pyramid, draw_pyramid
from engine.loop.run import Run
from engine.loop.weights.partition import Partition
from engine.models.family import Family


class Step:
    """An optimizer step, called with the micro-batches to come and its number.

    Everything that differs between steps is put on the device, so that what follows can be replayed from CUDA graphs: on one
    process the whole micro-batch, under ZeRO 1 and 2 what comes before DeepSpeed's reductions.

    Args:
        captures: whether to do so.
        text_encoder: frozen, on the device, where captions are tokens.
    """

    def __init__(
        self, config: TrainConfig, run: Run, family: Family, partition: Partition, metrics: Metrics, captures: bool,
        text_encoder: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.config, self.family, self.partition, self.metrics = config, family, partition, metrics
        self.text_encoder, self.noise_scale = text_encoder, metrics.noise_scale
        self.accumulation = config.micro_batches
        self.samples = config.train_batch_size * self.accumulation
        processes, device = partition.processes, partition.processes.device
        self.rate_factor_of = rate_factors(config, peak_rate(config, processes.world), run.steps)
        self.seed = torch.tensor([run.seed], device=device)
        self.gradient_scale = torch.full((1,), 1 / self.samples, device=device)
        # Whether a micro-batch begins a step, and whether it ends it.
        self.kinds = [(number == 0, number == self.accumulation - 1) for number in range(self.accumulation)]
        self.whole = self.before_reduction = None
        if captures and partition.captured_whole:
            self.whole = Captured(self.micro_batch, processes, self.kinds, len(run.streams.shapes))
        elif captures:
            self.before_reduction = Captured(self.differentiate, processes, expected=len(run.streams.shapes))

    def __call__(self, batches: Iterator[Batch], number: int) -> None:
        """Step number `number`, counted from 1."""
        partition = self.partition
        partition.begin(number, self.rate_factor_of(number - 1))
        if partition.loss_scaler:
            self.gradient_scale.fill_(partition.loss_scale / self.samples)
        for first, last in self.kinds:
            if last and partition.ema:
                partition.ema.wait()
            (self.whole or self.micro_batch)(next(batches), first, last)
        partition.end(number)
        self.metrics.end_step()

    def micro_batch(self, batch: Batch, first: bool, last: bool) -> None:
        """One micro-batch, and the update after a step's last."""
        partition = self.partition
        if self.before_reduction or self.noise_scale:
            loss, gradients = (self.before_reduction or self.differentiate)(batch)
            if self.noise_scale:
                self.noise_scale.add(gradients, first)
            partition.receive(gradients, first)
        else:
            loss, prediction, gradient = self.compare(partition.predict, batch)
            partition.backward(prediction, gradient, first)
        self.metrics.add(loss, batch, self.accumulation)
        partition.update(last)
        if last and self.noise_scale:
            self.noise_scale.end_step(partition.optimizer.grad_norm)

    def differentiate(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """A micro-batch's losses [B] and gradients, without DeepSpeed: the part of its step that a CUDA graph can hold."""
        loss, prediction, gradient = self.compare(self.partition.module, batch)
        return loss, list(torch.autograd.grad(prediction, self.partition.parameters, gradient, materialize_grads=True))

    def compare(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        scale = self.gradient_scale
        return predict_and_compare(model, self.family, batch, self.config, self.seed, scale, self.text_encoder)

    @property
    def captured(self) -> Captured | None:
        """What of the step is captured."""
        return self.whole or self.before_reduction

    @property
    def graphs(self) -> int:
        """How many graphs there are to replay."""
        return self.captured.graphs if self.captured else 0

    def release(self) -> None:
        """Gives the graphs and their memory back; the next step captures again."""
        if self.captured:
            self.captured.release()


def predict_and_compare(
    model: Callable[..., Any], family: Family, batch: Batch, config: TrainConfig, seed: Tensor, gradient_scale: Tensor,
    text_encoder: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The forward pass of a micro-batch, up to the gradient of the loss with respect to the prediction.

    Everything that differs between micro-batches is read from the device, so that the pass can be captured.

    Args:
        model: calls the trained module.
        seed: int64 [1] on the device.
        gradient_scale: fp32 [1] on the device: loss scale / (micro-batch * accumulation).
        text_encoder: frozen, where captions are tokens.

    Returns:
        The loss of each sample, fp32 [B]; the prediction, to be differentiated; and its gradient, complete.
    """
    encoding = family.encoding
    if text_encoder is not None:
        with torch.no_grad():
            batch = replace(batch, record=batch.record | encoding.encode_tokens(text_encoder, batch.record))
    mean = batch.record[encoding.mean]
    std = batch.record[encoding.std] if encoding.std else None
    coefficients, slots, offset = batch.coefficients, batch.slots, config.noise_offset
    pyramid = None
    if config.pyramid_noise_discount:
        levels = config.pyramid_noise_iterations
        pyramid = draw_pyramid(seed, slots, mean.shape[1:], config.pyramid_noise_discount, levels)
    noisy = _noisy(mean, std, coefficients, seed, slots, offset, config.input_perturbation, pyramid)
    correction = None
    if config.dream_training:
        noisy, correction, coefficients = _dream(model, family, batch, config, seed, noisy, pyramid)
    prediction = family.predict(model, noisy, batch.timesteps, batch.record)
    compared = prediction.detach() if correction is None else prediction.detach() + correction
    if pyramid is not None:
        compared, coefficients = pyramid.take_from(compared, coefficients), pyramid.fine(coefficients)
    mask = batch.record.get("mask")
    loss, gradient = diffusion_loss(compared, mean, std, coefficients, seed, slots, offset, gradient_scale, mask)
    return loss, prediction, gradient.to(prediction.dtype)


def _noisy(
    mean: Tensor, std: Tensor | None, coefficients: Tensor, seed: Tensor, slots: Tensor, offset: float, perturbation: float,
    pyramid: Pyramid | None,
) -> Tensor:  # fmt: skip
    """`add_noise`, and the coarse part of a pyramid's noise."""
    if pyramid is None:
        return add_noise(mean, std, coefficients, seed, slots, offset, perturbation)
    fine, std = pyramid.fine(coefficients), None if std is None else std.float()
    noisy = add_noise(mean.float(), std, fine, seed, slots, offset, perturbation / pyramid.share)
    return (noisy + per_sample(coefficients[1], noisy) * pyramid.coarse).to(mean.dtype)


@torch.no_grad()
def _dream(
    model: Callable[..., Any], family: Family, batch: Batch, config: TrainConfig, seed: Tensor, noisy: Tensor,
    pyramid: Pyramid | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """DREAM (arXiv:2312.00210): with d = lambda (e - model(x_t)), lambda = s^p, train on x_t + s d against e + d.

    The target e + d is (1 + lambda) e - lambda model(x_t): the noise keeps its fused form with c_e = 1 + lambda, and the
    rest moves to the prediction's side of the difference, so that the noise is not stored here either.

    Returns:
        The new noisy input, what to add to the prediction before comparing (fp32), and the coefficients of the loss.
    """
    _, sigma, c_x, _, *rest = batch.coefficients
    strength = sigma**config.dream_detail_preservation
    first = family.predict(model, noisy, batch.timesteps, batch.record).float()
    mean = batch.record[family.encoding.mean]
    # The first two rows make the noise's part of s d, with none of x0; the others are those of the loss.
    coefficients = torch.stack([torch.zeros_like(sigma), sigma * strength, c_x, 1 + strength, *rest])
    shift = _noisy(mean.float(), None, coefficients, seed, batch.slots, config.noise_offset, 0.0, pyramid)
    correction = per_sample(strength, first) * first
    moved = noisy.float() + shift - per_sample(sigma, first) * correction
    return moved.to(noisy.dtype), correction, coefficients
