"""What a measurement must name to be believed: device, driver, versions and commit; and where it is kept, row by row."""

import gc
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.errors import TRY_AGAIN, first_line
from engine.files import write_json

RESULTS = Path(__file__).parent / "results"
COMMIT = "ENGINE_COMMIT"  # names the commit where there is no repository
SOURCES = ("engine", "benchmarks", "cpp_ext", "examples", "tests")
PACKAGES = ("triton", "deepspeed", "diffusers", "transformers", "torchao", "xformers")


def _processor() -> str:
    """The processor's name; `platform` does not know it on Linux."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _answer(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sources() -> str:
    """A name of this code where nothing else names it: another name after a change, so that what failed is tried again."""
    root = Path(__file__).parent.parent
    files = sorted(path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in (".py", ".cpp"))
    contents = b"\0".join(part for path in files for part in (str(path.relative_to(root)).encode(), path.read_bytes()))
    return f"sources {hashlib.sha256(contents).hexdigest()[:12]}"


def environment() -> dict[str, Any]:
    """Where this process measures; what cannot be found out is None, and never ends a measurement.

    `commit` is what ENGINE_COMMIT says, or git, or a digest of the sources.
    """
    cuda = torch.cuda.is_available()
    folder = str(Path(__file__).parent)
    driver = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split() if cuda else []
    return {
        "commit": os.environ.get(COMMIT) or _answer("git", "-C", folder, "rev-parse", "HEAD") or _sources(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {_processor()}, {torch.get_num_threads()} threads",
        **({"driver": driver[0] if driver else None, "cuda": torch.version.cuda} if cuda else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
    }


def write_result(path: Path | None, document: str, **measured: Any) -> None:
    """Keeps what a benchmark measured, where a file is named, under its question: the first line of its docstring."""
    if path is not None:
        write_json(path, {"question": document.splitlines()[0], **environment(), **measured})


UNFINISHED = "begun and not ended: the process was killed, or crashed"
ATTEMPTS = 2  # of a row that did not end; a limit of time may have been too short for cold caches, a hang comes again
# What the allocators of torch, CUDA and cuBLAS say, also from within another library's error.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
OUT_OF_MEMORY = "out of memory"


def reason(error: Exception) -> str:
    """Why a row failed, in one line; a lack of memory by the same words whoever met it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(cause)):
            return OUT_OF_MEMORY
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {first_line(error)}"


TRACE = 3000  # characters at the end of a failure's trace that are kept


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Rows:
    """The rows of a benchmark: each is kept the moment it is measured, and one that fails costs only itself.

    Where the file exists, what it holds is kept and not measured again, so that a call goes on where the one before ended, be
    it on another machine: every row names its environment. Rows of two devices stand beside each other, because their times
    make no ratio. What failed is tried again under another commit; what did not end, because the process was killed, once more.

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
            _release_memory()
        except RuntimeError as error:  # an illegal access, say: nothing more will run in this process
            self.broken = f"the device failed in an earlier row ({first_line(error)}); the next call goes on"
        return row

    def _device(self, number: int) -> str:
        return str(self.environments[number]["device"])

    def _find(self, name: str) -> dict[str, Any] | None:
        device = self._device(self.number)
        return next((row for row in self.rows if row["name"] == name and self._device(row["environment"]) == device), None)

    def _stands(self, row: dict[str, Any]) -> bool:
        """Whether a kept row need not be measured again."""
        if "failed" not in row:
            return True
        here = row["environment"] == self.number
        return here and (row["failed"] != UNFINISHED or row["attempts"] >= ATTEMPTS)

    def _keep(self, row: dict[str, Any]) -> None:
        before = self._find(row["name"])
        self.rows[:] = [*(other for other in self.rows if other is not before), row]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"question": self.question, "environments": self.environments, "rows": self.rows})
