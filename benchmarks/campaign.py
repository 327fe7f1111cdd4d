"""Every number from one GPU, a few minutes at a time: `python -m benchmarks.campaign --minutes 9 [--only PART] [--output DIR]`

The parts of `benchmarks.plan` run in the order of what they tell, each in a process of its own: a crash, a hang or a lack
of memory costs that part alone. Nothing is begun that would not end in the minutes given. A further call with the same DIR,
on the same or another machine, goes on: what is done is not repeated, what ended early goes on from its last row, and what
failed is tried again after the others, until nothing came of it twice under one commit.

DIR holds `campaign.json` (state and every row, written anew every few seconds), `campaign.md` (every table, chart and
failure) and the charts: few and small files, to be carried to the next machine. Logs and compiled code lie in `--scratch`;
they are worth keeping between calls, and nothing is lost without them. `--plan` says what each part should take;
`--rehearse` runs all of them on the CPU with tiny models, and parts that crash, hang and fail on purpose.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.plan import PLAN, Part, rehearsal
from engine.errors import TRY_AGAIN, UserError, exit_code
from engine.files import write_json

RESULTS = Path(__file__).parent / "results"
COMMIT = "ENGINE_COMMIT"  # as `benchmarks.environment` has it, which would load torch into this process
REPORT_SECONDS = 40  # left at the end for campaign.md and its charts
MARGIN = 15  # seconds by which a part is told to end before its time
LEAST = 60  # seconds that a part must have to go on
ATTEMPTS = 2  # of a part under one commit, where nothing came of them
TAIL = 30  # lines of a part's output that are kept
POLL = 0.2  # seconds between two looks at a part
KEEP_EVERY = 5  # seconds between two looks at its rows

DONE, GOES_ON, FAILED = "done", "goes on", "failed"


def environment_of(python: dict[str, str]) -> dict[str, Any]:
    """What `benchmarks.environment` says, from a process of its own: this one must not hold memory of the GPU."""
    code = "import json; from benchmarks.environment import environment; print(json.dumps(environment()))"
    answer = subprocess.run([sys.executable, "-c", code], env=python, capture_output=True, text=True, timeout=180, check=False)
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise UserError(f"torch cannot say where it runs: {last}; mend the installation and start again")
    return json.loads(answer.stdout.splitlines()[-1])


def process_environment(scratch: Path, rehearses: bool) -> dict[str, str]:
    """Variables of the parts' processes: where compiled code is kept, no network, and traces of what crashes."""
    cache = scratch.absolute() / "cache"
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"), "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    return {**os.environ, **variables, **({"CUDA_VISIBLE_DEVICES": ""} if rehearses else {})}


def start(part: Part, arguments: list[str], log: Path, variables: dict[str, str]) -> Any:
    """A part's process, the first of a group of its own; of this session, so that what ends the session ends it too."""
    with log.open("ab") as output:
        command = [sys.executable, *part.python, *arguments]
        output.write(f"\n$ {shlex.join(command)}\n".encode())
        return subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=variables, process_group=0)


