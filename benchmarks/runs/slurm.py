"""What becomes of a job under SLURM? `python -m benchmarks.runs.slurm [--results DIR]`

A SLURM of two nodes runs on this machine: the slurmctld and slurmd of Debian's packages, in namespaces of their own, each node
with a name, an address and two files that stand for GPUs. It runs examples/slurm/*.sbatch as they are, with a tiny model on the
CPU: two nodes of two processes. One job is disturbed in every way that it should survive, one after the other, and continues by
itself each time; others end for good. What SLURM and the jobs' logs say of each is kept, and the logs.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch

from benchmarks.tools.place import Place, weights
from benchmarks.tools.rows import write_result
from engine.files import write_text
from engine.quiet import quiet_libraries

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "unshare": "util-linux", "ip": "iproute2"}
NAMESPACES = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
ADDRESSES = {"head": "10.0.0.1", "n1": "10.0.0.2", "n2": "10.0.0.3"}
STEPS, EVERY = 240, 10
TRAINING = "-u -m engine.run"  # in the command of a process that trains, and not in that of its launcher
GOES_ON = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED", "REQUEUE_HOLD")
PATIENCE = 900.0  # seconds for a job to come to where it is waited for

CONFIGURATION = """
ClusterName=here
SlurmctldHost=head
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdTimeout=20
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
NodeName=n1 NodeAddr=10.0.0.2 NodeHostname=n1 Port=7001 CPUs=2 Gres=gpu:2
NodeName=n2 NodeAddr=10.0.0.3 NodeHostname=n2 Port=7002 CPUs=2 Gres=gpu:2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1
PartitionName=graceful Nodes=n1,n2 PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


RECIPE = f"""family = "sd"
pretrained_model_name_or_path = "{{model}}"
train_data_dir = "{{images}}"
resolution = 16
center_crop = true
shard_records = 4
train_batch_size = 2
global_batch_size = 8
max_train_steps = {STEPS}
checkpointing_steps = {EVERY}
log_every = {EVERY}
seed = 1
use_ema = true
report_to = "none"
"""


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Until the condition holds.

    Raises:
        TimeoutError: it does not for `PATIENCE` seconds.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {PATIENCE:g} seconds")
        time.sleep(0.2)


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Cluster:
    """A controller and two nodes; to be used within namespaces of their own, whose end ends them.

    Args:
        root: a directory for what they keep.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for command in (("link", "set", "lo", "up"), *(("addr", "add", f"{at}/24", "dev", "lo") for at in ADDRESSES.values())):
            subprocess.run(["ip", *command], check=True)
        (root / "hosts").write_text("".join(f"{at} {name}\n" for name, at in {"localhost": "127.0.0.1", **ADDRESSES}.items()))
        subprocess.run(["mount", "--bind", str(root / "hosts"), "/etc/hosts"], check=True)
        subprocess.run(["hostname", "head"], check=True)
        (root / "slurm.conf").write_text(CONFIGURATION.format(root=root))
        for number in range(2):
            (root / f"gpu{number}").touch()
        (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-1]\n")
        (root / "state").mkdir()
        os.environ["SLURM_CONF"] = str(root / "slurm.conf")
        self._start("slurmctld", "slurmctld", "-D")
        self.nodes = {name: self.start_node(name) for name in ("n1", "n2")}
        wait_until(lambda: self._idle() == 2, "the nodes")

    def _start(self, name: str, *command: str) -> int:
        with (self.root / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log).pid

    def _idle(self) -> int:
        shown = subprocess.run(["sinfo", "-h", "-p", "low", "-N", "-o", "%T"], capture_output=True, text=True, check=False)
        return shown.stdout.split().count("idle")

    def start_node(self, name: str) -> int:
        return self._start(name, "unshare", "--uts", "sh", "-c", f"hostname {name}; exec slurmd -D -N {name}")

    def processes(self, node: str, command: str = "") -> list[int]:
        """Those of a node, which share its name, with a text in their command."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                of_the_node = (process / "ns/uts").readlink() == Path(f"/proc/{self.nodes[node]}/ns/uts").readlink()
                if of_the_node and command in line:
                    found.append(int(process.name))
        return found

    def kill_node(self, name: str) -> None:
        """Ends everything on a node at once, as a loss of power does."""
        for process in self.processes(name):
            os.kill(process, signal.SIGKILL)

    def revive(self) -> None:
        """Starts nodes again that were killed, and waits until both are free."""
        for name, process in self.nodes.items():
            if not Path(f"/proc/{process}/exe").exists():
                self.nodes[name] = self.start_node(name)
        wait_until(lambda: self._idle() == 2, "two free nodes")


