"""Checkpoints: complete or absent, checked before loading, and independent of how many processes wrote them.

A directory checkpoint-N holds, per process, rank-R.safetensors with the slices it keeps in fp32: tensors named
`kind/parameter@start`, with kind `weight`, a moment of the optimizer or `ema`, flattened, `start` the first element within the
parameter (parameters are those of the training form, `models/training_form.py`). state.json holds the step and what the run
was; manifest.json the digest of every file. No pickle is written or opened.

Between steps, a file is written from where the state lies. To be written beside the training, the state is copied to host
memory first. Writing needs no other process but the first, which waits until every process's digest is there and publishes.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import UserError, disk_problem
from engine.files import PARTIAL, digest, discard, publish_directory, write_json, write_text
from engine.loop.metrics import Metrics
from engine.loop.weights.ema import Ema
from engine.loop.weights.partition import Partition, Slice
from engine.processes import Processes
from engine.tensors import PIECE, TensorFile, header_of, host_buffer, in_file_order, pieces_of, staged, write_pieces

FORMAT_VERSION = 2
LATEST = "latest"


def sliced_tensors(partition: Partition, ema: Ema | None) -> dict[str, list[Tensor]]:
    """Everything that is laid out as the masters, by kind."""
    kinds: dict[str, list[Tensor]] = {"weight": partition.masters}
    state = partition.optimizer.state[partition.masters[0]]
    for kind, value in state.items():
        if torch.is_tensor(value) and value.numel() == partition.masters[0].numel() and value.dim() > 0:
            kinds[kind] = partition.moments(kind)
    if ema is not None:
        kinds["ema"] = ema.averages
    return kinds


def other_state(partition: Partition, kinds: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Optimizer state that has no place within a parameter, by the name that it is stored under.

    Counters are the same for all masters and stored once, so that they fit any other partition; 8-bit scales are not.
    """
    state: dict[str, list[Tensor]] = {}
    for number, master in enumerate(partition.masters):
        for kind, value in partition.optimizer.state[master].items():
            if torch.is_tensor(value) and kind not in kinds:
                name = f"optimizer/{kind}" if value.dim() == 0 else f"optimizer/{number}/{kind}"
                state.setdefault(name, []).append(value)
    return state


