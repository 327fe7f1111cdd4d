"""What a command says while it works: lines on standard error, of the first process alone."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from engine.errors import printable
from engine.launcher import rank

PATIENCE = 2.0  # seconds after which work that is under way is named
LINE_EVERY = 30.0  # seconds between two lines of work that counts what it did

_quiet = False
_warned: set[str] = set()


def begin(quiet: bool) -> None:
    """To be called when a command starts its work. `quiet` leaves warnings only."""
    global _quiet
    _quiet = quiet
    _warned.clear()


def say(*lines: str) -> None:
    if not _quiet:
        _write(*lines)


def warn(line: str) -> None:
    """Says what went wrong without ending the work, once however often it happens."""
    if line not in _warned:
        _warned.add(line)
        _write(f"warning: {line}")


def _write(*lines: str) -> None:
    if rank() == 0:
        tqdm.write("\n".join(map(printable, lines)), file=sys.stderr)  # which leaves the bar of a terminal whole
        sys.stderr.flush()


def shows_bars() -> bool:
    """Whether progress is shown as bars, by this process; elsewhere lines take their place."""
    return sys.stderr.isatty() and rank() == 0 and not _quiet


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Names the work inside if it takes longer than `PATIENCE`."""
    timer = threading.Timer(PATIENCE, say, (f"{what} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Progress:
    """How much of some work is done: a bar in a terminal, elsewhere a line now and then.

    done: before this process began.
    """

    def __init__(self, total: int, what: str, unit: str, done: int = 0) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done, self._before, self._started = done, done, time.monotonic()
        self._due = self._started + PATIENCE
        self._bar = tqdm(total=total, desc=what, unit=unit, initial=done, leave=False, disable=not shows_bars())

    def update(self, count: int = 1) -> None:
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now >= self._due and self._before < self.done < self.total:
            self._due = now + LINE_EVERY
            left = (now - self._started) * (self.total - self.done) / (self.done - self._before)
            say(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}s, {duration(left)} left")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """A time for a person, in its two largest units."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
