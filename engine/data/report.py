"""What is said of samples that were refused or changed."""

from collections.abc import Mapping
from pathlib import Path

from engine.data.format.index import Refusals
from engine.messages import say, warn

_REASONS = 6


def by_count(refused: Mapping[str, Refusals]) -> list[tuple[str, Refusals]]:
    """Reasons of an index, the most frequent first."""
    return sorted(refused.items(), key=lambda item: -item[1].count)


def describe_refused(refused: Mapping[str, Refusals]) -> str:
    """Reasons with their counts and the first names of each, in one line."""
    parts = []
    for reason, refusals in by_count(refused)[:_REASONS]:
        first = "".join(f": {item['detail']}" for item in refusals.first[:1] if item.get("detail"))
        names = ", ".join(item["source"] for item in refusals.first) + ", ..." * (refusals.count > len(refusals.first))
        parts.append(f"{refusals.count} {reason} ({names}{first})")
    if len(refused) > _REASONS:
        parts.append(f"{len(refused) - _REASONS} other reasons")
    return "; ".join(parts).replace("\n", " ")


def say_refused(samples: int, refused: Mapping[str, Refusals], directory: Path) -> None:
    """How many samples were refused and why; more than half asks for attention."""
    count = sum(refusals.count for refusals in refused.values())
    if not count:
        return
    counted = (
        f"{count} of {samples} samples: {describe_refused(refused)}; `python -m engine.shards info {directory} --refused` "
        "lists them"
    )
    if 2 * count > samples:
        warn(f"more than half of the samples are refused, {counted}")
    else:
        say(f"refused {counted}")
