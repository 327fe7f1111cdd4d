"""Commands as processes of their own.

Without a GPU they are forked from a process that has imported the engine's libraries, which takes five to ten seconds of a
command. CUDA does not survive a fork, so with a GPU they are started as anywhere.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.tools.ranks import rank_variables
from engine.files import write_atomically
from engine.loop import log

ON_GPU = torch.cuda.is_available()
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "engine.quiet", "engine.loop.trainer", "engine.models.stable_diffusion", "engine.models.kandinsky_prior",
    "engine.models.kandinsky_decoder", "engine.models.wuerstchen", "deepspeed",
])  # fmt: skip


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def undrawn(lines: object, names: object, path: Path, held_out: object = ()) -> None:
    """An empty file in the place of the curves of a run, which take a quarter of a short one's time."""
    write_atomically(path, lambda temporary: temporary.write_bytes(b""))


def _python(arguments: list[str], variables: dict[str, str], output: str, errors: str) -> None:
    """What `python ARGUMENTS` does, with `-m` or `-c`; but curves are not drawn, nor garbage sought among the libraries."""
    gc.freeze()
    log.curves = undrawn
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # which is read on import only
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, what, *rest = arguments
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


class Command:
    """A Python command under way, as `subprocess.Popen` gives it, with its output in files.

    Args:
        command: `sys.executable`, `-m` or `-c`, and what follows; with another first word it is started as it is.
        variables: of the environment, beside what all have.
    """

    def __init__(self, command: list[str], **variables: str) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.files = [Path(self.directory.name) / name for name in ("output", "errors")]
        for file in self.files:
            file.touch()
        forked = not ON_GPU and command[0] == sys.executable and command[2] != "torch.distributed.run"
        self.process = self._forked(command[1:], variables) if forked else self._started(command, variables)
        self.pid = self.process.pid

    def _forked(self, arguments: list[str], variables: dict[str, str]):
        process = SERVER.Process(target=_python, args=(arguments, environment() | variables, *map(str, self.files)))
        process.start()
        return process

    def _started(self, command: list[str], variables: dict[str, str]):
        with self.files[0].open("w") as output, self.files[1].open("w") as errors:
            return subprocess.Popen(command, env=environment() | variables, stdout=output, stderr=errors)

    def poll(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 600) -> int:
        """The exit status, negative for a signal; a command that takes longer is killed."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"still running after {timeout:g} s; it said {self.errors[-2000:]}")
            time.sleep(0.01)
        return code

    @property
    def output(self) -> str:
        return self.files[0].read_text()

    @property
    def errors(self) -> str:
        return self.files[1].read_text()


def run(command: list[str], **variables: str) -> Command:
    """A command that has ended."""
    started = Command(command, **variables)
    started.wait()
    return started


def start_two(command: list[str], world: int = 2, **variables: str) -> list[Command]:
    """Two processes of one group, or more, without a launcher, which would end one when it misses the other."""
    return [Command(command, **(own | variables)) for own in rank_variables(world, world)]


def run_two(command: list[str]) -> None:
    """Two processes of one group, both of which must end well."""
    both = start_two(command)
    codes = [process.wait() for process in both]
    assert codes == [0, 0], [process.errors for process in both]
