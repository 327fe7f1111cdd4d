"""Processes that build together: each shard is one process's at a time, and anyone's when that is gone."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from engine.data.claims import BUILDING, Claims
from engine.data.plan import BLOCK, RUN, Plan, planned
from engine.data.plan import known as runs_known
from engine.data.together import sweep_halves
from engine.files import lock
from engine.processes import Processes

HOLD = """
import sys, time
from pathlib import Path
from engine.data.claims import Claims
from engine.processes import Processes
claims = Claims(Path(sys.argv[1]), Processes())
assert claims.join()
with claims.shard(int(sys.argv[2])) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def plan_of(samples: int) -> Plan:
    stamps, counts = np.arange(samples, dtype=np.uint64), np.ones(samples, np.int64)
    return planned(runs_known(np.zeros(0, RUN), stamps, counts), np.zeros(0, BLOCK), 4)


@pytest.fixture
def claims(tmp_path):
    opened = Claims(tmp_path, Processes())
    assert opened.alone()
    opened.begin(plan_of(10))
    assert opened.join()
    yield opened
    os.close(opened.descriptor)


def test_a_claim_ends_with_the_process_that_holds_it(claims, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "1"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "True\n"
        assert not claims.alone(), "another process builds here"
        with claims.shard(1) as mine, claims.shard(0) as free:
            assert (mine, free) == (False, True)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with claims.shard(1) as mine:
        assert mine
    assert claims.alone()


def test_a_build_is_known_by_its_content_as_a_mount_may_number_files_as_it_likes(claims, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / BUILDING, tmp_path / "elsewhere")
    elsewhere = Claims(tmp_path / "elsewhere", Processes(), create=False)
    claims.advance(2, 1)
    assert elsewhere.token == claims.token != b""
    claims.begin(plan_of(10))
    assert elsewhere.token != claims.token
    elsewhere.leave()
    os.ftruncate(claims.descriptor, 0)
    assert claims.token == b""


PLAN = """
import sys
from pathlib import Path
from engine.data.claims import Claims
from engine.processes import Processes
claims = Claims(Path(sys.argv[1]), Processes())
print(claims.alone(), claims.join())
"""


def test_nobody_plans_while_another_process_begins(tmp_path):
    claims = Claims(tmp_path, Processes())
    assert claims.alone()
    claims.begin(plan_of(10))
    other = subprocess.run([sys.executable, "-c", PLAN, str(tmp_path)], capture_output=True, text=True, check=True)
    assert other.stdout == "False False\n"
    os.close(claims.descriptor)


def test_who_asked_to_be_alone_in_vain_still_holds_the_directory(tmp_path):
    mine, other = lock(tmp_path, shared=True), lock(tmp_path, shared=True)
    sweep_halves(tmp_path, mine)
    os.close(other)
    assert lock(tmp_path) is None
    os.close(mine)


def test_what_is_complete_is_known_until_its_samples_change(claims):
    plan = plan_of(10)
    numbers, _ = plan.samples(plan.blocks[1])
    entry = (1, 4, 4, 4, 1000, 1, 1, 4, 4, np.zeros(32, np.uint8), np.zeros(32, np.uint8))
    claims.advance(0, 3)
    assert claims.entry(1, plan.blocks[1], numbers) is None
    claims.complete(1, numbers, entry)
    assert claims.done() == 7
    assert claims.entry(1, plan.blocks[1], numbers)["bytes"] == 1000
    assert claims.entry(1, plan.blocks[1], numbers[1:]) is None
    assert claims.entry(0, plan.blocks[0], numbers) is None
    claims.begin(plan_of(30))
    assert claims.entry(1, plan.blocks[1], numbers)["bytes"] == 1000, "more samples do not change it"
    assert claims.done() == 4


@pytest.mark.parametrize("cut", [1, 100])
def test_half_a_slot_is_no_complete_shard(cut, claims, tmp_path):
    plan = plan_of(10)
    numbers, _ = plan.samples(plan.blocks[2])
    claims.complete(2, numbers, (2, 2, 2, 2, 1000, 1, 1, 8, 2, np.zeros(32, np.uint8), np.zeros(32, np.uint8)))
    os.truncate(tmp_path / BUILDING, (tmp_path / BUILDING).stat().st_size - 16 - cut)
    assert claims.entry(2, plan.blocks[2], numbers) is None


def test_where_there_are_no_locks_everyone_may_do_everything(claims, monkeypatch):
    def fails(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.fcntl", fails)
    assert claims.alone()
    with claims.shard(0) as mine, claims.index():
        assert mine


def test_a_file_that_was_removed_is_not_claimed(tmp_path):
    claims = Claims(tmp_path, Processes())
    (tmp_path / BUILDING).unlink()
    assert not claims.is_there()
    claims.leave()
    started = time.monotonic()
    Claims(tmp_path, Processes()).leave()
    assert not (tmp_path / BUILDING).exists(), "nothing was begun"
    assert time.monotonic() - started < 1
