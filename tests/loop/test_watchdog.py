"""A step that hangs ends the process with its own exit code, and the processes that are behind are named."""

import socket
import subprocess
import sys
import time

from tests.loop.runs import command, config, environment

WATCHER = """
import os, sys, time
from engine.loop.watchdog import Watchdog
from engine.processes import Processes

processes = Processes().connect()
watchdog = Watchdog(processes, timeout=2.0)
for step in range(1, 4):
    watchdog.step = step
    time.sleep(0.1)
with watchdog.paused():
    time.sleep(3)
if processes.rank == 0:
    watchdog.step = 4
time.sleep(60)
"""


def test_the_process_that_is_behind_is_named():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = time.monotonic()
    both = [
        subprocess.Popen([sys.executable, "-c", WATCHER], env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [75, 75]
    assert time.monotonic() - started > 3, "work that was paused for ran out of time"
    said = [line for error in errors for line in error.splitlines() if "no step has ended for 2 seconds" in line]
    assert any("behind are process 1 (step 3)" in line for line in said), errors


def test_a_run_that_hangs_is_given_up(model, images, shards, tmp_path):
    run = command(config(model, images, shards, tmp_path / "out", step_timeout=2.0, max_train_steps=100000))
    hang = (
        "import sys, time; from engine.loop import trainer; step = trainer.Training._train_step\n"
        "def stuck(self, *arguments):\n"
        "    step(self, *arguments)\n"
        "    if self.step == 5: time.sleep(60)\n"
        "trainer.Training._train_step = stuck\n"
        "from engine import run; sys.argv[0] = 'engine.run'; sys.exit(run.main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", hang, *run[3:]], capture_output=True, text=True, env=environment(), check=False
    )
    assert result.returncode == 75, result.stderr
    assert "process 0: no step has ended for 2 seconds (--step_timeout); all are at step" in result.stderr
