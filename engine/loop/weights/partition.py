"""What this process keeps of the trained weights in fp32, and where: the common part of `flat.py` and `zero.py`."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.optimizers import OPTIMIZERS
from engine.config.options import TrainConfig
from engine.loop.optimizers import Optimizer, create_optimizer
from engine.loop.optimizers.groups import Group, groups_of
from engine.loop.optimizers.rates import peak_rate
from engine.loop.weights.ema import Ema, decay_of_step
from engine.models.encoder import PRECISIONS
from engine.models.quantized import QuantizedLinear
from engine.models.trained_weights import check_rates
from engine.processes import Processes


@dataclass(frozen=True)
class Slice:
    """A run of elements of a flattened parameter, and where this process keeps it: in which flat tensor, from where."""

    name: str
    shape: torch.Size
    start: int
    length: int
    holder: int
    offset: int


class Partition(ABC):
    """The trained module and its fp32 weights as this process holds them.

    module: the trained module, in the training precision.
    parameters: those of its parameters that are trained.
    masters: flat fp32 tensors that the optimizer updates, each of weights that learn alike.
    keys: names of the optimizer's groups in checkpoints: of parameters where each is one, else the same on every process.
    slices: which parameter's elements lie where in `masters`; the same places hold its moments and its moving average.
    frozen: parameters that are not trained, in fp32 on the host, by name; none beside adapters, which are saved alone.
    frozen_size, frozen_bytes: of what the module holds untrained, in elements, and in bytes on the device of this process.
    ema: the moving average of `masters`, or None.
    captured_whole: whether a CUDA graph can hold all of a micro-batch, or only what comes before the reductions.
    """

    captured_whole = False
    optimizer: Optimizer
    masters: list[Tensor]
    keys: list[str]
    ema: Ema | None = None

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes) -> None:
        self.module, self.config, self.processes = model, config, processes
        frozen = [] if config.trains_beside else [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.frozen = {name: parameter.detach().clone() for name, parameter in frozen}
        size = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        codes = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        self.frozen_size = size + sum(layer.in_features * layer.out_features for layer in codes)
        share = processes.world if config.zero_stage == 3 else 1
        self.frozen_bytes = size * PRECISIONS[config.mixed_precision].itemsize / share
        self.frozen_bytes += sum(layer.codes.nbytes + layer.scales.nbytes for layer in codes)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check_rates(trained, config)
        self.groups = groups_of(trained, config, processes.world)
        self.names: dict[nn.Parameter, str] = {trained[name]: name for name in self.groups}
        self.parameters: list[Tensor] = list(self.names)
        self.shapes = {name: parameter.shape for parameter, name in self.names.items()}
        self.slices: list[Slice] = []

    def create_state(self, flat: Tensor, sum_parts: Callable[[Tensor], Tensor] | None, weights: Tensor | None = None) -> None:
        """Divides the flat fp32 weights into `masters`, and creates what lies beside them: the moving average, if one is kept,
        and the optimizer with its state.

        Args:
            flat: holds `slices`, which lie in the order of their offsets and are told their masters here.
            sum_parts: as an optimizer takes it.
            weights: the same weights in the training precision, which the optimizer then writes too.
        """
        whole = OPTIMIZERS[self.config.optimizer].whole_parameters
        groups: list[Group] = []
        begins: list[int] = []
        for number, piece in enumerate(sorted(self.slices, key=lambda piece: piece.offset)):
            group = self.groups[piece.name]
            if not groups or group != groups[-1] or whole:
                groups.append(group)
                begins.append(piece.offset if groups[1:] else 0)
            self.slices[number] = replace(piece, holder=len(groups) - 1, offset=piece.offset - begins[-1])
        if not groups:  # a part that is all padding
            groups, begins = [next(iter(self.groups.values()))], [0]
        self.bounds = list(zip(begins, [*begins[1:], flat.numel()], strict=True))
        if whole:  # without the room between them
            self.bounds = [(begin, begin + piece.length) for begin, piece in zip(begins, self.slices, strict=True)]
        self.masters = self.divide(flat.detach())
        pieces = [(piece.name, piece.shape) for piece in self.slices] if whole else []
        of_run = list(dict.fromkeys(self.groups.values()))
        self.keys = [name for name, _ in pieces] or ([group.name for group in of_run] if of_run[1:] else ["0"])
        self.optimizer = create_optimizer(self.masters, groups, self.config, sum_parts, pieces, of_run)
        if self.config.keeps_average:
            self.ema = Ema(self.masters, self.config.offload_ema and self.masters[0].is_cuda, self._allocate_fp32)
        averages = self.ema.averages if self.ema and not self._averages_apart else None
        self.optimizer.create_state(self.masters, self.allocate, None if weights is None else self.divide(weights), averages)

    def divide(self, flat: Tensor) -> list[Tensor]:
        """Views of a tensor laid out as the flat weights, one for each of `masters`."""
        return [flat[begin:end] for begin, end in self.bounds]

    @property
    def _averages_apart(self) -> bool:
        """Whether the moving average is updated after the optimizer's step, and not in it."""
        return self.ema is not None and (self.ema.offload or not self.optimizer.in_one_pass)

    def beside(self) -> dict[str, Tensor]:
        """What is saved with the trained weights, by name: parameters that are not trained, and buffers."""
        return {} if self.config.trains_beside else {**self.frozen, **dict(self.module.named_buffers())}

    @property
    def exported(self) -> list[Tensor]:
        """The weights that are shown and saved, laid out as `masters`."""
        return self.ema.averages if self.ema else self.masters

    @property
    def rate(self) -> float:
        """The learning rate of the group whose highest one is the run's, or the nearest to it."""
        peaks, peak = self.optimizer.peak_rates, peak_rate(self.config, self.processes.world)
        return float(min(self.optimizer.param_groups, key=lambda group: abs(peaks[group["name"]] - peak))["lr"])

    def begin(self, step: int, rate_factor: float) -> None:
        """Puts what optimizer step number `step`, counted from 1, needs on the device."""
        self.optimizer.set_rates(rate_factor)
        if self.ema and not self._averages_apart:
            self.optimizer.set_average_weight(1 - decay_of_step(step))

    def end(self, step: int) -> None:
        """To be called when the step has moved the weights."""
        if self.ema and OPTIMIZERS[self.config.optimizer].averages_itself:
            for master, average in zip(self.masters, self.ema.averages, strict=True):
                self.optimizer.write_average(master, average)
        elif self.ema and self._averages_apart:
            self.ema.update(step)

    @abstractmethod
    def predict(self, *arguments: Any, **named: Any) -> Any:
        """Calls the module."""

    @abstractmethod
    def backward(self, prediction: Tensor, gradient: Tensor, first: bool) -> None:
        """Differentiates a micro-batch's prediction, whose gradient is complete, and adds to the gradients of the step."""

    @abstractmethod
    def receive(self, gradients: Sequence[Tensor], first: bool) -> None:
        """Adds a micro-batch's gradients of `parameters` to those of the step, which its first micro-batch begins."""

    @abstractmethod
    def update(self, last: bool) -> None:
        """To be called after every micro-batch; after a step's last, the optimizer moves the weights."""

    def allocate(self, like: Tensor) -> Tensor:
        """Zeros for state laid out as one of `masters`, where that state is kept."""
        return torch.zeros_like(like)

    def _allocate_fp32(self, like: Tensor) -> Tensor:
        return self.allocate(like) if like.dtype == torch.float32 else torch.zeros_like(like, dtype=torch.float32)

    def view(self, piece: Slice, tensors: list[Tensor]) -> Tensor:
        """The elements of a slice in tensors laid out as `masters`."""
        return tensors[piece.holder].detach().view(-1)[piece.offset : piece.offset + piece.length]

    def room_to_gather(self) -> Tensor | None:
        """Memory on the device for any one parameter in fp32, if gathering needs it."""
        if self.processes.world == 1:
            return None
        return torch.empty(max(map(torch.Size.numel, self.shapes.values())), device=self.processes.device)

    def gather(self, tensors: list[Tensor], room: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters, one at a time, from tensors laid out as `masters`. Every process must iterate to the end.

        Args:
            room: from `room_to_gather`, where nothing must be allocated meanwhile; holds each parameter until the next.
        """
        if self.processes.world == 1:
            for piece in self.slices:
                yield piece.name, self.view(piece, tensors).view(piece.shape)
            return
        pieces = {piece.name: piece for piece in self.slices}
        for name, shape in self.shapes.items():
            # Every element is held once, so that adding the parts over processes moves it without rounding.
            size = shape.numel()
            whole = torch.zeros(size, device=self.processes.device) if room is None else room[:size].zero_()
            if name in pieces:
                piece = pieces[name]
                whole[piece.start : piece.start + piece.length].copy_(self.view(piece, tensors))
            yield name, self.processes.sum_(whole).view(shape)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module computes with the moving average; then all weights have their bits again. All must enter."""
        assert self.ema is not None
        kept = [] if self.config.masters == "fp32" else [master.clone() for master in self.masters]
        if kept:  # bf16, which cannot hold the averages
            self.ema.wait()
            torch._foreach_copy_(self.masters, self.ema.averages)
        else:
            self.ema.exchange()
        try:
            self.refresh_weights()
            yield
        finally:  # of this process alone: where something failed the others may be anywhere
            if kept:
                torch._foreach_copy_(self.masters, kept)
            else:
                self.ema.exchange()
        self.refresh_weights()

    @abstractmethod
    def refresh_weights(self) -> None:
        """Makes the module's weights follow `masters` after these were loaded."""

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's loss scaler under fp16, else None."""
        return None

    @property
    def loss_scale(self) -> float:
        return float(self.loss_scaler.cur_scale) if self.loss_scaler else 1.0
