"""The campaign: parts that fail cost only themselves, and a further call goes on."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.campaign import __main__ as command
from benchmarks.campaign import campaign, plan, processes
from benchmarks.campaign.campaign import DONE, FAILED, GOES_ON, Attempt, Campaign
from benchmarks.campaign.plan import PROVOKED, Part
from benchmarks.tools import environment, planned
from benchmarks.tools.checkpoints import AIMS
from benchmarks.tools.levers import LEVERS
from benchmarks.tools.published import CHECKPOINTS
from tests import in_process

HERE = {"commit": "one", "device": "CPU"}
# Keeps a row more in each run, and leaves with 75 until there are three.
COUNTS = """
import json, pathlib, sys
file = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
kept = json.loads(file.read_text()) if file.exists() else {"environments": [{}], "rows": []}
kept["rows"].append({"name": str(len(kept["rows"])), "environment": 0})
file.write_text(json.dumps(kept))
sys.exit(75 if len(kept["rows"]) < 3 else 0)
"""


def part(name: str, code: str, limit: float = 30, seconds: float = 1, measures: bool = False) -> Part:
    return Part(name, "Why?", ("-c", code), (), seconds, "none", limit, measures, measures)


def open_campaign(tmp_path: Path, scratch: str = "scratch", seconds: float = 60, here: dict = HERE) -> Campaign:
    variables = processes.process_environment(tmp_path / scratch, rehearses=True)
    return Campaign(tmp_path / "out", tmp_path / scratch, here, variables, time.monotonic() + seconds, 10)


def statuses(opened: Campaign) -> dict[str, str]:
    return {name: kept["status"] for name, kept in opened.state["parts"].items()}


def runs(opened: Campaign) -> list[str]:
    return opened.state["calls"][-1]["parts"]


def test_what_fails_costs_only_itself_and_is_tried_twice_under_a_commit(tmp_path):
    provoked = [*PROVOKED[:1], replace(PROVOKED[1], limit=1), PROVOKED[3]]
    parts = [*provoked, part("good", "print('well')")]
    first = open_campaign(tmp_path)
    first.run(parts)
    names = [failing.name for failing in provoked]
    assert runs(first) == [*names, "good", *names]
    assert statuses(first) == {**dict.fromkeys(names, FAILED), "good": DONE}
    kept = json.loads((tmp_path / "out" / "campaign.json").read_text())["parts"]
    ends = [kept[name]["attempts"][-1]["ended"] for name in names]
    assert ends == ["ended by SIGSEGV", "killed: no sign of life for 1 s", "failed with exit code 1"]
    assert any("Segmentation fault" in line for line in kept[names[0]]["tail"])
    assert any("about to hang" in line for line in kept[names[1]]["tail"])
    assert any('File "<string>", line 1' in line for line in kept[names[1]]["tail"]), "where it hung"
    assert kept[names[2]]["tail"][-1] == "ValueError: provoked"
    again = open_campaign(tmp_path)
    again.run(parts)
    assert runs(again) == []
    mended = open_campaign(tmp_path, here={**HERE, "commit": "two"})
    mended.run(parts[-2:])
    assert runs(mended) == [names[-1], names[-1]]


def test_a_part_goes_on_from_its_rows_on_another_machine(tmp_path):
    counting = part("counting", COUNTS, measures=True)
    first = open_campaign(tmp_path, "one")
    attempt = Attempt(first, counting)
    while attempt.runs():
        time.sleep(0.05)
    attempt.end()
    assert statuses(first) == {"counting": GOES_ON}
    second = open_campaign(tmp_path, "two", here={**HERE, "device": "another"})
    second.run([counting])
    assert runs(second) == ["counting", "counting"]
    kept = second.state["parts"]["counting"]
    assert kept["status"] == DONE
    assert [row["name"] for row in second.rows(counting)] == ["0", "1", "2"]
    assert [attempt["rows"] for attempt in kept["attempts"]] == [1, 1, 1]
    third = open_campaign(tmp_path)
    third.run([counting])
    assert runs(third) == []


def test_rows_that_failed_are_measured_again_under_another_commit(tmp_path):
    rows = COUNTS.replace('"environment": 0}', '"environment": 0, "failed": "for once"}').replace("< 3", "< 1")
    failing = part("failing", rows, measures=True)
    open_campaign(tmp_path).run([failing])
    same, mended = open_campaign(tmp_path), open_campaign(tmp_path, here={**HERE, "commit": "two"})
    assert same.done(failing)
    assert not mended.done(failing)


def test_a_row_that_lacked_memory_beside_others_is_tried_once_more_alone(tmp_path):
    kept = COUNTS.replace("< 3", "< 1")
    lacks = kept.replace('str(len(kept["rows"]))', "'large'").replace(
        '"environment": 0}', '"environment": 0, "failed": "out of memory"}'
    )
    assert "'large'" in lacks
    parts = [replace(part(name, code, measures=True), memory=1) for name, code in (("lacks", lacks), ("other", kept))]
    opened = open_campaign(tmp_path)
    opened.run(parts)
    assert runs(opened) == ["lacks", "other", "lacks"]
    assert [row["name"] for row in opened.rows(parts[0])] == ["large"], "in the place of the first attempt's"
    assert opened.done(parts[0])
    again = open_campaign(tmp_path)
    again.run(parts)
    assert runs(again) == []


def test_only_rows_of_the_recipe_stand_for_every_commit(tmp_path):
    kernel = COUNTS.replace("< 3", "< 1")
    trains = kernel.replace('"environment": 0}', '"environment": 0, "settings": {"options": {}}}')
    recipe = trains.replace('{"options": {}}', "{}")
    codes = {"kernel": kernel, "engine": trains, "recipe": recipe}
    parts = [part(name, code, measures=True) for name, code in codes.items()]
    open_campaign(tmp_path).run(parts)
    same, other = open_campaign(tmp_path), open_campaign(tmp_path, here={**HERE, "commit": "two"})
    assert [same.done(part) for part in parts] == [True, True, True]
    assert [other.done(part) for part in parts] == [False, False, True]


class Forked:
    """A part's process, forked from this one, which has imported torch already."""

    def __init__(self, part: Part, arguments: list[str], log: Path, variables: dict[str, str]) -> None:
        log.touch()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            faulthandler.disable()
            os.setpgid(0, 0)
            os._exit(in_process.run([sys.executable, *part.python, *arguments]).returncode)

    def poll(self) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_a_row_that_crashes_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "start", Forked)
    code = """
import os, pathlib, signal, sys
from benchmarks.tools.rows import Rows
rows = Rows(pathlib.Path(sys.argv[sys.argv.index("--json") + 1]), "What?")
rows.measure("crashes", 1, lambda: os.kill(os.getpid(), signal.SIGSEGV))
rows.measure("good", 1, lambda: {"value": 1})
"""
    crashing = part("crashing", code, measures=True)
    for _ in range(3):
        open_campaign(tmp_path, here=environment.environment()).run([crashing])
    last = open_campaign(tmp_path, here=environment.environment())
    assert [(row["name"], "failed" in row) for row in last.rows(crashing)] == [("crashes", True), ("good", False)]
    last.run([crashing])
    assert runs(last) == []


