"""How would training scale to 1,024 GPUs? A model on paper: `python -m benchmarks.runs.scaling [--json FILE] [--chart FILE]`

Nothing is measured. A step's time is

- operations: batch x training operations / (matrix product x utilisation);
- optimizer: 38 bytes per parameter that a process updates, at the memory's speed;
- communication: the bytes of `payload`, of reductions twice where the engine makes them in fp32, by the faster of ring and tree
  (Thakur et al., "Optimization of collective communication operations in MPICH", 2005), within a node over NVLink and between
  nodes over one network card per GPU, the two at the same time. DeepSpeed all-reduces at stages 1 and 2 whatever
  `reduce_scatter` says (counted by `benchmarks.runs.host_time`), which moves twice the bytes of stage 3's reduce-scatter.
  Stage 3 gathers the weights of every module by itself, in both passes: so many latencies;
- captured (stages 1 and 2): nothing else. Reductions follow the backward pass, and nothing waits for the host;
- overlapped: what of the reductions hides behind the backward pass comes off, and what the device waits for the host is added,
  as `engine.loop.overlap` estimates both. `--cuda_graphs auto` takes the faster; stage 3 is never captured, and its Python
  takes longer with every process: `STAGE_3_HOST` per tensor and process, from `benchmarks.runs.host_time`. `compiled` models
  hand over all their gradients at once and overlap nothing.

`--zero_stage 0` runs on several processes as stage 1 does.

Figures of the hardware are options. The bytes are checked against counted ones by `benchmarks.runs.parallel`.
"""

import argparse
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.tools.charts import save
from benchmarks.tools.cost import payload, sizes_of
from benchmarks.tools.rows import write_result
from engine.loop.overlap import UTILISATION, hidden_seconds, host_seconds, overlap_gain
from engine.loop.weights.zero_options import FP32_REDUCTION, OVERLAPPED_BUCKET

FAMILIES = {"SD 1.5, 512 px": 32, "Kandinsky 2.2 prior": 128, "Kandinsky 2.2 decoder, 768 px": 16,
            "Wuerstchen v2 prior, 768 px": 32}  # fmt: skip
GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
STAGES = [1, 2, 3]
BATCHES = [4, 8, 32]
CHOICES: dict[str, dict[str, Any]] = {
    "8 GPUs": {"gpus": 8},
    "64 GPUs": {"gpus": 64},
    "64 GPUs, 10 Gbit/s each": {"gpus": 64, "network": 1.25e9},
    "4 GPUs, PCIe 25 GB/s": {"gpus": 4, "nvlink": 25e9},
}
OPTIMIZER_BYTES = 38
STAGE_3_HOST = 10e-6  # seconds: 8 to 12 on one core (`benchmarks.runs.host_time`), where stages 1 and 2 show no growth
STATE_BYTES = {"weights": 2, "gradients": 2, "optimizer": 16}  # per parameter: masters, moments, average


@dataclass(frozen=True)
class Hardware:
    """A cluster; bandwidths in bytes per second and direction and GPU, latencies in seconds."""

    matrix_flops: float = 788e12
    utilisation: float = UTILISATION
    memory: float = 4.3e12
    nvlink: float = 450e9
    network: float = 50e9
    nvlink_latency: float = 3e-6
    network_latency: float = 8e-6
    gpus_per_node: int = 8
    memory_bytes: float = 141e9
    host_link: float = 50e9
    disk: float = 2e9
    hours_between_failures: float = 50_000.0


