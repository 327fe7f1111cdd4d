"""How pictures of results look, and how they are written."""

from pathlib import Path

from matplotlib.figure import Figure

from engine.files import write_atomically

BLUE, GREY, RED = "#3b6ea5", "#b0b0b0", "#b5483b"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
