"""How should group normalisation cut its work on this GPU? `python -m benchmarks.operations.tilings`

Both passes of `engine::group_norm_silu` in bf16, at sizes of SD and Kandinsky's decoder, under every way to cut them that
`TILINGS` names; those at the top of `engine/kernels/group_norm_silu.py` ship. Medians of replays with cold caches, and the
share of a copy of the bytes that must move, 4 per element forward and 6 backward.
"""

import argparse
import importlib
import statistics
import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from benchmarks.tools.question import this_device
from benchmarks.tools.timing import Work, copying, microseconds
from engine.errors import UserError, exit_code

kernels: Any = importlib.import_module("engine.kernels.group_norm_silu")  # whose function has its name
NAMES = ("TILE", "STAGES", "NUM_WARPS", "TURNS", "PROGRAMS")
TILINGS = [
    (2048, 3, 4, 8, 2560), (4096, 1, 4, 8, 2560), (2048, 1, 4, 8, 2560), (2048, 3, 4, 16, 1280), (1024, 3, 2, 8, 2560),
    (4096, 2, 8, 4, 1280),
]  # fmt: skip
SHAPES = [(32, 320, 64, 64), (32, 960, 64, 64), (32, 640, 32, 32), (32, 1280, 16, 16), (32, 1280, 8, 8), (16, 384, 96, 96),
          (4, 320, 64, 64), (4, 640, 32, 32), (4, 1280, 16, 16)]  # fmt: skip
CALLS, LARGE = 10, 600_000_000  # at most so many calls on inputs of their own, of so many bytes together


def sides(shape: tuple[int, ...], device: torch.device) -> dict[str, Work]:
    """Both passes on inputs of their own, and copies of as many bytes."""
    batch, channels, *_ = shape
    x, gradient = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last) for _ in range(2)
    )
    weight, bias = (torch.randn(channels, device=device, dtype=torch.bfloat16).expand(batch, channels) for _ in range(2))
    _, mean, rstd = kernels.launch_group_norm_silu(x, weight, bias, 32, 1e-5, True)
    return {
        "forward": lambda: kernels.launch_group_norm_silu(x, weight, bias, 32, 1e-5, True),
        "backward": lambda: kernels.launch_group_norm_silu_backward(gradient, x, weight, bias, mean, rstd, 32, True),
        "copy forward": copying(4 * x.numel(), device), "copy backward": copying(6 * x.numel(), device),
    }  # fmt: skip


def measure(shape: tuple[int, ...], tiling: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """Median microseconds of each side under a tiling."""
    with ExitStack() as patched:
        for name, value in zip(NAMES, tiling, strict=True):
            patched.enter_context(mock.patch.object(kernels, name, value))
        calls = max(1, min(CALLS, LARGE // (2 * torch.Size(shape).numel())))
        works = [sides(shape, device) for _ in range(calls)]
        times, _ = microseconds({side: [work[side] for work in works] for side in works[0]}, device)
    return {side: statistics.median(values) for side, values in times.items()}


def main() -> int:
    argparse.ArgumentParser("benchmarks.operations.tilings", description=__doc__.splitlines()[0]).parse_args()
    device = this_device()
    if device.type != "cuda":
        raise UserError("there is no GPU here, and on a CPU these kernels are interpreted")
    print(torch.cuda.get_device_name(device))
    for shape in SHAPES:
        for tiling in TILINGS:
            taken = measure(shape, tiling, device)
            parts = [
                f"{side} {taken[side]:7.1f} us {taken[f'copy {side}'] / taken[side]:4.0%}" for side in ("forward", "backward")
            ]
            print(f"{shape!s:20} {tiling!s:38} {'   '.join(parts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("benchmarks.operations.tilings", main))
