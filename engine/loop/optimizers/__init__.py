"""The optimizers behind the interface of `interface.py`, and the schedules of the learning rate."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from engine.config.options import TrainConfig
from engine.loop.optimizers.adamw import AdamW, Lion
from engine.loop.optimizers.by_parameter import Adafactor, Muon, OfMatrices
from engine.loop.optimizers.groups import Group
from engine.loop.optimizers.interface import Optimizer
from engine.loop.optimizers.library import adamw_8bit, prodigy, schedule_free


def create_optimizer(
    masters: Sequence[Tensor],
    groups: Sequence[Group],
    config: TrainConfig,
    sum_parts: Callable[[Tensor], Tensor] | None,
    pieces: Sequence[tuple[str, Sequence[int]]] = (),
    of_run: Sequence[Group] = (),
) -> Optimizer:
    """The optimizer that a configuration names, of masters and the group of each.

    Args:
        pieces: name and shape of each master's parameter, where each is one (`OptimizerTraits.whole_parameters`).
        of_run: all groups of the run in their order, also those of which this process has no master.
    """
    held = list(zip([[master] for master in masters], groups, strict=True))
    held += [([], group) for group in of_run if group not in groups]
    held.sort(key=lambda each: of_run.index(each[1]) if of_run else 0)
    named: list[dict[str, Any]] = [{"name": group.name, "params": of_group, "lr": group.rate} for of_group, group in held]
    for each in named:
        if each["lr"] == 0:  # Prodigy decays all weights at one rate
            each["weight_decay"] = 0.0
    given = named, config.max_grad_norm, sum_parts
    betas, decay = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay
    adam: dict[str, Any] = {"betas": betas, "eps": config.adam_epsilon, "weight_decay": decay}
    match config.optimizer:
        case "adamw":
            return AdamW(*given, seed=config.seed or 0, **adam)
        case "lion":
            return Lion(*given, seed=config.seed or 0, **adam)
        case "adamw8bit":
            return adamw_8bit()(*given, **adam)
        case "adafactor":
            return Adafactor(*given, pieces, weight_decay=decay)
        case "muon":
            return Muon(*given, pieces, **adam)
        case "prodigy":
            with contextlib.redirect_stdout(io.StringIO()):  # it prints how it decays
                return prodigy()(*given, use_bias_correction=True, safeguard_warmup=True, **adam)
        case "schedulefree_adamw":
            return schedule_free()(*given, **adam)


__all__ = ["OfMatrices", "Optimizer", "create_optimizer"]
