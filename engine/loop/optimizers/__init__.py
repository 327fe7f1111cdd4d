"""The optimizers, one file each behind the interface of `interface.py`, and the schedules of the learning rate."""

from collections.abc import Callable, Sequence

from torch import Tensor

from engine.config.options import TrainConfig
from engine.loop.optimizers.adamw import AdamW
from engine.loop.optimizers.adamw_8bit import adamw_8bit
from engine.loop.optimizers.interface import Optimizer
from engine.loop.optimizers.rates import peak_rate


def create_optimizer(
    parameters: Sequence[Tensor], config: TrainConfig, world: int, sum_parts: Callable[[Tensor], Tensor] | None
) -> Optimizer:
    """The optimizer that a configuration names, with all parameters in one group."""
    kind = adamw_8bit() if config.use_8bit_adam else AdamW
    return kind(
        [{"name": "weights", "params": list(parameters)}],
        config.max_grad_norm,
        sum_parts,
        lr=peak_rate(config, world),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
