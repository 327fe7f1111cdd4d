"""What the attempts of a launch leave each other in the output directory.

A note, where the same command would fail again, which scripts obey too; and under torchrun a mark of the launch.
"""

import contextlib
from pathlib import Path

from engine.errors import UserError
from engine.files import discard, held, read_text, write_text

FAILED = "failed"
LAUNCH = ".launch"  # a line for each torchrun of the launch that began here last, and one more:
_TAKEN = "took over"  # what is in the directory is that launch's, or what it goes on from


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


def begin(output: Path, launches: set[str]) -> bool:
    """Marks the output directory; the note of an earlier launch goes. That of this one is heeded: all would fail again.

    Args:
        launches: as `launcher.launch` tells them on all nodes, some of which may be others than in the attempt before.

    Returns:
        Whether an attempt before this one took the directory over.

    Raises:
        UserError: what the attempt before this one said.
    """
    lines: set[str] = set()
    with contextlib.suppress(OSError, ValueError):
        lines = set(read_text(output / LAUNCH).splitlines())
    note, ours = output / FAILED, bool(lines & launches)
    if ours and note.is_file():
        raise UserError(*read_text(note).splitlines())
    if launches:
        output.mkdir(parents=True, exist_ok=True)
    if launches or note.is_file():
        with held(output) as free:
            if free is not None:
                discard(note)
                _mark(output, launches | lines if ours else launches)
    return ours and _TAKEN in lines


def mark_as_taken(output: Path, launches: set[str]) -> None:
    """Says that what is in the output directory is this launch's from now on."""
    _mark(output, launches and launches | {_TAKEN})


def _mark(output: Path, lines: set[str]) -> None:
    if lines:
        write_text(output / LAUNCH, "".join(f"{line}\n" for line in sorted(lines)))
    else:
        discard(output / LAUNCH)
