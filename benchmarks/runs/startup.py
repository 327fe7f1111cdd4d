"""What does the start of a run take? `python -m benchmarks.runs.startup [--json FILE] [--measured FILE]`, figures of a cluster

Measured on 1, 2 and 4 processes of this machine with a tiny Stable Diffusion on prebuilt shards, going on from a checkpoint
of four processes: seconds of every phase, until the first step has ended; and what every process did, counted by a preloaded
library (files opened, looked up, read; messages to the processes' store; descriptors). Two processes also with four times the
images, four times the shards, and a checkpoint of one process: what grows with what.

From these counts, and the sizes of SD 1.5 and 10 million samples, a model computes the phases at 8, 128 and 1,024 processes, 8
per node. Nothing of that is measured; the figures of the file system are options.
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
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.preloaded import Forks, build
from benchmarks.tools.shared import counted, free_port

WORLDS = (1, 2, 4)
AT = 3  # the checkpoint's step
LAST = "The first step"
IMPORTS, BETWEEN = "Interpreter and imports", "Between these"
VARIANTS = ("", "four times the images", "four times the shards", "a checkpoint of one process")


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
        self.images = {"": self.place.images, VARIANTS[1]: many}

    def command(self, output: Path, variant: str, steps: int) -> list[str]:
        command = self.place.command(
            output, "--train_batch_size", "1", "--global_batch_size", "4", "--zero_stage", "2", "--shard_records",
            "2" if variant == VARIANTS[2] else "8", "--shards_dir", str(self.root / f"shards-{variant or 'base'}"),
            "--checkpointing_steps", str(AT), steps=steps,
        )  # fmt: skip
        command[command.index("--train_data_dir") + 1] = str(self.images.get(variant, self.place.images))
        return command[3:]

    def environment(self, world: int) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # fmt: skip

    def train(self, output: Path, variant: str) -> None:
        """Leaves shards and a checkpoint of one process or of four."""
        world = 1 if variant == VARIANTS[3] else 4
        command, common = self.command(output, variant, AT), self.environment(world)
        processes = [
            self.forks.start(
                ["engine.run", *command], common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, self.root / f"said-{rank}"
            )
            for rank in range(world)
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
        common = os.environ | self.environment(world) | {"LD_PRELOAD": str(self.library), "SHARED_DIRECTORY": str(self.root)}
        command = [sys.executable, "-m", "benchmarks.runs.startup", "worker", *self.command(output, variant, AT + 1)]
        with (self.root / "said").open("w") as said:
            processes = [
                subprocess.Popen(
                    command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "STARTED": str(time.time())},
                    stdout=said, stderr=said,
                )
                for rank in range(world)
            ]  # fmt: skip
        codes = [process.wait(timeout=600) for process in processes]
        if any(codes):
            raise RuntimeError((self.root / "said").read_text()[-3000:])
        notes = [json.loads(Path(f"{output}.rank-{rank}.json").read_text()) for rank in range(world)]
        for note in notes:
            note["phases"] = {what.replace(f"{self.root}/", ""): phase for what, phase in note["phases"].items()}
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


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2:])
    from benchmarks.tools.rows import write_result

    parser = argparse.ArgumentParser("benchmarks.runs.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--measured", type=Path, help="take the measured rows from there instead")
    options = parser.parse_args()
    rows = json.loads(options.measured.read_text())["measured"] if options.measured else measure()
    print(measured_table(rows))
    write_result(options.json, __doc__, measured=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
