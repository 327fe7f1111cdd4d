"""Writing checkpoints: aside, synced, published when every process's part is there, beside the training if asked for.

Between steps, a file is written from where the state lies. To be written beside the training, the state is copied to host
memory first. Writing needs no other process but the first, which waits until every process's digest is there and publishes.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from engine.errors import UserError, disk_problem, first_line
from engine.files import PARTIAL, digest, discard, sync, sync_files, write_json, write_text
from engine.loop.checkpoints.layout import Depth, find
from engine.loop.checkpoints.names import (
    LATEST,
    MANIFEST,
    REPLACED,
    STATE,
    checkpoint_name,
    complete_checkpoints,
    rank_file,
    step_of,
)
from engine.loop.checkpoints.snapshot import Snapshot, take
from engine.loop.metrics import Metrics
from engine.loop.run import Run
from engine.loop.weights.partition import Partition
from engine.messages import say, warn
from engine.processes import Processes
from engine.tensors import PIECE, host_buffer, pieces_of, staged, write_pieces

LONGEST_WAIT = 60.0  # seconds that a failed checkpoint takes room while others still write their parts of it


@dataclass
class Writer:
    """Saves checkpoints under a directory, one at a time; older ones go only once a newer one is complete.

    beside: copy the state to host memory and write in a thread; the next `save` and `wait` wait for it, and raise what it
        raised.
    models: writes the models of a checkpoint into its directory, beside all slices, and returns their files; or None.
    token: tells this run's unfinished writing from that of a run that was killed; the same on all processes.
    """

    directory: Path
    run: Run
    processes: Processes
    total_limit: int | None
    beside: bool
    token: str
    models: Callable[[Path], list[Path]] | None = None
    copy_seconds: float = 0.0
    _parts_written: bool = False  # by all processes, as the first knows
    _thread: threading.Thread | None = None
    _error: BaseException | None = None
    _buffers: list[Tensor] = field(default_factory=list)

    def save(self, step: int, partition: Partition, metrics: Metrics) -> None:
        """Every process must call it. Returns when the state is copied, or without `beside` when all of it is written.

        Raises:
            UserError: this checkpoint, or the one before it, could not be written.
        """
        self.wait()
        self.processes.synchronize()
        snapshot = take(step, self.run, partition, metrics)
        if self.beside:
            started = time.perf_counter()
            pieces = self._copied(snapshot.tensors)
            self.copy_seconds = time.perf_counter() - started
            self._thread = threading.Thread(target=self._work, args=(snapshot, pieces), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._work(snapshot, pieces_of(snapshot.tensors))
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

    def _copied(self, tensors: list[Tensor]) -> list[Tensor]:
        """The bytes of tensors in buffers that are kept from one checkpoint to the next."""
        size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
        while len(self._buffers) * PIECE < size:
            self._buffers.append(host_buffer())
        return list(staged(tensors, self._buffers))

    def _work(self, snapshot: Snapshot, pieces: Iterable[Tensor]) -> None:
        started = time.perf_counter()
        try:
            self._write(snapshot, pieces)
        except Exception as error:
            problem = disk_problem(error) or (error.strerror or str(error) if isinstance(error, OSError) else None)
            self._remove_half(self._aside(snapshot.step))
            if problem is None:
                self._error = error
                return
            self._error = UserError(
                f"{self.directory / checkpoint_name(snapshot.step)} cannot be written: {problem}; {self._kept()}. Make "
                "room or permit writing there, and continue with --resume_from_checkpoint latest",
                alone=True,
            )
        else:
            if self.processes.is_first:
                written = time.perf_counter() - started
                copied = f"copied in {self.copy_seconds:.2f} s, " if self.beside else ""
                say(f"Saved {checkpoint_name(snapshot.step)}: {copied}written in {written:.2f} s")

    def _kept(self) -> str:
        """What there is to go on from, in words."""
        try:
            last = find(self.directory, LATEST, Depth.HEADERS)
        except (OSError, UserError):
            return "the ones before it cannot be read"
        return f"the last complete one is {last}" if last else "there is no complete one"

    def _aside(self, step: int) -> Path:
        return self.directory / f"{checkpoint_name(step)}-{self.token}{PARTIAL}"

    def _write(self, snapshot: Snapshot, pieces: Iterable[Tensor]) -> None:
        rank = self.processes.rank
        aside = self._aside(snapshot.step)
        self._parts_written = False
        aside.mkdir(parents=True, exist_ok=True)
        written = write_pieces(aside / rank_file(rank), snapshot.header, pieces)
        if not self.processes.is_first and _failed(aside, 0).exists():
            raise OSError("process 0 could not write its part")
        half = _note(aside, rank).with_suffix(PARTIAL)
        half.write_text(written)
        sync(half)
        half.rename(_note(aside, rank))  # from here on the first process may remove everything
        if self.processes.is_first:
            digests = self._digests(aside)
            self._parts_written = True
            digests |= self._models(aside)
            write_json(aside / STATE, snapshot.state.model_dump())
            digests[STATE] = digest(aside / STATE)
            write_json(aside / MANIFEST, digests)
            self._publish(aside, self.directory / checkpoint_name(snapshot.step))

    def _digests(self, aside: Path) -> dict[str, str]:
        """File -> digest, once every process has written its part; their notes of it are taken away."""
        ranks = range(self.processes.world)
        while not all(_note(aside, rank).exists() for rank in ranks):
            for rank in ranks:
                if _failed(aside, rank).exists():
                    raise OSError(f"process {rank} could not write its part")
            time.sleep(0.01)
        digests = {rank_file(rank): _note(aside, rank).read_text() for rank in ranks}
        for rank in ranks:
            _note(aside, rank).unlink()
        return digests

    def _remove_half(self, aside: Path) -> None:
        """Frees what a checkpoint that failed has taken of the disk: each process its part, the first also what is left.

        The directory stays for the next start to sweep where other processes do not come to an end.
        """
        rank = self.processes.rank
        with contextlib.suppress(OSError):
            discard(aside / rank_file(rank))
        with contextlib.suppress(OSError):
            _failed(aside, rank).touch()  # the first process must not wait for this one
        if self.processes.is_first and (self._parts_written or self._others_stopped(aside)):
            with contextlib.suppress(OSError):
                discard(aside)

    def _others_stopped(self, aside: Path) -> bool:
        """Whether no other process writes its part any more; this is waited for, if not for ever."""
        given_up = time.monotonic() + LONGEST_WAIT
        others = range(1, self.processes.world)
        while not all(_note(aside, other).exists() or _failed(aside, other).exists() for other in others):
            if time.monotonic() > given_up:
                return False
            time.sleep(0.01)
        return True

    def _models(self, aside: Path) -> dict[str, str]:
        """File -> digest of the models for others to open. The training needs none of it: what keeps them away is a warning."""
        if self.models is None:
            return {}
        try:
            return {path.relative_to(aside).as_posix(): digest(path) for path in self.models(aside)}
        except Exception as error:  # a full disk, say
            for folder in (path for path in aside.iterdir() if path.is_dir()):
                discard(folder)
            warn(f"{aside.name.removesuffix(PARTIAL)}: without models for diffusers to open: {first_line(error)}")
            return {}

    def _publish(self, aside: Path, final: Path) -> None:
        replaced = final.with_name(f"{final.name}{REPLACED}")
        sync_files(aside)  # before the one of the same step is out of the way
        if os.path.lexists(final):
            discard(replaced)
            final.rename(replaced)
        try:
            aside.rename(final)
        except OSError:
            with contextlib.suppress(OSError):
                replaced.rename(final)
            raise
        sync(self.directory)
        write_text(self.directory / LATEST, final.name + "\n")
        _remove_old(replaced)
        if self.total_limit is not None:
            # Of later steps are those of a run that went further before this one went on from an earlier checkpoint.
            older = [path for path in complete_checkpoints(self.directory) if step_of(path) < step_of(final)]
            for old in older[: -self.total_limit + 1 or None]:
                _remove_old(old)


def _note(aside: Path, rank: int) -> Path:
    """Where a process leaves the digest of its part, once this is written."""
    return aside / f"rank-{rank}.digest"


def _failed(aside: Path, rank: int) -> Path:
    """What a process leaves that could not write its part."""
    return aside / f"rank-{rank}.failed"


def _remove_old(checkpoint: Path) -> None:
    """One that stays after all costs room, and no training."""
    try:
        discard(checkpoint)
    except OSError as error:
        warn(f"{checkpoint}: cannot be removed: {first_line(error)}")
