"""Errors that are part of the interface."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the person running the engine can mend.

    The message says what is wrong, where, and what to do, in one line. Command lines print it without a stack trace and
    leave with exit code 2. `alone`: only this process of several met it, so that no other will say it.
    """

    def __init__(self, message: str, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def first_line(error: Exception) -> str:
    """What an exception of a library says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def exit_code(program: str, main: Callable[[], int]) -> int:
    """Runs a command line, turning a `UserError` into one line on standard error and exit code 2, Ctrl-C into 130.

    Under a launcher every process meets most mistakes; only the first process of each node says them.
    """
    try:
        return main()
    except UserError as error:
        if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
