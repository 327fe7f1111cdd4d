"""What becomes of files that strangers altered? `python -m benchmarks.fuzz --minutes N [--json FILE]`

Cases of `tests/fuzz` for as long as asked, on all cores, as long of every kind of file. `--kinds KIND --case N` runs one again.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.question import command_line
from benchmarks.tools.rows import write_result
from benchmarks.tools.tables import markdown
from engine.messages import Progress
from tests.fuzz.judge import FAULTS, VERDICTS, Outcome
from tests.fuzz.kinds import KINDS
from tests.fuzz.workers import outcomes

COLUMNS = {"kind": "kind", "mutations": "mutations"} | {verdict: verdict for verdict in VERDICTS}


def rows_of(counts: dict[str, Counter[str]]) -> list[dict[str, Any]]:
    """A row for every kind, and one of all."""
    counted = {kind: count for kind, count in counts.items() if count}
    counted["all"] = sum(counted.values(), Counter())
    return [
        {"kind": kind, "mutations": sum(count.values()), **{verdict: count[verdict] for verdict in VERDICTS}}
        for kind, count in counted.items()
    ]


class Table:
    """What was found so far: counts by kind and verdict, and of every distinct fault a case that shows it."""

    def __init__(self, kinds: list[str], seed: int) -> None:
        self.seed = seed
        self.counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        self.seconds = dict.fromkeys(kinds, 0.0)
        self.faults: dict[tuple[str, str, str], dict[str, Any]] = {}

    def cases(self, first: int, end: float) -> Iterator[tuple[str, int, int]]:
        """Cases until the time is over, of the kind on which the least time was spent."""
        numbers = {kind: itertools.count(first) for kind in self.seconds}
        while time.monotonic() < end:
            kind = min(self.seconds, key=self.seconds.__getitem__)
            self.seconds[kind] += 1e-3  # others are on their way before this one is there
            yield kind, next(numbers[kind]), self.seed

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.kind][outcome.verdict] += 1
        self.seconds[outcome.kind] += outcome.seconds
        if outcome.verdict in FAULTS:
            shown = {
                "kind": outcome.kind, "verdict": outcome.verdict, "where": outcome.where, "case": outcome.number,
                "seed": self.seed, "what": outcome.what, "said": outcome.said, "times": 0,
            }  # fmt: skip
            told = outcome.where or outcome.said[:40]
            self.faults.setdefault((outcome.kind, outcome.verdict, told), shown)["times"] += 1


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of all mutations (default: 0)")
    parser.add_argument("--case", type=int, help="only this one of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first case of each kind (default: 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core")
    options = parser.parse_args()
    seconds = 60 * (options.minutes or 1)
    table, started = Table(options.kinds, options.seed), time.monotonic()
    cases = table.cases(options.first, started + seconds)
    if options.case is not None:
        cases = ((kind, options.case, options.seed) for kind in options.kinds)
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as directory,
        Progress(int(seconds), "Fuzzing", "second") as progress,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for outcome in outcomes(cases, Path(directory), options.processes):
            table.add(outcome)
            if options.case is not None:
                print(f"{outcome.kind} {outcome.number}: {outcome.verdict}; {outcome.what}\n  {outcome.where} {outcome.said}")
            progress.update(int(time.monotonic() - started) - progress.done)
    rows, faults = rows_of(table.counts), sorted(table.faults.values(), key=lambda fault: -fault["times"])
    for fault in faults if options.case is None else []:
        print(json.dumps(fault))
    print(markdown(rows, COLUMNS))
    write_result(
        options.json, __doc__, seed=options.seed, minutes=round((time.monotonic() - started) / 60, 1), rows=rows, faults=faults
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
