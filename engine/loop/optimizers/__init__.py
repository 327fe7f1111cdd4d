"""The optimizers, one file each behind the interface of `interface.py`, and the schedules of the learning rate."""

from collections.abc import Callable, Sequence

from torch import Tensor

from engine.config.options import TrainConfig
from engine.loop.optimizers.adamw import AdamW
from engine.loop.optimizers.adamw_8bit import adamw_8bit
from engine.loop.optimizers.groups import Group
from engine.loop.optimizers.interface import Optimizer


def create_optimizer(
    masters: Sequence[Tensor], groups: Sequence[Group], config: TrainConfig, sum_parts: Callable[[Tensor], Tensor] | None
) -> Optimizer:
    """The optimizer that a configuration names, of masters and the group of each."""
    kind = adamw_8bit() if config.use_8bit_adam else AdamW
    return kind(
        [{"name": group.name, "params": [master], "lr": group.rate} for master, group in zip(masters, groups, strict=True)],
        config.max_grad_norm,
        sum_parts,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
