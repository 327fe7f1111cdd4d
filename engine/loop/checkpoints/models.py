"""The models in a checkpoint, as diffusers opens them: made from the slices beside them, of however many processes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config.optimizers import OPTIMIZERS
from engine.loop.checkpoints.names import ADAPTERS, VECTORS
from engine.loop.checkpoints.slices import SliceFiles, open_slices
from engine.loop.weights.whole import adapter_of, write_published
from engine.models import inversion
from engine.models.adapter import write_adapter
from engine.models.family import Family
from engine.models.inversion import write_vectors
from engine.models.parts import parts_of
from engine.models.training_form import to_published_form

FOLDERS = {"weight": "{}", "ema": "{}_ema"}  # of the weights and their moving average, as the diffusers scripts name them


def whole_parameters(
    files: SliceFiles, kind: str, shapes: Mapping[str, torch.Size], others: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a model in training form, fp32 on the host and put together from slices one at a time, and then `others`.

    Args:
        shapes: of the trained parameters.
        others: parameters that are not trained, and buffers.
    """
    for name, shape in shapes.items():
        parameter = torch.empty(shape)
        files.fill_parameter(kind, name, parameter)
        yield name, parameter
    yield from others.items()


def write_models(
    checkpoint: Path,
    family: Family,
    module: Any,
    shapes: Mapping[str, torch.Size],
    beside: Mapping[str, Tensor],
    world: int,
) -> list[Path]:
    """Writes the weights, and the moving average if there is one, into folders of a checkpoint; returns their files.

    Of adapters, and of the vectors of a token, there is a file of each instead.

    Needs no collective, and never holds more than a parameter.

    Args:
        module: the trained module, in training form.
        shapes: of the trained parameters.
        beside: what is saved with them.
        world: how many processes wrote slices.
    """
    config, part, dtype = family.config, family.part, family.encoding.dtype
    files = open_slices(checkpoint, world)
    written = []
    # Where the average is the model, the weights that are stepped on are none.
    named = {"ema": "weight"} if OPTIMIZERS[config.optimizer].averages_itself else {kind: kind for kind in FOLDERS}
    for kind in filter(files.kinds.__contains__, named):
        tensors = to_published_form(module, whole_parameters(files, kind, shapes, beside))
        if config.lora_rank:
            written.append(checkpoint / ADAPTERS[named[kind]])
            write_adapter(written[-1], adapter_of(module, part, tensors, dtype))
        elif config.placeholder_token:
            written.append(checkpoint / VECTORS[named[kind]])
            write_vectors(written[-1], config.placeholder_token, dict(tensors)[inversion.VECTORS])
        else:
            folders = {name: checkpoint / FOLDERS[named[kind]].format(name) for name in parts_of(module, part)}
            write_published(folders, module, tensors, dtype)
            written += [path for folder in folders.values() for path in sorted(folder.iterdir())]
    return written
