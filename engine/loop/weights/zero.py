"""DeepSpeed ZeRO: which piece of which parameter this process keeps in fp32, and how its gradients come there.

What docs/design.md says about the choices here in short: DeepSpeed reduces and gathers; the norm, the clipping, AdamW and the
moving average are ours and work on its flat fp32 partitions, so that a step reads nothing back to the host.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.weights.partition import Partition, Slice
from engine.loop.weights.zero_options import deepspeed_config, machinery_stage, read_file
from engine.messages import say
from engine.models.training_form import ResnetBlock
from engine.processes import Processes


class _CompleteGradients(torch.autograd.Function):
    """A scalar whose backward pass hands out gradients that are already complete.

    The fused loss writes the gradient of the whole step's loss, scale included. DeepSpeed wants a scalar to call backward
    on; whatever it multiplies that scalar by is already in the gradients.

    The backward pass empties the list: autograd takes a gradient as it is where no one else holds the tensor, and else copies.
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


class _Stepped(torch.optim.Optimizer):
    """What DeepSpeed steps in the place of the engine's optimizer: with the flat fp32 partition, in which all groups lie.

    on_step: what a step is, with the gradient that DeepSpeed has left beside the partition.
    """

    on_step: Callable[[Tensor], None]

    def __init__(self, parameters: Sequence[Tensor], rate: float) -> None:
        super().__init__(list(parameters), {"lr": rate})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (partition,) = self.param_groups[0]["params"]
        self.on_step(partition.grad)


class ZeroPartition(Partition):
    """The module under DeepSpeed, which reduces gradients to this process's part and gathers the weights again."""

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes, captured: bool) -> None:
        super().__init__(model, config, processes)
        deepspeed = _import_deepspeed(processes)
        model.to(processes.device)
        stepped = _Stepped(self.parameters, next(iter(self.groups.values())).rate)
        elements = sum(parameter.numel() for parameter in self.parameters)
        options = deepspeed_config(config, elements, overlap=processes.world > 1 and not captured)
        self.stage = machinery_stage(config)
        if self.stage == 3:
            set_leaf_modules(model)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=stepped, config=options, dist_init_required=False)
        zero = self.engine.optimizer
        # Whether a gradient's memory is free again when its micro-batch ends: it is the only one, or stage 2 has moved it on.
        self.takes_gradients = config.micro_batches == 1 or (self.stage == 2 and zero.contiguous_gradients)
        if self.stage == 3:
            (flat,), (group,) = zero.fp32_partitioned_groups_flat, zero.fp16_groups
            self._add_even_slices(group)
        else:
            (flat,), (group,) = zero.single_partition_of_fp32_groups, zero.bit16_groups
            for parameter in group:
                self._add_slice(parameter, self.names[parameter])
        self.directory = Path(config.nvme_path) if config.nvme_path else None
        if self.directory:
            flat.data = self.allocate(flat).copy_(flat.detach())
        self.create_state(flat, processes.sum_)
        stepped.on_step = self._step

    def allocate(self, like: Tensor) -> Tensor:
        if self.directory is None:
            return super().allocate(like)
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=f"rank-{self.processes.rank}-") as file:
            # The file loses its name at once and its space with the process, however that ends.
            return torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype).view_as(like)

    def _step(self, gradient: Tensor) -> None:
        gradients = self.divide(gradient)
        for master, part in zip(self.masters, gradients, strict=True):
            master.grad = part
        try:
            self.optimizer.step()
        finally:  # DeepSpeed gives its memory back
            for master in self.masters:
                master.grad = None

    def _add_slice(self, parameter: Tensor, name: str) -> None:
        """Stages 1 and 2: the partition is a piece of all parameters laid end to end."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            # DeepSpeed's view of the weights has a history, which would keep the parameter's AccumulateGrad node for the whole
            # run, bound to the stream of now: differentiating on the stream of a capture would then draw this one into it.
            mapping.lp_fragment = mapping.lp_fragment.detach()
            ours, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            self.slices.append(Slice(name, parameter.shape, ours.start, ours.numel, 0, flat.start))

    def _add_even_slices(self, group: list[Any]) -> None:
        """Stage 3: the partition is an equal piece of every parameter, padded at the end."""
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = self.processes.rank * size
            length = min(size, parameter.ds_numel - start)
            if length > 0:
                self.slices.append(Slice(self.names[parameter], parameter.ds_shape, start, length, 0, offset))
            offset += size

    def predict(self, *arguments: Any, **named: Any) -> Any:
        return self.engine(*arguments, **named)

    def backward(self, prediction: Tensor, gradient: Tensor, first: bool) -> None:
        self.engine.backward(_CompleteGradients.apply([gradient], prediction), scale_wrt_gas=False)

    def receive(self, gradients: Sequence[Tensor], first: bool) -> None:
        from deepspeed.runtime.utils import register_output_backward_hooks

        # Autograd takes new tensors over the same memory as they are. Where micro-batches add up in `.grad` it must copy the
        # first, because a graph writes the next one's there, and does so because the caller holds the tensors.
        given = [gradient.detach() for gradient in gradients] if self.takes_gradients else list(gradients)
        scalar = _CompleteGradients.apply(given, *self.parameters)
        # DeepSpeed did not see the forward pass; what it would have prepared there is due now.
        self.engine.optimizer.clear_backward_seen_flag()
        register_output_backward_hooks(scalar, self.engine._backward_prologue)
        self.engine.backward(scalar, scale_wrt_gas=False)

    def update(self, last: bool) -> None:
        self.engine.step()
        if last and self.stage == 3 and self.loss_scaler is None and self.engine.optimizer.overflow:
            # Stage 3 looks at the norm itself, and then leaves the optimizer out. (Under fp16 that is the search for a scale.)
            self.optimizer.note_skip()

    def refresh_weights(self) -> None:
        zero = self.engine.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        zero._reassign_or_swap_out_partitioned_parameters(0)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @property
    def loss_scaler(self) -> Any:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return scaler if scaler is not None and scaler.dynamic else None


def check_deepspeed(config: TrainConfig, processes: Processes) -> None:
    """Raises `UserError` for a precision that DeepSpeed does not run on this device, or a file of options that contradicts."""
    _import_deepspeed(processes)
    options = deepspeed_config(config, elements=1, overlap=False)
    if config.deepspeed_config:
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig(options)
        except Exception as error:  # what it raises of a value depends on the option
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"--deepspeed_config {config.deepspeed_config}: DeepSpeed refuses it: {said}; mend the file"
            ) from None
    if "scheduler" in read_file(config):
        say(f"--deepspeed_config {config.deepspeed_config}: in place of its scheduler is --lr_scheduler {config.lr_scheduler}")
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


def set_leaf_modules(model: nn.Module) -> None:
    """Lets ZeRO 3 gather residual blocks whole: their forward pass uses the weights of the norms inside."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [ResnetBlock], raise_if_not_found=False)


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
