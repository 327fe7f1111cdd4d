"""Jobs under SLURM, which `python -m benchmarks.runs.slurm` runs where its packages are; here, what it says without them."""

import pytest

from benchmarks.runs import slurm
from benchmarks.runs.slurm import ENDS, EVENTS, table


@pytest.mark.parametrize(("absent", "user", "needs"), [("slurmd", 0, "apt-get install slurmd"), ("", 1000, "root")])
def test_what_is_missing_is_said_in_a_line(absent, user, needs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["slurm"])
    monkeypatch.setattr(slurm.shutil, "which", lambda command: None if command == absent else command)
    monkeypatch.setattr(slurm.os, "geteuid", lambda: user)
    assert slurm.main() == 2
    said = capsys.readouterr().err
    assert needs in said
    assert said.count("\n") == 1


def test_the_tables_have_a_row_for_every_event_and_job():
    event = {"event": "it", "newest_before": 10, "continued_from": 13, "restarts": 1, "nodes": 2}
    end = {"what": "scancel", "state": "CANCELLED", "exit_code": "0:15", "restarts": 0, "last_line": "9: COMPLETING: its own"}
    lines = table({"events": [event], "ends": [end]}).splitlines()
    assert "| it | 10 | 13 | 1 | 2 |" in lines
    assert "| scancel | CANCELLED | 0:15 | 0 | COMPLETING: its own |" in lines
    assert all(one.__doc__ for one in EVENTS + ENDS)
