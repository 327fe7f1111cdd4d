"""The note that a run leaves in its output directory when the same command would fail again, which scripts obey."""

import contextlib
from pathlib import Path

from engine.errors import UserError
from engine.files import discard, held, read_text, write_text
from engine.launcher import restarted

FAILED = "failed"


def leave_note(output: Path, error: UserError, step: int = 0) -> None:
    """Writes what was wrong, a line each, and the step that was reached, if any; nothing where another attempt may succeed.

    The directory must be this run's, and be there.
    """
    reached = [f"reached step {step}"] if step > 0 else []
    if not error.passing and output.is_dir():
        with contextlib.suppress(OSError, UserError):  # what was wrong matters more
            write_text(output / FAILED, "".join(f"{line}\n" for line in [*error.lines, *reached]))


def leave_note_unless_held(output: Path, error: UserError, step: int = 0) -> None:
    """The same before the directory is this run's; nothing where another run is writing there."""
    with contextlib.suppress(OSError, UserError), held(output) as ours:
        if ours is not None:
            leave_note(output, error, step)


def obey_note(output: Path) -> None:
    """Removes the note of an earlier run. One that torchrun started again heeds it instead of loading everything to fail again.

    Raises:
        UserError: what the attempt before this one said.
    """
    note = output / FAILED
    if not note.is_file():
        return
    if restarted():
        raise UserError(*read_text(note).splitlines())
    with held(output) as ours:
        if ours is not None:
            discard(note)
