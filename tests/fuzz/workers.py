"""Cases run in processes that may die: a crash or a hang is an outcome, and the next case goes on in a new process."""

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from random import Random
from typing import Any

from engine.files import discard
from tests.commands import SERVER
from tests.fuzz.judge import Kind, Outcome, judge, prepared, watch
from tests.fuzz.kinds import KINDS

THOROUGH = 10  # of so many cases one does what takes long
MEMORY = 6 * 2**30  # bytes of addresses that a process may take beside what it begins with
PATIENCE = 60.0  # seconds after which a process that does not even stop at its limit is replaced
SAID = "said.txt"  # what a worker's libraries say past Python
FIRST = 120.0  # as long where a base must be made first


def generator_of(kind: str, number: int, seed: int) -> Random:
    return Random(f"{seed}/{kind}/{number}")


class Fuzzer:
    """The cases of a process: bases made once, and what these are read as, which must not be refused."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.expected: dict[Path, Any] = {}

    def run(self, name: str, number: int, seed: int) -> Outcome:
        kind, random = KINDS[name], generator_of(name, number, seed)
        support = self.root / kind.base
        base = random.choice(self._bases(kind, support))
        if base not in self.expected:
            self.expected[base] = kind.read(prepared(self.root / "case", base, support))
        started = time.monotonic()
        place = prepared(self.root / "case", base, support, thorough=number % THOROUGH == 0)
        what = kind.mutate(place.given, random)
        verdict, said, where = judge(kind, place, self.expected[base])
        return Outcome(name, number, verdict, f"{base.name}: {what}", said, where, time.monotonic() - started)

    def _bases(self, kind: Kind, support: Path) -> list[Path]:
        whole, made = support / "whole", support / "made"
        if not made.exists():
            discard(support)
            whole.mkdir(parents=True)
            kind.make(whole)
            made.touch()
        return sorted(whole.iterdir())


def _work(pipe: connection.Connection, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with (root / SAID).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent ends this process
    with contextlib.suppress(OSError), Path("/proc/self/statm").open() as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    faulthandler.disable()  # a crash is an outcome, and needs no stack
    import torch

    from engine.quiet import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    os.chdir(root)
    watch()
    fuzzer = Fuzzer(root)
    with contextlib.suppress(EOFError):
        while case := pipe.recv():
            try:
                pipe.send(fuzzer.run(*case))
            except Exception as error:  # of the fuzzer itself: the base is not read, or a mutation fails
                error.add_note(f"case {case}")
                pipe.send(error)


class Worker:
    """A process that runs one case at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pipe, other = multiprocessing.Pipe()
        self.process = SERVER.Process(target=_work, args=(other, root), daemon=True)
        self.process.start()
        other.close()
        self.case: tuple[str, int, int] | None = None
        self.known: set[str] = set()  # kinds whose base is there
        self.deadline = 0.0

    def give(self, case: tuple[str, int, int]) -> None:
        self.case, self.deadline = case, time.monotonic() + (PATIENCE if case[0] in self.known else FIRST)
        self.known.add(case[0])
        self.pipe.send(case)

    def end(self) -> None:
        self.pipe.close()
        self.process.join(1)
        self.process.kill()
        self.process.join()

    def outcome(self) -> Outcome | None:
        """How the case ended, once it has."""
        assert self.case is not None
        name, number, _ = self.case
        try:
            if self.pipe.poll():
                answer = self.pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                return answer
        except (EOFError, ConnectionError):
            self.process.join()
            if (self.process.exitcode or 0) >= 0:  # no signal: the fuzzer itself failed
                raise RuntimeError((self.root / SAID).read_text()[-2000:]) from None
            return Outcome(name, number, "crash", said=f"exit code {self.process.exitcode}")
        return Outcome(name, number, "hang", said="no answer") if time.monotonic() > self.deadline else None


def outcomes(cases: Iterator[tuple[str, int, int]], root: Path, processes: int = 1) -> Iterator[Outcome]:
    """Runs cases (kind, number, seed) and gives their outcomes as they come.

    Args:
        root: a directory for the workers' own.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the server of processes imports the library
    workers = [Worker(root / f"worker-{number}") for number in range(processes)]
    try:
        busy = [worker for worker in workers if _give_next(worker, cases)]
        while busy:
            connection.wait([worker.pipe for worker in busy], timeout=1)
            for worker in list(busy):
                if (outcome := worker.outcome()) is None:
                    continue
                busy.remove(worker)
                if outcome.verdict in ("crash", "hang"):
                    workers.remove(worker)
                    worker.end()
                    workers.append(worker := Worker(worker.root))
                yield outcome
                if _give_next(worker, cases):
                    busy.append(worker)
    finally:
        for worker in workers:
            worker.end()


def _give_next(worker: Worker, cases: Iterator[tuple[str, int, int]]) -> bool:
    case = next(cases, None)
    if case is not None:
        worker.give(case)
    return case is not None
