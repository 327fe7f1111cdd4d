"""Writing checkpoints: aside, synced, published when every process's part is there, beside the training if asked for.

Between steps, a file is written from where the state lies. To be written beside the training, the state is copied to host
memory first. While one is written no collective is involved: every process syncs its file and its entry in the directory and
tells the first its digest through the processes' store; the first publishes once all have told, and tells what became of it.
For each checkpoint that is some 5 operations of the store a process, a look every second while it waits, and a barrier when
all have heard.
"""

import contextlib
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from engine.errors import LostProcess, UserError, disk_problem, first_line, lost_a_process
from engine.files import PARTIAL, digest, discard, parse_json, read_text, seen, sync, sync_files, write_json, write_text
from engine.liveness import GRACE, named
from engine.loop.checkpoints.layout import Depth, find, named_in
from engine.loop.checkpoints.names import (
    BEST,
    LATEST,
    MANIFEST,
    REPLACED,
    STATE,
    checkpoint_name,
    complete_checkpoints,
    is_for_others,
    rank_file,
    step_of,
)
from engine.loop.checkpoints.snapshot import Snapshot, take
from engine.loop.checkpoints.state import Best, parse_state
from engine.loop.metrics import Metrics
from engine.loop.run import Run
from engine.loop.weights.partition import Partition
from engine.messages import say, warn
from engine.processes import Processes
from engine.tensors import PIECE, host_buffer, pieces_of, staged, write_pieces

LIMIT = 3000.0  # seconds for what a training waits for: the parts of all, once the first's is written; a thread's end
_FAILED = "!"  # what a process tells in place of a digest begins with it


