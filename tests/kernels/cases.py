"""Inputs for the fused kernels, their results in double precision, and where the kernels run."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half a unit in the last place of the output, relative to values of a few units.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

SHAPES = [(1, 1, 1, 1), (2, 4, 8, 8), (3, 4, 5, 7), (2, 3, 6, 6), (1, 16, 24, 24), (1, 4, 32, 64), (2, 1280), (3, 7)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def with_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, stored contiguously, channels last, or as a strided view of something larger."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        larger = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        return larger[..., ::2].copy_(tensor)
    return tensor.contiguous()


LAYOUTS = ["contiguous", "channels_last", "strided"]

run_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ,
    reason="Triton kernels need a GPU or the interpreter",
)


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a function that has run once, on a stream aside, and the results that replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


class Sample:
    """A posterior, coefficients and slots of a batch, and its exact clean samples and noise."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str, has_std: bool, offset: float) -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        batch = shape[0]
        self.mean = with_layout(torch.randn(shape, generator=generator).to(dtype).to(DEVICE), layout)
        std = with_layout(torch.rand(shape, generator=generator).to(dtype).to(DEVICE), layout)
        self.std = std if has_std else None
        self.seed_value, self.slot_values = -(2**40) - 11, [2**33 + 5 * row for row in range(batch)]
        self.seed = torch.tensor([self.seed_value], device=DEVICE)
        self.slots = torch.tensor(self.slot_values, device=DEVICE)
        self.coefficients = torch.rand(5, batch, generator=generator).to(DEVICE)
        self.offset = offset
        self.clean = self.mean.double().cpu().numpy()
        if has_std:
            self.clean = self.clean + std.double().cpu().numpy() * self.normals(1, shape[1:])
        shared = self.normals(3, (shape[1], *[1] * (len(shape) - 2)))
        self.noise = self.normals(0, shape[1:]) + offset * shared

    @property
    def arguments(self) -> tuple:
        """The arguments that both operations take first."""
        return self.mean, self.std, self.coefficients, self.seed, self.slots

    def normals(self, stream: int, shape: tuple[int, ...]) -> np.ndarray:
        return reference.normals(self.seed_value, self.slot_values, stream, tuple(shape))


def column(values: torch.Tensor, dimensions: int) -> np.ndarray:
    return values.double().cpu().numpy().reshape(-1, *[1] * (dimensions - 1))
