"""Steps that hang and processes that die: an exit code of their own, and no trace."""

import signal
import sys
import time

import pytest

from tests.commands import run, start_two
from tests.loop.runs import command, config

WATCHER = """
import os, sys, time
import torch
from engine.loop.watchdog import Watchdog
from engine.processes import Processes

processes = Processes(device=torch.device("cpu")).connect()
watchdog = Watchdog(processes, timeout=2.0)
for step in range(1, 4):
    watchdog.finished(step)
    time.sleep(0.1)
with watchdog.paused():
    time.sleep(3)
if processes.rank == 0:
    watchdog.finished(4)
time.sleep(60)
"""


def test_the_process_that_is_behind_is_named():
    started = time.monotonic()
    both = start_two([sys.executable, "-c", WATCHER])
    assert [process.wait(60) for process in both] == [75, 75]
    errors = [process.errors for process in both]
    assert time.monotonic() - started > 3, "work that was paused for ran out of time"
    said = [line for error in errors for line in error.splitlines() if "no step has ended for 2 seconds" in line]
    assert any("behind are process 1 (step 3)" in line for line in said), errors


def test_a_run_that_hangs_is_given_up(model, images, shards, tmp_path):
    options = command(config(model, images, shards, tmp_path / "out", step_timeout=2.0, max_train_steps=100000))
    hang = (
        "import sys, time; from engine.loop.step import Step; run_step = Step.__call__\n"
        "def stuck(self, batches, number):\n"
        "    run_step(self, batches, number)\n"
        "    if number == 5: time.sleep(60)\n"
        "Step.__call__ = stuck\n"
        "from engine import run; sys.argv[0] = 'engine.run'; sys.exit(run.main())"
    )
    result = run([sys.executable, "-c", hang, *options[3:]])
    assert result.returncode == 75, result.errors
    assert "process 0: no step has ended for 2 seconds (--step_timeout); all are at step" in result.errors


@pytest.mark.two_processes
@pytest.mark.parametrize("stage", [1, 3])
def test_a_process_that_loses_another_says_so_without_a_trace(stage, model, images, shards, tmp_path):
    options = {"train_batch_size": 2, "max_train_steps": 100_000, "checkpointing_steps": 2, "zero_stage": stage}
    first, second = start_two(command(config(model, images, shards, tmp_path / "out", **options)))
    while not (tmp_path / "out" / "checkpoint-4").exists() and first.poll() is None:
        time.sleep(0.01)
    second.kill()
    assert first.wait(60) == 75, first.errors
    assert "engine.run: error: process 0: another process is gone" in first.errors
    assert "Traceback" not in first.errors
    assert second.wait() == -signal.SIGKILL