def test_a_row_that_breaks_the_device_is_followed_by_a_fresh_process(tmp_path):
    breaking = COUNTS.replace('"environment": 0}', '"environment": 0, "failed": "an illegal memory access"}')
    opened = open_campaign(tmp_path)
    opened.run([part("breaking", breaking, measures=True)])
    assert runs(opened) == ["breaking"] * 3


def test_a_part_dies_with_the_session_that_started_it(tmp_path):
    process = processes.start(part("sleeping", "import time; time.sleep(60)"), [], tmp_path / "log", dict(os.environ))
    try:
        assert os.getsid(process.pid) == os.getsid(0)
        assert os.getpgid(process.pid) == process.pid
    finally:
        processes.kill(process)


def test_a_report_that_hangs_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "REPORT_SECONDS", 0.01)
    assert not processes.write_report(tmp_path, dict(os.environ))


def test_the_end_of_a_call_kills_the_whole_group_and_keeps_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "KEEP_EVERY", 0.1)
    child = tmp_path / "child"
    code = f"""
import json, pathlib, subprocess, sys, time
file = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
aside = file.with_suffix(".partial")
aside.write_text(json.dumps({{"environments": [{{}}], "rows": [{{"name": "kept", "environment": 0}}]}}))
aside.replace(file)
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
pathlib.Path({str(child)!r}).write_text(str(started.pid))
time.sleep(3600)
"""
    opened = open_campaign(tmp_path, seconds=1.5)
    opened.run([part("long", code, measures=True), part("after", "", seconds=2)])
    assert runs(opened) == ["long"]
    kept = opened.state["parts"]["long"]
    assert kept["status"] == GOES_ON
    assert kept["attempts"][0]["ended"] == "killed: the minutes of this call were over"
    assert [row["name"] for row in opened.state["rows"]["long"]["rows"]] == ["kept"]
    described = Path(f"/proc/{child.read_text()}/stat")
    until = time.monotonic() + 20
    while described.exists() and described.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert time.monotonic() < until


