"""The memory of whole runs: by phase where they are run, computed where they do not fit."""

import json
import sys
from functools import partial

from benchmarks.runs import full_size
from tests import in_process

# Leaves the files of a run, one phase after another.
RUN = """
import json, pathlib, sys, time
output = pathlib.Path(sys.argv[1])
time.sleep(0.2)
(output / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\\n")
time.sleep(0.2)
held = bytearray(1 << 28)
time.sleep(0.1)
(output / "pipeline.partial").mkdir()
time.sleep(0.2)
"""


def test_the_memory_of_a_process_is_measured_by_phase(tmp_path):
    phases = full_size.watch([sys.executable, "-c", RUN, str(tmp_path)], partial(full_size.phase, tmp_path, "load", None))
    assert list(phases) == ["load", "step", "export"]
    assert all(0 < phase["anonymous_gib"] <= phase["peak_gib"] for phase in phases.values())
    assert phases["load"]["peak_gib"] < 2**-2 < phases["step"]["peak_gib"]


def test_the_full_size_run_is_measured_by_phase(monkeypatch, tmp_path, capsys):
    """The commands, with their memory as read from this process at their end."""

    def watch(command, phase):
        first = phase()
        ended = in_process.run(command)
        assert ended.returncode == 0, ended.stderr
        return {first: {"seconds": 1.0, "peak_gib": 2.0, "anonymous_gib": 1.0}}

    monkeypatch.setattr(full_size, "watch", watch)
    monkeypatch.setattr(full_size, "apart", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(sys, "argv", ["full_size", "--tiny", "--family", "sd", "--json", str(tmp_path / "rows.json")])
    assert full_size.main() == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert list(row["phases"]) == ["load", "resume", "export command"]
    assert row["peak_gib"] == 2.0
    assert "| sd | export command |" in capsys.readouterr().out


def test_what_does_not_fit_is_computed(monkeypatch):
    monkeypatch.setattr(full_size, "available_bytes", lambda: 2**30)
    row = full_size.run_or_compute("sd", False, False, None)
    assert row["computed_gib"] * 2**30 == 22 * row["parameters"] + full_size.BESIDE
    assert "not run: needs 19.1 GiB (computed), 1.0 available" in full_size.table([row | {"name": "sd"}])
