"""The campaign: parts that fail cost only themselves, a further call goes on, and the rehearsal runs every part."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.campaign import __main__ as command
from benchmarks.campaign import campaign, gpu_tests, plan, processes, report
from benchmarks.campaign.campaign import DONE, FAILED, GOES_ON, Campaign
from benchmarks.campaign.plan import PROVOKED, Part
from benchmarks.operations import attention
from benchmarks.steps import equality, overhead
from benchmarks.tools import environment
from benchmarks.tools.rows import Rows

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
    return Campaign(tmp_path / "out", tmp_path / scratch, here, variables, time.monotonic() + seconds)


def statuses(opened: Campaign) -> dict[str, str]:
    return {name: kept["status"] for name, kept in opened.state["parts"].items()}


def runs(opened: Campaign) -> list[str]:
    return opened.state["calls"][-1]["parts"]


def test_what_fails_costs_only_itself_and_is_tried_twice_under_a_commit(tmp_path):
    parts = [*PROVOKED, part("good", "print('well')")]
    first = open_campaign(tmp_path)
    first.run(parts)
    names = [provoked.name for provoked in PROVOKED]
    assert runs(first) == [*names, "good", *names]
    assert statuses(first) == {**dict.fromkeys(names, FAILED), "good": DONE}
    kept = json.loads((tmp_path / "out" / "campaign.json").read_text())["parts"]
    ends = [kept[name]["attempts"][-1]["ended"] for name in names]
    assert ends == ["ended by SIGSEGV", "killed: no sign of life for 2 s", "failed with exit code 1", "failed with exit code 1"]
    assert any("Segmentation fault" in line for line in kept[names[0]]["tail"])
    assert any("about to hang" in line for line in kept[names[1]]["tail"])
    assert any('File "<string>", line 1' in line for line in kept[names[1]]["tail"]), "where it hung"
    assert kept[names[2]]["tail"][-1].startswith("torch.OutOfMemoryError: CUDA out of memory")
    again = open_campaign(tmp_path)
    again.run(parts)
    assert runs(again) == []
    mended = open_campaign(tmp_path, here={**HERE, "commit": "two"})
    mended.run(parts[-2:])
    assert runs(mended) == [names[-1], names[-1]]


def test_a_part_goes_on_from_its_rows_on_another_machine(tmp_path):
    counting = part("counting", COUNTS, measures=True)
    first = open_campaign(tmp_path, "one")
    first.attempt(counting)
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


def test_a_row_that_crashes_costs_only_itself(tmp_path):
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


def test_benchmarks_that_lack_a_row_say_so(tmp_path, monkeypatch):
    for module in (attention, overhead):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(tmp_path / "rows.json"), "--minutes", "0"])
        assert module.main() == 75


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
    opened = open_campaign(tmp_path, seconds=3)
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


def test_runs_that_are_not_equal_failed(monkeypatch):
    def run(family, directory, graphs, options, steps):
        weights = {"weight": torch.full((2,), 1.5 if graphs == "off" else 1.0)}
        return {"curve": [(1.0, 1.0)], "weights": weights, "step_milliseconds": 1.0}

    monkeypatch.setattr(equality, "run", run)
    row = Rows(None, "What?").measure("sd", 1, lambda: equality.compare("sd", {}, 1))
    assert row["failed"] == "not equal in exported weights only, weights by up to 0.5"
    assert "| sd | not equal in exported weights only" in equality.table([row])


def test_every_part_is_chosen_by_its_name(capsys):
    assert [part.name for part in command.chosen(plan.PLAN, "step, SD")] == ["step, SD 1.5 at 512 px"]
    with pytest.raises(command.UserError, match="--only nothing: no such part; there are: gpu tests, host waits"):
        command.chosen(plan.PLAN, "nothing")
    lacking = Part("lacking", "Why?", (), (), 1, "none", needs=("a_package_that_nobody_has",))
    assert command.chosen([lacking], None) == []
    assert "lacking: skipped, for want of a_package_that_nobody_has" in capsys.readouterr().err
    command.print_plan(plan.PLAN, 9)
    printed = capsys.readouterr().out
    assert all(f"estimate, not measured: {part.assumption}" in printed for part in plan.PLAN)
    assert len({part.slug for part in plan.PLAN}) == len(plan.PLAN)


def test_a_table_that_fails_costs_only_itself(tmp_path):
    parts = {name: {"status": DONE, "attempts": [], "failed": [], "tail": []} for name in ("optimizer", "sampling")}
    for kept in parts.values():
        kept["attempts"].append({"environment": 0, "status": DONE, "ended": "done", "rows": 1, "seconds": 1.0})
    row = {"name": "SD 1.5, 512 px", "environment": 0, "gain": 1.5}
    rows = {name: {"environments": [HERE], "rows": [row]} for name in ("optimizer", "sampling")}
    state = {"rehearsal": False, "environments": [HERE], "calls": [], "parts": parts, "rows": rows}
    text = report.report(state, tmp_path)
    assert "This could not be written:\n\n```\nTraceback" in text
    assert "KeyError: 'microseconds'" in text
    assert "| SD 1.5, 512 px |  |  |  |  | 1.5 |" in text
    assert "- kernels: 200 s by estimate" in text


def test_the_tests_of_a_machine_are_counted_and_one_that_kills_is_named(tmp_path, capfd):
    suite = tmp_path / "test_three.py"
    suite.write_text("def test_well(): pass\n\ndef test_wrong():\n    one = 1\n    assert one == 2\n")
    row = Rows(None, "What?").measure("three", 1, lambda: gpu_tests.run_suite([str(suite)]))
    assert row["failed"] == "1 of 2 tests fail", "so that another commit measures it again"
    assert (row["passed"], row["skipped"], row["wrong"]) == (1, 0, 1)
    assert "test_wrong: assert 1 == 2\n" in gpu_tests.table([row])
    assert "assert one == 2" in gpu_tests.table([row])
    assert "test_three.py::test_well PASSED" in capfd.readouterr().out
    suite.write_text("import os\n\ndef test_well(): pass\n\ndef test_kills():\n    os.abort()\n")
    with pytest.raises(RuntimeError, match="pytest ended with -6, in or after .*test_three.py::test_kills"):
        gpu_tests.run_suite([str(suite)])


class Forked:
    """A part's process, forked from one that has imported what they all import; imports would take most of the rehearsal."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["benchmarks.campaign.report", "benchmarks.runs.recipe", "benchmarks.tools.small_runs", "benchmarks.runs.sampling"]
    )

    def __init__(self, part: Part, arguments: list[str], log: Path, variables: dict[str, str]) -> None:
        self.process = self.context.Process(target=run_forked, args=((*part.python, *arguments), log, variables))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        self.process.join(0)
        return self.process.exitcode


