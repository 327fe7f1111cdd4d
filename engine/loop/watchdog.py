"""A step that does not end is given up: the processes that are behind are named, and a launcher may start again."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from engine.errors import TRY_AGAIN
from engine.processes import Processes


class Watchdog:
    """A thread that watches the step number of this process, and tells it to the others through the rendezvous store.

    The training only counts; whatever it is blocked in, a collective with a process that died say, the thread goes on.

    Args:
        timeout: seconds without a new step after which the process leaves with `TRY_AGAIN`.
    """

    def __init__(self, processes: Processes, timeout: float) -> None:
        self.processes, self.timeout = processes, timeout
        self.step = -1
        self._paused = 0
        self._stop = threading.Event()
        self._store = dist.distributed_c10d._get_default_store() if processes.world > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def finished(self, step: int) -> None:
        """To be called with the number of every step that ended."""
        self.step = step

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work inside may take as long as it takes."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _watch(self) -> None:
        seen, since = self.step, time.monotonic()
        while not self._stop.wait(min(self.timeout / 10, 5.0)):
            if self._store is not None:
                self._store.set(f"watchdog/{self.processes.rank}", str(self.step))
            # The first step may compile; counting begins when it has ended.
            if self.step != seen or self._paused or self.step < 0:
                seen, since = self.step, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                self._give_up()

    def _give_up(self) -> None:
        steps = {rank: self._step_of(rank) for rank in range(self.processes.world)}
        newest = max(steps.values())
        behind = [f"process {rank} (step {step})" for rank, step in steps.items() if step < newest]
        named = f"behind are {', '.join(behind)}" if behind else f"all are at step {newest}"
        print(
            f"engine.run: error: process {self.processes.rank}: no step has ended for {self.timeout:g} seconds "
            f"(--step_timeout); {named}. Leaving with exit code {TRY_AGAIN}; continue with --resume_from_checkpoint latest",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(TRY_AGAIN)

    def _step_of(self, rank: int) -> int:
        if self._store is None or rank == self.processes.rank:
            return self.step
        try:
            return int(self._store.get(f"watchdog/{rank}")) if self._store.check([f"watchdog/{rank}"]) else -1
        except RuntimeError:  # the process that kept the store is gone
            return -1
