"""Signals that ask to stop, obeyed by all processes after the same step."""

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from engine.processes import Processes


class StopSignal:
    """SIGTERM, SIGUSR1 and the first Ctrl-C, turned into one step at which every process stops. A second Ctrl-C ends at once.

    A process may be told before the others. Every few steps a reduction of the flags is started on the host, and read when the
    next is due, so that all processes see the same answer at the same step and none waits for it. How many steps lie between
    two follows from the slowest process's time for a step, which the reduction finds too: 2 seconds' worth, 10 at most. A
    signal is obeyed after twice as many at most.

    Args:
        every_step: agree as soon as can be: with the next step.
    """

    def __init__(self, processes: Processes, every_step: bool = False) -> None:
        self.processes = processes
        self.received = False
        self._most = 1 if every_step else 10
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._steps, self._due, self._since = 0, 1, time.perf_counter()  # since the last reduction began
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell leaves it for what runs in its background
            numbers.append(signal.SIGINT)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
            if self.processes.is_first:
                # Not through Python's stream, in the middle of whose work this may be.
                os.write(2, b"\nLeaving after this step, with a checkpoint; Ctrl-C again ends at once\n")

    def agreed(self) -> bool:
        """Whether to stop after this step. To be called once a step by every process."""
        if self.processes.world == 1:
            return self.received
        self._steps += 1
        if self._steps < self._due:
            return False
        stop = 0.0
        if self._pending is not None:
            largest, work = self._pending
            work.wait()
            stop, seconds = largest.tolist()
            self._due = int(min(max(2 / seconds, 1), self._most))
        now = time.perf_counter()
        largest = torch.tensor([float(self.received), (now - self._since) / self._steps])
        self._pending = (largest, dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True))
        self._steps, self._since = 0, now
        return stop > 0

    def close(self) -> None:
        """Ends the agreement. A process that was told to stop passes over what it is told again, until `release`.

        Launchers and SLURM send SIGTERM more than once, and the checkpoint may still be on its way.
        """
        if not self.received:
            self.release()
        if self._pending is not None:
            self._pending[1].wait()

    def release(self) -> None:
        """Gives the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
