"""What do faults of storage cost? `python -m benchmarks.runs.storage [--faults NAME ...] [--every 1] [--json FILE]`

A short run encodes, trains, writes two checkpoints and exports. At every operation that alters a file or a directory, and at
every one that reads, it meets a fault: it is killed there, the operation fails once, or it and all after it do. The run must
go on or end in lines of its own; the same command, started again without a fault, must end in the same weights and leave
nothing unfinished behind.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch

from benchmarks.tools.place import Place, weights
from benchmarks.tools.rows import write_result
from benchmarks.tools.storage import NONE, Ended, Fault, FaultyRuns, instants, unsynced
from engine.messages import Progress

EIO, ENOSPC, EROFS, ESTALE = "5", "28", "30", "116"
FAULTS = {
    "killed": Fault("changes", action="kill"),
    "a write takes half": Fault("changes", action="short"),
    "EIO once, writing": Fault("changes", action=EIO),
    "ESTALE once, writing": Fault("changes", action=ESTALE),
    "ENOSPC once": Fault("changes", action=ENOSPC),
    "full from then on": Fault("changes", action=ENOSPC, lasting=True),
    "read-only from then on": Fault("changes", action=EROFS, lasting=True),
    "the directory is moved away": Fault("changes", action="vanish"),
    "EIO once, reading": Fault("reads", action=EIO),
    "ESTALE once, reading": Fault("reads", action=ESTALE),
    "unreadable from then on": Fault("reads", action=EIO, lasting=True),
}
STEPS = 4


class Trial:
    """A run that nobody disturbed, and others that are compared with it."""

    def __init__(self, place: Place, runs: FaultyRuns) -> None:
        self.place, self.runs = place, runs
        self.disk = place.root / "disk"
        self.output = self.disk / "out"
        self.command = place.command(self.output, steps=STEPS)[2:]
        self.operations: dict[str, list[list[str]]] = {}
        for kind in ("changes", "reads"):
            shutil.rmtree(self.disk, ignore_errors=True)
            ended = self.run(Fault(kind))
            assert ended.status == 0, ended.said
            self.operations[kind] = ended.operations
        self.expected = weights(self.output)

    def run(self, fault: Fault) -> Ended:
        """The command once; images and models can only be read, so that what alters files is met on the disk alone."""
        return self.runs.run(self.command, self.place.root if fault.operations == "reads" else self.disk, fault)

    def meet(self, fault: Fault) -> dict[str, Any]:
        """What becomes of a run with this fault, and of the same command after it: `wrong` is empty where all is well."""
        for directory in (self.disk, Path(f"{self.disk}.gone")):
            shutil.rmtree(directory, ignore_errors=True)
        ended = self.run(fault)
        killed = fault.action == "kill" and ended.status == -9
        result = {"at": fault.at, "status": ended.status, "said": ended.said[-2000:], "wrong": ""}
        if not (killed or ended.clean):
            return result | {"wrong": "hangs" if ended.status is None else "ends in a trace"}
        again = self.run(NONE)
        result["said_again"] = again.said[-2000:]
        if again.status != 0:
            return result | {"wrong": "cannot be started again"}
        ours = weights(self.output)
        if not all(torch.equal(ours[name], self.expected[name]) for name in self.expected):
            return result | {"wrong": "ends in other weights"}
        left = [path.name for path in self.output.rglob("*") if path.name.endswith(".partial") or path.name.startswith(".tmp")]
        return result | {"wrong": f"leaves {left[0]}" if left else ""}


def sweep(trial: Trial, name: str, every: int, start: int = 0) -> dict[str, Any]:
    """Meets a kind of fault at its instants, each `every`-th of them."""
    kind = FAULTS[name]
    chosen = instants(trial.operations[kind.operations])[start::every]
    counts: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    with Progress(len(chosen), name, "run") as progress:
        for at in chosen:
            result = trial.meet(Fault(kind.operations, at, kind.action, kind.lasting))
            counts["went on" if result["status"] == 0 else "killed" if result["status"] == -9 else "ended in lines"] += 1
            if result["wrong"]:
                result["operation"] = [
                    part.replace(f"{trial.place.root}/", "") for part in trial.operations[kind.operations][at - 1]
                ]
                wrong.append(result)
            progress.update()
    return {"fault": name, "runs": len(chosen), **counts, "wrong": wrong}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    columns = ["went on", "ended in lines", "killed"]
    lines = [f"| fault | runs | {' | '.join(columns)} | not well, or not the same weights after a restart |"]
    lines += ["|---" * (len(columns) + 3) + "|"]
    for row in rows:
        lines.append(
            f"| {row['fault']} | {row['runs']} | {' | '.join(str(row.get(c, 0)) for c in columns)} | {len(row['wrong'])} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.storage", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    parser.add_argument("--every", type=int, default=1, help="take each so many-th instant (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        place = Place(root)
        with FaultyRuns() as runs:
            trial = Trial(place, runs)
            early = sorted(set(unsynced(trial.operations["changes"])))
            rows = [sweep(trial, name, options.every) for name in options.faults]
    print(table(rows))
    print("named before it was synced:", ", ".join(early) or "nothing")
    for row in rows:
        for result in row["wrong"]:
            print(f"{row['fault']}, {result['operation']}: {result['wrong']}")
    write_result(options.json, __doc__, faults=rows, named_before_synced=early)
    return 0


if __name__ == "__main__":
    sys.exit(main())
