"""Errors that are part of the interface."""

import errno
import os
import re
import sys
from collections.abc import Callable

from engine.launcher import local_rank, rank

TRY_AGAIN = 75  # EX_TEMPFAIL: the same command may work when it is tried again


class UserError(Exception):
    """A mistake that the person running the engine can mend.

    The message says what is wrong, where, and what to do, in one line. Command lines print it without a stack trace and
    leave with exit code 2. `alone`: only this process of several met it, so that no other will say it.
    """

    def __init__(self, message: str, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def first_line(error: BaseException) -> str:
    """What an exception of a library says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def innermost(error: BaseException) -> BaseException:
    """What went wrong first: an exception raised while another was handled hides it."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return error


def disk_problem(error: BaseException) -> str | None:
    """What the disk, not the program, did wrong: full, over quota or read-only; None for any other exception.

    Some libraries hide the system's number in their own exceptions' text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG) else None


def lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, from what gloo or NCCL says."""
    return bool(re.search(r"gloo/transport|remote process exited or there was a network error", str(error)))


def exit_code(program: str, main: Callable[[], int]) -> int:
    """Runs a command line, turning a `UserError` into one line on standard error and exit code 2, Ctrl-C into 130.

    A process that lost another in a collective says so in one line and leaves with `TRY_AGAIN`: the cause is the other's.

    Under a launcher every process meets most mistakes; only the first process of each node says them.
    """
    try:
        return main()
    except UserError as error:
        if error.alone or local_rank() == 0:
            print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if lost_a_process(error):
            print(
                f"{program}: error: process {rank()}: another process is gone; its own message, or the "
                f"launcher's, says why. Leaving with exit code {TRY_AGAIN}; a training continues with "
                "--resume_from_checkpoint latest",
                file=sys.stderr,
            )
            return TRY_AGAIN
        problem = disk_problem(error)
        if problem is None:
            raise
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        print(
            f"{program}: error: {where}{problem}; make room or permit writing there, and start the same again", file=sys.stderr
        )
        return 2
