"""Runs of the engine on storage with faults: a library is preloaded that lets an operation fail, or kills the process there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tools.preloaded import Forks


@dataclass(frozen=True)
class Fault:
    """What befalls a run.

    operations: "changes" or "reads".
    at: the number of the operation below the directory, from 1; 0 for none.
    action: "kill", "stop", "short", "vanish", or the number of an error.
    lasting: whether it befalls all operations from there on too.
    only: a text; of the operations those alone count of which a line, the name and the paths with tabs between, holds it.
    """

    operations: str = "changes"
    at: int = 0
    action: str = "kill"
    lasting: bool = False
    only: str = ""

    def variables(self, directory: Path) -> dict[str, str]:
        """What tells the library of it, for what lies below a directory."""
        return {
            "STORAGE_DIRECTORY": str(directory), "STORAGE_OPERATIONS": self.operations, "STORAGE_AT": str(self.at),
            "STORAGE_ACTION": self.action, "STORAGE_LASTING": str(int(self.lasting)), "STORAGE_ONLY": self.only,
        }  # fmt: skip


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


class FaultyRuns:
    """Runs commands and gives them faults of storage."""

    def __init__(self) -> None:
        self._forks = Forks(["storage"])

    def run(self, command: Sequence[str], directory: Path, fault: Fault = NONE) -> Ended:
        """Runs what follows `python -m`, with a fault of what lies below a directory."""
        log, said = (self._forks.place / name for name in ("log", "said"))
        log.unlink(missing_ok=True)
        process = self._forks.start(command, fault.variables(directory) | {"STORAGE_LOG": str(log)}, said)
        status = self._forks.wait(process)
        if status is None:
            self._forks.kill(process)
        operations = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
        return Ended(status, said.read_text(errors="replace"), operations)

    def __enter__(self) -> "FaultyRuns":
        return self

    def __exit__(self, *unused: object) -> None:
        self._forks.close()


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
