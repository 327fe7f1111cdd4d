"""The published model put together from a partition, to be saved or to draw with."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from engine.loop.weights.partition import Partition
from engine.models.adapter import Adapter
from engine.models.parts import empty_copy, part_and_name, parts_of, prefix_of
from engine.models.training_form import alphas_of, to_published_form
from engine.tensors import writing


def whole_tensors(partition: Partition, room: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """Parameters, with the weights that are exported, and buffers of the published model, one at a time; or adapters alone.

    Every process must iterate to the end. On a single one they are views of what training holds.

    Args:
        room: as `Partition.gather` takes it.
    """
    partition.processes.synchronize()
    others = partition.beside().items()
    return to_published_form(partition.module, itertools.chain(partition.gather(partition.exported, room), others))


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


def published_parts(module: Any, part: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """The published models of a module in training form, to draw with, around tensors of `gather_state`.

    Args:
        part: as `parts_of` takes it.
    """
    model = empty_copy(module)
    model.load_state_dict(state, assign=True, strict=False)
    for name, _ in list(model.named_buffers()):
        # Some are no part of a state dictionary.
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = state[name]
    return parts_of(model.eval(), part)


def adapter_of(module: Any, part: str, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Adapter:
    """The adapter of a module in training form, on the host.

    Args:
        part: as `parts_of` takes it.
        tensors: of the adapter, in published form.
    """
    within = prefix_of(module, part)
    named = {f"{within}{name}": tensor.to("cpu", dtype).contiguous() for name, tensor in tensors}
    return Adapter(named, {f"{within}{layer}": alpha for layer, alpha in alphas_of(module).items()})


def write_published(
    folders: Mapping[str, Path], module: Any, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Writes the published models of a module in training form, as diffusers opens them.

    Args:
        folders: by the names of all parts; where there is one, its name is what `parts_of` takes.
        tensors: parameters and buffers of the published form, written one after another.
    """
    (part, *_) = folders
    with contextlib.ExitStack() as stack:
        models = parts_of(empty_copy(module), part)
        write = {name: stack.enter_context(_writing_model(folders[name], model, dtype)) for name, model in models.items()}
        for name, tensor in tensors:
            of, within = part_and_name(module, part, name)
            write[of](within, tensor)


@contextlib.contextmanager
def _writing_model(folder: Path, model: Any, dtype: torch.dtype) -> Iterator[Callable[[str, Tensor], None]]:
    """What writes a tensor of a model into a folder, as its library opens it, and passes over what that does not keep."""
    folder.mkdir(exist_ok=True)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    file, prefix = folder / SAFETENSORS_WEIGHTS_NAME, ""
    if isinstance(model, PreTrainedModel):
        # Names as in published pipelines: the library of now reads them, too, and those of other programs no others.
        file, prefix = folder / SAFE_WEIGHTS_NAME, "text_model."
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [type(model).__name__], str(dtype).removeprefix("torch.")
        config.save_pretrained(folder)
    else:
        model.save_config(folder)
    with writing(file, {f"{prefix}{name}": tensor for name, tensor in state.items()}, {"format": "pt"}) as write:
        yield lambda name, tensor: write(f"{prefix}{name}", tensor) if name in state else None
