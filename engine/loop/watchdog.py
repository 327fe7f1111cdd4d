"""A step that does not end is given up: the processes that are behind are named, and a launcher may start again."""

import contextlib
import math
import threading
import time
from collections.abc import Iterator

from engine.liveness import named
from engine.processes import Processes


class Watchdog:
    """A thread that ends this process with `TRY_AGAIN` when a step takes too long, whatever the training is blocked in.

    The training only counts; the step travels to the others with the signs of life.

    Args:
        first: seconds for the first step, which may compile.
        timeout: seconds for each of the others; None for no limit.
        step: the one before the first.
    """

    def __init__(self, processes: Processes, first: float, timeout: float | None, step: int = 0) -> None:
        self.processes, self.timeout = processes, timeout or math.inf
        processes.step = step
        self._allow("the first step has not ended", first, "--first_step_timeout")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def finished(self, step: int) -> None:
        """To be called with the number of every step that ended."""
        self.processes.step = step
        self._allow("no step has ended", self.timeout, "--step_timeout")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def paused(self, seconds: float) -> Iterator[None]:
        """Work inside, which no step may end in, has a limit of its own."""
        _, what, limit, option = self._limit
        self._allow("what is done between two steps has not ended", seconds, "")
        try:
            yield
        finally:
            self._allow(what, limit, option)

    def _allow(self, what: str, seconds: float, option: str) -> None:
        self._limit = time.monotonic(), what, seconds, option  # one assignment, for the other thread

    def _watch(self) -> None:
        while True:
            since, what, seconds, option = self._limit
            if time.monotonic() - since > seconds:
                self.processes.leave(f"{what} for {seconds:g} seconds{f' ({option})' if option else ''};", self._behind)
            self.processes.beat_soon()
            if self._stop.wait(min(seconds / 10, 5.0)):
                return

    def _behind(self) -> str:
        """Which processes are behind."""
        if self.processes.store is None:
            return f"it is at step {self.processes.step}"
        self.processes.beat()
        steps = self.processes.steps()
        newest = max(steps)
        behind = [rank for rank, step in enumerate(steps) if step < newest]
        if not behind:
            return f"all are at step {newest}"
        return f"behind {'is' if len(behind) == 1 else 'are'} {named(behind)} (step {min(steps)} of {newest})"
