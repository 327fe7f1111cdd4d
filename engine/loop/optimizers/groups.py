"""Groups of weights that learn at one rate: by patterns of their names, and by their layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from engine.config.options import TrainConfig
from engine.loop.optimizers.rates import peak_rate, scaled
from engine.models.trained_weights import rate_given, whole_name

_BLOCK = re.compile(r"(?:\w+\.)*?(down_blocks|mid_block|up_blocks|transformer_blocks|blocks|layers)\b(?:\.(\d+))?")
_A_LAYER = 3  # blocks of Wuerstchen's prior, of residuals, timestep and attention
_STAGES = ("down_blocks", "mid_block", "up_blocks")  # of a UNet, in the order of its pass


def in_a_block(name: str) -> bool:
    """Whether a parameter is of a block, and not of what comes before or after all."""
    return _BLOCK.match(name) is not None


@dataclass(frozen=True)
class Group:
    """Weights that learn alike.

    name: what people see of it.
    rate: the highest learning rate, which the schedule multiplies.
    """

    name: str
    rate: float


def groups_of(names: Iterable[str], config: TrainConfig, world: int) -> dict[str, Group]:
    """The group of every trained parameter, by name, in the order in which they lie; without options all are in one.

    A rate of `--lr_of` stands as it is given; others are those of the run, times `--layer_lr_decay` for every layer after them.
    """
    peak, depths = peak_rate(config, world), _depths(known := list(names), config)
    found: dict[str, Group] = {}
    for name in known:
        given = rate_given(name, config)
        if given:
            found[name] = Group(f"of {given[0]}", scaled(given[1], config, world))
        elif config.layer_lr_decay < 1:
            layer, later = depths[name]
            found[name] = Group(layer, peak * config.layer_lr_decay**later)
        else:
            found[name] = Group("weights", peak)
    # In an order that no rate decides, which a resumed run may change.
    return {name: group for each in dict.fromkeys(found.values()) for name, group in found.items() if group == each}


def _depths(names: list[str], config: TrainConfig) -> dict[str, tuple[str, int]]:
    """Of every parameter its layer, and how many layers of its part come after that.

    The layers of a part are its blocks in the order of its pass, what comes before them (embeddings, the first convolution),
    and what comes after them.
    """
    layers: dict[str, dict[tuple[int, int, int], None]] = {}
    places: dict[str, tuple[str, tuple[int, int, int], str]] = {}
    begun: set[str] = set()
    for name in names:
        part, _, within = whole_name(name, config).partition(".")
        if block := _BLOCK.match(within):
            stage = _STAGES.index(block[1]) if block[1] in _STAGES else 0
            number = int(block[2] or 0) // (_A_LAYER if block[1] == "blocks" else 1)
            place, layer = (1, stage, number), f"{block[1]}.{number}" if block[2] else block[1]
            begun.add(part)
        else:
            place, layer = ((2, 0, 0), "output") if part in begun else ((0, 0, 0), "input")
        places[name] = part, place, layer
        layers.setdefault(part, {})[place] = None
    ranks = {part: {place: rank for rank, place in enumerate(sorted(of, reverse=True))} for part, of in layers.items()}
    several = len(layers) > 1
    return {
        name: (f"{part}.{layer}" if several else layer, ranks[part][place]) for name, (part, place, layer) in places.items()
    }
