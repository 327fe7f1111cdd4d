"""The fp32 weights of a process, their moving average, and the optimizer's state beside them."""

from torch import nn

from engine.config.optimizers import OPTIMIZERS, named
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.weights.flat import FlatPartition
from engine.loop.weights.partition import Partition
from engine.loop.weights.zero import ZeroPartition
from engine.processes import Processes


def needs_deepspeed(config: TrainConfig, world: int) -> bool:
    """Whether weights are partitioned by DeepSpeed: for several processes, and for what only it does (ZeRO, offloading, its own
    options, fp16's loss scale, the flat partitions that 8-bit AdamW steps on). Else they lie in flat buffers, without it."""
    sharded = world > 1 or config.zero_stage > 0 or config.offload_optimizer != "none" or config.deepspeed_config is not None
    return sharded or config.mixed_precision == "fp16" or config.optimizer == "adamw8bit"


def check_division(config: TrainConfig, world: int) -> None:
    """Refuses to divide weights whose optimizer must see all of them, or that have no masters.

    Raises:
        UserError: which, and what divides them.
    """
    what = f"--optimizer {config.optimizer}" if not OPTIMIZERS[config.optimizer].anywhere else "--masters none"
    if what == "--masters none" and config.masters != "none":
        return
    if needs_deepspeed(config, world):
        by = (
            f"{world} processes" if world > 1 else f"--zero_stage {config.zero_stage}" if config.zero_stage
            else "--offload_optimizer" if config.offload_optimizer != "none"
            else "--mixed_precision fp16" if config.mixed_precision == "fp16" else "--deepspeed_config"
        )  # fmt: skip
        raise UserError(
            f"{what} with {by}, where DeepSpeed divides fp32 masters into flat parts: it is for one process without ZeRO; "
            f"use {named(lambda traits: traits.anywhere)}" if what != "--masters none" else
            f"{what} with {by}, where DeepSpeed keeps and divides fp32 masters; it is for one process without ZeRO"
        )  # fmt: skip


def open_partition(model: nn.Module, config: TrainConfig, processes: Processes, captured: bool) -> Partition:
    """Lays out the weights of a freshly loaded model for training.

    Args:
        captured: whether its steps will be captured, and so do not overlap reductions with the backward pass.
    """
    if needs_deepspeed(config, processes.world):
        return ZeroPartition(model, config, processes, captured)
    return FlatPartition(model, config, processes)
