"""How long does a launcher leave its processes after a signal? `python -m benchmarks.runs.launchers [--json FILE]`

Two processes that do nothing but wait are started by each launcher, and signalled: the launcher alone, as `kill` does, or all
that it started too, as SLURM does. Processes that never leave show how long they are left, and processes that leave with exit
code 0 after two seconds, as a run does that has saved its checkpoint, what the launcher makes of that.
"""

import argparse
import base64
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmarks.tools.rows import write_result

TIMEOUT = 45  # seconds, as TORCH_ELASTIC_SHUTDOWN_TIMEOUT
LONGEST = 80.0  # seconds that are waited for the end of what never leaves
SAVING = 2.0  # seconds that what leaves needs for it
ELASTIC = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
ONE_NODE = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()
LAUNCHERS = {
    "torchrun": ELASTIC,
    f"torchrun, TORCH_ELASTIC_SHUTDOWN_TIMEOUT={TIMEOUT}": ELASTIC,
    "what deepspeed runs on each node": ["deepspeed.launcher.launch", f"--world_info={ONE_NODE}", "--no_local_rank"],
    "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank"],
}
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
# Notes every tenth of a second for how long it has lived since the first signal.
PROCESS = """
import os, signal, sys, time
began = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: began.append(time.monotonic()))
note, stays = os.path.join(sys.argv[1], os.environ["RANK"]), float(sys.argv[2])
open(note, "w").close()
while not began or time.monotonic() < began[0] + stays:
    time.sleep(0.1)
    if began:
        with open(note + ".new", "w") as file:  # which may be killed while it writes
            file.write(f"{time.monotonic() - began[0]:.1f}")
        os.replace(note + ".new", note)
"""


def signalled(launcher: str, name: str, whom: str, stays: float) -> dict[str, Any]:
    """What becomes of two processes, of which each leaves `stays` seconds after the first signal that it gets.

    Returns:
        `exit_code` of the launcher; None where it does not end. `lived`: seconds that the processes lived after the signal.
    """
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "process.py"
        script.write_text(PROCESS)
        notes = [Path(directory) / rank for rank in "01"]
        variables = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(TIMEOUT)} if "=" in launcher else {}
        running = psutil.Popen(
            [sys.executable, "-m", *LAUNCHERS[launcher], str(script), directory, str(stays)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not all(note.exists() for note in notes):
            if running.poll() is not None:
                raise RuntimeError(f"{launcher} ended with exit code {running.returncode}")
            time.sleep(0.1)
        family = [running, *running.children(recursive=True)]
        for process in family if whom == "all" else family[:1]:
            process.send_signal(signal.Signals[name])
        psutil.wait_procs(family, timeout=LONGEST)
        code = running.poll()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running.wait()
        return {"exit_code": code, "lived": [float(note.read_text() or 0) for note in notes]}


def measured(case: tuple[str, str, str]) -> dict[str, Any]:
    """The row of a launcher, a signal, and who gets it."""
    launcher, name, whom = case
    stubborn, leaving = signalled(*case, LONGEST * 2), signalled(*case, SAVING)
    return {
        "launcher": launcher, "signal": name, "to": whom, "lived": stubborn["lived"],
        "exit_code_when_killed": stubborn["exit_code"], "exit_code_when_left": leaving["exit_code"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, of SIGTERM; SIGINT is answered alike, and SIGUSR1 passed on by none."""
    lines = [
        "| launcher | signal | to | seconds left to each process | exit code after they left with 0 |",
        "|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["signal"] == "SIGTERM"):
        left = ", ".join(
            "not told" if not seconds else "no limit" if seconds > LONGEST - 5 else f"{seconds:.0f}" for seconds in row["lived"]
        )
        lines.append(f"| {row['launcher']} | {row['signal']} | {row['to']} | {left} | {row['exit_code_when_left']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.launchers", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    cases = [(launcher, name, whom) for launcher in LAUNCHERS for name in SIGNALS for whom in ("launcher", "all")]
    with ThreadPoolExecutor(6) as pool:  # they wait, most of the time
        rows = list(pool.map(measured, cases))
    print(table(rows))
    write_result(options.json, __doc__, launchers=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
