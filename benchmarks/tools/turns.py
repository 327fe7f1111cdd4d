"""Processes that prepare beside each other and are timed one after another."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from torch._inductor import compile_fx
from torch._inductor import config as inductor

from engine.errors import UserError


@contextlib.contextmanager
def written_alone(path: Path) -> Iterator[None]:
    """Keeps a file of rows from other processes, each of which would lose what another adds.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--json {path}: another process writes it; name another file") from None
        yield


class Turn:
    """A lock that one process holds while it uses the GPU. A compiled row traces for longer than it is timed, on the host.

    Args:
        path: the lock's file; without one nothing is waited for.
    """

    def __init__(self, path: Path | None) -> None:
        self.file: TextIO | None = path.open("w") if path else None
        self.held = False
        if path:  # another is timed while this process compiles, and its launches need the host
            inductor.compile_threads = max(1, min(inductor.compile_threads or 1, len(os.sched_getaffinity(0)) // 4))

    def take(self) -> None:
        if self.file and not self.held:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.held = True

    def give(self) -> None:
        if self.file and self.held:
            fcntl.flock(self.file, fcntl.LOCK_UN)
            self.held = False

    @contextlib.contextmanager
    def taken_by_compiled_code(self) -> Iterator[None]:
        """Gives the turn, until a function that is compiled in here is called; has it again afterwards."""
        compiles: Any = compile_fx.compile_fx

        def compile_and_take(*arguments: Any, **named: Any) -> Any:
            compiled = compiles(*arguments, **named)

            def run(*inputs: Any) -> Any:
                self.take()
                return compiled(*inputs)

            return run

        self.give()
        with mock.patch.object(compile_fx, "compile_fx", compile_and_take) if self.file else contextlib.nullcontext():
            yield
        self.take()
