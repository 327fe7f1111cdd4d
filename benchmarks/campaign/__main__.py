"""Every number from one GPU, a few minutes at a time: `python -m benchmarks.campaign --minutes 9 [--only PART] [--output DIR]`

The parts of `benchmarks.campaign.plan` run in the order of what they tell, each in a process of its own: a crash, a hang or a
lack of memory costs that part alone. Nothing is begun that would not end in the minutes given. A further call with the same
DIR, on the same or another machine, goes on: what is done is not repeated, what ended early goes on from its last row, and what
failed is tried again after the others, until nothing came of it twice under one commit.

DIR holds `campaign.json` (state and every row, written anew every few seconds), `campaign.md` (every table, chart and
failure) and the charts: few and small files, to be carried to the next machine. Logs and compiled code lie in `--scratch`;
they are worth keeping between calls, and nothing is lost without them. `--plan` says what each part should take;
`--rehearse` runs all of them on the CPU with tiny models, and parts that crash, hang and fail on purpose.
"""

import argparse
import importlib.util
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

from benchmarks.campaign.campaign import Campaign
from benchmarks.campaign.plan import PLAN, Part, rehearsal
from benchmarks.campaign.processes import REPORT_SECONDS, environment_of, process_environment, write_report
from benchmarks.tools.environment import COMMIT, RESULTS, folder_of
from engine.errors import UserError, exit_code


def chosen(parts: list[Part], only: str | None) -> list[Part]:
    """The parts whose name holds `only`, that can run here."""
    found = [part for part in parts if only is None or only.lower() in part.name.lower()]
    if not found:
        raise UserError(f"--only {only}: no such part; there are: {', '.join(part.name for part in parts)}")
    lacking = {part.name: [name for name in part.needs if importlib.util.find_spec(name) is None] for part in found}
    for name, packages in lacking.items():
        if packages:
            print(f"{name}: skipped, for want of {', '.join(packages)}", file=sys.stderr)
    return [part for part in found if not lacking[part.name]]


def print_plan(parts: list[Part], minutes: float) -> None:
    """Every part with its estimate, and what a first call of so many minutes has time for."""
    left = 60 * minutes - REPORT_SECONDS
    for part in parts:
        share = min(part.seconds, left) if part.resumes else part.seconds * (part.seconds <= left)
        left -= share
        first = "whole" if share == part.seconds else f"{share:.0f} s of it" if share else "not yet"
        print(f"{part.name:34} {part.seconds:5.0f} s  in the first call: {first:12}  {part.question}")
        print(f"{'':34} estimate, not measured: {part.assumption}\n{'':34} python {shlex.join(part.python)}")
    print(f"\n{sum(part.seconds for part in parts) / 60:.0f} minutes in all, by estimate")


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="of this call, the report included (default: %(default)s)")
    parser.add_argument("--only", metavar="PART", help="parts whose name holds this")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE/campaign")
    parser.add_argument("--scratch", type=Path, default=Path("build/campaign"), help="logs and caches (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print every part with its estimate, and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU, and failures on purpose")
    options = parser.parse_args()
    parts = rehearsal() if options.rehearse else PLAN
    if options.plan:
        print_plan(parts, options.minutes)
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
    campaign = Campaign(output, options.scratch, here, variables, deadline)
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
