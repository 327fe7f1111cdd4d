"""The trained module as parts of a pipeline: one of its models, or several that are trained as one module."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class JoinedParts(nn.Module):
    """Several parts of a pipeline, under their names there; a family's own class says what the forward pass computes."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def parts_of(module: nn.Module, part: str) -> dict[str, Any]:
    """The models of a trained module by their names in the pipeline.

    Args:
        part: what the pipeline calls the model, where it is a single one.
    """
    return dict(module.named_children()) if isinstance(module, JoinedParts) else {part: module}


def prefix_of(module: nn.Module, part: str) -> str:
    """What is put before the names of a trained module's tensors and layers to have them within the pipeline.

    Args:
        part: as `parts_of` takes it.
    """
    return "" if isinstance(module, JoinedParts) else f"{part}."


def part_and_name(module: nn.Module, part: str, name: str) -> tuple[str, str]:
    """The part that a tensor of the trained module is of, and its name there.

    Args:
        part: as `parts_of` takes it.
    """
    of, _, within = (prefix_of(module, part) + name).partition(".")
    return of, within


def portable(name: str) -> str:
    """A name within a pipeline as releases of transformers before 5 have it too, and all read it."""
    return re.sub(r"^text_encoder\.(?=encoder\.)", "text_encoder.text_model.", name)


def bare(name: str) -> str:
    """A name within a pipeline without what only some releases of transformers have in it."""
    return name.replace("text_encoder.text_model.", "text_encoder.")


def empty_copy(module: Any) -> Any:
    """The published form of a trained module, or of one of its models, on the meta device."""
    if isinstance(module, JoinedParts):
        return type(module)(**{name: empty_copy(part) for name, part in module.named_children()})
    with torch.device("meta"):
        if isinstance(module, PreTrainedModel):
            return type(module)(module.config)
        return type(module).from_config(module.config)
