"""What do faults of a cluster cost? `python -m benchmarks.runs.cluster [--scenarios NAME ...] [--json FILE]`

Jobs of two to four processes, each on a node of its own, share a file system that shows late what other nodes did
(benchmarks/tools/shared.cpp). Nobody watches over them: every process must end by itself, well or in lines with exit code 2 or
75, within two minutes, or seven where a silent process must first be taken for dead. The same command, started again, must end
in the weights of a job that nobody disturbed: in the same bits where the number of processes is the same, else up to the order
of summation.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch

from benchmarks.tools.place import Place, distance, weights
from benchmarks.tools.rows import write_result
from benchmarks.tools.shared import Cluster, Job, Node
from benchmarks.tools.storage import Ended, Fault
from benchmarks.tools.tables import cell
from engine.quiet import quiet_libraries

STEPS = 9  # with checkpoints of 3, 6 and 9
SILENT = 420.0  # seconds to wait where nothing but the lack of signs of life tells that a process is gone
GLOBAL_BATCH = 4
CLOSE = 1e-3  # of how far training moved the weights: the order of summation, and no other samples
FRESH = Node()
PAIR = [FRESH, FRESH]
Attempts = Iterator[list[Ended]]


class Trial:
    """A job that nobody disturbed, and others that are compared with it."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        self.cluster, self.place = cluster, Place(root / "place")
        self.whole = cluster.directory / "whole"
        ended = self.start(self.whole, PAIR).wait()
        assert [each.status for each in ended] == [0, 0], [each.said for each in ended]
        self.expected = weights(self.whole)
        self.untrained = weights(Path(self.place.model))

    def output(self, name: str, shards: bool = True) -> Path:
        """A new output directory, with the shards or without."""
        output = self.cluster.directory / name.replace(" ", "-")
        output.mkdir()
        if shards:
            shutil.copytree(self.whole / "shards", output / "shards")
        return output

    def start(self, output: Path, nodes: list[Node], *options: str, steps: int = STEPS) -> Job:
        command = self.place.command(
            output,
            "--train_batch_size",
            "1",
            "--global_batch_size",
            str(GLOBAL_BATCH),
            "--zero_stage",
            "2",
            *options,
            steps=steps,
        )
        return self.cluster.start(command[2:], nodes)

    def unseen(self, output: Path) -> float:
        """A delay that hides the last checkpoint for some seconds from now on."""
        return time.time() - (output / "latest").stat().st_mtime + 8

    def meet(self, name: str) -> dict[str, Any]:
        """What becomes of a scenario: `wrong` is empty where all is well."""
        started, codes, said, wrong = time.monotonic(), [], [], []
        for ended in SCENARIOS[name](self, self.output(name, shards="shards" not in name)):
            codes.append([each.status for each in ended])
            said += [line for each in ended for line in each.said.splitlines() if "error: " in line or "warning: " in line]
            wrong += [problem for each in ended if (problem := _problem(each))]
        if any(code != 0 for code in codes[-1]):
            wrong.append("did not end well in the end")
        else:
            wrong += self.compare(self.cluster.directory / name.replace(" ", "-"), exact={len(each) for each in codes} == {2})
        lines = dict.fromkeys(line.replace(str(self.cluster.directory), ".") for line in said)
        return {"scenario": name, "exit_codes": codes, "said": list(lines), "wrong": wrong,
                "seconds": round(time.monotonic() - started, 1)}  # fmt: skip

    def compare(self, output: Path, exact: bool) -> list[str]:
        """What is wrong with the weights."""
        ours = weights(output)
        off = distance(ours, self.expected, self.untrained)
        same = all(torch.equal(ours[name], self.expected[name]) for name in ours) if exact else off < CLOSE
        return [] if same else [f"ends in other weights, {off:.1e} of the way off"]


def _problem(ended: Ended) -> str:
    if ended.status is None:
        return f"hangs: {ended.said[-300:]}"
    if ended.status != -signal.SIGKILL and not ended.clean:
        return f"ends with {ended.status}: {ended.said[-1000:]}"
    return ""


def stale_directory(trial: Trial, output: Path) -> Attempts:
    """The second node sees the checkpoint before the last."""
    yield trial.start(output, PAIR, steps=6).wait()
    yield trial.start(output, [FRESH, Node(delay=trial.unseen(output))]).wait()


def stale_first(trial: Trial, output: Path) -> Attempts:
    """The first node does, and decides by it."""
    yield trial.start(output, PAIR, steps=6).wait()
    yield trial.start(output, [Node(delay=trial.unseen(output)), FRESH]).wait()


def slow_rename(trial: Trial, output: Path) -> Attempts:
    yield trial.start(output, [Node(rename=3, delay=2)] * 2, "--step_timeout", "20").wait()


def killed_host(trial: Trial, output: Path) -> Attempts:
    """The first process, which keeps the store, is killed in the midst of training."""
    job = trial.start(output, PAIR, "--step_timeout", "10", steps=100_000).when((output / "checkpoint-3").exists)
    job.kill(0)
    yield job.wait()
    yield trial.start(output, PAIR).wait()


def silent_host(trial: Trial, output: Path) -> Attempts:
    """The first process stops without a word in a step, as on a node that lost its power: no connection to it is closed."""
    metrics = output / "metrics.jsonl"
    job = trial.start(output, PAIR, "--step_timeout", "10", "--checkpointing_steps", "100000", steps=100_000).when(
        lambda: metrics.exists() and metrics.read_text().count("\n") > 4
    )
    job.stop(0)
    yield job.wait()
    yield trial.start(output, PAIR).wait()


