"""The rehearsal of a campaign: every question is asked on the smallest models, and the report shows all that came of it."""

import json
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import sample
from benchmarks.campaign import __main__ as command
from benchmarks.campaign import campaign, gpu_tests, plan, report
from benchmarks.campaign.campaign import DONE
from benchmarks.campaign.plan import PROVOKED, Part
from benchmarks.data import loader
from benchmarks.runs import recipe
from benchmarks.steps import compilation, step
from benchmarks.tools import timing
from benchmarks.tools.environment import environment
from tests import in_process

HERE = {"commit": "one", "device": "CPU"}
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a rehearsal stays on the CPU, and here it is in this process"
)


class Here:
    """A part's process that is none: the part has run to its end in this one."""

    def __init__(self, part: Part, arguments: list[str], log: Path, variables: dict[str, str]) -> None:
        result = in_process.run([sys.executable, *part.python, *arguments])
        log.write_text(result.stdout + result.stderr)
        self.code = result.returncode

    def poll(self) -> int:
        return self.code


def write_here(output: Path, variables: dict[str, str]) -> bool:
    return in_process.run([sys.executable, "-m", "benchmarks.campaign.report", str(output)]).returncode == 0


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """What a rehearsal brings home; without the parts that crash and hang, and with the shortest of windows."""
    directory = tmp_path_factory.mktemp("campaign")
    output = directory / "out"
    outcome = {"passed": 10, "skipped": 0, "wrong": 0, "failures": []}
    arguments = ["--rehearse", "--minutes", "20", "--output", str(output), "--scratch", str(directory / "scratch")]
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(campaign, "start", Here)
        patch.setattr(campaign, "kill", lambda process: None)
        patch.setattr(command, "environment_of", lambda variables: environment())
        patch.setattr(command, "write_report", write_here)
        patch.setattr(command, "rehearsal", lambda: [part for part in plan.rehearsal() if part not in PROVOKED[:2]])
        patch.setattr(gpu_tests, "run_suite", lambda arguments: outcome)
        patch.setattr(recipe, "WARM_UP", 1)
        patch.setattr(recipe, "subprocess", SimpleNamespace(run=in_process.run))
        patch.setattr(sample, "TURNS", 1)
        patch.setattr(compilation, "subprocess", SimpleNamespace(run=in_process.run, TimeoutExpired=TimeoutError))
        for module, windows in ((step, 2), (loader, 1)):
            patch.setattr(module, "WINDOWS", windows)
        patch.setattr(loader, "WINDOW_SECONDS", 0.05)
        patch.setattr(timing, "REPEATS", 2)
        patch.setattr(sys, "argv", ["campaign", *arguments])
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        try:
            assert command.main() == 0
        finally:
            signal.signal(signal.SIGTERM, handlers[0])
            signal.signal(signal.SIGINT, handlers[1])
    return output


def test_the_rehearsal_runs_every_part(rehearsed):
    state = json.loads((rehearsed / "campaign.json").read_text())
    parts, rows = state["parts"], {name: kept["rows"] for name, kept in state["rows"].items()}
    assert parts.keys() == {part.name for part in plan.rehearsal()} - {part.name for part in PROVOKED[:2]}
    broken = {name: kept["tail"] for name, kept in parts.items() if kept["status"] != DONE}
    assert broken.keys() == {part.name for part in PROVOKED[2:]}, broken
    assert not [row for kept in rows.values() for row in kept if "failed" in row]
    assert rows.keys() == {part.key for part in plan.PLAN}
    assert all(attempt["rows"] > 0 for part in plan.PLAN for attempt in parts[part.name]["attempts"])


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
        assert f"\n- {part.name}: `python {shlex.join(part.tiny)}`" in text
    for name in charts:
        assert f"({name})" in text
        assert np.asarray(Image.open(files[name]).convert("L")).std() > 5
    assert "| MLPerf Training 4.0, Stable Diffusion | H100 | 126 |" in text
    assert "| CUDA graphs, with cuDNN's search and stacked projections | captured / engine |" in text
    assert "| model | device | aim, samples/s | fastest |" in text
    assert "torch.OutOfMemoryError: CUDA out of memory" in text


def test_a_table_that_fails_costs_only_itself(tmp_path):
    parts = {name: {"status": DONE, "attempts": [], "failed": [], "tail": []} for name in ("optimizer", "sampling")}
    for kept in parts.values():
        kept["attempts"].append({"environment": 0, "status": DONE, "ended": "done", "rows": 1, "seconds": 1.0})
    row = {"name": "SD 1.5, 512 px", "environment": 0, "gain": {"engine": 1.5}}
    rows = {name: {"environments": [HERE], "rows": [row]} for name in ("optimizer", "sample")}
    state = {"rehearsal": False, "environments": [HERE], "calls": [], "parts": parts, "rows": rows}
    text = report.report(state, tmp_path)
    assert "This could not be written:\n\n```\nTraceback" in text
    assert "KeyError: 'microseconds'" in text
    assert "| SD 1.5, 512 px |  |  |  |  |  |  | 1.5 |  |" in text
    assert "- kernels: 225 s by estimate" in text