class Job:
    """A training that is submitted as a user would, with what the example needs to be told of so small a cluster."""

    def __init__(self, place: Place, name: str, *options: str, engine: tuple[str, ...] = (), **variables: str) -> None:
        self.name, self.output, self.log = name, place.root / name, place.root / f"{name}.log"
        environment = {"OUTPUT_DIR": str(self.output), "SHARDS_DIR": str(place.root / "shards"), "OMP_NUM_THREADS": "1"}
        self.number = subprocess.run(
            ["sbatch", "--parsable", "--nodes=1-2", "--gpus-per-node=2", "--cpus-per-task=2", f"--output={self.log}",
             *options, "examples/slurm/train.sbatch", str(place.root / "recipe.toml"), *engine],
            env=os.environ | environment | variables, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    def shown(self) -> dict[str, str]:
        words = said("scontrol", "show", "job", "--oneliner", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self) -> str:
        """What SLURM calls it; what it queued again starts now, and not in two minutes."""
        shown = self.shown()
        if shown["Reason"] == "BeginTime":
            said("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        return shown["JobState"]

    def has_ended(self) -> bool:
        """Whether it is over; what is queued again is so for a moment, too."""
        if self.state() in GOES_ON:
            return False
        time.sleep(5)
        return self.state() not in GOES_ON

    def newest(self) -> int:
        """The step of its newest checkpoint."""
        latest = self.output / "latest"
        return int(latest.read_text().strip().removeprefix("checkpoint-")) if latest.exists() else 0

    def continued_from(self) -> list[int]:
        """The steps from which it went on."""
        text = self.log.read_text() if self.log.exists() else ""
        return [int(step) for step in re.findall(r"Continuing from \S*/checkpoint-(\d+)", text)]

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """As `wait_until`; a job that ends before is an error."""
        wait_until(lambda: condition() or self.has_ended(), f"{self.name}: {what}")
        if not condition():
            raise RuntimeError(f"{self.name} ended before {what}: {self.log.read_text()[-2000:]}")

    def report(self) -> dict[str, Any]:
        """How it ended."""
        wait_until(self.has_ended, f"the end of {self.name}")
        shown, lines = self.shown(), self.log.read_text().splitlines()
        return {
            "job": self.name, "state": shown["JobState"], "exit_code": shown["ExitCode"], "restarts": int(shown["Restarts"]),
            "last_line": next(line for line in reversed(lines) if line.startswith(f"{self.number}: ")),
        }  # fmt: skip


# What a job survives: each disturbs it while it trains.


def over_time(cluster: Cluster, job: Job) -> None:
    """its time is nearly over: `--signal=TERM@120`, two minutes before"""
    trained = cluster.processes("n1", TRAINING)
    for process in trained:  # so that it does not end before
        os.kill(process, signal.SIGSTOP)
    hours, minutes, seconds = map(int, job.shown()["RunTime"].split(":"))
    said("scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * hours + minutes + 2}")
    time.sleep(60 - seconds + 35)  # SLURM looks every 30 seconds
    for process in trained:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
    wait_until(lambda: job.state() == "PENDING", "the requeue")
    said("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")


def preempted(cluster: Cluster, job: Job) -> None:
    """preempted, without GraceTime"""
    said("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: job.shown()["JobState"] == "PENDING", "the requeue")
    said("scontrol", "update", f"JobId={job.number}", "Partition=graceful")


def preempted_gracefully(cluster: Cluster, job: Job) -> None:
    """preempted, with GraceTime=120"""
    said("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def process_lost(cluster: Cluster, job: Job) -> None:
    """SIGKILL to a process of the second node"""
    os.kill(cluster.processes("n2", TRAINING)[-1], signal.SIGKILL)


def damaged(cluster: Cluster, job: Job) -> None:
    """scontrol requeue, and the newest checkpoint is cut short meanwhile"""
    said("scontrol", "requeuehold", job.number)
    wait_until(lambda: job.shown()["JobState"] not in ("RUNNING", "COMPLETING"), "the stop")
    for file in (job.output / f"checkpoint-{job.newest()}").glob("rank-*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    said("scontrol", "release", job.number)


def node_lost(cluster: Cluster, job: Job) -> None:
    """SIGKILL to everything on the second node; the other goes on alone"""
    cluster.kill_node("n2")


EVENTS = (over_time, preempted, preempted_gracefully, process_lost, damaged, node_lost)


def meet(event: Callable[[Cluster, Job], None], cluster: Cluster, job: Job) -> dict[str, Any]:
    """Disturbs a job once it has a checkpoint that is newer than the one it went on from; from which it goes on then."""
    before = job.continued_from()
    job.wait_until(lambda: job.newest() > max(before, default=0), "the next checkpoint")
    newest, started = job.newest(), time.monotonic()
    event(cluster, job)
    job.wait_until(lambda: len(job.continued_from()) > len(before), f"going on after {event.__name__}")
    shown = job.shown()
    row = {
        "event": event.__doc__, "newest_before": newest, "continued_from": job.continued_from()[-1],
        "nodes": int(shown["NumNodes"].split("-")[0]), "restarts": int(shown["Restarts"]),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    print(row, flush=True)
    return row


# What ends a job for good.


def cancelled(cluster: Cluster, place: Place) -> Job:
    """scancel"""
    job = Job(place, "cancelled")
    job.wait_until(lambda: job.newest() > 0, "the first checkpoint")
    said("scancel", job.number)
    return job


def bad_option(cluster: Cluster, place: Place) -> Job:
    """an option that the engine lacks"""
    return Job(place, "bad_option", engine=("--no_such_option", "1"))


def no_model(cluster: Cluster, place: Place) -> Job:
    """a model that is not there"""
    return Job(place, "no_model", engine=("--pretrained_model_name_or_path", "/nowhere"))


def no_shards(cluster: Cluster, place: Place) -> Job:
    """no shards"""
    return Job(place, "no_shards", SHARDS_DIR=str(place.root / "nowhere"))


def fruitless(cluster: Cluster, place: Place) -> Job:
    """torchrun is killed at every start; MAX_FRUITLESS=2"""
    job = Job(place, "fruitless", MAX_FRUITLESS="2")

    def killed_until_it_ends() -> bool:
        for process in cluster.processes("n1", "torchrun"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return job.has_ended()

    wait_until(killed_until_it_ends, "the end")
    return job


ENDS = (no_shards, bad_option, no_model, fruitless, cancelled)


def build_shards(place: Place) -> None:
    """Writes the recipe and builds its shards with the example's other script."""
    (place.root / "recipe.toml").write_text(RECIPE.format(model=place.model, images=place.images))
    said(
        "sbatch", "--wait", "--parsable", "--array=0-1", "--gpus-per-node=2", "--cpus-per-task=2",
        f"--output={place.root}/shards-%a.log", f"--export=ALL,SHARDS_DIR={place.root}/shards,OMP_NUM_THREADS=1",
        "examples/slurm/shards.sbatch", str(place.root / "recipe.toml"),
    )  # fmt: skip


def distance(output: Path, whole: Path) -> float:
    """How far the weights that a job exported are from those of another, relative to their size."""
    ours, theirs = weights(output), weights(whole)
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return (apart / sum(float(theirs[name].double().square().sum()) for name in theirs)) ** 0.5


def anywhere(text: str, root: Path) -> str:
    """A text without the paths of this machine."""
    python = (Path(prefix) for prefix in (sys.prefix, sys.base_prefix))
    for path in (*(form for prefix in python for form in (prefix.resolve(), prefix)), Path.cwd(), root):
        text = text.replace(f"{path}/", "")
    return text


def jobs(results: Path | None) -> dict[str, Any]:
    """Runs all jobs on a cluster of their own; what became of them."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        place, cluster = Place(root), Cluster(root)

        def kept(name: str) -> None:
            if results:
                results.mkdir(parents=True, exist_ok=True)
                write_text(results / f"{name}.log", anywhere((root / f"{name}.log").read_text(), root))

        def report(job: Job, what: str | None) -> dict[str, Any]:
            row = {"what": what, **job.report()}
            row["last_line"] = anywhere(row["last_line"], root)
            kept(job.name)
            print(row, flush=True)
            cluster.revive()
            return row

        build_shards(place)
        cluster.revive()
        ended = [report(end(cluster, place), end.__doc__) for end in ENDS]
        whole = report(Job(place, "undisturbed"), "nothing")
        job = Job(place, "disturbed", "--signal=TERM@120", "--time=60")
        try:
            events = [meet(event, cluster, job) for event in EVENTS]
        finally:
            kept("disturbed")
        last = report(job, "all of these") | {"distance": distance(job.output, place.root / "undisturbed")}
        return {"events": events, "ends": [whole, last, *ended]}


def table(measured: dict[str, Any]) -> str:
    """Two Markdown tables: what a job survives, and what ends one."""
    lines = ["| what happens | newest checkpoint then | goes on from | restarts by SLURM | nodes |", "|---|---|---|---|---|"]
    for row in measured["events"]:
        lines.append(
            f"| {row['event']} | {row['newest_before']} | {row['continued_from']} | {row['restarts']} | {row['nodes']} |"
        )
    lines += ["", "| what happens | state | exit code | restarts | what its log says last |", "|---|---|---|---|---|"]
    for row in measured["ends"]:
        line = row["last_line"].split(": ", 1)[1]
        lines.append(f"| {row['what']} | {row['state']} | {row['exit_code']} | {row['restarts']} | {line} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.slurm", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="write slurm.json and the logs of the jobs into this directory")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the namespaces
    options = parser.parse_args()
    missing = sorted({package for command, package in PACKAGES.items() if shutil.which(command) is None})
    if missing or os.geteuid() != 0:
        needs = f"apt-get install {' '.join(missing)}" if missing else "root, for namespaces of its own"
        print(f"benchmarks.runs.slurm: error: needs {needs}", file=sys.stderr)
        return 2
    if not options.inside:
        again = [sys.executable, "-m", "benchmarks.runs.slurm", "--inside", *sys.argv[1:]]
        return subprocess.run([*NAMESPACES, *again], check=False).returncode
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # torchrun
    quiet_libraries()
    torch.set_num_threads(1)
    measured = jobs(options.results)
    print(table(measured))
    write_result(options.results and options.results / "slurm.json", __doc__, **measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
