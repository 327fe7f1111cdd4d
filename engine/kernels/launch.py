"""Triton launches on the current device, whatever device its arguments lie on; torch's own operations do not."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Others = ParamSpec("Others")
Result = TypeVar("Result")


def is_nvidia(device: torch.device) -> bool:
    """Whether it is a GPU of NVIDIA's: AMD's call themselves cuda too."""
    return device.type == "cuda" and torch.version.hip is None


def on_its_device(launch: Callable[Concatenate[Tensor, Others], Result]) -> Callable[Concatenate[Tensor, Others], Result]:
    """Makes the device of the first argument the current one during the launch."""

    @functools.wraps(launch)
    def guarded(first: Tensor, *others: Others.args, **named: Others.kwargs) -> Result:
        with torch.cuda.device_of(first):
            return launch(first, *others, **named)

    return guarded
