"""Markdown tables of kept rows."""

from collections.abc import Iterable, Mapping
from typing import Any

OUT_OF_MEMORY = "out of memory"  # why a row failed, whoever met it


def lasts(row: Mapping[str, Any]) -> bool:
    """Whether a row stands for every commit: of the recipe and of the card alone, whose settings hold no options of the engine.
    What has no settings is of this project's code, which changes."""
    return "settings" in row and "options" not in row["settings"]


def problem(row: Mapping[str, Any]) -> str | None:
    """Why a row holds no result; None where it does."""
    return row.get("failed") or row.get("missing")


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def markdown(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table of rows; one without a result says why in the column after its name.

    Args:
        columns: title -> what it shows of a row; the first is the name.
    """
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        values = [cell(row.get(key)) for key in columns.values()]
        if reason := problem(row):
            values[1:] = [cell(reason), *[""] * (len(values) - 2)]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)
