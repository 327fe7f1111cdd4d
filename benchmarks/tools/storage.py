"""Runs of the engine on storage with faults: a library is preloaded that lets an operation fail, or kills the process there.

The runs are forked from one process that has imported the engine's libraries, so that one takes a second or two.
"""

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
LIMIT = 120.0  # seconds after which a run hangs


@dataclass(frozen=True)
class Fault:
    """What befalls a run.

    operations: "changes" or "reads".
    at: the number of the operation below the directory, from 1; 0 for none.
    action: "kill", "short", "vanish", or the number of an error.
    lasting: whether it befalls all operations from there on too.
    """

    operations: str = "changes"
    at: int = 0
    action: str = "kill"
    lasting: bool = False


NONE = Fault()


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, negative for a signal; None where it hung."""

    status: int | None
    said: str
    operations: list[list[str]]

    @property
    def clean(self) -> bool:
        """Whether it ended well, or in lines of its own."""
        return self.status in (0, 2, 75) and "Traceback" not in self.said


def can_be_built() -> bool:
    return shutil.which("g++") is not None and sys.platform == "linux"


class FaultyRuns:
    """Forks commands and gives them faults of storage."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory()
        self._place = Path(self._kept.name)
        library = self._place / "storage.so"
        words = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-D_LARGEFILE64_SOURCE", "-U_FORTIFY_SOURCE", str(SOURCE)]
        subprocess.run([*words, "-o", str(library), "-ldl"], check=True)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tools.storage"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, command: Sequence[str], directory: Path, fault: Fault = NONE) -> Ended:
        """Runs what follows `python -m`, with a fault of what lies below a directory."""
        log = self._place / "log"
        log.unlink(missing_ok=True)
        variables = {
            "STORAGE_DIRECTORY": str(directory), "STORAGE_OPERATIONS": fault.operations, "STORAGE_AT": str(fault.at),
            "STORAGE_ACTION": fault.action, "STORAGE_LASTING": str(int(fault.lasting)), "STORAGE_LOG": str(log),
        }  # fmt: skip
        said = self._place / "said"
        job = {"command": list(command), "variables": variables, "said": str(said)}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        status = json.loads(self._server.stdout.readline())
        operations = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
        return Ended(status, said.read_text(errors="replace"), operations)

    def __enter__(self) -> "FaultyRuns":
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._kept.cleanup()


def unsynced(operations: Sequence[Sequence[str]]) -> Iterator[str]:
    """Files that came under a name that lasts before their bytes were forced to the disk: a crash could leave them empty.

    What the safetensors library writes is not seen under its last name, which it is given by a system call.
    """
    written: set[str] = set()
    for name, path, *others in operations:
        if name in ("write", "open") and not Path(path).name.startswith(".tmp"):
            written.add(path)
        elif name in ("fsync", "fdatasync", "unlink"):
            written.discard(path)
        elif name == "rename":
            moved = {file for file in written if file == path or file.startswith(f"{path}/")}
            renamed = {others[0] + file.removeprefix(path) for file in moved}
            written = written - moved | renamed
            if not others[0].endswith(".partial"):
                yield from sorted(renamed)


def instants(operations: Sequence[Sequence[str]]) -> list[int]:
    """Numbers of operations worth a fault: all, but of many alike in a row the first, the middle and the last."""
    chosen, first = [], 0
    for number in range(1, len(operations) + 1):
        if number == len(operations) or operations[number] != operations[first]:
            chosen += sorted({first + 1, (first + 1 + number) // 2, number})
            first = number
    return chosen


def _serve() -> None:
    """Forks each command that comes as a line of JSON, and answers with its exit status."""
    import engine.quiet  # isort: skip (before the libraries that it quiets)
    import datasets  # noqa: F401
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401

    import engine.loop.trainer
    import engine.models.stable_diffusion  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(job["command"], job["variables"], job["said"])
        print(json.dumps(_wait(child)), flush=True)


def _become(command: list[str], variables: dict[str, str], said: str) -> None:
    code = 1
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        os.environ.update(variables)
        sys.argv = command
        with contextlib.suppress(SystemExit):
            try:
                runpy.run_module(command[0], run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
                raise
            except BaseException:
                sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
    finally:
        os._exit(code)


def _wait(child: int) -> int | None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    _serve()
