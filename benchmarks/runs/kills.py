"""What do kills cost? `python -m benchmarks.runs.kills [--kills 50] [--json FILE]`

A run that encodes, trains, checkpoints (half of the rounds beside the training) and exports is killed with SIGKILL at random
instants and started again with the same command, until it ends; then its exported weights are compared bit by bit with those
of a run that nobody disturbed. Nobody touches a file in between.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.place import STEPS, Place, run, start, wait_for, weights
from benchmarks.tools.rows import write_result
from engine.data.format.index import INDEX, Index
from engine.data.format.verify import verify
from engine.files import digest
from engine.quiet import quiet_libraries


def _corrupt(output: Path) -> list[str]:
    """Files that claim to be complete and are not what their digests say."""
    found = []
    for manifest in output.glob("checkpoint-*/manifest.json"):
        digests = json.loads(manifest.read_text())
        found += [str(manifest.parent / name) for name, value in digests.items() if digest(manifest.parent / name) != value]
    if (output / "shards" / INDEX).exists():
        index = Index.read(output / "shards")
        found += verify(output / "shards", index, range(len(index.shards)), rows=True)
    return found


def _phase(output: Path, ended: bool) -> str:
    """What a killed run was doing, from what it left."""
    if ended:
        return "after the end"
    if list(output.glob("pipeline.partial")):
        return "export"
    if list(output.glob("checkpoint-*.partial")):
        return "checkpoint"
    if (output / "metrics.jsonl").exists():
        return "training"
    return "encoding" if (output / "shards").exists() else "start"


def _await_an_instant(output: Path, process: subprocess.Popen, moments: random.Random) -> None:
    """Waits for a random instant of a run: any time from its start, or in one of its phases."""
    phases = ["any time", "encoding", "training", "training", "checkpoint", "export"]
    what, step = moments.choice(phases), moments.randint(1, STEPS)

    def is_there() -> bool:
        if what == "encoding":
            return any(output.glob("shards/*"))
        if what == "training":
            file = output / "metrics.jsonl"
            return file.exists() and len(file.read_text().splitlines()) >= step
        return any(output.glob("checkpoint-*.partial" if what == "checkpoint" else "pipeline.partial"))

    if what == "any time":
        time.sleep(moments.uniform(0.5, 6.0))
        return
    wait_for(is_there, process)
    time.sleep(moments.uniform(0.0, 0.05))


def kills(place: Place, count: int) -> dict[str, Any]:
    """Kills runs `count` times at random instants; every run is resumed to its end and compared."""
    whole = place.root / "whole"
    assert run(place.command(whole)).returncode == 0
    expected = weights(whole)
    moments = random.Random(4)
    phases: dict[str, int] = {}
    corrupt: list[str] = []
    rounds, different, manual, done = 0, 0, 0, 0
    while done < count:
        output = place.root / f"killed-{rounds}"
        options = ["--checkpoint_async"] if rounds % 2 else []
        # A few kills within one run, then it may end.
        for _ in range(min(moments.randint(3, 6), count - done)):
            process = start(place.command(output, *options))
            _await_an_instant(output, process, moments)
            ended = process.poll() is not None
            process.send_signal(signal.SIGKILL)
            process.wait()
            phase = _phase(output, ended)
            phases[phase] = phases.get(phase, 0) + 1
            done += 0 if ended else 1
            corrupt += _corrupt(output)
        result = run(place.command(output, *options))
        manual += result.returncode != 0
        if result.returncode == 0:
            ours = weights(output)
            different += not all(torch.equal(ours[name], expected[name]) for name in expected)
        print(f"round {rounds}: {done} of {count} kills, phases {phases}, different {different}", flush=True)
        shutil.rmtree(output)
        rounds += 1
    return {"kills": done, "runs": rounds, "phases": phases, "different_results": different, "corrupt_files": corrupt,
            "runs_that_needed_a_hand": manual}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as directory:
        killed = kills(Place(Path(directory)), options.kills)
    print(json.dumps(killed, indent=1))
    write_result(options.json, __doc__, **killed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
