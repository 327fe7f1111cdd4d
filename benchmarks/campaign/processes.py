"""The processes of a campaign: of its parts, of what asks torch where it runs, and of the report."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.campaign.plan import Part
from engine.errors import UserError

REPORT_SECONDS = 30  # left at the end for campaign.md and its charts
TAIL = 30  # lines of a part's output that are kept


def environment_of(python: dict[str, str]) -> dict[str, Any]:
    """What `benchmarks.tools.environment` says, from a process of its own: this one must not hold memory of the GPU."""
    code = "import json; from benchmarks.tools.environment import environment; print(json.dumps(environment()))"
    answer = subprocess.run([sys.executable, "-c", code], env=python, capture_output=True, text=True, timeout=180, check=False)
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise UserError(f"torch cannot say where it runs: {last}; mend the installation and start again")
    return json.loads(answer.stdout.splitlines()[-1])


def memory_of_card() -> float:
    """GiB; of the smallest card that the plan is for, where nobody says how many there are."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return min(float(line) / 1024 for line in answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return 79.0


def process_environment(scratch: Path, rehearses: bool) -> dict[str, str]:
    """Variables of the parts' processes: where compiled code is kept, no network, and traces of what crashes."""
    cache = scratch.absolute() / "cache"
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"), "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    return {**os.environ, **variables, **({"CUDA_VISIBLE_DEVICES": ""} if rehearses else {})}


def start(part: Part, arguments: list[str], log: Path, variables: dict[str, str]) -> Any:
    """A part's process, the first of a group of its own; of this session, so that what ends the session ends it too."""
    with log.open("ab") as output:
        command = [sys.executable, *part.python, *arguments]
        output.write(f"\n$ {shlex.join(command)}\n".encode())
        return subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=variables, process_group=0)


def write_report(output: Path, variables: dict[str, str]) -> bool:
    """Whether campaign.md could be written; in a process of its own, because what it imports takes memory and time."""
    command = [sys.executable, "-m", "benchmarks.campaign.report", str(output)]
    try:
        return subprocess.run(command, env=variables, process_group=0, check=False, timeout=2 * REPORT_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def kill(process: Any) -> None:
    """Ends a part's whole group; first Python prints where each thread of a process that still runs is."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGABRT)
        wait(process, 3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    wait(process, 30)


def wait(process: Any, seconds: float) -> None:
    ended = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < ended:
        time.sleep(0.05)


def last_lines(log: Path) -> list[str]:
    """The end of a log, without what progress bars overwrote."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 40_000))
        lines = file.read().decode(errors="replace").splitlines()
    shown = [line.rpartition("\r")[2] for line in lines if line.strip()][-TAIL:]
    # The report travels: where this machine keeps things is nobody's business.
    scratch = str(log.absolute().parent.parent)
    places = {sys.executable: "python", sys.prefix: "PREFIX", scratch: "SCRATCH", str(Path.cwd()): "."}
    sites = {path: "SITE" for path in sys.path if Path(path).is_absolute() and path not in places}
    for place, name in (places | sites).items():
        shown = [line.replace(place, name) for line in shown]
    return [line[:400] for line in shown]