def silent_publisher(trial: Trial, output: Path) -> Attempts:
    """The same while it writes a checkpoint."""
    fault = Fault(at=1, action="stop", only=f"\t{output}/checkpoint-6\n")
    job = trial.start(output, [Node(fault=fault), FRESH], "--step_timeout", "10")
    yield job.wait(SILENT, silent=0)
    yield trial.start(output, PAIR).wait()


def killed_publisher(trial: Trial, output: Path) -> Attempts:
    """The first process is killed just before it gives a checkpoint its name."""
    fault = Fault(at=1, only=f"\t{output}/checkpoint-6\n")
    yield trial.start(output, [Node(fault=fault), FRESH], "--step_timeout", "10").wait()
    yield trial.start(output, PAIR).wait()


def killed_writer(trial: Trial, output: Path, *options: str) -> Attempts:
    """The second process is killed while it writes its part of a checkpoint: the first must not wait for it."""
    fault = Fault(at=2, only="/rank-1.safetensors\n")
    yield trial.start(output, [FRESH, Node(fault=fault)], "--step_timeout", "10", *options).wait(SILENT)
    yield trial.start(output, PAIR).wait()


def killed_writer_beside(trial: Trial, output: Path) -> Attempts:
    return killed_writer(trial, output, "--checkpoint_async")


def full_disk(trial: Trial, output: Path) -> Attempts:
    """The second process finds no room for its part."""
    fault = Fault(at=1, action="28", lasting=True, only="/rank-1.safetensors\n")
    yield trial.start(output, [FRESH, Node(fault=fault)]).wait()
    yield trial.start(output, PAIR).wait()


def other_number(trial: Trial, output: Path) -> Attempts:
    """Four processes, then two of which one sees an older checkpoint, then three nodes fewer than at first."""
    yield trial.start(output, [FRESH] * 4, steps=3).wait()
    yield trial.start(output, [FRESH, Node(delay=trial.unseen(output))], steps=6).wait()
    yield trial.start(output, [Node(delay=3)]).wait()


def damaged(trial: Trial, output: Path) -> Attempts:
    """The last checkpoint is not what its digests say."""
    yield trial.start(output, PAIR, steps=6).wait()
    file = output / "checkpoint-6" / "rank-1.safetensors"
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    yield trial.start(output, PAIR).wait()


def shards_without_locks(trial: Trial, output: Path) -> Attempts:
    """Both build the shards, where locks are unsupported."""
    yield trial.start(output, [Node(locks="none", delay=1)] * 2).wait()


def shards_with_node_locks(trial: Trial, output: Path) -> Attempts:
    """Both build the shards, where locks hold within a node alone."""
    yield trial.start(output, [Node(locks="node", delay=1)] * 2).wait()


def shards_killed(trial: Trial, output: Path) -> Attempts:
    """The second process is killed while it writes a shard."""
    fault = Fault(at=1, only=".safetensors")
    yield trial.start(output, [FRESH, Node(fault=fault)]).wait(SILENT)
    yield trial.start(output, PAIR).wait()


def shards_unseen(trial: Trial, output: Path) -> Attempts:
    """Shards that one process has just built, and that the second node does not see yet."""
    yield trial.start(output, [FRESH], "--max_train_steps", "1", "--output_dir", f"{output}-before", "--shards_dir",
                      str(output / "shards")).wait()  # fmt: skip
    yield trial.start(output, [FRESH, Node(delay=15)]).wait()


SCENARIOS: dict[str, Callable[[Trial, Path], Attempts]] = {
    "a node sees an older directory": stale_directory,
    "the first node sees an older directory": stale_first,
    "renaming takes 3 s and is seen 2 s later": slow_rename,
    "the store's host is killed": killed_host,
    "the store's host falls silent in a step": silent_host,
    "the store's host falls silent during publication": silent_publisher,
    "killed during publication": killed_publisher,
    "killed while it writes its part": killed_writer,
    "killed while it writes its part beside the training": killed_writer_beside,
    "no room for the part of one": full_disk,
    "4 processes, then 2, then 1": other_number,
    "the last checkpoint is damaged": damaged,
    "shards are built without locks": shards_without_locks,
    "shards are built with locks within nodes alone": shards_with_node_locks,
    "killed while it builds shards": shards_killed,
    "a node does not see the shards yet": shards_unseen,
}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: exit codes of every process in every attempt, and how it ended."""
    lines = ["| scenario | exit codes, attempt by attempt | what was said | seconds | wrong |", "|---|---|---|---|---|"]
    for row in rows:
        codes = "; ".join(", ".join("hangs" if code is None else str(code) for code in codes) for codes in row["exit_codes"])
        said = "; ".join(line.partition(": ")[2] for line in row["said"][:2]).replace("|", "\\|")
        lines.append(f"| {row['scenario']} | {codes} | {said} | {row['seconds']:.0f} | {cell('; '.join(row['wrong'])[:300])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.cluster", description=__doc__.splitlines()[0])
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="default: all")
    parser.add_argument("--json", type=Path, help="write the results there too, beside those of other scenarios")
    options = parser.parse_args()
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as directory, Cluster(Path(directory)) as cluster:
        trial = Trial(Path(directory), cluster)
        for name in options.scenarios:
            rows.append(trial.meet(name))
            print(f"{name}: {rows[-1]['exit_codes']} {rows[-1]['seconds']} s {rows[-1]['wrong']}", flush=True)
    print(table(rows))
    if options.json and options.json.exists():
        kept = {row["scenario"]: row for row in [*json.loads(options.json.read_text())["scenarios"], *rows]}
        rows = [kept[name] for name in SCENARIOS if name in kept]
    write_result(options.json, __doc__, scenarios=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
