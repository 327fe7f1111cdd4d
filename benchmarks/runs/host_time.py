"""What does DeepSpeed send, and how does its host time grow with processes? `python -m benchmarks.runs.host_time [--json FILE]`

One process of a group that is not there: torch's fake process group, whose collectives return at once. A model of many small
layers trains at ZeRO 1, 2 and 3; the processor's time of a step is that of the host's Python, and nearly nothing else. Which
collectives a step calls is counted, also with DeepSpeed's other ways to reduce.
"""

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.tools.rows import write_result
from benchmarks.tools.traffic import Collectives
from engine.files import write_json
from engine.quiet import quiet_libraries

WORLDS, LAYERS, WIDTH = (2, 16, 64), 343, 64  # as many tensors as SD 1.5 has
WAYS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2, "contiguous_gradients": True},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0},
    "stage 1, reduce_scatter off": {"stage": 1, "reduce_scatter": False},
    "stage 2, reduce_scatter off": {"stage": 2, "contiguous_gradients": True, "reduce_scatter": False},
    "stage 2, use_multi_rank_bucket_allreduce off": {
        "stage": 2, "contiguous_gradients": True, "use_multi_rank_bucket_allreduce": False,
    },
    "stage 3, DeepSpeed's defaults": {"stage": 3},
}  # fmt: skip


def worker(world: int, path: Path) -> int:
    """The first of so many processes, of which the others are not there; DeepSpeed knows one group in its life."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    quiet_libraries()
    torch.set_num_threads(1)
    write_json(path, [measure(world, way) for way in WAYS if world == WORLDS[0] or "," not in way])
    dist.destroy_process_group()
    return 0


def measure(world: int, way: str, layers: int = LAYERS, steps: int = 5) -> dict[str, Any]:
    """Seconds of the host in a step, and the collectives that it calls: calls and bytes over those of the gradients."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    size = sum(parameter.nbytes for parameter in model.parameters())
    options = WAYS[way] | ({"compute_grad_norm": False} if "3" not in way else {})
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "steps_per_print": None,
            "zero_optimization": options | {"overlap_comm": False}, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )  # fmt: skip
    seconds, collectives = [], Collectives()
    for step in range(steps):
        with collectives if step == steps - 1 else contextlib.nullcontext():
            started = time.process_time()
            engine.backward(engine(torch.zeros(1, WIDTH)).sum())
            engine.step()
            seconds.append(time.process_time() - started)
    return {
        "processes": world, "way": way, "tensors": 2 * layers, "seconds": statistics.median(seconds[1:-1]),
        "calls": dict(collectives.calls), "of_gradients": {name: round(n / size, 3) for name, n in collectives.bytes.items()},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| way | processes | ms of the host per step | collectives: calls, bytes over those of the gradients |",
        "|---" * 4 + "|",
    ]
    for row in rows:
        called = ", ".join(f"{name} {row['calls'][name]} x, {share:g}" for name, share in row["of_gradients"].items())
        lines.append(f"| {row['way']} | {row['processes']} | {1e3 * row['seconds']:.0f} | {called} |")
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        return worker(int(sys.argv[2]), Path(sys.argv[3]))
    parser = argparse.ArgumentParser("benchmarks.runs.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for world in WORLDS:
            file = Path(directory) / f"{world}.json"
            command = [sys.executable, "-m", "benchmarks.runs.host_time", "worker", str(world), str(file)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            rows += json.loads(file.read_text())
    print(table(rows))
    write_result(options.json, __doc__, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
