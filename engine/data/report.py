"""What is said of samples that were refused or changed."""

from collections.abc import Sequence
from pathlib import Path

from engine.messages import say, warn

_NAMES, _REASONS = 3, 6


def by_reason(refused: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The refused samples of an index by reason, the most frequent first."""
    groups: dict[str, list[dict[str, str]]] = {}
    for item in refused:
        groups.setdefault(item["reason"], []).append(item)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def describe_refused(refused: Sequence[dict[str, str]]) -> str:
    """Reasons with their counts and up to three names each, in one line."""
    groups = by_reason(refused)
    parts = []
    for reason, items in list(groups.items())[:_REASONS]:
        first = "".join(f": {item['detail']}" for item in items[:1] if item.get("detail"))
        names = ", ".join(item["source"] for item in items[:_NAMES]) + (", ..." if len(items) > _NAMES else "")
        parts.append(f"{len(items)} {reason} ({names}{first})")
    if len(groups) > _REASONS:
        parts.append(f"{len(groups) - _REASONS} other reasons")
    return "; ".join(parts).replace("\n", " ")


def say_refused(samples: int, refused: Sequence[dict[str, str]], index: Path) -> None:
    """How many samples were refused and why; more than half asks for attention."""
    if not refused:
        return
    counted = f"{len(refused)} of {samples} samples: {describe_refused(refused)}; the list is in {index}"
    if 2 * len(refused) > samples:
        warn(f"more than half of the samples are refused, {counted}")
    else:
        say(f"refused {counted}")