def collective_seconds(size: float, gpus: int, hardware: Hardware) -> float:
    """A reduce-scatter or all-gather of `size` bytes over all GPUs; half an all-reduce."""
    within = min(gpus, hardware.gpus_per_node)
    nodes = max(gpus // hardware.gpus_per_node, 1)
    ring_latency = (within - 1) * hardware.nvlink_latency + (nodes - 1) * hardware.network_latency
    tree_latency = math.log2(within) * hardware.nvlink_latency + math.log2(nodes) * hardware.network_latency
    # Every GPU of a node has a network card of its own: together they carry the node's share.
    between = (nodes - 1) / nodes * size / (hardware.network * within) if nodes > 1 else 0.0
    inside = (within - 1) / within * size / hardware.nvlink
    ring, tree = max(inside, between) + ring_latency, max(size / hardware.nvlink * (within > 1), 2 * between) + tree_latency
    return min(ring, tree)


def communication_seconds(row: dict[str, Any], stage: int, gpus: int, buckets: int, hardware: Hardware) -> tuple[float, float]:
    """What a step's reductions and gatherings take: both in so many collectives of equal size, but at stage 3 every module is
    gathered by itself, in both passes."""
    if gpus == 1:
        return 0.0, 0.0
    moved = payload(stage, row["parameters"])
    if gpus >= FP32_REDUCTION:
        moved["reduced"] *= 2
    reduced = buckets * collective_seconds(moved["reduced"] / buckets, gpus, hardware)
    gathers = 2 * row["modules"] if stage == 3 else buckets
    gathered = gathers * collective_seconds(moved["gathered"] / gathers, gpus, hardware)
    # Stages 1 and 2 all-reduce: a reduce-scatter, and then everything is gathered once more.
    return (1 if stage == 3 else 2) * reduced, gathered


def step_seconds(row: dict[str, Any], batch: int, stage: int, gpus: int, hardware: Hardware) -> dict[str, float]:
    """The parts of a step's time, with `batch` samples per GPU; `hidden` and `waiting` count where reductions overlap."""
    buckets = -(-row["parameters"] // OVERLAPPED_BUCKET)
    reduction, gathering = communication_seconds(row, stage, gpus, buckets, hardware)
    operations = batch * 3 * row["forward_flops"] / (hardware.matrix_flops * hardware.utilisation)
    hidden = hidden_seconds(reduction, operations, buckets)
    growth = STAGE_3_HOST * row["tensors"] * gpus if stage == 3 and gpus > 1 else 0.0
    slack = max(0.0, operations - host_seconds(row["tensors"]))  # while the device works, the host may
    return {
        "operations": operations,
        "optimizer": OPTIMIZER_BYTES * row["parameters"] / gpus / hardware.memory,
        "communication": reduction + gathering,
        "hidden": hidden,
        "waiting": hidden - overlap_gain(operations, reduction, row["tensors"], buckets) + max(0.0, growth - slack),
    }


def total_seconds(parts: dict[str, float], captured: bool) -> float:
    """A step's time from its parts, captured or with reductions that overlap."""
    total = parts["operations"] + parts["optimizer"] + parts["communication"]
    return total if captured else total - parts["hidden"] + parts["waiting"]


def chosen_seconds(parts: dict[str, float], stage: int) -> float:
    """A step's time as `--cuda_graphs auto` runs it."""
    overlapped = total_seconds(parts, captured=False)
    return overlapped if stage == 3 else min(total_seconds(parts, captured=True), overlapped)


def state_bytes(parameters: int, stage: int, gpus: int) -> float:
    """The state of the trained model on one GPU, activations aside."""
    sharded = {1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}[stage]
    return sum(parameters * size / (gpus if name in sharded else 1) for name, size in STATE_BYTES.items())


def stops_paying(parameters: int, stage: int, hardware: Hardware) -> int:
    """The number of GPUs from which doubling them frees less than a hundredth of a GPU's memory at this stage."""
    for gpus in GPUS:
        if state_bytes(parameters, stage, gpus) - state_bytes(parameters, stage, 2 * gpus) < hardware.memory_bytes / 100:
            return gpus
    return GPUS[-1]


def checkpoint_interval(parameters: int, gpus: int, beside: bool, hardware: Hardware) -> tuple[float, float]:
    """Seconds between checkpoints that lose the least time, and the share of time then lost (Young 1974, Daly 2006).

    A checkpoint pauses for the copy to the host when it is written beside the training, else for the writing too; each process
    holds its part of 16 bytes per parameter.
    """
    part = 16 * parameters / gpus
    pause = part / hardware.host_link + (0 if beside else part / hardware.disk)
    failures = hardware.hours_between_failures * 3600 / gpus
    interval = math.sqrt(2 * pause * failures)
    return interval, pause / interval + interval / (2 * failures)


def measure_all(hardware: Hardware) -> list[dict[str, Any]]:
    rows = []
    for checkpoint, batch in FAMILIES.items():
        sizes = sizes_of(checkpoint)
        for stage in STAGES:
            alone = chosen_seconds(step_seconds(sizes, batch, 1, 1, hardware), 1)
            for gpus in GPUS:
                parts = step_seconds(sizes, batch, stage, gpus, hardware)
                rows.append({
                    "model": checkpoint, "batch": batch, "stage": stage, "gpus": gpus, **parts,
                    "efficiency": alone / chosen_seconds(parts, stage),
                    "state_gb": state_bytes(sizes["parameters"], stage, gpus) / 1e9, "parameters": sizes["parameters"],
                })  # fmt: skip
    return rows


def measure_choices(hardware: Hardware) -> list[dict[str, Any]]:
    """Seconds of a step at stage 1, captured and overlapped, by batch and cluster."""
    rows = []
    for checkpoint in FAMILIES:
        sizes = sizes_of(checkpoint)
        for batch in BATCHES:
            for cluster, changes in CHOICES.items():
                gpus, changed = changes["gpus"], {name: value for name, value in changes.items() if name != "gpus"}
                parts = step_seconds(sizes, batch, 1, gpus, replace(hardware, **changed))
                rows.append({
                    "model": checkpoint, "batch": batch, "cluster": cluster, **parts,
                    "captured": total_seconds(parts, captured=True), "overlapped": total_seconds(parts, captured=False),
                })  # fmt: skip
    return rows


def choices_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ms of a step captured / overlapped, the faster in bold (what overlap hides, what it waits for the host)."""
    lines = [f"| model, samples per GPU | {' | '.join(CHOICES)} |", "|---" * (len(CHOICES) + 1) + "|"]
    for model in FAMILIES:
        for batch in BATCHES:
            cells = []
            for row in (row for row in rows if row["model"] == model and row["batch"] == batch):
                captured, overlapped = (f"{1e3 * row[way]:.0f}" for way in ("captured", "overlapped"))
                faster = row["captured"] <= row["overlapped"]
                times = f"**{captured}** / {overlapped}" if faster else f"{captured} / **{overlapped}**"
                cells.append(f"{times} ({1e3 * row['hidden']:.0f}, {1e3 * row['waiting']:.0f})")
            lines.append(f"| {model}, {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], hardware: Hardware) -> str:
    """Markdown: efficiency and state by stage and GPUs; where stages stop paying; checkpoint intervals."""
    shown = [1, 8, 64, 256, 1024]
    lines = [f"| model, samples per GPU | stage | {' | '.join(f'{gpus} GPUs' for gpus in shown)} | stops paying at |",
             "|---" * (len(shown) + 3) + "|"]  # fmt: skip
    for model, batch in FAMILIES.items():
        for stage in STAGES:
            by_gpus = {row["gpus"]: row for row in rows if row["model"] == model and row["stage"] == stage}
            cells = [f"{by_gpus[gpus]['efficiency']:.1%}, {by_gpus[gpus]['state_gb']:.1f} GB" for gpus in shown]
            limit = stops_paying(by_gpus[1]["parameters"], stage, hardware)
            lines.append(f"| {model}, {batch} | {stage} | {' | '.join(cells)} | {limit} |")
    lines += ["", "| model | GPUs | between: interval, time lost | beside: interval, time lost |", "|---|---|---|---|"]
    for model in FAMILIES:
        parameters = next(row["parameters"] for row in rows if row["model"] == model)
        for gpus in (8, 64, 1024):
            cells = []
            for beside in (False, True):
                interval, lost = checkpoint_interval(parameters, gpus, beside, hardware)
                cells.append(f"{interval / 60:.0f} min, {lost:.2%}")
            lines.append(f"| {model} | {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Efficiency by the number of GPUs, one panel per model."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for panel, model in zip(figure.subplots(2, 2).flat, FAMILIES, strict=True):
        for stage in STAGES:
            points = [(row["gpus"], row["efficiency"]) for row in rows if row["model"] == model and row["stage"] == stage]
            panel.plot(*zip(*points, strict=True), label=f"stage {stage}", linestyle="--" if stage == 2 else "-")
        panel.set(xscale="log", title=f"{model}, {FAMILIES[model]} per GPU", xlabel="GPUs", ylabel="efficiency (predicted)")
        panel.set_xticks(GPUS[::2], [str(gpus) for gpus in GPUS[::2]])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False)
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.scaling", description=__doc__.splitlines()[0])
    for item in fields(Hardware):
        parser.add_argument(f"--{item.name}", type=type(item.default), default=item.default, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--chart", type=Path, help="draw the efficiencies there")
    options = vars(parser.parse_args())
    json_file, picture = options.pop("json"), options.pop("chart")
    hardware = Hardware(**options)
    rows = measure_all(hardware)
    choices = measure_choices(hardware)
    print(f"{table(rows, hardware)}\n\n{choices_table(choices)}")
    write_result(json_file, __doc__, hardware=options, rows=rows, choices=choices)
    if picture:
        chart(rows, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
