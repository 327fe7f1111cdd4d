"""Commands of the engine with libraries preloaded.

They are forked from one process that has imported what they need, and so take a second or two each.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIMIT = 120.0  # seconds after which a run hangs
_IMPORTED = [
    "engine.quiet", "datasets", "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip",
    "engine.loop.trainer", "engine.models.stable_diffusion",
]  # fmt: skip


def can_be_built() -> bool:
    return shutil.which("g++") is not None and sys.platform == "linux"


def build(name: str, directory: Path) -> Path:
    """The library of the source NAME.cpp beside this file, in a directory."""
    library, source = directory / f"{name}.so", Path(__file__).with_name(f"{name}.cpp")
    words = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-D_LARGEFILE64_SOURCE", "-U_FORTIFY_SOURCE", str(source)]
    subprocess.run([*words, "-o", str(library), "-ldl"], check=True)
    return library


class Forks:
    """A process with libraries preloaded that forks commands; each library does nothing unless its variables say so.

    Args:
        libraries: names of the sources beside this file; a call meets the first first.
        modules: what to import beside the usual.
    """

    def __init__(self, libraries: Sequence[str], modules: Sequence[str] = ()) -> None:
        self._kept = tempfile.TemporaryDirectory()
        self.place = Path(self._kept.name)
        preloaded = " ".join(str(build(name, self.place)) for name in libraries)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tools.preloaded", *_IMPORTED, *modules], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=os.environ | {"LD_PRELOAD": preloaded, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def _ask(self, **job: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, command: Sequence[str], variables: Mapping[str, str], said: Path) -> int:
        """Starts what follows `python -m`, with its output in a file; the number of the process."""
        return self._ask(command=list(command), variables=dict(variables), said=str(said))

    def wait(self, process: int, seconds: float = LIMIT) -> int | None:
        """The exit status, negative for a signal; None where it has not ended by then."""
        return self._ask(process=process, seconds=seconds)

    def kill(self, process: int) -> None:
        os.kill(process, signal.SIGKILL)
        self.wait(process)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._kept.cleanup()


def _serve(modules: Sequence[str]) -> None:
    """Forks each command that comes as a line of JSON and answers with its number, or with the exit status of such a one."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # else each fork, seeking garbage, copies the pages of all that the libraries keep
    for line in sys.stdin:
        job = json.loads(line)
        answer = _wait(job["process"], job["seconds"]) if "process" in job else os.fork()
        if answer == 0 and "command" in job:
            _become(job["command"], job["variables"], job["said"])
        print(json.dumps(answer), flush=True)


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


def _wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.005)


if __name__ == "__main__":
    _serve(sys.argv[1:])
