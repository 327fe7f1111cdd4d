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
from engine import liveness
from engine.loop.watchdog import Watchdog
from engine.processes import Processes

liveness.LAST_LOOK = 1.0
processes = Processes(device=torch.device("cpu")).connect()
first = processes.rank == 0
"""
BEHIND = """
watchdog = Watchdog(processes, 5.0, 1.0)
for step in range(1, 4):
    watchdog.finished(step)
    time.sleep(0.1)
with watchdog.paused(5.0):
    time.sleep(1.5)
if first:
    watchdog.finished(4)
time.sleep(60)
"""


def test_the_process_that_is_behind_is_named_once_a_node():
    started = time.monotonic()
    both = start_two([sys.executable, "-c", WATCHER + BEHIND])
    assert [process.wait(60) for process in both] == [75, 75]
    said = "".join(process.errors for process in both)
    assert time.monotonic() - started > 2.5, "work that was paused for ran out of time"
    assert said.count("\n") == 1, said
    assert "no step has ended for 1 seconds (--step_timeout); behind is process 1 (step 3 of 4). Leaving with" in said


@pytest.mark.parametrize(
    ("blocked", "said"),
    [
        ("time.sleep(60)", "the first step has not ended for 1 seconds (--first_step_timeout); all are at step 0"),
        (
            "watchdog.finished(1)\nwith watchdog.paused(0.5): time.sleep(60)",
            "what is done between two steps has not ended for 0.5",
        ),
        ("watchdog.finished(1)\ntime.sleep(1.5)\nsys.exit()", None),
    ],
    ids=["first", "paused", "later"],
)
def test_each_kind_of_work_has_its_limit(blocked, said):
    both = start_two([sys.executable, "-c", f"{WATCHER}\nwatchdog = Watchdog(processes, 1.0, None)\n{blocked}"])
    assert [process.wait(60) for process in both] == ([75, 75] if said else [0, 0])
    assert (said or "") in "".join(process.errors for process in both)


DEAD_STORE = """
processes._closed.set()  # the signs of life notice it as well
watchdog = Watchdog(processes, 1.0, None)
print("here", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "frozen"])
def test_a_step_is_given_up_without_the_store(number):
    both = start_two([sys.executable, "-c", WATCHER + DEAD_STORE])
    while not all(process.output for process in both):
        time.sleep(0.01)
    both[0].send_signal(number)
    assert both[1].wait(20) == 75
    if both[0].poll() is None:
        both[0].kill()
    assert "(--first_step_timeout); the store of the processes" in both[1].errors
    assert both[1].errors.count("\n") == 1, both[1].errors


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
    assert "process 0: no step has ended for 2 seconds (--step_timeout); it is at step" in result.errors


@pytest.mark.two_processes
@pytest.mark.parametrize(("stage", "killed"), [(1, 1), (3, 0)])
def test_a_process_that_loses_another_says_so_without_a_trace(stage, killed, model, images, shards, tmp_path):
    """The first process keeps the store, so that its loss is that of the store too."""
    options = {"train_batch_size": 2, "max_train_steps": 100_000, "checkpointing_steps": 2, "zero_stage": stage}
    both = start_two(command(config(model, images, shards, tmp_path / "out", **options)))
    while not (tmp_path / "out" / "checkpoint-4").exists() and both[0].poll() is None:
        time.sleep(0.01)
    other = both[1 - killed]
    both[killed].kill()
    assert other.wait(60) == 75, other.errors
    assert f"engine.run: error: process {1 - killed}: another process is gone" in other.errors
    assert "Traceback" not in other.errors
    assert both[killed].wait() == -signal.SIGKILL
