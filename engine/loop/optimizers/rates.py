"""The learning rate: its highest value, and the schedules as factors of it."""

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from engine.config.options import TrainConfig
from engine.errors import UserError


def peak_rate(config: TrainConfig, world: int) -> float:
    """The rate that schedules multiply: as given, or scaled by the global batch of `world` processes."""
    return scaled(config.learning_rate, config, world)


def scaled(rate: float, config: TrainConfig, world: int) -> float:
    """A rate as it is given, or times the global batch of `world` processes where `--scale_lr` asks for that."""
    scale = config.gradient_accumulation_steps * config.train_batch_size * world if config.scale_lr else 1
    return rate * scale


def rate_factors(config: TrainConfig, peak: float, steps: int) -> Callable[[int], float]:
    """What the highest rate is multiplied by in optimizer step k of `steps`, counted from 0: diffusers' schedules.

    Raises:
        UserError: the schedule cannot have this rate.
    """
    # The schedules come attached to an optimizer; this one only carries the rate, which one of them looks at.
    carrier = torch.optim.SGD([torch.zeros(1)], lr=peak)
    try:
        scheduler = get_scheduler(
            config.lr_scheduler, carrier, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps,
            num_cycles=config.lr_num_cycles, power=config.lr_power,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"--lr_scheduler {config.lr_scheduler} with --learning_rate {peak}: {error}") from None
    return scheduler.lr_lambdas[0]
