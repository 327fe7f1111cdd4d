"""The trained module as parts of a pipeline: one of its models, or several that are trained as one module."""

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


def part_and_name(module: nn.Module, part: str, name: str) -> tuple[str, str]:
    """The part that a tensor of the trained module is of, and its name there.

    Where there are several, names begin with the part.

    Args:
        part: as `parts_of` takes it.
    """
    if not isinstance(module, JoinedParts):
        return part, name
    of, _, name = name.partition(".")
    return of, name


def empty_copy(module: Any) -> Any:
    """The published form of a trained module, or of one of its models, on the meta device."""
    if isinstance(module, JoinedParts):
        return type(module)(**{name: empty_copy(part) for name, part in module.named_children()})
    with torch.device("meta"):
        if isinstance(module, PreTrainedModel):
            return type(module)(module.config)
        return type(module).from_config(module.config)
