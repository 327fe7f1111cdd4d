"""Errors that are part of the interface."""

import atexit
import contextlib
import errno
import os
import re
import select
import sys
import threading
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from pydantic_core import ValidationError

from engine.launcher import local_rank, rank, world

TRY_AGAIN = 75  # EX_TEMPFAIL: the same command may work when it is tried again
# What files alone are the cause of; other numbers are, where a file is named.
_OF_THE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
    errno.ESTALE, errno.EREMOTEIO, errno.ENOLCK, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
# What is wrong with a file, or with its name, where the disk is sound.
OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENAMETOOLONG)
# What a file system says of one file that it has lost, or does not reach; some of it is over in a second.
OF_ONE_FILE = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENXIO)
MEND_THE_PLACE = "mend what is wrong with that place (room, permissions, the mount), and start the same again"
CLOSED_PIPE = 128 + 13  # as a program that SIGPIPE ends
LONGEST = 1000  # characters of a line that is printed; names and values in files of others may have any length
# Categories of Unicode that move the cursor, end a line, colour or reverse what follows, or cannot be written at all.
_UNPRINTABLE = ("Cc", "Cf", "Zl", "Zp", "Cs")


def printable(text: str) -> str:
    """Text of others in one line that does nothing to a terminal: what would is shown as an escape, a long middle left out."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _UNPRINTABLE else character
        for character in text
    )


class UserError(Exception):
    """A mistake that the person running the engine can mend.

    Each line says what is wrong, where, and what to do; what it quotes can neither break it nor reach the terminal. Command
    lines print them without a stack trace and leave with exit code 2.

    lines: what is said, made `printable`; one for each mistake.
    alone: only this process of several met it, so that no other will say it.
    shared: every process raises it, so that the first says it for all.
    passing: the same command may succeed on another node, or another time, without anything in it being mended.
    said: whether another process says it; None where that is not known.
    """

    said: bool | None = None

    def __init__(self, *lines: str, alone: bool = False, shared: bool = False, passing: bool = False) -> None:
        self.lines = [printable(line) for line in lines]
        self.alone, self.shared, self.passing = alone, shared, passing
        super().__init__(*self.lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def of_all(errors: Sequence[UserError]) -> UserError:
    """What some processes met, for all to raise: the first that must be mended, if any, with what the others said."""
    error = min(errors, key=lambda error: error.passing)
    error.lines = list(dict.fromkeys(line for each in errors for line in each.lines))
    error.alone, error.shared = False, True
    return error


class FailingDisk(UserError):
    """A file cannot be read for now, or never again; others there may be."""


class LostProcess(Exception):
    """Another process, without which this one cannot go on, is gone or does not answer. Exit code `TRY_AGAIN`."""


def leaving(line: str) -> str:
    """What a process says that leaves for no fault of its own."""
    return f"{line}. Leaving with exit code {TRY_AGAIN}; a training continues with --resume_from_checkpoint latest"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, KeyError):
        return f"there is no {error} in it"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, ValidationError):
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        return printable(f"{where}: " * bool(where) + wrong["msg"].removeprefix("Value error, "))
    return printable(str(error).strip().split("\n")[0] or type(error).__name__)


def innermost(error: BaseException) -> BaseException:
    """What went wrong first: an exception raised while another was handled hides it."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return error


def system_number(error: BaseException) -> int | None:
    """The system's number of an error, which some libraries hide in their own exceptions' text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else None
    return int(found[1]) if number is None and found else number


def disk_problem(error: BaseException) -> str | None:
    """What the disk, not the program, did wrong: full, not permitted, broken, its files gone; None for any other exception."""
    number = system_number(error)
    of_a_file = isinstance(error, OSError) and error.filename is not None
    return os.strerror(number) if number is not None and (of_a_file or number in _OF_THE_DISK) else None


def blame_the_machine(path: Path, error: BaseException) -> None:
    """Raises what is no fault of a file that was read: a lack of memory as it is, a failing disk as what to mend.

    Raises:
        UserError: the disk is broken, full, gone or not permitted; `FailingDisk`, where that may be of this file alone.
    """
    if out_of_memory(error):
        raise error
    of_the_file = isinstance(error, OSError) and error.errno in OF_THE_FILE
    if not of_the_file and (problem := disk_problem(error)):
        kind = FailingDisk if system_number(error) in OF_ONE_FILE else UserError
        raise kind(f"{path}: cannot be read: {problem}; {MEND_THE_PLACE}", passing=True) from None


def of_the_machine(error: Exception) -> UserError | None:
    """What the disk did wrong, as a mistake that is mended there; None for any other exception."""
    problem, where = disk_problem(error), f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return UserError(f"{where}{problem}; {MEND_THE_PLACE}", passing=True) if problem else None


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the host or of a GPU ran out, from what Python or torch raises."""
    return isinstance(error, MemoryError) or bool(
        re.search(r"out of memory|can(?:'t|not) allocate memory", str(error), re.IGNORECASE)
    )


def _pipe_closed() -> bool:
    """Whether nobody reads what this program prints any more, as after `| head`."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def lost_a_process(error: BaseException) -> bool:
    """Whether another process is gone, from what gloo, NCCL or the store of the processes says."""
    of_the_store = type(error).__name__ in ("DistNetworkError", "DistStoreError")
    return (
        isinstance(error, LostProcess)
        or of_the_store
        or bool(re.search(r"gloo/transport|remote process exited or there was a network error", str(error)))
    )


def exit_code(program: str, main: Callable[[], int]) -> int:
    """Runs a command line, turning a `UserError` into its lines on standard error and exit code 2, Ctrl-C into 130.

    A process that lost another says so in one line and leaves with `TRY_AGAIN`: the cause is the other's. One whose output
    nobody reads any more leaves without a word.

    Under a launcher every process meets most mistakes; only the first process of each node says them. Of a lost one the second
    speaks too, because the first may be the one that is gone. One of several processes that leaves for an error ends here and
    now: what libraries do at the end may wait for the others.
    """
    try:
        code = _exit_code(program, main)
    except BaseException:
        if world() == 1:
            raise
        traceback.print_exc()
        code = 1
    if world() > 1:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """Ends one of several processes; after success as Python does, but for what comes last: a thread that the store or the
    network holds in C++ could then neither go on nor end, and would abort the process."""
    if not code:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _exit_code(program: str, main: Callable[[], int]) -> int:
    def say(*lines: str) -> None:
        for line in lines:
            print(f"{program}: error: {printable(line)}", file=sys.stderr)

    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be handled, and not when Python ends
    except UserError as error:
        says = error.alone or (rank() == 0 if error.shared else local_rank() == 0)
        if says if error.said is None else not error.said:
            say(*error.lines)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _pipe_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to be flushed goes there
            return CLOSED_PIPE
        if lost_a_process(error):
            gone = "another process is gone; its own message, or the launcher's, says why"
            if local_rank() < 2:
                say(f"process {rank()}: {leaving(first_line(error) if isinstance(error, LostProcess) else gone)}")
            return TRY_AGAIN
        if out_of_memory(error):
            say(f"out of memory: {first_line(error)}; lower the batch size, the resolution or the number of images, or, in a "
                "training, try --gradient_checkpointing or a higher --zero_stage")  # fmt: skip
            return 2
        if (mistake := of_the_machine(error)) is None:
            raise
        say(*mistake.lines)
        return 2
