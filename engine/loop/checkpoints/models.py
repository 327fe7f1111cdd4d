"""The models in a checkpoint, as diffusers opens them: made from the slices beside them, of however many processes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.loop.checkpoints.names import ADAPTERS, VECTORS
from engine.loop.checkpoints.slices import SliceFiles, open_slices
from engine.loop.weights.whole import adapter_of, write_published
from engine.models import inversion
from engine.models.adapter import write_adapter
from engine.models.inversion import write_vectors
from engine.models.parts import parts_of
from engine.models.training_form import alphas_of, to_published_form

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
    module: Any,
    shapes: Mapping[str, torch.Size],
    beside: Mapping[str, Tensor],
    part: str,
    dtype: torch.dtype,
    world: int,
    average_alone: bool = False,
    token: str | None = None,
) -> list[Path]:
    """Writes the weights, and the moving average if there is one, into folders of a checkpoint; returns their files.

    Of adapters, and of the vectors of a token, there is a file of each instead.

    Needs no collective, and never holds more than a parameter.

    Args:
        module: the trained module, in training form.
        shapes: of the trained parameters.
        beside: what is saved with them.
        part: as `parts_of` takes it.
        world: how many processes wrote slices.
        average_alone: the average is the model, and the weights that are stepped on are none.
        token: whose vectors alone are trained.
    """
    files = open_slices(checkpoint, world)
    adapted = alphas_of(module)
    written = []
    named = {"ema": "weight"} if average_alone else {kind: kind for kind in FOLDERS}
    for kind in filter(files.kinds.__contains__, named):
        tensors = to_published_form(module, whole_parameters(files, kind, shapes, beside))
        if token:
            written.append(checkpoint / VECTORS[named[kind]])
            write_vectors(written[-1], token, dict(tensors)[inversion.VECTORS])
            continue
        if adapted:
            written.append(checkpoint / ADAPTERS[named[kind]])
            write_adapter(written[-1], adapter_of(module, part, tensors, dtype))
            continue
        folders = {name: checkpoint / FOLDERS[named[kind]].format(name) for name in parts_of(module, part)}
        write_published(folders, module, tensors, dtype)
        written += [path for folder in folders.values() for path in sorted(folder.iterdir())]
    return written
