"""What does `engine.sample --compile` gain? `python -m benchmarks.runs.sampling [--tiny] [--json FILE] [--minutes M]`

SD 1.5 at its published size, with random weights, draws images as `python -m engine.sample` does, plain and compiled:
seconds of the first call, which compiles, and of those after it, and how far the pictures are apart.
"""

import contextlib
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.compiling import compiling_cheaply
from benchmarks.tools.published import random_stable_diffusion
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import markdown
from benchmarks.tools.timing import spread
from engine.models.drawing import compile_models, draw
from engine.prompts import Wanted
from engine.quiet import quiet_libraries
from examples import tiny_models

CALLS = 4  # beside the first
EXPECTED_SECONDS = 100  # of which 60 for torch.compile from cold caches; assumed


def open_pipeline(tiny: bool, device: torch.device) -> Any:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        if tiny:
            return tiny_models.stable_diffusion(Path(directory)).to(device)
        return random_stable_diffusion(Path(directory), device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def measure(tiny: bool, images: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds per call of both sides, and the largest difference of a pixel, 0 to 255."""
    pipeline = open_pipeline(tiny, device)
    pipeline.set_progress_bar_config(disable=True)
    row: dict[str, Any] = {"images": images, "inference_steps": steps}
    drawn = {}
    for side in ("plain", "compiled"):
        if side == "compiled":
            compile_models(pipeline, 1)
        seconds = []
        for _ in range(1 + CALLS):
            started = time.perf_counter()
            wanted = [Wanted("a photograph", seed, steps=steps) for seed in range(images)]
            drawn[side] = [image for _, image in draw(pipeline, wanted, images)]
            seconds.append(time.perf_counter() - started)
        median, low, high = spread(seconds[1:])
        row |= {f"{side}_first_seconds": seconds[0], f"{side}_seconds": median, f"{side}_quartiles": [low, high]}
    pixels = [np.stack([np.asarray(image, float) for image in pictures]) for pictures in drawn.values()]
    return row | {
        "gain": row["plain_seconds"] / row["compiled_seconds"],
        "pixels_apart": float(abs(pixels[0] - pixels[1]).max()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {
        "pipeline": "name", "images": "images", "steps": "inference_steps", "plain, s": "plain_seconds",
        "compiled, s": "compiled_seconds", "gain": "gain", "plain, first": "plain_first_seconds",
        "compiled, first": "compiled_first_seconds", "pixels apart, of 255": "pixels_apart",
    })  # fmt: skip


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead of the published size")
    parser.add_argument("--images", type=int, default=4, help="at a time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of sampling (default: %(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    kept = Rows(options.json, __doc__, options.minutes)
    name = "tiny" if options.tiny else "SD 1.5, 512 px"
    work = partial(measure, options.tiny, options.images, options.steps, device)
    with compiling_cheaply() if options.tiny else contextlib.nullcontext():
        row = kept.measure(name, 20 if options.tiny else EXPECTED_SECONDS, work)
    print(table([row]))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
