"""How far the host runs ahead of the device: far enough that the device never waits, near enough that counters are true."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

AHEAD = 2  # steps that the device has been given and has not finished


def device_event(device: torch.device) -> Any:
    """A new event of a GPU, None for the CPU, where a step is finished when it returns.

    Waiting for it leaves the core to the loader's thread instead of polling.
    """
    return torch.cuda.Event(blocking=True) if device.type == "cuda" else None


class Pace:
    """The steps that the device was given and has not finished: `AHEAD` of them at most.

    Args:
        finished: called with the number of every step once the device has finished it, in order.
    """

    def __init__(self, device: torch.device, finished: Callable[[int], None]) -> None:
        self.device, self.finished = device, finished
        self._given: deque[tuple[int, Any]] = deque()

    def given(self, step: int) -> None:
        """To be called when the device has been given a step; waits for the one `AHEAD` steps before."""
        event = device_event(self.device)
        if event is None:
            self.finished(step)
            return
        event.record()
        self._given.append((step, event))
        self.wait(AHEAD)

    def wait(self, unfinished: int = 0) -> None:
        """Until no more steps than this are unfinished."""
        while len(self._given) > unfinished:
            step, event = self._given[0]
            event.synchronize()
            self._given.popleft()
            self.finished(step)