def host_counters(partition: Partition) -> dict[str, int]:
    """Counters that an optimizer (bitsandbytes') keeps as plain numbers, the same for all masters."""
    state = partition.optimizer.state[partition.masters[0]]
    return {kind: value for kind, value in state.items() if isinstance(value, int)}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's own generators, which draw a model's dropout."""
    state = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device)
    return state


@dataclass
class Snapshot:
    """What a checkpoint holds of this process.

    header, pieces: of its file; the pieces are copies, or come from where the state lies as they are asked for.
    state: what state.json will hold.
    """

    step: int
    header: bytes
    pieces: Iterable[Tensor]
    state: dict[str, Any]


@dataclass
class Writer:
    """Saves checkpoints under a directory, one at a time; older ones go only once a newer one is complete.

    run: what must be the same when the run is resumed (seed, global batch, shards' fingerprint).
    beside: copy the state to host memory and write in a thread; the next `save` and `wait` wait for it, and raise what it
        raised.
    token: tells this run's unfinished writing from that of a run that was killed; the same on all processes.
    """

    directory: Path
    run: dict[str, Any]
    processes: Processes
    total_limit: int | None
    beside: bool
    token: str
    copy_seconds: float = 0.0
    _thread: threading.Thread | None = None
    _error: BaseException | None = None
    _buffers: list[Tensor] = field(default_factory=list)

    def save(self, step: int, partition: Partition, ema: Ema | None, metrics: Metrics) -> None:
        """Every process must call it. Returns when the state is copied, or without `beside` when all of it is written.

        Raises:
            UserError: this checkpoint, or the one before it, could not be written.
        """
        self.wait()
        self.processes.synchronize()
        started = time.perf_counter()
        snapshot = self._snapshot(step, partition, ema, metrics)
        self.copy_seconds = time.perf_counter() - started
        if self.beside:
            self._thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._work(snapshot)
            self.wait()
            self.processes.barrier()

    def wait(self) -> None:
        """Until what is being written is complete."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _snapshot(self, step: int, partition: Partition, ema: Ema | None, metrics: Metrics) -> Snapshot:
        kinds = sliced_tensors(partition, ema)
        tensors = {
            f"{kind}/{piece.name}@{piece.start}": partition.view(piece, holders)
            for piece in partition.slices for kind, holders in kinds.items()
        }  # fmt: skip
        tensors |= {name: values[0].detach().cpu() for name, values in other_state(partition, kinds).items()}
        tensors |= {"metrics/loss_sum": metrics.loss_sum.cpu().view(1), **random_state(self.processes.device)}
        tensors = in_file_order(tensors)
        header, _ = header_of(tensors)
        pieces: Iterable[Tensor] = pieces_of(tensors.values())
        if self.beside:
            pieces = self._copied(list(tensors.values()))
        scaler = partition.loss_scaler
        state = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world": self.processes.world,
            "run": self.run,
            "optimizer_counters": host_counters(partition),
            "loss_steps": metrics.steps,
            "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))} if scaler else None,
        }
        return Snapshot(step, header, pieces, state)

    def _copied(self, tensors: list[Tensor]) -> list[Tensor]:
        """The bytes of tensors in buffers that are kept from one checkpoint to the next."""
        size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
        while len(self._buffers) * PIECE < size:
            self._buffers.append(host_buffer())
        return list(staged(tensors, self._buffers))

    def _work(self, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        try:
            self._write(snapshot)
        except Exception as error:
            problem = disk_problem(error) or (error.strerror or str(error) if isinstance(error, OSError) else None)
            with contextlib.suppress(OSError):
                (self._aside(snapshot.step) / f"rank-{self.processes.rank}.failed").touch()
            if problem is None:
                self._error = error
                return
            last = find(self.directory, LATEST)
            kept = f"the last complete one is {last}" if last else "there is no complete one"
            self._error = UserError(
                f"{self.directory / f'checkpoint-{snapshot.step}'} cannot be written: {problem}; {kept}. Make "
                "room or permit writing there, and continue with --resume_from_checkpoint latest",
                alone=True,
            )
        else:
            if self.processes.is_first:
                written = time.perf_counter() - started
                copied = f"copied in {self.copy_seconds:.2f} s, " if self.beside else ""
                tqdm.write(f"Saved checkpoint-{snapshot.step}: {copied}written in {written:.2f} s", file=sys.stderr)

    def _aside(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}-{self.token}{PARTIAL}"

    def _write(self, snapshot: Snapshot) -> None:
        rank = self.processes.rank
        aside = self._aside(snapshot.step)
        aside.mkdir(parents=True, exist_ok=True)
        written = write_pieces(aside / f"rank-{rank}.safetensors", snapshot.header, snapshot.pieces)
        write_json(aside / f"rank-{rank}.json", written)
        if self.processes.is_first:
            digests = self._digests(aside)
            write_json(aside / "state.json", snapshot.state)
            digests["state.json"] = digest(aside / "state.json")
            write_json(aside / "manifest.json", digests)
            self._publish(aside, self.directory / f"checkpoint-{snapshot.step}")

    def _digests(self, aside: Path) -> dict[str, str]:
        """File -> digest, once every process has written its part; their notes of it are taken away."""
        notes = [aside / f"rank-{rank}.json" for rank in range(self.processes.world)]
        while not all(note.exists() for note in notes):
            for failed in aside.glob("rank-*.failed"):
                raise OSError(f"process {failed.stem.removeprefix('rank-')} could not write its part")
            time.sleep(0.01)
        digests = {note.with_suffix(".safetensors").name: json.loads(note.read_text()) for note in notes}
        for note in notes:
            note.unlink()
        return digests

    def _publish(self, aside: Path, final: Path) -> None:
        replaced = final.with_name(f"{final.name}.replaced")
        discard(replaced)
        if final.exists():
            final.rename(replaced)
        publish_directory(aside, final)
        write_text(self.directory / LATEST, final.name + "\n")
        discard(replaced)
        if self.total_limit is not None:
            others = [path for path in complete_checkpoints(self.directory) if path != final]
            for old in others[: -self.total_limit + 1 or None]:
                discard(old)


def discard_unfinished(directory: Path) -> None:
    """Removes what runs left that were killed while they wrote."""
    for path in directory.glob(f"checkpoint-*{PARTIAL}"):
        discard(path)


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find(directory: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None when `latest` finds none.

    A path as the scripts take it: a directory, or the name of one in the output directory.
    """
    if resume != LATEST:
        path = Path(resume)
        return path if path.is_dir() else directory / path.name
    pointer = directory / LATEST
    if pointer.is_file() and (directory / pointer.read_text().strip()).is_dir():
        return directory / pointer.read_text().strip()
    # A crash between renaming the checkpoint and moving the pointer leaves a complete one unnamed.
    complete = complete_checkpoints(directory)
    return complete[-1] if complete else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Checks every digest and returns state.json.

    Raises:
        UserError: a file is missing or altered, or the format is another.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        damaged = [
            name for name, expected in manifest.items()
            if not (checkpoint / name).is_file() or digest(checkpoint / name) != expected
        ]  # fmt: skip
        state = json.loads((checkpoint / "state.json").read_text()) if not damaged else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: not a complete checkpoint ({error}); {_others(checkpoint)}") from None
    if damaged:
        raise UserError(f"{checkpoint}: damaged: {', '.join(damaged)} missing or altered; {_others(checkpoint)}")
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(f"{checkpoint}: format version {state['format_version']}, this engine reads {FORMAT_VERSION}")
    return state


def _others(checkpoint: Path) -> str:
    others = [path for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
    return f"resume from {others[-1]} instead" if others else "there is no other; start again in an empty directory"


class SliceFiles:
    """The slices of a checkpoint's files, found by kind and parameter."""

    def __init__(self, checkpoint: Path) -> None:
        self.files = [TensorFile(path) for path in sorted(checkpoint.glob("rank-*.safetensors"))]
        self.places: dict[str, list[tuple[int, TensorFile, str]]] = {}
        for file in self.files:
            for name in file.header:
                if "@" in name:
                    whole, start = name.rsplit("@", 1)
                    self.places.setdefault(whole, []).append((int(start), file, name))

    @property
    def kinds(self) -> list[str]:
        return sorted({whole.split("/", 1)[0] for whole in self.places})

    def elements(self, kind: str) -> int:
        """How many numbers of a kind the files hold."""
        return sum(file.elements(name) for whole, places in self.places.items() if whole.startswith(f"{kind}/")
                   for _, file, name in places)  # fmt: skip

    def fill_parameter(self, kind: str, name: str, parameter: Tensor) -> None:
        """Copies a whole parameter from whichever files hold its pieces; it must be contiguous."""
        self.fill(kind, Slice(name, parameter.shape, 0, parameter.numel(), 0, 0), parameter.detach().view(-1))

    def fill(self, kind: str, piece: Slice, target: Tensor) -> None:
        """Copies the elements of a slice from whichever files hold them."""
        filled = 0
        for start, file, name in self.places.get(f"{kind}/{piece.name}", []):
            first = max(start, piece.start)
            last = min(start + file.elements(name), piece.start + piece.length)
            if first < last:
                file.read(name, first - start, target[first - piece.start : last - piece.start])
                filled += last - first
        if filled != piece.length:
            raise UserError(f"the checkpoint holds {filled} of {piece.length} elements of {kind}/{piece.name}; was it trained "
                            "with the same model and options?")  # fmt: skip


def load(
    checkpoint: Path, state: dict[str, Any], partition: Partition, ema: Ema | None, metrics: Metrics, processes: Processes
) -> None:
    """Brings weights, optimizer, averages, loss scale and generators back; `state` as `read_state` returned it."""
    kinds = sliced_tensors(partition, ema)
    files = SliceFiles(checkpoint)
    with torch.no_grad():
        for piece in partition.slices:
            for kind, holders in kinds.items():
                files.fill(kind, piece, partition.view(piece, holders))
    same_world = state["world"] == processes.world
    own = files.files[processes.rank if same_world else 0]
    for name, values in other_state(partition, kinds).items():
        if name not in own.header or own.header[name]["shape"] != list(values[0].shape):
            raise UserError(f"{checkpoint}: holds no {name} for this optimizer and number of processes")
        for value in values:
            value.copy_(own.tensor(name))
    for master in partition.masters:
        partition.optimizer.state[master].update(state["optimizer_counters"])
    if same_world:
        torch.set_rng_state(own.tensor("random/cpu"))
        if "random/cuda" in own.header and processes.device.type == "cuda":
            torch.cuda.set_rng_state(own.tensor("random/cuda"), processes.device)
    if partition.loss_scaler and state["loss_scaler"]:
        vars(partition.loss_scaler).update(state["loss_scaler"])
    sums = [file.tensor("metrics/loss_sum") for file in ([own] if same_world else files.files)]
    metrics.loss_sum.fill_(float(torch.cat(sums).mean()))
    metrics.steps = state["loss_steps"]
    partition.refresh_weights()
