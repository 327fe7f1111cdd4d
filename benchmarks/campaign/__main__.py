"""Every number from one GPU, a few minutes at a time: `python -m benchmarks.campaign --minutes 9 [--only PART...]`

The parts of `benchmarks.campaign.plan` run each in a process of its own: a crash, a hang or a lack of memory costs that part
alone. Those that need no quiet machine run first, beside each other, as many as the card's memory holds; what is compiled is
compiled there, many forms at once. Then each timed part has the machine for itself.

Nothing is begun that would not end in the minutes given. A further call with the same DIR, on the same or another machine, goes
on: what is done is not repeated, what ended early goes on from its last row, and what failed is tried again after the others,
until nothing came of it twice under one commit.

DIR holds `campaign.json` (state and every row, written anew every few seconds), `campaign.md` (every table, chart and
failure) and the charts: few and small files, to be carried to the next machine. Logs and compiled code lie in `--scratch`;
they are worth keeping between calls, and nothing is lost without them. `--plan` says what each part should take;
`--rehearse` runs all of them on the CPU with tiny models, and parts that crash, hang and fail on purpose.
"""

import argparse
import importlib.util
import json
import os
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

from benchmarks.campaign.campaign import Campaign
from benchmarks.campaign.plan import PLAN, Part, rehearsal
from benchmarks.campaign.processes import REPORT_SECONDS, environment_of, memory_of_card, process_environment, write_report
from benchmarks.tools.environment import COMMIT, RESULTS, folder_of
from benchmarks.tools.planned import SECONDS
from engine.errors import UserError, exit_code


def chosen(parts: list[Part], only: list[str]) -> list[Part]:
    """The parts whose name holds one of `only`, or all, that can run here."""
    found = [part for part in parts if not only or any(name.lower() in part.name.lower() for name in only)]
    if not found:
        raise UserError(f"--only {' '.join(only)}: no such part; there are: {', '.join(part.name for part in parts)}")
    lacking = {part.name: [name for name in part.needs if importlib.util.find_spec(name) is None] for part in found}
    for name, packages in lacking.items():
        if packages:
            print(f"{name}: skipped, for want of {', '.join(packages)}", file=sys.stderr)
    return [part for part in found if not lacking[part.name]]


def kept_rows(output: Path | None) -> dict[str, float]:
    """Seconds that rows of `benchmarks.steps.step` took, by name; of the campaign of a folder, or of every kept one of GPUs."""
    files = [output / "campaign.json"] if output else sorted(RESULTS.glob("*/campaign/campaign.json"))
    states = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = [row for state in states if not state["rehearsal"] for row in state["rows"].get("step", {"rows": []})["rows"]]
    return {row["name"]: row["took_seconds"] for row in rows if "failed" not in row and "took_seconds" in row}


def expected(part: Part, took: dict[str, float]) -> tuple[float, float]:
    """A part's seconds, with what rows that compile nothing took where they were measured; and those of rows that are kept: the
    recipe's, which stand for every commit.

    Args:
        took: as `kept_rows`.
    """
    seconds, kept = part.seconds, 0.0
    for lever in part.levers:
        known = [value for name, value in took.items() if name.startswith(f"{part.checkpoint}: {lever.name}, batch ")]
        if known:
            estimate = SECONDS[lever.name]
            of_row = estimate if lever.compiles else known[0]
            seconds, kept = seconds + of_row - estimate, kept + of_row * (lever.options is None)
    return seconds, kept


def print_plan(parts: list[Part], took: dict[str, float], cards: tuple[float, ...] = (79, 139)) -> None:
    """Every part with its estimate, and how long all of them take on cards of so many GiB."""
    timed = beside = held = there = 0.0
    for part in parts:
        seconds, kept = expected(part, took)
        taken = f" but for kept rows, {kept:.0f} s" if kept else ""
        where = "alone" if part.memory is None else f"beside others, {part.memory:.0f} GiB"
        print(f"{part.name:34} {seconds:5.0f} s, {where:24}  {part.question}")
        print(f"{'':34} estimate, not measured{taken}: {part.assumption}\n{'':34} python {shlex.join(part.python)}")
        timed, there = timed + seconds * (part.memory is None), there + kept
        beside, held = max(beside, seconds * (part.memory is not None)), held + seconds * (part.memory or 0)
    for memory in cards:
        together = max(beside, held / memory)
        rest = (together + timed - there) / 60
        print(
            f"\n{together:.0f} s for what runs beside each other, with {memory:.0f} GiB and 16 cores;\n{timed:.0f} s for what "
            f"is timed, {there:.0f} s of them for rows that are kept: {rest:.0f} minutes for all others, by estimate"
        )


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="of this call, the report included (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PART", default=[], help="parts whose name holds one of these")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE/campaign")
    parser.add_argument("--scratch", type=Path, default=Path("build/campaign"), help="logs and caches (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print every part with its estimate, and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU, and failures on purpose")
    options = parser.parse_args()
    parts = rehearsal() if options.rehearse else PLAN
    if options.plan:
        print_plan(chosen(parts, options.only), kept_rows(options.output))
        return 0
    deadline = time.monotonic() + 60 * options.minutes - REPORT_SECONDS
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # a crash writes no gigabytes
    variables = process_environment(options.scratch, options.rehearse)
    here = environment_of(variables)
    if "cuda" not in here and not options.rehearse:
        raise UserError("there is no GPU here; --rehearse runs every part on the CPU")
    output = options.output or RESULTS / folder_of(here["device"]) / "campaign"
    if here["commit"]:
        variables[COMMIT] = here["commit"]  # of all parts, whatever is committed meanwhile
    selected = chosen(parts, options.only)
    memory = len(os.sched_getaffinity(0)) if options.rehearse else memory_of_card()  # a rehearsal's parts take 1 each
    campaign = Campaign(output, options.scratch, here, variables, deadline, memory)
    campaign.state["rehearsal"] = options.rehearse
    try:
        campaign.run(selected)
    finally:
        campaign.keep()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(output / ("campaign.md" if write_report(output, variables) else "campaign.json"))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("benchmarks.campaign", main))
