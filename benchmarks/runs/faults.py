"""What do faults cost? `python -m benchmarks.runs.faults [--json FILE]`

Each is provoked once, and what the user sees is kept: exit code and message. `benchmarks.runs.kills` kills runs by the dozen.
"""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from safetensors.torch import load_file

from benchmarks.tools.place import Place, finish, run, start, wait_for
from benchmarks.tools.rows import write_result
from benchmarks.tools.shards import replace_rows
from engine.data.format.index import shard_name
from engine.quiet import quiet_libraries


def _mounted(path: Path, size: str) -> bool:
    """Mounts a small file system in memory; False where this user may not."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


def _alter(path: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def _halve(content: bytearray) -> None:
    del content[len(content) // 2 :]


def _plant_nan(shards: Path) -> None:
    """Puts a NaN into the first latent of the first shard; digests and checksums say that all is well."""
    latents = load_file(shards / shard_name(0))["latent_mean"]
    latents[0, 0, 0, 0] = float("nan")
    replace_rows(shards, 0, latent_mean=latents)


Provoked = Iterator[tuple[str, subprocess.CompletedProcess[str]]]


def disks(place: Place) -> Provoked:
    """Full and read-only file systems, where this user may mount them."""
    for what, size, inside in (("a shard", "16k", "shards"), ("a checkpoint", "1500k", "out")):
        disk = place.root / f"disk-{inside}"
        if _mounted(disk, size):
            output = place.root / "out-of-small-shards" if inside == "shards" else disk
            shards = ["--shards_dir", str((disk if inside == "shards" else place.base) / "shards")]
            yield f"the disk is full during {what}", run(place.command(output, *shards))
            subprocess.run(["umount", str(disk)], check=False)
    disk = place.root / "read-only"
    if _mounted(disk, "10m"):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield "the output is read-only", run(place.command(disk / "out", steps=3))
        subprocess.run(["umount", str(disk)], check=False)


def damaged_files(place: Place) -> Provoked:
    """Shards and checkpoints that are not what they were."""
    for what in ("a shard", "a checkpoint"):
        for damage, change in (("is cut short", _halve), ("has one byte flipped", _flip)):
            fault = f"{what} {damage}"
            output = place.copy_of_base(fault.replace(" ", "-"))
            shards = sorted((output / "shards").glob("shard-*"))
            _alter(shards[0] if what == "a shard" else output / "checkpoint-6" / "rank-0.safetensors", change)
            yield fault, run(place.command(output, steps=9))


def bad_samples(place: Place) -> Provoked:
    """An image that is none, and a latent that is not a number."""
    images = place.root / "images-with-a-bad-one"
    shutil.copytree(place.images, images)
    sorted(images.glob("*.jpg"))[0].write_bytes(b"not an image")
    command = place.command(place.root / "unreadable", steps=3)
    command[command.index("--train_data_dir") + 1] = str(images)
    yield "an image cannot be read", run(command)
    yield "an image cannot be read, --strict", run([*command, "--strict", "--shards_dir", str(place.root / "strict")])

    output = place.copy_of_base("not-a-number")
    _plant_nan(output / "shards")
    yield "a NaN in one sample", run(place.command(output, steps=12))
    yield "a NaN in one sample, --max_skipped_steps 0", run(place.command(output, "--max_skipped_steps", "0", steps=24))


def running_jobs(place: Place) -> Provoked:
    """What happens to, or beside, a run that goes on."""
    output = place.root / "deleted"
    running = start(place.command(output, steps=100_000), subprocess.PIPE)
    wait_for((output / "checkpoint-3").exists, running)
    shutil.rmtree(output / "shards")
    time.sleep(2)
    running.send_signal(signal.SIGTERM)
    yield "the shards are deleted under a running job (then SIGTERM)", finish(running)

    output = place.copy_of_base("shared")
    first = start(place.command(output, steps=100_000))
    wait_for((output / "checkpoint-9").exists, first)
    yield "two runs start in one output directory", run(place.command(output))
    first.kill()
    first.wait()

    yield "a process is killed in a collective", killed_in_a_collective(place)

    clock = (
        "import itertools, sys, time; ticks = itertools.count(2_000_000_000, -100)\n"
        "time.time = lambda: float(next(ticks))\n"
        "from engine import run; sys.exit(run.main())"
    )
    output = place.copy_of_base("clock")
    yield "the clock goes backwards", run([sys.executable, "-c", clock, *place.command(output, steps=9)[3:]])


def killed_in_a_collective(place: Place) -> subprocess.CompletedProcess[str]:
    """Two processes, of which one is killed; the other must end too, and both start again from the last checkpoint."""
    output = place.root / "collective"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
                "-m", "engine.run"]  # fmt: skip
    options = place.command(output, "--step_timeout", "20", "--zero_stage", "2")[3:]
    running = start([*launcher, *options], subprocess.PIPE)
    wait_for((output / "checkpoint-6").exists, running)
    workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=False).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    return finish(running)


def faults(place: Place) -> list[dict[str, Any]]:
    """Provokes each fault; what the command answered."""
    assert run(place.command(place.base, steps=6)).returncode == 0
    rows: list[dict[str, Any]] = []
    for fault, result in itertools.chain(disks(place), damaged_files(place), bad_samples(place), running_jobs(place)):
        lines = [line for line in result.stderr.splitlines() if "engine.run: error" in line or "Error: " in line]
        warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ") and " damaged: " in line]
        said = (lines if result.returncode else warnings or result.stdout.strip().splitlines() or [""])[-1]
        rows.append({
            "fault": fault, "exit_code": result.returncode, "said": said.replace(str(place.root), "."),
            "trace": "Traceback" in result.stderr,
        })  # fmt: skip
        print(f"{fault}: exit code {result.returncode}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| fault | exit code | what the user sees |", "|---|---|---|"]
    lines += [f"| {row['fault']} | {row['exit_code']} | {row['said'].removeprefix('engine.run: error: ')} |" for row in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as directory:
        provoked = faults(Place(Path(directory)))
    print(table(provoked))
    write_result(options.json, __doc__, faults=provoked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
