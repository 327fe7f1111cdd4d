"""The state of a campaign: what is done, what goes on from where, and what failed how often."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.campaign.plan import Part
from benchmarks.campaign.processes import kill, last_lines, start
from engine.errors import TRY_AGAIN
from engine.files import write_json

MARGIN = 15  # seconds by which a part is told to end before its time
LEAST = 60  # seconds that a part must have to go on
ATTEMPTS = 2  # of a part under one commit, where nothing came of them
POLL = 0.2  # seconds between two looks at a part
KEEP_EVERY = 5  # seconds between two looks at its rows

DONE, GOES_ON, FAILED = "done", "goes on", "failed"


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
        `benchmarks.tools.rows.ATTEMPTS` of them the part goes on with the next."""
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
