"""What do faults cost? `python -m benchmarks.runs.faults [--kills 50] [--json FILE]`

Kills: a run that encodes, trains, checkpoints (half of the rounds beside the training) and exports is killed with SIGKILL at
random instants and started again with the same command, until it ends; then its exported weights are compared bit by bit with
those of a run that nobody disturbed. Nobody touches a file in between.

Faults: each is provoked once, and what the user sees is kept: exit code and message.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import safetensors
from safetensors.torch import load_file, save_file

from benchmarks.tools.rows import write_result
from engine.files import digest, write_json
from engine.quiet import quiet_libraries
from examples import tiny_models
from examples.photographs import write_images

STEPS = 40
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Place:
    """A tiny pipeline and images, and commands that train on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = tiny_models.write_stable_diffusion(root / "model")["pretrained_model_name_or_path"]
        self.images = write_images(root / "images", longest=64)
        self.base = root / "base"

    def copy_of_base(self, name: str) -> Path:
        """A directory in which six steps were trained."""
        return Path(shutil.copytree(self.base, self.root / name))

    def command(self, output: Path, *options: str, steps: int = STEPS) -> list[str]:
        return [
            sys.executable, "-m", "engine.run", "--family", "sd", "--pretrained_model_name_or_path", self.model,
            "--train_data_dir", str(self.images), "--output_dir", str(output), "--resolution", "16", "--center_crop",
            "--shard_records", "4", "--train_batch_size", "4", "--max_train_steps", str(steps), "--seed", "1", "--use_ema",
            "--checkpointing_steps", "3", "--checkpoints_total_limit", "2", "--log_every", "1", "--report_to", "none",
            "--resume_from_checkpoint", "latest", *options,
        ]  # fmt: skip


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT | variables)


def start(command: list[str], output: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output, text=True)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.001)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def _corrupt(output: Path) -> list[str]:
    """Files that claim to be complete and are not what their digests say."""
    found = []
    for manifest in output.glob("checkpoint-*/manifest.json"):
        digests = json.loads(manifest.read_text())
        found += [str(manifest.parent / name) for name, value in digests.items() if digest(manifest.parent / name) != value]
    index = output / "shards" / "index.json"
    if index.exists():
        for entry in json.loads(index.read_text())["shards"]:
            if digest(output / "shards" / entry["file"]) != entry["sha256"]:
                found.append(entry["file"])
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
    content[-5] ^= 1


def _halve(content: bytearray) -> None:
    del content[len(content) // 2 :]


def _plant_nan(shards: Path) -> None:
    """Puts a NaN into the first latent of the first shard, and its new digest into the index."""
    index = json.loads((shards / "index.json").read_text())
    entry = index["shards"][0]
    path = shards / entry["file"]
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["latent_mean"][0, 0, 0, 0] = float("nan")
    save_file(tensors, path, metadata)
    entry["sha256"] = digest(path)
    write_json(shards / "index.json", index)


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
            shards = sorted((output / "shards").glob("*.safetensors"))
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

    yield "a process is killed in a collective", _killed_in_a_collective(place)

    clock = (
        "import itertools, sys, time; ticks = itertools.count(2_000_000_000, -100)\n"
        "time.time = lambda: float(next(ticks))\n"
        "from engine import run; sys.exit(run.main())"
    )
    output = place.copy_of_base("clock")
    yield "the clock goes backwards", run([sys.executable, "-c", clock, *place.command(output, steps=9)[3:]])


def _killed_in_a_collective(place: Place) -> subprocess.CompletedProcess[str]:
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
        said = (lines if result.returncode else result.stdout.strip().splitlines() or [""])[-1]
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
    parser.add_argument("--kills", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory))
        provoked = faults(place)
        print(table(provoked))
        killed = kills(place, options.kills) if options.kills else None
    print(json.dumps(killed, indent=1))
    write_result(options.json, __doc__, faults=provoked, kills=killed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
