"""DeepSpeed ZeRO: its configuration, and which piece of which parameter this process keeps in fp32.

What docs/design.md says about the choices here in short: DeepSpeed reduces and gathers; the norm, the clipping, AdamW and the
moving average are ours and work on its flat fp32 partitions, so that a step reads nothing back to the host.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import TrainConfig
from engine.errors import UserError
from engine.loop.optimizer import create_optimizer
from engine.loop.partition import Partition, Slice
from engine.processes import Processes

_BUCKET_ELEMENTS = 200_000_000


class _CompleteGradients(torch.autograd.Function):
    """A scalar whose backward pass hands out gradients that are already complete.

    The fused loss writes the gradient of the whole step's loss, scale included. DeepSpeed wants a scalar to call backward
    on; whatever it multiplies that scalar by is already in the gradients.
    """

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return None, *ctx.gradients


class ZeroPartition(Partition):
    """The module under DeepSpeed, which reduces gradients to this process's part and gathers the weights again."""

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes) -> None:
        super().__init__(model, processes)
        deepspeed = _import_deepspeed(processes)
        model.to(processes.device)
        self.accumulation = config.gradient_accumulation_steps
        self.optimizer = create_optimizer(self.parameters, config, processes.sum_)
        elements = sum(parameter.numel() for parameter in self.parameters)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=deepspeed_config(config, machinery_stage(config), elements),
            dist_init_required=False,
        )
        self.masters = self.engine.optimizer.single_partition_of_fp32_groups
        for holder, group in enumerate(self.engine.optimizer.bit16_groups):
            for parameter in group:
                self._add_slice(parameter, self.names[parameter], holder)
        self.optimizer.create_state()

    def _add_slice(self, parameter: Tensor, name: str, holder: int) -> None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            ours, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            self.slices.append(Slice(name, parameter.shape, ours.start, ours.numel, holder, flat.start))

    def predict(self, *arguments: Any, **named: Any) -> Any:
        return self.engine(*arguments, **named)

    def backward(self, prediction: Tensor, gradient: Tensor, first: bool) -> None:
        self._backward(_CompleteGradients.apply([gradient], prediction))

    def receive(self, gradients: Sequence[Tensor], first: bool) -> None:
        if self.accumulation == 1:
            # New tensors over the same memory: autograd then takes them as they are. The gradients of several micro-batches
            # add up, and it must copy the first.
            gradients = [gradient.detach() for gradient in gradients]
        scalar = _CompleteGradients.apply(gradients, *self.parameters)
        # DeepSpeed did not see the forward pass; what it would have prepared there is due now.
        self.engine.optimizer.clear_backward_seen_flag()
        from deepspeed.runtime.utils import register_output_backward_hooks

        register_output_backward_hooks(scalar, self.engine._backward_prologue)
        self._backward(scalar)

    def _backward(self, scalar: Tensor) -> None:
        self.engine.backward(scalar, scale_wrt_gas=False)

    def update(self, last: bool) -> None:
        self.engine.step()

    def refresh_weights(self) -> None:
        self.engine.optimizer.update_lp_params()

    @property
    def loss_scaler(self) -> Any:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return scaler if scaler is not None and scaler.dynamic else None


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

    `--zero_stage 0` asks for no sharding, yet runs on the partitioned optimizers too: they give the same numbers with less
    traffic, and DeepSpeed's stage 0 in bf16 takes a dummy first step that shifts Adam's bias correction. Stage 1 leaves the
    backward pass alone; stage 2 accumulates low-precision micro-batches in fp32.
    """
    if config.zero_stage:
        return config.zero_stage
    return 2 if config.gradient_accumulation_steps > 1 and config.mixed_precision != "no" else 1


def deepspeed_config(config: TrainConfig, stage: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of `elements` parameters."""
    bucket = min(_BUCKET_ELEMENTS, elements + elements % 2)
    zero = {
        "stage": stage,
        # The norm is the optimizer's affair (on the device), and without these two buffers stage 1 installs no hooks.
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