def test_parts_run_beside_each_other_while_they_fit_the_card_and_before_what_is_timed(tmp_path):
    log = tmp_path / "log"
    code = """
import sys, time
with open({log!r}, "a") as log:
    print("{name} begins", file=log, flush=True)
    time.sleep({seconds})
    print("{name} ends", file=log, flush=True)
"""

    def beside(name, seconds, memory):
        return replace(part(name, code.format(log=str(log), name=name, seconds=seconds)), memory=memory)

    crashing = replace(part("crashing", "raise ValueError"), memory=1)
    open_campaign(tmp_path).run([
        beside("timed", 0, None), crashing, beside("long", 1.5, 5), beside("large", 0, 9), beside("short", 0.7, 3),
    ])  # fmt: skip
    lines = log.read_text().splitlines()
    assert set(lines[:2]) == {"long begins", "short begins"}
    assert lines[2:] == ["short ends", "long ends", "large begins", "large ends", "timed begins", "timed ends"]
    kept = json.loads((tmp_path / "out" / "campaign.json").read_text())["parts"]
    assert {name for name, part in kept.items() if part["status"] != DONE} == {"crashing"}


def test_code_that_was_compiled_elsewhere_is_compiled_again(tmp_path):
    local = replace(part("compilation", COUNTS.replace("< 3", "< 1"), measures=True), memory=1, local=True)
    open_campaign(tmp_path).run([local])
    same, elsewhere = open_campaign(tmp_path), open_campaign(tmp_path, "another")
    assert same.done(local)
    assert not elsewhere.done(local)
    assert not open_campaign(tmp_path, here={**HERE, "commit": "two"}).done(local)


def test_every_planned_row_has_a_lever_and_an_estimate():
    timed = [part for part in plan.PLAN if part.checkpoint]
    assert {part.checkpoint for part in timed} == set(AIMS)
    assert planned.SECONDS.keys() <= {lever.name for lever in LEVERS}
    for part in timed:
        assert part.levers == planned.levers_of(part.checkpoint, CHECKPOINTS[part.checkpoint][0])
        assert part.python[part.python.index("--levers") + 1 :] == tuple(lever.name for lever in part.levers)
    assert not any(lever.name == "compiled, plain norms" for part in timed if "prior" in part.name for lever in part.levers)
    assert len({part.key for part in plan.PLAN if part.memory is not None}) == sum(p.memory is not None for p in plan.PLAN)


def test_a_signal_ends_a_call_with_its_report(tmp_path):
    output = tmp_path / "out"
    code = f"""
import sys, time
from benchmarks.campaign import __main__ as command
from benchmarks.campaign.plan import Part
command.PLAN[:] = [Part("long", "Why?", ("-c", "import time; time.sleep(3600)"), (), 1, "none", 300, False, False)]
command.environment_of = lambda variables: {{"commit": None, "device": "none", "cuda": "none"}}
command.write_report = lambda output, variables: (output / "campaign.md").write_text("written") > 0
sys.argv = ["campaign", "--output", {str(output)!r}, "--scratch", {str(tmp_path / "scratch")!r}]
sys.exit(command.exit_code("campaign", command.main))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("long:")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert (output / "campaign.md").read_text() == "written"
    kept = json.loads((output / "campaign.json").read_text())["parts"]["long"]
    assert kept["status"] == GOES_ON
    assert kept["attempts"][0]["ended"] == "this call ended"


def test_every_part_is_chosen_by_its_name(capsys):
    assert [part.name for part in command.chosen(plan.PLAN, ["step, SD", "loader"])] == ["step, SD 1.5 at 512 px", "loader"]
    with pytest.raises(command.UserError, match="--only nothing: no such part; there are: gpu tests, host waits"):
        command.chosen(plan.PLAN, ["nothing"])
    lacking = Part("lacking", "Why?", (), (), 1, "none", needs=("a_package_that_nobody_has",))
    assert command.chosen([lacking], []) == []
    assert "lacking: skipped, for want of a_package_that_nobody_has" in capsys.readouterr().err
    command.print_plan(plan.PLAN, {"SD 1.5, 512 px: captured, batch 32": 29.4, "SD 1.5, 512 px: recipe, batch 32": 31.0})
    printed = capsys.readouterr().out
    assert all(part.assumption in printed for part in plan.PLAN)
    assert "estimate, not measured but for kept rows, 31 s: 15 s of imports" in printed
    assert "31 s of them for rows that are kept" in printed
    assert len({part.slug for part in plan.PLAN}) == len(plan.PLAN)


def test_a_report_does_not_say_where_a_machine_keeps_things(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")
    log = tmp_path / "scratch" / "logs" / "part.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"$ {sys.executable} -m part --json {tmp_path}/scratch/rows/part.json\nFile {Path.cwd()}/engine/run.py\n"
                   f"{tmp_path}/site/torchao/api.py: a warning\n")  # fmt: skip
    assert processes.last_lines(log) == [
        "$ python -m part --json SCRATCH/rows/part.json", "File ./engine/run.py", "SITE/torchao/api.py: a warning",
    ]  # fmt: skip
