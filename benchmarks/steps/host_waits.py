"""Does a step wait for the GPU? `python -m benchmarks.steps.host_waits [--families NAME...] [--json FILE] [--minutes M]`

A small model of each family trains as `python -m engine.run` would, with torch told to refuse whatever makes the host wait
for the device (`torch.cuda.set_sync_debug_mode("error")`) from the fourth step to the next line of metrics: one process,
uncaptured and captured. torch sees waits of its own operations, and not those that a library makes by itself. On a CPU the
same runs, unwatched.
"""

import argparse
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.rows import Rows
from benchmarks.tools.small_runs import small_run
from benchmarks.tools.tables import markdown
from engine.catalogue import FAMILIES
from engine.loop import step, trainer
from engine.quiet import quiet_libraries

STEPS = 12
FIRST = 5  # watched; those before compile kernels, choose algorithms and capture


class _Watch:
    """Wraps a training's steps; `where` says which line of the engine waited, if one did."""

    def __init__(self) -> None:
        self.watched = 0
        self.where = ""
        self.train_step = step.Step.__call__

    def step(self, step: Any, batches: Any, number: int) -> None:
        if number < FIRST or not torch.cuda.is_available():
            return self.train_step(step, batches, number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.train_step(step, batches, number)
            self.watched += 1
        except RuntimeError as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/engine/" in frame.filename]
            self.where = f" (engine/{frames[-1].filename.rpartition('/engine/')[2]}:{frames[-1].lineno})" if frames else ""
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")


def watch(family: str, graphs: str) -> dict[str, Any]:
    """How many steps were watched and did not wait.

    Raises:
        RuntimeError: one did; the line of the engine is in the message.
    """
    watch = _Watch()
    with tempfile.TemporaryDirectory() as directory:
        run = small_run(family, Path(directory), max_train_steps=STEPS, log_every=STEPS, cuda_graphs=graphs, use_ema=True)
        with mock.patch.object(step.Step, "__call__", lambda *arguments: watch.step(*arguments)):
            try:
                trainer.train(run)
            except RuntimeError as error:
                raise RuntimeError(f"{error}{watch.where}") from error
    return {"graphs": graphs, "steps": STEPS, "watched": watch.watched}


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {"run": "name", "steps": "steps", "watched without a wait": "watched"})


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.steps.host_waits", description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--json", type=Path, help="keep the rows there, and go on from those that are there")
    parser.add_argument("--minutes", type=float, help="begin no run that would not end in time")
    options = parser.parse_args()
    quiet_libraries()
    kept = Rows(options.json, __doc__, options.minutes)
    rows = []
    for graphs in ("off", "auto"):
        for family in options.families:
            name = f"{family}, {'captured' if graphs == 'auto' else 'uncaptured'}"
            rows.append(kept.measure(name, 20, partial(watch, family, graphs)))
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
