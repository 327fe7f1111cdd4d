"""A process of a run whose state is divided among several, without the rest of a training.

`python -m tests.loop.divided OUTPUT save|resume WORD...`: what a test wants otherwise is patched by further words.
"""

import dataclasses
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from engine import files, liveness, tensors
from engine.config.options import TrainConfig
from engine.errors import exit_code
from engine.launcher import rank
from engine.loop.checkpoints import layout, writer
from engine.loop.checkpoints.snapshot import restore, sliced_tensors
from engine.loop.checkpoints.writer import Writer
from engine.loop.metrics import Metrics
from engine.loop.resume import find_checkpoint, open_checkpoint
from engine.loop.run import Run
from engine.loop.weights.flat import FlatPartition
from engine.processes import Processes


class DividedPartition(FlatPartition):
    """Holds an even share of the flat weights, as ZeRO does; the rest is there and of no account."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        size = -(-self.masters[0].numel() // self.processes.world)
        first, last = self.processes.rank * size, (self.processes.rank + 1) * size
        whole, self.slices = self.slices, []
        for piece in whole:
            start, stop = max(first - piece.offset, 0), min(last - piece.offset, piece.length)
            if start < stop:
                ours = {"start": start, "length": stop - start, "offset": piece.offset + start}
                self.slices.append(dataclasses.replace(piece, **ours))

    def refresh_weights(self) -> None:
        pass


class Divided:
    """A tiny model with every kind of state, of which each process holds its share."""

    def __init__(self, output: Path) -> None:
        self.processes = Processes(device=torch.device("cpu")).connect()
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 7))
        values = {"pretrained_model_name_or_path": "unused", "use_ema": True, "output_dir": str(output)}
        values |= {"train_batch_size": 4 // self.processes.world, "resume_from_checkpoint": "latest"}
        self.config = TrainConfig.model_validate({"family": "sd", **values})
        self.partition = DividedPartition(model, self.config, self.processes)
        run = Run(seed=3, global_batch=4, fingerprint="", records=1, steps=9)
        self.metrics = Metrics(run, self.processes)
        self.writer = Writer(output, run, self.processes, None, "beside" in sys.argv, "01234567")

    def save(self, step: int) -> None:
        self.partition.optimizer.apply([torch.full_like(self.partition.masters[0], 1.0 / step)])
        self.metrics.steps, self.metrics.loss_sum = step, torch.tensor(0.1 * step + self.processes.rank / 7)
        self.writer.save(step, self.partition, self.metrics)
        if "training" in sys.argv:
            time.sleep(30 if "killed" in sys.argv and step == 4 else 2.0)
        self.writer.wait()

    def resume(self) -> Path:
        for kind in sliced_tensors(self.partition).values():
            for tensor in kind:
                tensor.fill_(-1)
        found = self.processes.computed_by_first(lambda: find_checkpoint(self.config))
        opened = open_checkpoint(found, self.config, self.processes)
        restore(opened, self.partition, self.metrics)
        return opened.path


def note_files(read: list[tuple[str, int]]) -> None:
    """Notes every file that is opened, with its bytes."""
    open_regular = files.open_regular

    def noted(path: Path):
        file = open_regular(path)
        read.append((path.name, os.fstat(file.fileno()).st_size))
        return file

    for module in (files, tensors, layout):
        module.open_regular = noted


def patch(words: list[str], others: bool) -> None:
    """What goes otherwise than it should, in all processes but the first."""
    write_pieces = writer.write_pieces

    def write(path: Path, *others) -> str:
        written = write_pieces(path, *others)
        if "killed" in words and "checkpoint-2" not in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        if "stuck" in words:
            time.sleep(3)
        if "late" in words:
            time.sleep(1.5)
        if "full" in words:
            raise OSError(28, "No space left on device")
        return written

    def exhausted(*unused) -> list[torch.Tensor]:
        raise RuntimeError("CUDA error: out of memory")

    def blind(checkpoint: Path):
        raise layout.Damaged("not there yet")

    def unreadable(path: Path) -> str:
        if "checkpoint-4/rank" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return files.digest(path)

    liveness.BEAT, liveness.SILENCE, liveness.LAST_LOOK = 0.2, 2.0, 0.5
    writer.LIMIT = 1.0 if {"stuck", "late"} & {*words} else 60.0
    writer.GRACE = 0.5
    files.SEEN_WITHIN = 1.0 if "blind" in words else 600.0
    if others:
        writer.write_pieces = write
        if "blind" in words:
            layout._manifest = blind
        if "memory" in words:
            Writer._copied = exhausted
        if "unreadable" in words:
            layout.digest = unreadable


def main() -> int:
    output, *words = sys.argv[1:]
    read: list[tuple[str, int]] = []
    patch(words, others=rank() > 0)
    divided = Divided(Path(output))
    if "save" in words:
        for step in (2, 4):
            divided.save(step)
    if "resume" in words:
        note_files(read)
        found = divided.resume()
        partition = divided.partition
        state = {
            f"{kind}/{piece.name}@{piece.start}": partition.view(piece, holders).tolist()
            for kind, holders in sliced_tensors(partition).items() for piece in partition.slices
        }  # fmt: skip
        said = {"checkpoint": found.name, "read": read, "state": state, "loss_sum": float(divided.metrics.loss_sum)}
        print(json.dumps(said))
    divided.processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("divided", main))