@dataclass
class Writer:
    """Saves checkpoints under a directory, one at a time; older ones go only once a newer one is complete.

    beside: copy the state to host memory and write in a thread, for which the next `save` and `wait` wait. What it raised
        `wait` raises; `save` tries the present step first, and raises only what keeps two in turn from being written.
    models: writes the models of a checkpoint into its directory, beside all slices, and returns their files; or None.
    keeps_best: name the one of the lowest held-out loss in `best`.
    token: tells this run's unfinished writing from that of a run that was killed; the same on all processes.
    """

    directory: Path
    run: Run
    processes: Processes
    total_limit: int | None
    beside: bool
    token: str
    models: Callable[[Path], list[Path]] | None = None
    keeps_best: bool = False
    copy_seconds: float = 0.0
    _saves: int = 0
    _saving: bool = False
    _failed: bool = False
    _store: dist.Store | None = None  # a client of its own: one that another thread waits with may be busy
    _thread: threading.Thread | None = None
    _awaited: threading.Event = field(default_factory=threading.Event)
    _removing: threading.Thread | None = None  # old checkpoints, which nobody waits for
    _error: BaseException | None = None
    _buffers: list[Tensor] = field(default_factory=list)

    def save(
        self, step: int, partition: Partition, metrics: Metrics, best: Best | None = None, as_best_alone: bool = False
    ) -> None:
        """Every process must call it. Returns when the state is copied, or without `beside` when all of it is written.

        Args:
            as_best_alone: it would not be written if its held-out loss were not the lowest.

        Raises:
            UserError, LostProcess: this checkpoint, or the two before it, could not be written; by all processes.
        """
        self._settle(step)
        self._join_removing()
        self._saves, self._saving = self._saves + 1, True
        if self._store is None and self.processes.store is not None:
            self._store = self.processes.own_store()
        self.processes.synchronize()
        snapshot = take(step, self.run, partition, metrics, best, as_best_alone)
        if self.beside:
            started = time.perf_counter()
            try:
                pieces: Iterable[Tensor] = self._copied(snapshot.tensors)
            except Exception as error:  # of memory; the others are to hear of it
                pieces = _raising(error)
            self.copy_seconds = time.perf_counter() - started
            self._awaited.clear()
            self._thread = threading.Thread(target=self._work, args=(snapshot, pieces), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._work(snapshot, pieces_of(snapshot.tensors))
            self.wait()

    def _settle(self, step: int) -> bool:
        """Waits for the checkpoint that is being written; whether it is complete. One that failed is let go once."""
        try:
            self.wait()
            self._failed = False
        except Exception as error:
            if self._failed or lost_a_process(error):
                raise
            self._failed = True
            if self.processes.is_first:
                warn(f"{first_line(error)}; trying again with step {step}")
        return not self._failed

    def name_best(self, best: Best) -> bool:
        """Names the checkpoint of the lowest loss in `best`; False where there is none. Every process must call it."""
        if not self._settle(best.step):
            return False
        self._join_removing()
        return self.processes.computed_by_first(lambda: self._name_best(best))

    def _name_best(self, best: Best) -> bool:
        final = self.directory / checkpoint_name(best.step)
        if not final.is_dir():
            return False
        superseded = named_in(self.directory / BEST)
        write_text(self.directory / BEST, final.name + "\n")
        self._begin_removing(final, superseded, best)
        return True

    def _begin_removing(self, final: Path, superseded: Path | None, best: Best | None) -> None:
        self._removing = threading.Thread(target=self._remove_old, args=(final, superseded, best), daemon=True)
        self._removing.start()

    def wait(self) -> None:
        """Until what is being written is complete. Every process must call it.

        Raises:
            UserError, LostProcess: it could not be written; by all processes.
        """
        if self._join():
            raise LostProcess(f"what is written in {self.directory} does not end within {LIMIT:g} seconds")
        error, self._error = self._error, None
        if self._saving and not (error and lost_a_process(error)):
            self.processes.barrier()  # the first process may keep the store, and must not leave while others look there
        self._saving = False
        if error is not None:
            raise error

    def close(self) -> None:
        """Lets what is being written come to its end, whatever that is, so that it is of use where the training failed."""
        self._join()
        self._join_removing()

    def _join(self) -> bool:
        """Waits for the thread that writes; whether it does not end."""
        self._awaited.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(LIMIT)
        return thread is not None and thread.is_alive()

    def _join_removing(self) -> None:
        if self._removing is not None:
            self._removing.join()
            self._removing = None

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
            self._error = error
            if self.beside and lost_a_process(error) and not self._awaited.wait(GRACE):  # the main thread may wait for ever
                self.processes.leave(f"{first_line(error)};", lambda: f"it is at step {self.processes.step}")
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
        """Writes this process's part and tells it; returns when the checkpoint is published.

        Raises:
            UserError, LostProcess: it is not, and why; by all processes.
        """
        aside = self._aside(snapshot.step)
        file, failure = aside / rank_file(self.processes.rank), None
        try:
            _make(aside)
            note = write_pieces(file, snapshot.header, pieces)
            sync(aside)  # its entry
        except Exception as error:
            failure, note = error, f"{_FAILED}{_problem(error) or first_line(error)}"
            with contextlib.suppress(OSError):  # what it took of a full disk
                discard(file)
        try:
            if self.processes.is_first:
                self._complete(snapshot, note)
            else:
                self._tell(note)
                self._hear()
        except Exception:
            with contextlib.suppress(OSError):
                discard(file)
            with contextlib.suppress(OSError):  # of those that did not fail in time, the last removes what is left
                aside.rmdir()
            if failure is not None and _problem(failure) is None:
                raise failure from None
            raise

    def _complete(self, snapshot: Snapshot, note: str) -> None:
        """Publishes the parts of all processes, and tells these what became of it.

        Raises:
            UserError, LostProcess: what is told.
        """
        aside, final = self._aside(snapshot.step), self.directory / checkpoint_name(snapshot.step)
        try:
            digests = self._digests(note)
            digests |= self._models(aside)
            absent = set() if snapshot.state.streams else {"unit", "streams"}
            absent |= {name for name in ("adapters", "as_best_alone", "in_turn") if not getattr(snapshot.state, name)}
            write_json(aside / STATE, snapshot.state.model_dump(exclude=absent))
            digests[STATE] = digest(aside / STATE)
            write_json(aside / MANIFEST, digests)
            best, named = snapshot.state.best, named_in(self.directory / BEST)
            is_best = self.keeps_best and best is not None and best.step == snapshot.step
            self._publish(aside, final, (LATEST, BEST) if is_best else (LATEST,))
            if named == final and not is_best:  # another run's, whose place it took
                discard(self.directory / BEST)
        except LostProcess as error:  # which may still write there
            said: Exception = LostProcess(f"{final} cannot be written: {error}; {self._kept()}")
            self._tell_outcome(said)
            raise said from None
        except Exception as error:
            with contextlib.suppress(OSError):
                discard(aside)
            problem = _problem(error)
            remedy = "Make room or permit writing there, and continue with --resume_from_checkpoint latest"
            line = f"{final} cannot be written: {problem or first_line(error)}; {self._kept()}. {remedy}"
            said = UserError(line, shared=True, passing=True)
            self._tell_outcome(said)
            raise error if problem is None else said from None
        self._tell_outcome(None)
        self._begin_removing(final, named if is_best else None, best)

    def _key(self, name: object) -> str:
        return f"checkpoint-{self.token}/{self._saves}/{name}"

    def _tell(self, note: str) -> None:
        """Tells the digest of this process's part, or what kept it from writing that."""
        assert self._store is not None
        self._store.set(self._key(self.processes.rank), note)
        self.processes.arrive(self._key("all"), self._store)

    def _digests(self, note: str) -> dict[str, str]:
        """File -> digest, once every process has told that of its part.

        Raises:
            OSError: some could not write theirs.
            LostProcess: some did not tell in time.
        """
        notes, ranks = [note], range(self.processes.world)
        if self._store is not None:
            self._tell(note)
            if not self.processes.wait(self._key("all"), self._store, math.inf if self.beside else LIMIT):
                late = [rank for rank in ranks if not self._store.check([self._key(rank)])]
                raise LostProcess(f"{named(late)} did not write {'their parts' if len(late) > 1 else 'its part'} within "
                                  f"{LIMIT:g} seconds after the first")  # fmt: skip
            notes = [told.decode() for told in self._store.multi_get([self._key(rank) for rank in ranks])]
        failed = [rank for rank in ranks if notes[rank].startswith(_FAILED)]
        if failed:
            problem = notes[failed[0]].removeprefix(_FAILED)
            raise OSError(f"{named(failed)}: {problem}" if len(ranks) > 1 else problem)
        return {rank_file(rank): notes[rank] for rank in ranks}

    def _tell_outcome(self, error: Exception | None) -> None:
        """Tells the others that the checkpoint is published, or what they, too, are to raise."""
        if self._store is not None:
            self._store.set(self._key("outcome"), pickle.dumps(error))  # type: ignore[arg-type]

    def _hear(self) -> None:
        """Waits until the first process has told what became of the checkpoint.

        Raises:
            UserError, LostProcess: it is not published.
        """
        assert self._store is not None
        self.processes.wait(self._key("outcome"), self._store)
        error = pickle.loads(self._store.get(self._key("outcome")))
        self._store.delete_key(self._key(self.processes.rank))
        if error is not None:
            raise error

    def _models(self, aside: Path) -> dict[str, str]:
        """File -> digest of the models for others to open. The training needs none of it: what keeps them away is a warning."""
        if self.models is None:
            return {}
        try:
            digests = {path.relative_to(aside).as_posix(): digest(path) for path in self.models(aside)}
            for folder in {(aside / name).parent for name in digests}:
                sync_files(folder)
            return digests
        except Exception as error:  # a full disk, say
            for path in aside.iterdir():
                if path.is_dir() or is_for_others(path.name):
                    discard(path)
            warn(f"{aside.name.removesuffix(PARTIAL)}: without models for diffusers to open: {first_line(error)}")
            return {}

    def _publish(self, aside: Path, final: Path, names: Iterable[str]) -> None:
        replaced = _replaced(final)
        for name in names:
            write_text(aside / name, final.name + "\n")  # where a full disk says so before anything has its name
        sync(aside)  # before the one of the same step is out of the way
        if os.path.lexists(final):
            discard(replaced)
            final.rename(replaced)
        try:
            aside.rename(final)
        except OSError:
            with contextlib.suppress(OSError):
                replaced.rename(final)
            raise
        for name in names:
            (final / name).replace(self.directory / name)
        sync(self.directory)

    def _remove_old(self, final: Path, superseded: Path | None, best: Best | None) -> None:
        """Removes what a checkpoint replaced, and those that are more than are kept.

        Args:
            superseded: the best before this one. It stays where it would be there without having been the best, and where its
                loss was taken over something else than that of `best`.
        """
        _remove(_replaced(final))
        # Of later steps are those of a run that went further before this one went on from an earlier checkpoint.
        older = [path for path in complete_checkpoints(self.directory) if step_of(path) < step_of(final)]
        if best is not None and superseded in older and _was_as_best_alone(superseded, best.of):
            older.remove(superseded)
            _remove(superseded)
        if self.total_limit is not None:
            named = named_in(self.directory / BEST)
            older = [path for path in older if path != named]
            for old in older[: -self.total_limit + 1 or None]:
                _remove(old)


def _was_as_best_alone(checkpoint: Path, of: str) -> bool:
    """Whether a checkpoint was written for its held-out loss alone, taken over this."""
    path = checkpoint / STATE
    try:
        state = parse_state(parse_json(read_text(path)), path)
    except (OSError, UserError, ValueError):  # it stays
        return False
    return state.as_best_alone and state.best is not None and state.best.of == of


def _make(aside: Path) -> None:
    """Makes the directory of a checkpoint, which several processes do, on nodes that may see it late."""
    try:
        aside.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if not seen(aside, aside.is_dir):
            raise


def _problem(error: Exception) -> str | None:
    """What the disk, or another process's, did wrong."""
    return disk_problem(error) or (error.strerror or str(error) if isinstance(error, OSError) else None)


def _replaced(final: Path) -> Path:
    """Where the checkpoint of the same step makes room."""
    return final.with_name(f"{final.name}{REPLACED}")


def _raising(error: Exception) -> Iterator[Tensor]:
    """Pieces that could not be had."""
    raise error
    yield


def _remove(checkpoint: Path) -> None:
    """One that stays after all costs room, and no training."""
    try:
        discard(checkpoint)
    except OSError as error:
        warn(f"{checkpoint}: cannot be removed: {first_line(error)}")