def run_forked(command: tuple[str, ...], log: Path, variables: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    kind, what, *sys.argv[1:] = command
    sys.argv[0] = what
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """What a rehearsal brings home."""
    directory = tmp_path_factory.mktemp("campaign")
    output = directory / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "start", Forked)
        patch.setattr(command, "environment_of", lambda variables: environment.environment())
        patch.setattr(command, "write_report", write_here)
        patch.setattr(command, "rehearsal", lambda: [part for part in plan.rehearsal() if part not in PROVOKED[:2]])
        arguments = ["--rehearse", "--minutes", "20", "--output", str(output), "--scratch", str(directory / "scratch")]
        patch.setattr(sys, "argv", ["campaign", *arguments])
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        try:
            assert command.main() == 0
        finally:
            signal.signal(signal.SIGTERM, handlers[0])
            signal.signal(signal.SIGINT, handlers[1])
    return output


def write_here(output: Path, variables: dict[str, str]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", str(output)])
        return report.main() == 0


def test_the_rehearsal_runs_every_part(rehearsed):
    state = json.loads((rehearsed / "campaign.json").read_text())
    parts, rows = state["parts"], {name: kept["rows"] for name, kept in state["rows"].items()}
    assert parts.keys() == {part.name for part in plan.rehearsal()} - {part.name for part in PROVOKED[:2]}
    broken = {name: kept["tail"] for name, kept in parts.items() if kept["status"] != DONE}
    assert broken.keys() == {part.name for part in PROVOKED[2:]}, broken
    assert not [row for kept in rows.values() for row in kept if "failed" in row]
    assert rows.keys() == {part.benchmark for part in plan.PLAN}
    assert all(
        attempt["rows"] > 0 for part in plan.PLAN for attempt in parts[part.name]["attempts"] if part.name != "curves in fp8"
    )


def test_a_rehearsal_brings_home_few_small_files_with_every_table_and_chart(rehearsed):
    files = {path.name: path for path in rehearsed.rglob("*")}
    charts = {name for name in files if name.endswith(".png")}
    assert charts == {"waterfall.png", "roofline.png", "kernels.png", "curves.png", "profile.png"}
    assert files.keys() == {"campaign.md", "campaign.json", *charts}
    assert sum(path.stat().st_size for path in files.values()) < 2**20
    text = files["campaign.md"].read_text()
    assert "no number here says\nanything about a GPU" in text
    assert "could not be written" not in text
    for part in plan.rehearsal()[:2] + plan.rehearsal()[6:]:
        assert f"\n- {part.name}: `python -m benchmarks.{part.benchmark} " in text
    for name in charts:
        assert f"({name})" in text
        assert np.asarray(Image.open(files[name]).convert("L")).std() > 5
    assert "| MLPerf Training 4.0, Stable Diffusion | H100 | 126 |" in text
    assert "| CUDA graphs | compiled and captured / compiled |" in text
    assert "torch.OutOfMemoryError: CUDA out of memory" in text


def test_a_report_does_not_say_where_a_machine_keeps_things(tmp_path):
    log = tmp_path / "scratch" / "logs" / "part.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"$ {sys.executable} -m part --json {tmp_path}/scratch/rows/part.json\nFile {Path.cwd()}/engine/run.py\n")
    assert processes.last_lines(log) == ["$ python -m part --json SCRATCH/rows/part.json", "File ./engine/run.py"]
