"""One process: weights, masters, moments and gradients in flat buffers, without DeepSpeed.

The module's weights are views of one buffer in the training precision. Nothing moves and nothing is read by the host, so that
a whole optimizer step can be captured as one CUDA graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.optimizers import OPTIMIZERS
from engine.config.options import TrainConfig
from engine.loop.weights.partition import Partition, Slice
from engine.models.encoder import PRECISIONS
from engine.processes import Processes

ALIGNMENT = 64  # elements: every parameter begins on a 128-byte line, also in bf16


class FlatPartition(Partition):
    """All trained weights of a single process.

    In fp32, and without masters, the module's weights are the masters themselves; in bf16 they follow these, in the
    optimizer's pass if it can.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes) -> None:
        super().__init__(model, config, processes)
        self.captured_whole = OPTIMIZERS[config.optimizer].on_device
        dtype, device = PRECISIONS[config.mixed_precision], processes.device
        offset = 0
        for parameter, name in self.names.items():
            self.slices.append(Slice(name, parameter.shape, 0, parameter.numel(), 0, offset))
            offset += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.flat = torch.zeros(offset, dtype=torch.float32 if config.masters == "fp32" else dtype, device=device)
        for parameter, view in zip(self.names, self._views(self.flat), strict=True):
            view.copy_(parameter.detach())
        self.weights = self.flat if dtype == self.flat.dtype else self.flat.to(dtype)
        model.to(device, dtype)
        for parameter, view in zip(self.names, self._views(self.weights), strict=True):
            parameter.data = view
        # A single micro-batch needs no more than its own precision.
        adds_up = config.micro_batches > 1 and config.accumulation_precision == "fp32"
        gradient = torch.zeros_like(self.flat, dtype=torch.float32 if adds_up else dtype)
        self.gradient_views = self._views(gradient)
        self.create_state(self.flat, None, None if self.weights is self.flat else self.weights)
        self.gradients = self.divide(gradient)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Of a flat tensor, before it is divided into masters."""
        return [self.view(piece, [flat]).view(piece.shape) for piece in self.slices]

    def predict(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)

    def backward(self, prediction: Tensor, gradient: Tensor, first: bool) -> None:
        self.receive(torch.autograd.grad(prediction, self.parameters, gradient, materialize_grads=True), first)

    def receive(self, gradients: Sequence[Tensor], first: bool) -> None:
        if first:
            torch._foreach_copy_(self.gradient_views, list(gradients))
        else:
            torch._foreach_add_(self.gradient_views, list(gradients))

    def update(self, last: bool) -> None:
        if last:
            self.optimizer.apply(self.gradients)
            if not self.optimizer.in_one_pass:
                self.refresh_weights()

    def refresh_weights(self) -> None:
        if self.weights is not self.flat:
            self.weights.copy_(self.flat)
