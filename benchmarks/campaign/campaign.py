"""The state of a campaign: what is done, what goes on from where, and what failed how often."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.campaign.plan import Part
from benchmarks.campaign.processes import kill, last_lines, start
from benchmarks.tools.tables import OUT_OF_MEMORY, lasts
from engine.errors import TRY_AGAIN
from engine.files import write_json

MARGIN = 15  # seconds by which a part is told to end before its time
ATTEMPTS = 2  # of a part under one commit, where nothing came of them
POLL = 0.2  # seconds between two looks at a part
KEEP_EVERY = 5  # seconds between two looks at its rows

DONE, GOES_ON, FAILED = "done", "goes on", "failed"


class Campaign:
    """The state of all calls, kept in one file.

    Args:
        here: the environment of this call.
        deadline: by `time.monotonic`, when the last part must have ended.
        memory: GiB for the parts that run beside each other.
    """

    def __init__(
        self, output: Path, scratch: Path, here: dict[str, Any], variables: dict[str, str], deadline: float, memory: float
    ) -> None:
        self.memory = memory
        self.file, self.scratch, self.variables, self.deadline = output / "campaign.json", scratch, variables, deadline
        for folder in (output, scratch / "rows", scratch / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {"environments": [], "calls": [], "parts": {}, "rows": {}}
        if self.file.exists():
            self.state = json.loads(self.file.read_text())
        if here not in self.state["environments"]:
            self.state["environments"].append(here)
        self.here = self.state["environments"].index(here)
        began, seconds = time.strftime("%Y-%m-%d %H:%M:%S"), deadline - time.monotonic()
        self.state["calls"].append({"environment": self.here, "began": began, "seconds": seconds, "parts": []})

    def keep(self) -> None:
        write_json(self.file, self.state)

    def commit(self, number: int) -> str | None:
        return self.state["environments"][number]["commit"]

    def kept(self, part: Part) -> dict[str, Any]:
        """What is known of a part."""
        return self.state["parts"].setdefault(part.name, {"status": None, "attempts": [], "failed": [], "tail": []})

    def rows(self, part: Part) -> list[dict[str, Any]]:
        """The rows that a part, and those with which it shares them, have brought."""
        return self.state["rows"].get(part.key, {"rows": []})["rows"]

    def rows_file(self, part: Part) -> Path:
        return self.scratch / "rows" / f"{part.key}.json"

    def done(self, part: Part) -> bool:
        """Whether nothing is to be done: all rows are there, and those that failed, or do not last, are of this commit."""
        kept = self.kept(part)
        if kept["status"] != DONE or self.lacked_memory(part):
            return False
        same = self.commit(self.here) == self.commit(kept["attempts"][-1]["environment"])
        if part.local:
            return same and self.rows_file(part).exists()
        failed = kept["failed"]
        return same or all(lasts(row) and not ("failed" in row and row["name"] in failed) for row in self.rows(part))

    def lacked_memory(self, part: Part) -> list[str]:
        """Names of the rows that ran out of memory, once, in a part that runs beside others: they are measured again alone."""
        failed = self.kept(part)["failed"] if part.memory is not None else []
        short = [row["name"] for row in self.rows(part) if row.get("failed") == OUT_OF_MEMORY]
        return [name for name in short if failed.count(name) == 1]

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
        return self.deadline - time.monotonic() >= min(max([part.least, *too_little]), part.limit)

    def run(self, parts: list[Part]) -> None:
        """Every part that is not done and fits: first those that run beside each other, and alone what lacked memory there;
        then the timed, one after another; and those that failed, before or now, after the others."""
        fresh = [part for part in parts if not self.failed(part)]
        beside = [part for part in fresh if part.memory is not None]
        self.run_beside([part for part in beside if not self.lacked_memory(part)])
        for part in beside:
            if self.lacked_memory(part):
                self.run_beside([part])
        for part in fresh:
            if part.memory is None:
                self.run_beside([part])
        for part in parts:
            if self.failed(part) and self.failures(part) < ATTEMPTS:
                self.run_beside([part])

    def run_beside(self, parts: list[Part]) -> None:
        """Parts beside each other, each as soon as the card's memory holds it and what runs, and again while it goes on."""
        waiting, running = list(parts), list[Attempt]()
        try:
            while waiting or running:
                for part in list(waiting):
                    taken = sum(attempt.part.memory or 0 for attempt in running)
                    if not running or taken + (part.memory or 0) <= self.memory:
                        waiting.remove(part)
                        if (self.failed(part) or not self.done(part)) and self.fits(part):
                            running.append(Attempt(self, part))
                time.sleep(POLL)
                for attempt in [attempt for attempt in running if not attempt.runs()]:
                    running.remove(attempt)
                    attempt.end()
                    goes_on = attempt.kept["status"] == GOES_ON and attempt.kept["changed"]
                    if goes_on and not self.lacked_memory(attempt.part):
                        waiting.append(attempt.part)
        finally:
            for attempt in running:
                attempt.end()

    def take(self, part: Part, rows: Path) -> bool:
        """Takes a part's rows over; whether there is anything new."""
        if not part.measures or not rows.exists():
            return False
        measured = json.loads(rows.read_text())
        changed = measured != self.state["rows"].get(part.key)
        self.state["rows"][part.key] = measured
        return changed


