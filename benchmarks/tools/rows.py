"""Where what a benchmark measured is kept: row by row, the moment it is there."""

import gc
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools.environment import environment
from benchmarks.tools.tables import OUT_OF_MEMORY, lasts
from engine.errors import TRY_AGAIN, first_line
from engine.files import write_json, write_text

_INNERMOST = re.compile(r"[{\[][^{}\[\]]*[}\]]")  # of JSON: objects and arrays without others inside


def write_result(path: Path | None, document: str, **measured: Any) -> None:
    """Keeps what a benchmark measured, where a file is named, under its question: the first line of its docstring.

    What holds no other object or array takes a line.
    """
    if path is not None:
        text = json.dumps({"question": document.splitlines()[0], **environment(), **measured}, indent=1, ensure_ascii=False)
        write_text(path, _INNERMOST.sub(lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n")


UNFINISHED = "begun and not ended: the process was killed, or crashed"
ATTEMPTS = 2  # of a row that did not end; a limit of time may have been too short for cold caches, a hang comes again
# What the allocators of torch, CUDA and cuBLAS say, also from within another library's error.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


def reason(error: Exception) -> str:
    """Why a row failed, in one line; a lack of memory by the same words whoever met it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(cause)):
            return OUT_OF_MEMORY
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {first_line(error)}"


TRACE = 3000  # characters at the end of a failure's trace that are kept


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Rows:
    """The rows of a benchmark: each is kept the moment it is measured, and one that fails costs only itself.

    Where the file exists, what it holds is kept and not measured again, so that a call goes on where the one before ended, be
    it on another machine: every row names its environment. Rows of two devices stand beside each other, because their times
    make no ratio. A row stands for its own commit alone, but for those of the recipe and the matrix product (`lasts`). What
    failed is tried again under another commit; what did not end, because the process was killed, once more.

    Args:
        path: the JSON file, or None to keep nothing.
        document: the benchmark's docstring.
        minutes: no row is begun that would not end within so many minutes from now.
    """

    def __init__(self, path: Path | None, document: str, minutes: float | None = None) -> None:
        self.path, self.question = path, document.splitlines()[0]
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        kept = json.loads(path.read_text()) if path is not None and path.exists() else {"environments": [], "rows": []}
        self.environments, self.rows = kept["environments"], kept["rows"]
        here = environment()
        if here not in self.environments:
            self.environments.append(here)
        self.number = self.environments.index(here)
        self.broken = ""
        self.begun: set[str] = set()  # names of the rows that were measured here, and not kept from before
        self.exit_code = 0  # of the benchmark: `TRY_AGAIN` once a row is missing, which a further call may measure

    def measure(self, name: str, seconds: float, work: Callable[[], dict[str, Any]], **about: Any) -> dict[str, Any]:
        """The row of a name: as kept, or what `work` returns, or why there is none (`failed`, `missing`).

        Args:
            seconds: how long the work is expected to take.
            about: what the row says beside its name, however it ends.
        """
        kept = self._find(name)
        if kept is not None and self._stands(kept):
            return kept
        row: dict[str, Any] = {"name": name, "environment": self.number, "device": self._device(self.number), **about}
        left = float("inf") if self.deadline is None else self.deadline - time.monotonic()
        if self.broken or left < seconds:
            self.exit_code = TRY_AGAIN
            return row | {"missing": self.broken or f"no time left: needs about {seconds:.0f} s"}
        attempts = kept.get("attempts", 0) if kept is not None and kept["environment"] == self.number else 0
        self._keep(row | {"failed": UNFINISHED, "attempts": attempts + 1})
        self.begun.add(name)
        started = time.monotonic()
        try:
            row |= work()
        except Exception as error:  # whatever it is, the rows after it are still wanted
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            row |= {"failed": reason(error), "trace": traceback.format_exc()[-TRACE:]}
        row["took_seconds"] = round(time.monotonic() - started, 1)
        self._keep(row)
        try:
            release_memory()
        except RuntimeError as error:  # an illegal access, say: nothing more will run in this process
            self.broken = f"the device failed in an earlier row ({first_line(error)}); the next call goes on"
        return row

    def _commit(self, number: int) -> str | None:
        return self.environments[number].get("commit")

    def _device(self, number: int) -> str:
        return str(self.environments[number]["device"])

    def _find(self, name: str) -> dict[str, Any] | None:
        device = self._device(self.number)
        return next((row for row in self.rows if row["name"] == name and self._device(row["environment"]) == device), None)

    def _stands(self, row: dict[str, Any]) -> bool:
        """Whether a kept row need not be measured again."""
        here = row["environment"] == self.number
        if "failed" not in row:
            return here or lasts(row) or self._commit(row["environment"]) == self._commit(self.number)
        return here and (row["failed"] != UNFINISHED or row["attempts"] >= ATTEMPTS)

    def _keep(self, row: dict[str, Any]) -> None:
        before = self._find(row["name"])
        self.rows[:] = [*(other for other in self.rows if other is not before), row]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"question": self.question, "environments": self.environments, "rows": self.rows})