def write_report(output: Path, variables: dict[str, str]) -> bool:
    """Whether campaign.md could be written; in a process of its own, because what it imports takes memory and time."""
    command = [sys.executable, "-m", "benchmarks.report", str(output)]
    try:
        return subprocess.run(command, env=variables, process_group=0, check=False, timeout=2 * REPORT_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def kill(process: Any) -> None:
    """Ends a part's whole group; first Python prints where each thread of a process that still runs is."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGABRT)
        wait(process, 3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    wait(process, 30)


def wait(process: Any, seconds: float) -> None:
    ended = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < ended:
        time.sleep(0.05)


def last_lines(log: Path) -> list[str]:
    """The end of a log, without what progress bars overwrote."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 40_000))
        lines = file.read().decode(errors="replace").splitlines()
    shown = [line.rpartition("\r")[2] for line in lines if line.strip()][-TAIL:]
    # The report travels: where this machine keeps things is nobody's business.
    scratch = str(log.absolute().parent.parent)
    places = {sys.executable: "python", sys.prefix: "PREFIX", scratch: "SCRATCH", str(Path.cwd()): "."}
    for place, name in places.items():
        shown = [line.replace(place, name) for line in shown]
    return [line[:400] for line in shown]


class Campaign:
    """The state of all calls, kept in one file.

    Args:
        here: the environment of this call.
        deadline: by `time.monotonic`, when the last part must have ended.
    """

    def __init__(self, output: Path, scratch: Path, here: dict[str, Any], variables: dict[str, str], deadline: float) -> None:
        self.file, self.scratch, self.variables, self.deadline = output / "campaign.json", scratch, variables, deadline
        for folder in (output, scratch / "rows", scratch / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {"environments": [], "calls": [], "parts": {}, "rows": {}}
        if self.file.exists():
            self.state = json.loads(self.file.read_text())
        if here not in self.state["environments"]:
            self.state["environments"].append(here)
        self.here = self.state["environments"].index(here)
        self.state["calls"].append({"environment": self.here, "began": time.strftime("%Y-%m-%d %H:%M:%S"), "parts": []})

    def keep(self) -> None:
        write_json(self.file, self.state)

    def commit(self, number: int) -> str | None:
        return self.state["environments"][number]["commit"]

    def kept(self, part: Part) -> dict[str, Any]:
        """What is known of a part."""
        return self.state["parts"].setdefault(part.name, {"status": None, "attempts": [], "failed": [], "tail": []})

    def rows(self, part: Part) -> list[dict[str, Any]]:
        """The rows of a part's benchmark; parts of one benchmark share them, so that none measures what another has."""
        return self.state["rows"].get(part.benchmark, {"rows": []})["rows"]

    def done(self, part: Part) -> bool:
        """Whether nothing is to be done: all rows are there, and those that failed did so under this commit."""
        kept = self.kept(part)
        if kept["status"] != DONE:
            return False
        same = self.commit(self.here) == self.commit(kept["attempts"][-1]["environment"])
        return same or not any("failed" in row and row["name"] in kept["failed"] for row in self.rows(part))

    def failed(self, part: Part) -> bool:
        """Whether its last attempt failed, under this commit."""
        kept = self.kept(part)
        return kept["status"] == FAILED and self.commit(kept["attempts"][-1]["environment"]) == self.commit(self.here)

    def failures(self, part: Part) -> int:
        """How often a part came to nothing under this commit; a row in which it crashed is something, since after
        `benchmarks.environment.ATTEMPTS` of them the part goes on with the next."""
        here = [a for a in self.kept(part)["attempts"] if self.commit(a["environment"]) == self.commit(self.here)]
        return sum(attempt["status"] == FAILED and not attempt["changed"] for attempt in here)

    def fits(self, part: Part) -> bool:
        """Whether there is time for a part, or for some rows of it; more than what was too little before."""
        too_little = [1.5 * a["seconds"] for a in self.kept(part)["attempts"] if a["status"] == GOES_ON and not a["rows"]]
        needed = min(LEAST, part.seconds) if part.resumes else part.seconds
        return self.deadline - time.monotonic() >= min(max([needed, *too_little]), part.limit)

    def run(self, parts: list[Part]) -> None:
        """Every part that is not done and fits; those that failed, before or now, after the others."""
        for part in [part for part in parts if not self.failed(part)]:
            while not self.done(part) and self.fits(part):
                attempt = self.attempt(part)
                if attempt["status"] != GOES_ON or not attempt["changed"]:
                    break
        for part in parts:
            if self.failed(part) and self.failures(part) < ATTEMPTS and self.fits(part):
                self.attempt(part)

    def attempt(self, part: Part) -> dict[str, Any]:
        """Runs a part once, from its last row on."""
        kept = self.kept(part)
        rows, log = self.scratch / "rows" / f"{part.benchmark}.json", self.scratch / "logs" / f"{part.slug}.log"
        rows.unlink(missing_ok=True)
        if part.benchmark in self.state["rows"]:
            write_json(rows, self.state["rows"][part.benchmark])
        before = self.rows(part)
        left = self.deadline - time.monotonic()
        arguments = ["--json", str(rows)] if part.measures else []
        arguments += ["--minutes", f"{max(left - MARGIN, 1) / 60:.2f}"] if part.measures and part.resumes else []
        attempt = {
            "environment": self.here,
            "status": GOES_ON,
            "ended": "this call ended",
            "rows": 0,
            "changed": 0,
            "seconds": 0.0,
        }
        kept["attempts"].append(attempt)
        self.state["calls"][-1]["parts"].append(part.name)
        print(f"{part.name}: {part.question}", file=sys.stderr, flush=True)
        started = time.monotonic()
        process = start(part, arguments, log, self.variables)
        try:
            attempt["status"], attempt["ended"] = self.watch(part, process, rows)
        finally:
            kill(process)
            attempt["seconds"] = round(time.monotonic() - started, 1)
            self.take(part, rows)
            new = [row for row in self.rows(part) if row not in before]
            attempt["rows"], attempt["changed"] = sum("failed" not in row for row in new), len(new)
            kept["failed"] += [row["name"] for row in new if "failed" in row]
            kept["status"], kept["tail"] = attempt["status"], last_lines(log)
            self.keep()
        print(f"  {attempt['ended']} after {attempt['seconds']:.0f} s", file=sys.stderr, flush=True)
        return attempt

    def watch(self, part: Part, process: Any, rows: Path) -> tuple[str, str]:
        """Waits for a part, keeping its rows; kills it when it gives no sign for its limit, or when the call ends.

        Returns:
            Its status, and how it ended.
        """
        sign = looked = time.monotonic()
        while process.poll() is None:
            time.sleep(POLL)
            now = time.monotonic()
            if now - looked > KEEP_EVERY:
                looked = now
                if self.take(part, rows):
                    sign = now
                    self.keep()
            if now > self.deadline:
                return GOES_ON, "killed: the minutes of this call were over"
            if now - sign > part.limit:
                return FAILED, f"killed: no sign of life for {part.limit:.0f} s"
        code = process.poll()
        if code in (0, TRY_AGAIN):
            return (GOES_ON, "goes on in a further call") if code else (DONE, "done")
        return FAILED, f"ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"

    def take(self, part: Part, rows: Path) -> bool:
        """Takes a part's rows over; whether there is anything new."""
        if not part.measures or not rows.exists():
            return False
        measured = json.loads(rows.read_text())
        changed = measured != self.state["rows"].get(part.benchmark)
        self.state["rows"][part.benchmark] = measured
        return changed


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
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/campaign-gpu, or -cpu for a rehearsal")
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
    output = options.output or RESULTS / ("campaign-cpu" if options.rehearse else "campaign-gpu")
    variables = process_environment(options.scratch, options.rehearse)
    here = environment_of(variables)
    if "cuda" not in here and not options.rehearse:
        raise UserError("there is no GPU here; --rehearse runs every part on the CPU")
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
