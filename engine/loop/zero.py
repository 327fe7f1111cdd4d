"""DeepSpeed ZeRO: its configuration, and which piece of which parameter this process keeps in fp32.

What docs/design.md says about the choices here in short: DeepSpeed reduces and gathers; the norm, the clipping, AdamW and the
moving average are ours and work on its flat fp32 partitions, so that a step reads nothing back to the host.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import TrainConfig
from engine.errors import UserError
from engine.loop.optimizer import create_optimizer
from engine.processes import Processes

_BUCKET_ELEMENTS = 200_000_000


@dataclass(frozen=True)
class Slice:
    """A run of elements of a flattened parameter, and where this process keeps it: in which flat tensor, from where."""

    name: str
    shape: torch.Size
    start: int
    length: int
    holder: int
    offset: int


class Sharded:
    """The trained module under DeepSpeed, with its fp32 weights as this process holds them.

    engine: the DeepSpeed engine; call it to predict.
    masters: fp32 tensors that the optimizer updates: the parameters themselves, or one flat partition.
    slices: which parameter's elements lie where in `masters`; the same places hold its moments and its moving average.
    replicated: whether every process holds everything.
    frozen: parameters that are not trained, in fp32 on the host, by name.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes) -> None:
        deepspeed = _import_deepspeed(processes)
        self.processes = processes
        stage = machinery_stage(config)
        self.replicated = stage == 0
        self.frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        model.to(processes.device)
        names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = create_optimizer(names, config, None if self.replicated else processes.sum_)
        elements = sum(parameter.numel() for parameter in names)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=deepspeed_config(config, stage, elements),
            dist_init_required=False,
        )
        self.slices: list[Slice] = []
        if self.replicated:
            # DeepSpeed would copy every gradient into buckets and back, for a sum over one process.
            self.engine.enable_backward_allreduce = processes.world > 1
            self.masters: list[Tensor] = list(names)
            for number, (parameter, name) in enumerate(names.items()):
                self.slices.append(Slice(name, parameter.shape, 0, parameter.numel(), number, 0))
        else:
            self.masters = self.engine.optimizer.single_partition_of_fp32_groups
            for holder, group in enumerate(self.engine.optimizer.bit16_groups):
                for parameter in group:
                    self._add_slice(parameter, names[parameter], holder)
        self.shapes = {name: parameter.shape for parameter, name in names.items()}
        self.optimizer.create_state()

    def _add_slice(self, parameter: Tensor, name: str, holder: int) -> None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            ours, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            self.slices.append(Slice(name, parameter.shape, ours.start, ours.numel, holder, flat.start))

    def view(self, piece: Slice, tensors: list[Tensor]) -> Tensor:
        """The elements of a slice in tensors laid out as `masters`."""
        return tensors[piece.holder].detach().view(-1)[piece.offset : piece.offset + piece.length]

    def moments(self, kind: str) -> list[Tensor]:
        """A tensor of the optimizer's state for each of `masters`."""
        return [self.optimizer.state[master][kind] for master in self.masters]

    def gather(self, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters, one at a time, from tensors laid out as `masters`. Every process must iterate to the end."""
        if self.replicated or self.processes.world == 1:
            for piece in self.slices:
                yield piece.name, self.view(piece, tensors).view(piece.shape)
            return
        pieces = {piece.name: piece for piece in self.slices}
        for name, shape in self.shapes.items():
            # Every element is held once, so that adding the parts over processes moves it without rounding.
            whole = torch.zeros(shape.numel(), dtype=torch.float32, device=self.processes.device)
            if name in pieces:
                piece = pieces[name]
                whole[piece.start : piece.start + piece.length] = self.view(piece, tensors).to(whole.device)
            yield name, self.processes.sum_(whole).view(shape)

    def refresh_weights(self) -> None:
        """Makes the module's weights follow `masters` after these were loaded."""
        if not self.replicated:
            self.engine.optimizer.update_lp_params()

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's loss scaler under fp16, else None."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return scaler if scaler is not None and scaler.dynamic else None

    @property
    def loss_scale(self) -> float:
        return float(self.loss_scaler.cur_scale) if self.loss_scaler else 1.0

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def check_precision(config: TrainConfig, processes: Processes) -> None:
    """Raises `UserError` for a precision that DeepSpeed does not run on this device."""
    _import_deepspeed(processes)
    from deepspeed.accelerator import get_accelerator

    supported = {
        "no": True,
        "bf16": get_accelerator().is_bf16_supported(),
        "fp16": get_accelerator().is_fp16_supported(),
    }
    if not supported[config.mixed_precision]:
        others = [name for name in ("bf16", "no") if supported[name]]
        raise UserError(
            f"--mixed_precision {config.mixed_precision} is not supported on this {processes.device.type}; "
            f"use {' or '.join(others)}"
        )


def machinery_stage(config: TrainConfig) -> int:
    """The ZeRO stage that DeepSpeed is given.

    Stage 0 with bf16 takes a dummy first step that shifts Adam's bias correction, so that low precision always runs on the
    partitioned optimizers: stage 1, which leaves the backward pass alone, or stage 2 where micro-batches accumulate, because
    it accumulates in fp32.
    """
    if config.zero_stage or config.mixed_precision == "no":
        return config.zero_stage
    return 2 if config.gradient_accumulation_steps > 1 else 1


def deepspeed_config(config: TrainConfig, stage: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of `elements` parameters."""
    bucket = min(_BUCKET_ELEMENTS, elements + elements % 2)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        # The norm is the optimizer's affair (on the device), and without these two buffers stage 1 installs no hooks.
        zero |= {
            "compute_grad_norm": False,
            "overlap_comm": False,
            "contiguous_gradients": stage == 2,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    if config.mixed_precision == "bf16":
        result["bf16"] = {"enabled": True, "check_grad_overflow": False}
    elif config.mixed_precision == "fp16":
        result["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000}
    if config.mixed_precision != "no" and stage == 2:
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def _import_deepspeed(processes: Processes) -> Any:
    """Imports DeepSpeed, and keeps it from building its shared-memory operator (22 s) on the CPU."""
    # DeepSpeed reads these from the environment even when the process group exists.
    for name, value in (
        ("RANK", processes.rank),
        ("WORLD_SIZE", processes.world),
        ("LOCAL_RANK", processes.local_rank),
    ):
        os.environ.setdefault(name, str(value))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
