"""What does the start of a run take? `python -m benchmarks.runs.startup [--json FILE] [--measured FILE] [--before FILE]`

Measured on 1, 2 and 4 processes of this machine with a tiny Stable Diffusion on prebuilt shards, going on from a checkpoint
of four processes: seconds of every phase, until the first step has ended; and what every process did, counted by a preloaded
library (files opened, looked up, read; messages to the processes' store; descriptors). Two processes also with four times the
images, four times the shards, and a checkpoint of one process: what grows with what.

From these counts, and the sizes of SD 1.5 and 10 million samples, a model computes the phases at 8, 128 and 1,024 processes, 8
per node; nothing of that is measured, and the figures of the cluster are options. What a process does does not depend on the
number of processes, where there are as many as wrote the checkpoint, but for messages to the store, which grow with it. With
`--before`, the counts of commit 30efb6f (this file was copied there), the model also computes what was: there every process
opened, compared and looked at all files of the checkpoint, and at every image.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.preloaded import Forks, build
from benchmarks.tools.ranks import rank_variables
from benchmarks.tools.shared import COUNTED, counted
from engine.processes import LAZY_CONNECTIONS

WORLDS = (1, 2, 4)
AT = 3  # the checkpoint's step
LAST, GROUP = "The first step", "Laying out weights and optimizer"
IMPORTS, BETWEEN = "Interpreter and imports", "Between these"
CLUSTERS = (8, 128, 1024)
PER_NODE = 8
# SD 1.5: parameters that are trained, bytes of the frozen models, samples, and records of a shard.
TRAINED, FROZEN, SAMPLES, SHARD_RECORDS = 859_520_964, 827_000_000, 10_000_000, 1024
MODEL, CHECKPOINT = 4 * TRAINED, 16 * TRAINED
ENTRY = 136  # bytes of a shard in the index
BATCH, AHEAD, RECORD, NUMBERS = 32, 64, 184_000, 50_000  # samples of a process; bytes of one, and of what opening a shard reads
MORE_IMAGES, MORE_SHARDS, ONE_FILE = "four times the images", "four times the shards", "a checkpoint of one process"
VARIANTS = ("", MORE_IMAGES, MORE_SHARDS, ONE_FILE)
ADDED_IMAGES, ADDED_FILES = 3 * 14, 3  # by which variants differ: copies of all 14 images, files of the other processes
NAMES = 100  # of a directory that a look-up gives


@dataclass(frozen=True)
class Figures:
    """Of a cluster and its file system; all assumed.

    node_bandwidth, bandwidth: bytes per second that a node reads, and that all of them do.
    metadata: operations per second of the metadata server; opens come from every process, look-ups once from every node.
    latency: seconds of one operation.
    store: messages per second of the processes' store.
    hashing: bytes per second of a process.
    imports: seconds of the processor for Python's imports, from a disk of the node.
    image: seconds of the processor for an image of a folder that is looked at.
    file: the same for a file of a checkpoint.
    """

    node_bandwidth: float = 5e9
    bandwidth: float = 100e9
    metadata: float = 50_000.0
    latency: float = 0.2e-3
    store: float = 100_000.0
    hashing: float = 1.5e9
    imports: float = 12.0
    image: float = 60e-6
    file: float = 1e-3


class Phases:
    """Takes the place of `engine.messages.busy`, which names what a run does: seconds and counts of each, without those inside.

    Args:
        started: when the process was.
        note: where to write them when the first step has ended.
    """

    def __init__(self, started: float, note: Path) -> None:
        self.note = note
        self.phases: dict[str, dict[str, Any]] = {}
        self._inside: list[str] = [IMPORTS]
        self._time, self._counts = started, dict.fromkeys(counted(), 0)

    def _pass(self) -> None:
        """What has passed since the last call belongs to the innermost phase."""
        now, counts = time.time(), counted()
        phase = self.phases.setdefault(self._inside[-1], {"seconds": 0.0} | dict.fromkeys(counts, 0))
        phase["seconds"] += now - self._time
        for name, count in counts.items():
            phase[name] += count - self._counts[name]
        self._time, self._counts = time.time(), counted()

    def begin(self) -> None:
        """The imports have ended."""
        self._pass()
        self._inside = [BETWEEN]

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        self._pass()
        self._inside.append(what)
        try:
            yield
        finally:
            self._pass()
            self._inside.pop()
            if what.startswith(LAST):
                descriptors = len(list(Path("/proc/self/fd").iterdir()))
                self.note.write_text(json.dumps({"phases": self.phases, "descriptors": descriptors}))


def worker(arguments: list[str]) -> int:
    """One process of a run, as `engine.run` starts it."""
    from engine import messages
    from engine.config.command_line import parse
    from engine.config.options import TrainConfig

    config = parse(TrainConfig, "benchmarks.runs.startup worker", "", arguments)
    rank = os.environ.get("RANK", "0")
    phases = Phases(float(os.environ["STARTED"]), Path(f"{config.output_dir}.rank-{rank}.json"))
    messages.busy = phases.busy  # before others take it by its name

    from engine.loop.trainer import train
    from engine.quiet import quiet_libraries

    quiet_libraries()
    phases.begin()
    return train(config)


class Bench:
    """A tiny pipeline, images and shards of them, and checkpoints to go on from."""

    def __init__(self, root: Path, forks: Forks) -> None:
        from benchmarks.tools.place import Place  # which imports more than `engine.run` does

        self.root, self.place, self.forks = root, Place(root), forks
        self.library = build("shared", root)
        many = Path(shutil.copytree(self.place.images, root / "many"))
        lines = [json.loads(line) for line in (many / "metadata.jsonl").read_text().splitlines()]
        copies = [(line, line | {"file_name": f"{copy}-{line['file_name']}"}) for copy in range(3) for line in lines]
        for line, copy in copies:
            shutil.copy(many / line["file_name"], many / copy["file_name"])
        (many / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, *(c for _, c in copies)]))
        self.images = {"": self.place.images, MORE_IMAGES: many}

    def command(self, output: Path, variant: str, steps: int) -> list[str]:
        command = self.place.command(
            output, "--train_batch_size", "1", "--global_batch_size", "4", "--zero_stage", "2", "--shard_records",
            "2" if variant == MORE_SHARDS else "8", "--shards_dir", str(self.root / f"shards-{variant or 'base'}"),
            "--checkpointing_steps", str(AT), steps=steps,
        )  # fmt: skip
        command[command.index("--train_data_dir") + 1] = str(self.images.get(variant, self.place.images))
        return command[3:]

    def train(self, output: Path, variant: str) -> None:
        """Leaves shards and a checkpoint of one process or of four."""
        world = 1 if variant == ONE_FILE else 4
        command = ["engine.run", *self.command(output, variant, AT)]
        processes = [
            self.forks.start(command, {"OMP_NUM_THREADS": "1"} | own, self.root / f"said-{rank}")
            for rank, own in enumerate(rank_variables(world, world))
        ]
        if any(self.forks.wait(process, 600) for process in processes):
            raise RuntimeError((self.root / "said-0").read_text())

    def measure(self, world: int, variant: str) -> list[dict[str, Any]]:
        """What every process of a run did until its first step had ended."""
        name = variant or "base"
        before = self.root / f"before-{name}"
        if not before.exists():
            self.train(before, variant)
        output = self.root / f"{name}-{world}"
        output.mkdir()
        shutil.copytree(before / f"checkpoint-{AT}", output / f"checkpoint-{AT}")
        (output / "latest").write_text(f"checkpoint-{AT}\n")
        counting = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(self.library), "SHARED_DIRECTORY": str(self.root)}
        command = [sys.executable, "-m", "benchmarks.runs.startup", "worker", *self.command(output, variant, AT + 1)]
        with (self.root / "said").open("w") as said:
            processes = [
                subprocess.Popen(
                    command, env=os.environ | counting | own | {"STARTED": str(time.time())}, stdout=said, stderr=said
                )
                for own in rank_variables(world, world)
            ]
        codes = [process.wait(timeout=600) for process in processes]
        if any(codes):
            raise RuntimeError((self.root / "said").read_text()[-3000:])
        notes = [json.loads(Path(f"{output}.rank-{rank}.json").read_text()) for rank in range(world)]
        for note in notes:
            note["phases"] = {what.replace(f"{output}/", ""): phase for what, phase in note["phases"].items()}
        return notes


def measure() -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(Forks(["shared"], ["deepspeed"])) as forks:
        bench = Bench(Path(directory), forks)
        for variant in VARIANTS:
            for world in (2,) if variant else WORLDS:
                rows.append({"processes": world, "variant": variant, "ranks": bench.measure(world, variant)})
                print(f"{world} processes {variant}", flush=True)
    return rows


def totals(rank: dict[str, Any]) -> dict[str, Any]:
    """Of all phases but the imports."""
    phases = [phase for what, phase in rank["phases"].items() if what != IMPORTS]
    return {name: sum(phase[name] for phase in phases) for name in phases[0]}


def measured_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds of each phase in the slowest process; then what the first and the last process did."""
    plain = [row for row in rows if not row["variant"]]
    phases = dict.fromkeys(what for row in plain for rank in row["ranks"] for what in rank["phases"])
    lines = [f"| phase | {' | '.join(str(row['processes']) for row in plain)} |", "|---" * (len(plain) + 1) + "|"]
    for what in phases:
        seconds = [max(rank["phases"].get(what, {"seconds": 0.0})["seconds"] for rank in row["ranks"]) for row in plain]
        lines.append(f"| {what} | {' | '.join(f'{value:.2f}' for value in seconds)} |")
    names = ("opened", "looked_up", "listed", "bytes_read", "bytes_mapped", "store_messages")
    lines += [
        "",
        f"| processes, variant | process | {' | '.join(names)} | descriptors | opened by imports |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        for number in sorted({0, row["processes"] - 1}):
            rank = row["ranks"][number]
            counts = totals(rank)
            lines.append(
                f"| {row['processes']}{', ' * bool(row['variant'])}{row['variant']} | {number} | "
                f"{' | '.join(str(counts[name]) for name in names)} | {rank['descriptors']} | "
                f"{rank['phases'][IMPORTS]['other_opened']} |"
            )
    return "\n".join(lines)


def phase_seconds(
    figures: Figures,
    world: int,
    opened: float = 0,
    looked_up: float = 0,
    same: float = 0,
    own: float = 0,
    cpu: float = 0,
    messages: float = 0,
    once: bool = False,
    threads: int = 1,
) -> float:
    """Of a phase in which every process, or `once` the first alone, does so much.

    Args:
        opened, looked_up: files.
        same, own: bytes that all processes read, which come to a node once; and bytes of its own.
        cpu: seconds.
        messages: to the store.
        threads: that ask for files side by side.
    """
    processes, nodes = (1, 1) if once else (world, -(-world // PER_NODE))
    return cpu + messages * processes / figures.store + max(
        (opened + looked_up) * figures.latency / threads,
        (opened * processes + looked_up * nodes) / figures.metadata,
        (same + own * min(processes, PER_NODE)) / figures.node_bandwidth,
        (same * nodes + own * processes) / figures.bandwidth,
    )  # fmt: skip


def modelled(rows: list[dict[str, Any]], before: bool, world: int, figures: Figures) -> dict[str, float]:
    """Seconds of the phases of a start, going on from a checkpoint of as many processes."""
    plain = {row["processes"]: row["ranks"][-1] for row in rows if not row["variant"]}
    two, one_file = ({row["variant"]: totals(row["ranks"][-1]) for row in rows if row["processes"] == 2}[variant]
                     for variant in ("", ONE_FILE))  # fmt: skip

    def files(*starts: str) -> dict[str, Any]:
        found = [next(phase for what, phase in plain[4]["phases"].items() if what.startswith(start)) for start in starts]
        return {name: sum(phase[name] for phase in found) for name in ("opened", "looked_up")}

    # Of the two groups of all processes DeepSpeed's is made without waits, in which a process asks again and again.
    by_processes = {row["processes"]: row["ranks"] for row in rows if not row["variant"]}
    made = {of: min(rank["phases"][GROUP]["store_messages"] for rank in ranks) for of, ranks in by_processes.items()}
    eager = before or world < LAZY_CONNECTIONS
    messages = min(totals(rank)["store_messages"] for rank in by_processes[4])
    messages += 2 * ((made[4] - made[2]) // 2) * (world - 4) if eager else 0
    shards = SAMPLES / SHARD_RECORDS
    imports = [sum(phase[f"other_{name}"] for phase in plain[4]["phases"].values()) for name in COUNTED[:4]]
    share = CHECKPOINT / world
    checkpoint: dict[str, Any] = files("Comparing ") | {"own": 2 * share, "cpu": share / figures.hashing}
    looks = {row["variant"]: totals(row["ranks"][0])["looked_up"] for row in rows if row["processes"] == 2}
    source: dict[str, Any] = {
        "looked_up": SAMPLES * (looks[MORE_IMAGES] - looks[""]) / ADDED_IMAGES, "cpu": SAMPLES * figures.image,
        "once": not before, "threads": 1 if before else 8,
    }  # fmt: skip
    if before:
        per_file = {name: (two[name] - one_file[name]) / ADDED_FILES * world for name in ("opened", "looked_up")}
        checkpoint = {
            **per_file, "same": CHECKPOINT, "own": share,
            "cpu": CHECKPOINT / figures.hashing + world * figures.file,
        }  # fmt: skip
    first = BATCH + AHEAD
    return {
        "imports, from a disk of the node": figures.imports,
        "joining": phase_seconds(figures, world, messages=messages),
        "models opened and checked": phase_seconds(figures, world, **files("Opening the models", "Checking the files")),
        "checkpoint compared and read": phase_seconds(figures, world, **checkpoint),
        "shards' index": phase_seconds(figures, world, opened=4, looked_up=shards / NAMES, same=shards * ENTRY),
        "frozen models compared": phase_seconds(figures, world, same=FROZEN, cpu=FROZEN / figures.hashing, once=True),
        "model loaded": phase_seconds(figures, world, **files("Loading the model"), same=MODEL),
        "first step: shards opened, rows read": phase_seconds(
            figures, world, opened=min(first, shards), own=first * (RECORD + NUMBERS)
        ),
        "only with --train_data_dir: images looked at": phase_seconds(figures, world, **source),
        "only where Python lies on the shared file system": phase_seconds(
            figures, world, opened=imports[0], looked_up=imports[1] + imports[2], same=imports[3]
        ),
    }  # fmt: skip


def modelled_table(kinds: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: seconds by phase at `CLUSTERS`; the sum is without what is the case only sometimes."""
    lines = [f"| phase | {' | '.join(f'{of}: {world}' for of in kinds for world in CLUSTERS)} |"]
    lines.append("|---" * (1 + len(CLUSTERS) * len(kinds)) + "|")
    columns = [phases for of in kinds.values() for phases in of]
    for what in columns[0]:
        lines.append(f"| {what} | {' | '.join(f'{phases[what]:.1f}' for phases in columns)} |")
    sums = [sum(seconds for what, seconds in phases.items() if not what.startswith("only")) for phases in columns]
    return "\n".join([*lines, f"| in all | {' | '.join(f'{seconds:.0f}' for seconds in sums)} |"])


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2:])
    from benchmarks.tools.rows import write_result

    parser = argparse.ArgumentParser("benchmarks.runs.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--measured", type=Path, help="take the measured rows from there instead")
    parser.add_argument("--before", type=Path, help="the measured rows of the engine before the first process decided for all")
    for item in fields(Figures):
        parser.add_argument(f"--{item.name}", type=float, default=item.default, help="default: %(default)s")
    options = vars(parser.parse_args())
    json_file, kept, earlier = (options.pop(name) for name in ("json", "measured", "before"))
    rows = json.loads(kept.read_text())["measured"] if kept else measure()
    print(measured_table(rows))
    sets = {"before": json.loads(earlier.read_text())["measured"]} if earlier else {}
    sets["now"] = rows
    kinds = {of: [modelled(each, of == "before", world, Figures(**options)) for world in CLUSTERS] for of, each in sets.items()}
    print(f"\n{modelled_table(kinds)}")
    write_result(json_file, __doc__, measured=rows, figures=options, modelled=kinds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
