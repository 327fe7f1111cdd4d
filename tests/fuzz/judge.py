"""How one case ends: what a command says of an altered file, and what it does meanwhile."""

import contextlib
import io
import os
import shutil
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from engine.data.sources.interface import Refused
from engine.errors import UserError, exit_code
from tests.fuzz.mutations import CANARY, OUTSIDE

LIMIT = 10  # seconds that a case may take
LONGEST = 1100  # characters of a line
# clean: refused in lines that say where; accepted: read as before, or as what it is now; silent: read as something else;
# unclear: refused in lines that do not say where, or that a terminal would act on; outside: touched what is not its own.
VERDICTS = ("clean", "accepted", "silent", "unclear", "trace", "crash", "hang", "outside")
FAULTS = VERDICTS[2:]


class Broken(Exception):
    """What was read breaks what holds of every file of its kind."""


class Hang(BaseException):
    """The time is over."""


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    base: names the whole ones; kinds may share them.
    make: writes those into an empty directory, once; each entry there is one. What they need lies beside it.
    mutate: alters a copy of one, and says how.
    read: does what the commands do with it, and returns what comes of it, to be compared; raises `UserError` or `Refused` where
        that is refused, and `Broken`.
    guarded: digests stand against the alteration, so that what is read must be what was.
    """

    base: str
    make: Callable[[Path], None]
    mutate: Callable[[Path, Random], str]
    read: Callable[["Place"], Any]
    guarded: bool = False


@dataclass(frozen=True)
class Place:
    """Where a case happens. given: the altered copy; output: where it may write; support: what the base lies beside; thorough:
    whether there is time for what takes long, in one case of some."""

    root: Path
    given: Path
    support: Path
    thorough: bool = True

    @property
    def output(self) -> Path:
        return self.root / "output"


@dataclass(frozen=True)
class Outcome:
    """verdict: one of `VERDICTS`; what: was altered; said: a line; where: exception and innermost function of the engine."""

    kind: str
    number: int
    verdict: str
    what: str = ""
    said: str = ""
    where: str = ""
    seconds: float = 0.0


def prepared(root: Path, given: Path, support: Path, thorough: bool = True) -> Place:
    """A place with a copy of a base, whose files are links to the same bytes."""
    for name in ("given", "output"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
    outside = root / OUTSIDE
    if not outside.exists():
        (outside / "checkpoint-9").mkdir(parents=True)
        (outside / "canary.txt").write_text(CANARY)
    copy = root / "given" / given.name
    if given.is_dir():
        shutil.copytree(given, copy, copy_function=os.link)
    else:
        os.link(given, copy)
    return Place(root, copy, support, thorough)


_written: list[str] | None = None  # while a case runs, what it opened for writing, made or removed
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
# What changes files, and how many of its arguments are their names; the last may be the directory that they are relative to.
_CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what the running case writes or starts."""
    if _written is None:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & _WRITING:
        _written.append(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100
    elif event in _CHANGES:
        names = [os.fsdecode(name) for name in arguments[: _CHANGES[event]] if not isinstance(name, int)]
        folder = arguments[-1] if isinstance(arguments[-1], int) and event in ("os.remove", "os.rmdir") else -1
        within = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()  # noqa: PTH109, PTH115
        _written.extend(os.path.join(within, name) for name in (names[1:] if event == "os.symlink" else names))  # noqa: PTH118
    elif event in _STARTS:
        _written.append(f"started {arguments[0]!r}")


def watch() -> None:
    """To be called once in a process, before cases are judged there."""
    sys.addaudithook(_audit)
    signal.signal(signal.SIGALRM, _give_up)


def _give_up(*unused: Any) -> None:
    raise Hang


def judge(kind: Kind, place: Place, expected: Any) -> tuple[str, str, str]:
    """Reads what lies at a place: verdict, first line, and where it was raised."""
    global _written
    said, results, code, ended = io.StringIO(), [], 0, None

    def main() -> int:
        try:
            results.append(kind.read(place))
        except Refused as why:
            raise UserError(f"{place.given}: {why}") from None
        return 0

    _written = written = []
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = exit_code("fuzz", main)
    except BaseException as error:
        ended = error
    finally:
        signal.alarm(0)
        _written = None
    text = said.getvalue()
    if left := _left(place, written, text + repr(results)):
        return "outside", left, _where(ended) if ended else ""
    if isinstance(ended, Broken):
        return "silent", str(ended), ""
    if ended is not None:
        return "hang" if isinstance(ended, Hang) else "trace", str(ended)[:300], _where(ended)
    errors = [line for line in text.splitlines() if "error:" in line]
    if strange := [line for line in text.split("\n") if not _fit_to_print(line)]:
        return "unclear", repr(strange[0][:200]), "not printable, or too long"
    # An option of a TOML file is named as such.
    named = (str(place.given), str(place.output), " --")
    if nameless := [line for line in errors if not any(name in line.partition(";")[0] for name in named)]:
        return "unclear", nameless[0][:300], "does not name the file"
    if kind.guarded and results and results != [expected]:
        return "silent", "altered, and read all the same", ""
    return "clean" if code else "accepted", errors[0][:300] if errors else "", ""


def _left(place: Place, written: list[str], told: str) -> str | None:
    """What a case did that it may not: written elsewhere, started, run, or told of what lies outside."""
    mark = place.root / OUTSIDE / "ran"
    if mark.exists():
        mark.unlink()
        for name, module in list(sys.modules.items()):
            if str(place.root) in (getattr(module, "__file__", None) or ""):
                del sys.modules[name]  # it is to run again
        return "a program of the folder ran"
    if CANARY in told or _holds_canary(place.output):
        return "what lies outside came back"
    return next((path for path in written if _is_astray(path, place)), None)


def _where(error: BaseException) -> str:
    """The exception, and the innermost line of the engine."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/engine/" in frame.filename]
    place = f"engine/{frames[-1].filename.rpartition('/engine/')[2]}:{frames[-1].name}" if frames else "no line of the engine"
    return f"{type(error).__name__} in {place}"


def _is_astray(path: str, place: Place) -> bool:
    """Whether a path that was written to is neither the case's own nor what Python itself writes."""
    return not (Path(path).is_relative_to(place.output) or path == os.devnull or "__pycache__" in path)


def _holds_canary(output: Path) -> bool:
    return any(
        path.stat().st_size < 2**20 and CANARY.encode() in path.read_bytes() for path in output.rglob("*") if path.is_file()
    )


def _fit_to_print(line: str) -> bool:
    return len(line) <= LONGEST and not any(
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in line
    )
