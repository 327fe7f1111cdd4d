"""What a command says while it works: lines on standard error, of the first process alone."""

import sys

from tqdm import tqdm

from engine.launcher import rank

_quiet = False
_warned: set[str] = set()


def begin(quiet: bool) -> None:
    """To be called when a command starts its work. `quiet` leaves warnings only."""
    global _quiet
    _quiet = quiet
    _warned.clear()


def say(line: str) -> None:
    if not _quiet:
        _write(line)


def warn(line: str) -> None:
    """Says what went wrong without ending the work, once however often it happens."""
    if line not in _warned:
        _warned.add(line)
        _write(f"warning: {line}")


def _write(line: str) -> None:
    if rank() == 0:
        tqdm.write(line, file=sys.stderr)  # which leaves the bar of a terminal whole
