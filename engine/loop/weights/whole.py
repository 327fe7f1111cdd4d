"""The published model put together from a partition, to be saved or to draw with."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from engine.loop.weights.partition import Partition
from engine.models.training_form import to_published_form
from engine.tensors import write_one_by_one


def whole_tensors(partition: Partition, room: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """Parameters, with the weights that are exported, and buffers of the published model, one at a time.

    Every process must iterate to the end. On a single one they are views of what training holds.

    Args:
        room: as `Partition.gather` takes it.
    """
    partition.processes.synchronize()
    others = partition.frozen.items(), partition.module.named_buffers()
    return to_published_form(partition.module, itertools.chain(partition.gather(partition.exported, room), *others))


def gather_state(partition: Partition, dtype: torch.dtype, keeps: bool, room: Tensor | None) -> dict[str, Tensor] | Exception:
    """The published model's tensors on the device, where `keeps`. Every process must call it.

    Where the exported weights of a single process have this dtype, their memory is the tensors'. Several add up one parameter
    after another in `room`, over all of them: to send it to D of them alone would move D times its bytes, this twice.

    What keeps this process from keeping them, a lack of memory say, is returned: the others need its parts all the same.
    """
    state: dict[str, Tensor] = {}
    failed: Exception | None = None
    for name, tensor in whole_tensors(partition, room):
        if keeps and failed is None:
            try:
                kind = dtype if tensor.is_floating_point() else None
                state[name] = tensor.to(partition.processes.device, kind, copy=room is not None)
            except Exception as error:
                failed = error
                state.clear()
    return failed or state


def published_model(module: Any, state: dict[str, Tensor]) -> Any:
    """The published model of one in training form, to draw with, around tensors of `gather_state`."""
    model = empty_published_model(module)
    model.load_state_dict(state, assign=True, strict=False)
    for name, _ in list(model.named_buffers()):
        # Some are no part of a state dictionary.
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = state[name]
    return model.eval()


def write_published(folder: Path, module: Any, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Writes the published model of one in training form into a folder, as diffusers opens it.

    Args:
        tensors: parameters and buffers of the published model, written one after another.
    """
    model = empty_published_model(module)
    model.save_config(folder)
    layout = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    stored = ((name, tensor) for name, tensor in tensors if name in layout)
    write_one_by_one(folder / SAFETENSORS_WEIGHTS_NAME, layout, stored, {"format": "pt"})


def empty_published_model(module: Any) -> Any:
    """The published model of one in training form, on the meta device."""
    with torch.device("meta"):
        return type(module).from_config(module.config)
