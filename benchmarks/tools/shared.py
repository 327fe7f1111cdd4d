"""A cluster on one machine: processes on nodes of their own, whose shared file system shows each late what the others did.

The file system is a preloaded library (shared.cpp) and no mount: it needs no rights, is there for chosen processes alone, and
counts what each of them opens, looks up and reads.
"""

import ctypes
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tools.preloaded import LIMIT, Forks
from benchmarks.tools.ranks import rank_variables
from benchmarks.tools.storage import Ended, Fault

COUNTED = ("opened", "looked_up", "listed", "bytes_read", "bytes_mapped")


@dataclass(frozen=True)
class Node:
    """How a node sees the shared directory.

    delay: seconds until it sees what another node created, renamed, replaced or removed there.
    rename: seconds that renaming takes it.
    locks: "none" where locks are unsupported, "node" where they hold within a node alone; else they hold everywhere.
    fault: what befalls its storage beside that.
    """

    delay: float = 0.0
    rename: float = 0.0
    locks: str = ""
    fault: Fault | None = None

    def variables(self, name: str, directory: Path, journal: Path) -> dict[str, str]:
        """What tells the library of it; `journal` is a directory of its own on the same file system as the shared one."""
        return {
            "SHARED_DIRECTORY": str(directory), "SHARED_JOURNAL": str(journal), "SHARED_NODE": name,
            "SHARED_DELAY": str(self.delay), "SHARED_RENAME": str(self.rename), "SHARED_LOCKS": self.locks,
            **(self.fault.variables(directory) if self.fault else {}),
        }  # fmt: skip


def counted() -> dict[str, int]:
    """What this process has opened, looked up, listed, read and mapped so far below the shared directory; the same names after
    "other_" of what lies elsewhere; and the messages that it sent to the processes' store.

    The library must be preloaded.
    """
    names = [*COUNTED, *(f"other_{name}" for name in COUNTED), "store_messages"]
    values = (ctypes.c_long * len(names))()
    ctypes.CDLL(None).shared_counts(values)
    return dict(zip(names, values, strict=True))


class Cluster:
    """Starts jobs of several processes, each on a node of its own.

    Args:
        root: of the shared directory, `root / "shared"`.
    """

    def __init__(self, root: Path) -> None:
        self.directory, self._journal, self._said = (root / name for name in ("shared", "journal", "said"))
        for folder in (self.directory, self._journal, self._said):
            folder.mkdir(parents=True)
        self.forks = Forks(["storage", "shared"], ["deepspeed"])
        self._numbers = itertools.count()

    def start(self, command: Sequence[str], nodes: Sequence[Node], **variables: str) -> "Job":
        """What follows `python -m` once on every node, as a launcher that does not watch over them starts it."""
        number, ranks = next(self._numbers), rank_variables(len(nodes), local_world=1)
        said = [self._said / f"{number}-{rank}" for rank in range(len(nodes))]
        processes = []
        for rank, node in enumerate(nodes):
            own = node.variables(f"node-{rank}", self.directory, self._journal)
            processes.append(self.forks.start(command, ranks[rank] | variables | own, said[rank]))
        return Job(self.forks, processes, said)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *unused: object) -> None:
        self.forks.close()


class Job:
    """The processes of a job, by rank."""

    def __init__(self, forks: Forks, processes: Sequence[int], said: Sequence[Path]) -> None:
        self.forks, self.processes, self._said = forks, processes, said
        self._status: dict[int, int | None] = {}
        self._silent: set[int] = set()

    def ended(self, rank: int) -> bool:
        if rank not in self._status and (status := self.forks.wait(self.processes[rank], 0)) is not None:
            self._status[rank] = status
        return rank in self._status

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank], signal.SIGKILL)

    def when(self, condition: Callable[[], bool]) -> "Job":
        """Waits until a condition holds, or a process has ended."""
        while not condition() and not any(self.ended(rank) for rank in range(len(self.processes))):
            time.sleep(0.01)
        return self

    def stop(self, rank: int) -> None:
        """Lets a process fall silent, as on a node without power: no connection to it is closed, and `wait` leaves it out."""
        os.kill(self.processes[rank], signal.SIGSTOP)
        self._silent.add(rank)

    def wait(self, seconds: float = LIMIT, silent: int | None = None) -> list[Ended]:
        """How each process ended; those that have not by then are killed, and hang.

        Args:
            silent: one that will fall silent by itself.
        """
        self._silent |= set() if silent is None else {silent}
        end = time.monotonic() + seconds
        ranks = range(len(self.processes))
        while not all(self.ended(rank) or rank in self._silent for rank in ranks) and time.monotonic() < end:
            time.sleep(0.02)
        for rank in ranks:
            if not self.ended(rank):
                self.forks.kill(self.processes[rank])
                self._status[rank] = -signal.SIGKILL if rank in self._silent else None
        return [Ended(self._status[rank], self._said[rank].read_text(errors="replace"), []) for rank in ranks]
