"""Does a step wait for the GPU? `python -m benchmarks.steps.host_waits [--families NAME...] [--json FILE] [--minutes M]`

A small model of each family takes the engine's own steps on batches of the loader, with torch told to refuse whatever makes the
host wait for the device (`torch.cuda.set_sync_debug_mode("error")`) from the fifth step on: one process, uncaptured and
captured. torch sees waits of its own operations, and not those that a library makes by itself. On a CPU the same, unwatched.
"""

import contextlib
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.checkpoints import opened
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.shards import write_shards
from benchmarks.tools.sides import open_training
from benchmarks.tools.tables import markdown
from engine.catalogue import FAMILIES
from engine.data.format.reader import Shards
from engine.data.samples.loader import BatchPlan, Loader
from engine.data.samples.order import order_of
from engine.data.samples.streams import Stream, Streams
from engine.quiet import quiet_libraries

STEPS = 12
FIRST = 5  # watched; those before compile kernels, choose algorithms and capture
BATCH, RECORDS = 4, 8


def watch(name: str, graphs: str, device: torch.device) -> dict[str, Any]:
    """How many steps were watched and did not wait.

    Raises:
        RuntimeError: one did; the line of the engine is in the message.
    """
    watched = 0
    with opened(name, device, cuda_graphs=graphs) as checkpoint, tempfile.TemporaryDirectory() as directory:
        family = checkpoint.family
        write_shards(Path(directory), RECORDS, name, family.encoding.record_spec)
        training = open_training(family, checkpoint.load_model(), device, BATCH)
        shards, plan = Shards(Path(directory)), BatchPlan(BATCH, 1, 0, 1)
        streams = Streams(7, [Stream(shards, order_of(7, shards.index.shards["records"], None))])
        with contextlib.closing(Loader(streams, plan, 7, family.schedule, device, 0, STEPS)) as loader:
            batches = iter(loader)
            for number in range(1, STEPS + 1):
                if number < FIRST or device.type != "cuda":
                    training.train_step(batches, number)
                else:
                    without_waiting(partial(training.train_step, batches, number))
                    watched += 1
    return {"graphs": graphs, "steps": STEPS, "watched": watched}


def without_waiting(work: Callable[[], Any]) -> None:
    """Does work that must not make the host wait for the GPU.

    Raises:
        RuntimeError: it did; the message says which line of the engine waited.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/engine/" in frame.filename]
        where = f" (engine/{frames[-1].filename.rpartition('/engine/')[2]}:{frames[-1].lineno})" if frames else ""
        raise RuntimeError(f"{error}{where}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {"run": "name", "steps": "steps", "watched without a wait": "watched"})


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    options = parser.parse_args()
    quiet_libraries()
    kept = Rows(options.json, __doc__, options.minutes)
    rows = []
    device = this_device()
    for graphs in ("off", "auto"):
        for family in options.families:
            name = f"{family}, {'captured' if graphs == 'auto' else 'uncaptured'}"
            rows.append(kept.measure(name, 20, partial(watch, family, graphs, device)))
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
