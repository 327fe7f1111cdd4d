"""Processes that prepare beside each other and are timed one after another."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from torch._inductor import compile_fx


class Turn:
    """A lock that one process holds while it uses the GPU. A compiled row traces for longer than it is timed, on the host.

    Args:
        path: the lock's file; without one nothing is waited for.
    """

    def __init__(self, path: Path | None) -> None:
        self.file: TextIO | None = path.open("w") if path else None
        self.held = False

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