class Attempt:
    """A part's process, which goes on from the part's last row.

    kept: what the campaign keeps of it.
    """

    def __init__(self, campaign: Campaign, part: Part) -> None:
        self.campaign, self.part, scratch = campaign, part, campaign.scratch
        self.rows, self.log = campaign.rows_file(part), scratch / "logs" / f"{part.slug}.log"
        again = campaign.lacked_memory(part)
        self.before = [row for row in campaign.rows(part) if row["name"] not in again]
        if not part.local:
            self.rows.unlink(missing_ok=True)
            if part.key in campaign.state["rows"]:
                write_json(self.rows, campaign.state["rows"][part.key] | {"rows": self.before})
        left = campaign.deadline - time.monotonic()
        arguments = ["--json", str(self.rows)] if part.measures else []
        arguments += ["--minutes", f"{max(left - MARGIN, 1) / 60:.2f}"] if part.measures and part.resumes else []
        self.kept: dict[str, Any] = {
            "environment": campaign.here, "status": GOES_ON, "ended": "this call ended", "rows": 0, "changed": 0,
            "seconds": 0.0,
        }  # fmt: skip
        campaign.kept(part)["attempts"].append(self.kept)
        campaign.state["calls"][-1]["parts"].append(part.name)
        print(f"{part.name}: {part.question}", file=sys.stderr, flush=True)
        self.started = self.sign = self.looked = time.monotonic()
        self.process = start(part, arguments, self.log, campaign.variables)

    def runs(self) -> bool:
        """Keeps its rows; whether it runs, and may: not when it gives no sign for its limit, or when the call ends."""
        now, part = time.monotonic(), self.part
        code = self.process.poll()
        if code is not None:
            ends = {0: (DONE, "done"), TRY_AGAIN: (GOES_ON, "goes on in a further call")}
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            return self._ends(*ends.get(code, (FAILED, how)))
        if now - self.looked > KEEP_EVERY:
            self.looked = now
            if self.campaign.take(part, self.rows):
                self.sign = now
                self.campaign.keep()
        if now > self.campaign.deadline:
            return self._ends(GOES_ON, "killed: the minutes of this call were over")
        if now - self.sign > part.limit:
            return self._ends(FAILED, f"killed: no sign of life for {part.limit:.0f} s")
        return True

    def _ends(self, status: str, how: str) -> bool:
        self.kept["status"], self.kept["ended"] = status, how
        return False

    def end(self) -> None:
        """Ends its processes, and keeps what came of it."""
        campaign, part, attempt = self.campaign, self.part, self.kept
        kill(self.process)
        attempt["seconds"] = round(time.monotonic() - self.started, 1)
        campaign.take(part, self.rows)
        new = [row for row in campaign.rows(part) if row not in self.before]
        attempt["rows"], attempt["changed"] = sum("failed" not in row for row in new), len(new)
        kept = campaign.kept(part)
        kept["failed"] += [row["name"] for row in new if "failed" in row]
        kept["status"], kept["tail"] = attempt["status"], last_lines(self.log)
        campaign.keep()
        print(f"  {part.name}: {attempt['ended']} after {attempt['seconds']:.0f} s", file=sys.stderr, flush=True)
