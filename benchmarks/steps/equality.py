"""Does a captured step train as an uncaptured one? `python -m benchmarks.steps.equality [--modes NAME...] [--json FILE]`

A small model of each family trains twice from the same seed under `--deterministic`, uncaptured and captured, in each of
`MODES`: eager, under torch.compile, and sharded by DeepSpeed at ZeRO stages 1 and 2 in a world of one. Losses, gradient
norms and exported weights must be equal, bit for bit. A row says how far they are apart where they are not. On a CPU
nothing is captured: a run of this path.
"""

import contextlib
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.compiling import compiling_cheaply
from benchmarks.tools.published import TINY
from benchmarks.tools.question import command_line
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import markdown
from engine.catalogue import FAMILIES
from engine.config.options import TrainConfig
from engine.loop import trainer
from engine.processes import Processes
from engine.quiet import quiet_libraries
from examples import tiny_models
from examples.photographs import write_images

STEPS = 20
MODES: dict[str, dict[str, Any]] = {
    "eager": {}, "compiled": {"compile": True}, "ZeRO 1": {"zero_stage": 1}, "ZeRO 2": {"zero_stage": 2},
    "accumulating": {"gradient_accumulation_steps": 4},
}  # fmt: skip
PLAIN_MODES = ["eager", "accumulating"]
EXPECTED_SECONDS = {"compiled": 60}  # of a pair of runs, most of them for torch.compile; assumed
OTHERWISE = 15


def inputs(family: str, directory: Path) -> dict[str, Any]:
    """Writes a small model and images; the options that name them and say how they are trained."""
    images, models = write_images(directory / "images", longest=200), tiny_models.WRITERS[family](directory / "models")
    return {
        "family": family, **models, "train_data_dir": str(images), "shards_dir": str(directory / "shards"),
        "resolution": TINY[family], "mixed_precision": "bf16" if torch.cuda.is_available() else "no", "train_batch_size": 4,
        "seed": 7, "learning_rate": 1e-4, "use_ema": True, "deterministic": True, "log_every": 1, "report_to": "none",
        "checkpointing_steps": 10**9,
    }  # fmt: skip


def run(options: dict[str, Any], output: Path) -> dict[str, Any]:
    """What a training leaves: losses and gradient norms by step, the time of a step, and its exported weights."""
    config = TrainConfig.model_validate(options | {"output_dir": str(output)})
    torch.manual_seed(0)
    if trainer.train(config) != 0:
        raise RuntimeError("the training did not end well")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = {
        f"{path.relative_to(output)}:{name}": tensor
        for path in sorted(output.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    seconds = sorted(line["step_seconds"] for line in lines)[len(lines) // 2]
    curve = [(line["loss"], line["grad_norm"]) for line in lines]
    return {"curve": curve, "step_milliseconds": 1000 * seconds, "weights": weights}


def compare(family: str, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Both runs, and how far apart they are: 0 everywhere where they are equal."""
    with tempfile.TemporaryDirectory() as directory:
        graphs = "on" if torch.cuda.is_available() else "auto"
        common = inputs(family, Path(directory)) | options | {"max_train_steps": steps}
        plain, captured = (run(common | {"cuda_graphs": way}, Path(directory) / way) for way in ("off", graphs))
    curves = zip(plain["curve"], captured["curve"], strict=True)
    unequal = [step for step, (ours, theirs) in enumerate(curves, 1) if ours != theirs]
    pairs = [(plain["weights"][name].double(), captured["weights"][name].double()) for name in plain["weights"]]
    row = {
        "captured": graphs == "on", "steps": steps, "weights": len(pairs),
        "equal": not unequal and all(torch.equal(ours, theirs) for ours, theirs in pairs),
        "first_unequal_step": unequal[0] if unequal else None,
        "largest_difference": max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
        "uncaptured_ms": plain["step_milliseconds"], "captured_ms": captured["step_milliseconds"],
    }  # fmt: skip
    if not row["equal"]:  # a failure, so that it is tried again under another commit
        first = f"from step {unequal[0]} on" if unequal else "in exported weights only"
        row["failed"] = f"not equal {first}, weights by up to {row['largest_difference']:.3g}"
    return row


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {
        "run": "name", "captured": "captured", "bit for bit equal": "equal", "first unequal step": "first_unequal_step",
        "largest difference of a weight": "largest_difference", "uncaptured, ms": "uncaptured_ms",
        "captured, ms": "captured_ms",
    })  # fmt: skip


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=PLAIN_MODES, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    options = parser.parse_args()
    quiet_libraries()
    kept = Rows(options.json, __doc__, options.minutes)
    processes = Processes().connect()  # DeepSpeed cannot follow it through a second initialisation
    rows = []
    for mode in options.modes:
        for family in options.families:
            work = partial(compare, family, MODES[mode], options.steps)
            with contextlib.nullcontext() if torch.cuda.is_available() else compiling_cheaply():
                rows.append(kept.measure(f"{family}, {mode}", EXPECTED_SECONDS.get(mode, OTHERWISE), work))
    processes.close()
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
