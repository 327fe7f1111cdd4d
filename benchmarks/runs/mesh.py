"""What does a gloo group of all processes cost? `python -m benchmarks.runs.mesh [--json FILE]`

Messages to the processes' store and descriptors of the last of 2, 4, 8 and 16 processes: when the group is made, and after
collectives; also where torch connects processes only when they first talk to each other (TORCH_GLOO_LAZY_INIT=1).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.tools.preloaded import build
from benchmarks.tools.ranks import free_port
from benchmarks.tools.rows import write_result
from benchmarks.tools.shared import counted
from benchmarks.tools.tables import markdown

WORLDS = (2, 4, 8, 16)


def worker(rank: int, world: int) -> int:
    def count() -> tuple[int, int]:
        return counted()["store_messages"], len(list(Path("/proc/self/fd").iterdir()))

    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), world, rank == 0, wait_for_workers=False)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world)])
    counts = [count()]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    counts.append(count())
    dist.all_reduce(torch.zeros(1000))
    dist.all_gather_object([None] * world, rank)
    dist.broadcast_object_list([rank])
    counts.append(count())
    if rank == world - 1:
        print(json.dumps(counts), flush=True)
    store.set(f"done/{rank}", "")
    store.wait([f"done/{other}" for other in range(world)])  # whose host must not go first
    os._exit(0)


def measure(library: Path, world: int, lazy: bool) -> dict[str, Any]:
    common = os.environ | {
        "LD_PRELOAD": str(library), "MASTER_PORT": str(free_port()), "TORCH_GLOO_LAZY_INIT": str(int(lazy)),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.runs.mesh", "worker", str(rank), str(world)], env=common,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    (before, files), (made, files_made), (used, files_used) = json.loads(
        [process.communicate(timeout=300)[0] for process in processes][-1]
    )
    return {
        "processes": world, "lazy": lazy, "messages": made - before, "messages_used": used - before,
        "descriptors": files_made - files, "descriptors_used": files_used - files,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    return markdown(rows, {
        "processes": "processes", "connected when needed": "lazy", "messages": "messages", "after collectives": "messages_used",
        "descriptors": "descriptors", "those after collectives": "descriptors_used",
    })  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        return worker(int(sys.argv[2]), int(sys.argv[3]))
    parser = argparse.ArgumentParser("benchmarks.runs.mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        library = build("shared", Path(directory))
        rows = [measure(library, world, lazy) for lazy in (False, True) for world in WORLDS]
    print(table(rows))
    write_result(options.json, __doc__, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
