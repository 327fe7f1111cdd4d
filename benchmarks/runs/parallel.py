"""Is training the same on any number of processes, and what does it send? `python -m benchmarks.runs.parallel [--json FILE]`

- 1, 2 and 4 processes x ZeRO 0 to 3 x two families: 20 steps in fp32 at the same global batch; the distance of the final
  weights from those of one process at stage 0, relative to the distance that training moved them.
- Elastic: 4 processes at stage 2, then 1 at stage 0, then 2 at stage 3, each from the other's checkpoint, against a run that
  was not interrupted.
- Bytes that a step hands to collectives, counted in every process, against `benchmarks.tools.cost.payload`; numbers of the
  moving average that a process holds, against 1/N; and how long a checkpoint pauses the training.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split

from safetensors.torch import load_file
from torch import nn

from benchmarks.tools.cost import payload
from benchmarks.tools.place import distance
from benchmarks.tools.rows import write_result
from benchmarks.tools.sides import random_batch
from benchmarks.tools.traffic import Collectives
from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.files import write_json
from engine.loop.checkpoints.writer import Writer
from engine.loop.metrics import Metrics
from engine.loop.run import Run
from engine.loop.trainer import Training, train
from engine.loop.weights.flat import FlatPartition
from engine.models.family import open_family
from engine.processes import Processes
from engine.quiet import quiet_libraries
from examples import tiny_models
from examples.photographs import write_images

WORLDS, STAGES, STEPS, GLOBAL_BATCH = (1, 2, 4), (0, 1, 2, 3), 20, 4
FAMILIES = {"sd": ("unet", 16), "kandinsky-prior": ("prior", 32)}


def worker(arguments: list[str]) -> int:
    """One process of a run, as `engine.run` does it; what a step like its own sends then is noted beside its output."""
    quiet_libraries()
    config = parse(TrainConfig, "benchmarks.runs.parallel worker", "", arguments)
    processes = Processes(config.local_rank).connect()  # before the run, which would leave the group at its end
    code = train(config)
    family = open_family(config)
    seed, size = config.seed or 0, config.train_batch_size * processes.world
    run = Run(seed, size, "", records=100, steps=STEPS)
    training = Training(config, run, family, family.load_model(), processes)
    batches = itertools.repeat(random_batch(family, config.train_batch_size, processes.device))
    training.train_step(batches, 1)
    with Collectives() as collectives:
        training.train_step(batches, 2)
    partition = training.partition
    assert partition.ema is not None
    write_json(Path(f"{config.output_dir}.rank-{processes.rank}.json"), {
        "collectives": collectives.bytes, "reduced": collectives.reduced, "gathered": collectives.gathered,
        "parameters": sum(shape.numel() for shape in partition.shapes.values()),
        "ema_numbers": sum(average.numel() for average in partition.ema.averages),
    })  # fmt: skip
    processes.close()
    return code


class Place:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = write_images(root / "images", longest=64)
        self.models = {name: tiny_models.WRITERS[name](root / name) for name in FAMILIES}
        # Models as small as these would stay gathered from the forward pass to the backward pass.
        free = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        (root / "zero-3.json").write_text(json.dumps({"zero_optimization": free}))

    def train(self, family: str, output: Path, world: int, stage: int, steps: int = STEPS, *more: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command = [
            *launcher, "-m", "benchmarks.runs.parallel", "worker", "--family", family,
            *(f"--{name}={value}" for name, value in self.models[family].items()), "--train_data_dir", str(self.images),
            "--shards_dir", str(self.root / f"{family}-shards"), "--output_dir", str(output), "--resolution",
            str(FAMILIES[family][1]), "--train_batch_size", str(GLOBAL_BATCH // world), "--zero_stage", str(stage),
            "--max_train_steps", str(steps), "--checkpointing_steps", "5", "--seed", "1", "--use_ema", "--learning_rate",
            "1e-3", "--report_to", "none", "--log_every", "5", *more,
            *(["--deepspeed_config", str(self.root / "zero-3.json")] if stage == 3 else []),
        ]  # fmt: skip
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        if result.returncode:
            raise RuntimeError(result.stderr[-3000:])

    def weights(self, family: str, output: Path) -> dict[str, torch.Tensor]:
        return load_file(output / FAMILIES[family][0] / "diffusion_pytorch_model.safetensors")

    def untrained(self, family: str) -> dict[str, torch.Tensor]:
        return self.weights(family, Path(next(iter(self.models[family].values()))))


def measure(place: Place) -> dict[str, Any]:
    rows = []
    for family in FAMILIES:
        start = place.untrained(family)
        reference: dict[str, torch.Tensor] = {}
        for world in WORLDS:
            for stage in STAGES:
                output = place.root / f"{family}-{world}-{stage}"
                place.train(family, output, world, stage)
                weights = place.weights(family, output)
                reference = reference or weights
                notes = [json.loads(Path(f"{output}.rank-{rank}.json").read_text()) for rank in range(world)]
                expected = payload(stage, notes[0]["parameters"], bytes_per_number=4)
                rows.append({
                    "family": family, "processes": world, "stage": stage, "distance": distance(weights, reference, start),
                    **notes[0], "expected": expected if world > 1 else {"reduced": 0, "gathered": 0},
                    "ema_numbers": [note["ema_numbers"] for note in notes],
                })  # fmt: skip
                print(rows[-1], flush=True)
    return {"rows": rows, "elastic": elastic(place), "pauses": pauses(place)}


def elastic(place: Place) -> dict[str, float]:
    """The distance of a run that changed its processes and stage twice from one that did not."""
    result = {}
    for family in FAMILIES:
        start = place.untrained(family)
        output, resume = place.root / f"{family}-elastic", ("--resume_from_checkpoint", "latest")
        place.train(family, output, 4, 2, 10)
        place.train(family, output, 1, 0, 15, *resume)
        place.train(family, output, 2, 3, 20, *resume)
        whole = place.weights(family, place.root / f"{family}-1-0")
        result[family] = distance(place.weights(family, output), whole, start)
    return result


def pauses(place: Place, parameters: int = 25_000_000) -> dict[str, Any]:
    """Seconds that a checkpoint of a model of one large layer holds the training up, written between steps and beside them.

    The second of three checkpoints: the first also makes the buffers.
    """
    side = int(parameters**0.5)
    config = TrainConfig(family="sd", pretrained_model_name_or_path="unused", use_ema=True)
    processes = Processes()
    partition = FlatPartition(nn.Linear(side, side, bias=False), config, processes)
    run = Run(seed=0, global_batch=1, fingerprint="", records=1, steps=2)
    metrics = Metrics(run, processes)
    result: dict[str, Any] = {"parameters": side * side, "bytes": 16 * side * side}
    for name, beside in (("between", False), ("beside", True)):
        writer = Writer(place.root / f"pause-{name}", run, processes, 1, beside, "token")
        for step in (1, 2):
            started = time.perf_counter()
            writer.save(step, partition, metrics)
            result[f"{name}_seconds"] = time.perf_counter() - started
            writer.wait()
            result[f"{name}_whole_seconds"] = time.perf_counter() - started
    return result


def table(measured: dict[str, Any]) -> str:
    """Markdown tables."""
    lines = ["| family | processes | stage | distance | reduced, expected | gathered, expected | average per process |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in measured["rows"]:
        share = max(row["ema_numbers"]) / row["parameters"]
        lines.append(
            f"| {row['family']} | {row['processes']} | {row['stage']} | {row['distance']:.1e} | "
            f"{row['reduced']}, {row['expected']['reduced']} | {row['gathered']}, {row['expected']['gathered']} | {share:.3f} |"
        )
    lines += ["", f"Elastic, 4 at stage 2 -> 1 at 0 -> 2 at 3: {measured['elastic']}"]
    lines.append(f"Checkpoints: {measured['pauses']}")
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser("benchmarks.runs.parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(Place(Path(directory)))
    print(table(measured))
    write_result(options.json, __doc__, **measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
