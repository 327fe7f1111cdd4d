"""The small example of each family, from photographs to an image; and the recipes for the published checkpoints."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from engine.config.command_line import parse
from engine.config.options import CacheConfig, TrainConfig
from examples import local
from examples.local import RESOLUTION
from examples.photographs import CAPTIONS, photographs
from examples.tiny_models import TOKENS
from tests import in_process


@pytest.mark.parametrize("family", RESOLUTION)
def test_an_example_trains_and_draws(family, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["local", family, "--steps", "20", "--directory", str(tmp_path)])
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(run=in_process.run))
    local.main()
    grid = Image.open(tmp_path / "grid.png")
    assert len(grid.convert("L").getcolors(2**16)) > 20
    losses = [json.loads(line)["loss"] for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert (tmp_path / "trained" / "samples" / "step-20.png").exists()


def test_the_photographs_have_captions_that_fit_the_tiny_tokenizer():
    assert len(photographs()) == len(CAPTIONS) == 14
    assert all(len(caption.replace(" ", "")) <= TOKENS - 2 for caption in CAPTIONS.values())


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_parse(path):
    config = parse(TrainConfig, "engine.run", "", ["--config", str(path)])
    assert path.stem.startswith(config.family)
    assert config.max_train_steps == 15000
    assert config.resolution == (512 if config.family == "sd" else 768)


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.toml")), ids=lambda path: path.stem)
def test_shards_are_built_by_the_recipe_of_a_training(path):
    config = parse(CacheConfig, "engine.shards build", "", ["--config", str(path), "--shards_dir", "elsewhere"], TrainConfig)
    trained = parse(TrainConfig, "engine.run", "", ["--config", str(path), "--shards_dir", "elsewhere"])
    assert {name: getattr(trained, name) for name in CacheConfig.model_fields} == dict(config)


SCRIPTS = sorted(Path("examples/slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_scripts_for_slurm_are_sound(script):
    checked = subprocess.run([Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


class Slurm:
    """Runs a script with commands of SLURM's that do what a test says, and write down how they were called.

    Args:
        srun: what the command does instead of training.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.output, self.calls = root, root / "out", root / "calls"
        (root / "bin").mkdir()
        (root / "shards").mkdir()
        (root / "shards/index.json").write_text("{}")
        self.command("srun", 'env; eval "$TRAINS"')
        self.command("scontrol", "if [[ $1 == show ]]; then echo n1; echo n2; fi")
        self.command("squeue", 'echo "${STATE:-RUNNING}"')
        self.command("getent", 'echo "10.0.0.2 STREAM n2"')
        self.command("ip", 'echo "10.0.0.2 dev ib0 src 10.0.0.1 uid 0"')

    def command(self, name: str, does: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{does}\n')
        path.chmod(0o755)

    def run(self, trains: str = "true", script: str = "train", **variables: str) -> subprocess.CompletedProcess:
        """One attempt of the job, in which `trains` is run by the shell in place of the training."""
        self.calls.write_text("")
        environment = {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}", "CALLS": str(self.calls), "TRAINS": trains,
            "OUT": str(self.output), "OUTPUT_DIR": str(self.output), "SHARDS_DIR": str(self.root / "shards"),
            "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "diffusion", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64",
        }  # fmt: skip
        command = ["bash", f"examples/slurm/{script}.sbatch", "recipe.toml", "--seed", "1"]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 17" in self.calls.read_text()


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


SAVES = 'echo checkpoint-$STEP > "$OUT/latest"; exit 1'


def test_a_job_that_is_finished_is_not_queued_again(slurm):
    for pipeline in ("", "prior_pipeline/"):
        ended = slurm.run(f'mkdir -p "$OUT/{pipeline}"; echo > "$OUT/{pipeline}model_index.json"')
        assert (ended.returncode, slurm.requeued) == (0, False)


def test_a_pipeline_of_an_earlier_run_does_not_finish_a_job(slurm):
    slurm.output.mkdir()
    (slurm.output / "model_index.json").write_text("")
    os.utime(slurm.output / "model_index.json", (time.time() - 60,) * 2)
    assert slurm.run(SAVES, STEP="5").returncode == 1
    assert slurm.requeued


def test_a_job_that_was_stopped_is_queued_again_and_goes_on(slurm):
    ended = slurm.run(SAVES, STEP="5")
    assert slurm.requeued
    assert "not finished (exit code 1), at checkpoint-5: queued again" in ended.stdout
    slurm.run('echo > "$OUT/model_index.json"', SLURM_RESTART_COUNT="1")
    assert not slurm.requeued


def test_a_mistake_is_not_tried_again(slurm):
    ended = slurm.run('echo "--lr: unknown option" > "$OUT/failed"; exit 1')
    assert (ended.returncode, slurm.requeued) == (2, False)
    assert "it would fail again: --lr: unknown option" in ended.stderr
    slurm.run(SAVES, STEP="5")
    assert slurm.requeued  # what an earlier attempt left says nothing of this one


def test_restarts_without_a_newer_checkpoint_are_capped(slurm):
    queued = []
    for restart in range(9):
        slurm.run(SAVES, STEP=str(max(2, restart)) if restart < 4 else "3", MAX_FRUITLESS="3", SLURM_RESTART_COUNT=str(restart))
        queued.append(slurm.requeued)
        if not slurm.requeued:
            break
    assert queued == [True] * 6 + [False]  # steps 2, 2, 2, 3, and then 3 again and again


def test_restarts_that_slurm_makes_itself_are_capped_too(slurm):
    slurm.run(SAVES, STEP="5", MAX_FRUITLESS="2")
    for restart in (1, 2, 3):  # killed with their node, before the script could say anything
        (slurm.output / "attempt").write_text("17 checkpoint-5 1\n")
        ended = slurm.run("true", MAX_FRUITLESS="2", SLURM_RESTART_COUNT=str(restart + 1))
    assert (ended.returncode, "srun" in slurm.calls.read_text()) == (1, False)
    assert "without a newer checkpoint" in ended.stderr


def test_all_restarts_together_are_capped(slurm):
    ended = slurm.run(SAVES, STEP="5", MAX_RESTARTS="4", SLURM_RESTART_COUNT="4")
    assert (ended.returncode, slurm.requeued) == (1, False)
    assert "restarted 4 times" in ended.stderr


def test_another_job_counts_its_own_restarts(slurm):
    slurm.output.mkdir()
    (slurm.output / "latest").write_text("checkpoint-5\n")
    (slurm.output / "attempt").write_text("16 checkpoint-5 0\n")
    slurm.run(SAVES, STEP="5", SLURM_RESTART_COUNT="9", MAX_FRUITLESS="2")
    assert slurm.requeued


def test_a_job_that_was_cancelled_is_not_queued_again(slurm):
    slurm.run(SAVES, STEP="5", STATE="COMPLETING")
    assert not slurm.requeued


def test_a_job_without_shards_ends_before_it_begins(slurm):
    ended = slurm.run(SHARDS_DIR="nowhere")
    assert (ended.returncode, slurm.calls.read_text()) == (2, "")
    assert "sbatch examples/slurm/shards.sbatch recipe.toml" in ended.stderr
    slurm.run(SHARDS_DIR="https://host/shards")
    assert "--shards_dir https://host/shards" in slurm.calls.read_text()


def test_a_node_that_lacks_a_mount_does_not_end_a_job_that_ran_before(slurm):
    gone = str(slurm.root / "gone")
    ended = slurm.run(SHARDS_DIR=gone, SLURM_RESTART_COUNT="3")
    assert (ended.returncode, slurm.requeued, "srun" in slurm.calls.read_text()) == (1, True, False)
    assert f"17: {gone} is not there on " in ended.stdout
    slurm.run(SHARDS_DIR=gone, SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert not slurm.requeued
    (slurm.root / "gone").mkdir()
    assert slurm.run(SHARDS_DIR=gone, SLURM_RESTART_COUNT="3").returncode == 2
    assert not slurm.requeued


def test_a_controller_that_does_not_answer_is_asked_again(slurm):
    slurm.command("sleep", "true")
    slurm.command("squeue", "exit 1")
    slurm.command("scontrol", "if [[ $1 == requeue ]]; then [[ $(grep -c requeue $CALLS) == 2 ]]; else echo n1; fi")
    assert slurm.run(SAVES, STEP="5").returncode == 1
    called = [line.split()[0] for line in slurm.calls.read_text().splitlines()]
    assert (called.count("squeue"), called.count("scontrol")) == (3, 3)
    slurm.command("squeue", "true")
    slurm.command("scontrol", "echo n1; [[ $1 != requeue ]]")
    assert "cannot be queued again" in slurm.run(SAVES, STEP="5").stderr


@pytest.mark.parametrize("job", ["1", "15999", "16000", "67043327", "4294967294"])
def test_what_torchrun_is_told(slurm, job):
    environment = slurm.run(SLURM_JOB_ID=job, SLURM_RESTART_COUNT="2").stdout.splitlines()
    called = next(line for line in slurm.calls.read_text().splitlines() if line.startswith("srun"))
    port = int(re.search(r"--rdzv-endpoint n1:(\d+)", called)[1])
    assert port == 12000 + int(job) % 16000
    assert (
        f"--nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint n1:{port} --rdzv-id {job}-2"
        in called
    )
    assert called.startswith("srun --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun")
    assert called.endswith("--seed 1")
    for line in (
        "OMP_NUM_THREADS=8",
        "SRUN_CPUS_PER_TASK=64",
        "GLOO_SOCKET_IFNAME=ib0",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    ):
        assert line in environment
    seconds = next(int(line.split("=")[1]) for line in environment if line.startswith("TORCH_ELASTIC_SHUTDOWN_TIMEOUT="))
    assert 0 < int(re.search(r"--signal=TERM@(\d+)", SCRIPTS[1].read_text())[1]) - seconds < 30


def test_what_the_user_exports_stands(slurm):
    environment = slurm.run(OMP_NUM_THREADS="3", GLOO_SOCKET_IFNAME="eth1").stdout.splitlines()
    assert {"OMP_NUM_THREADS=3", "GLOO_SOCKET_IFNAME=eth1"} <= set(environment)


def test_shards_are_built_on_every_node_by_itself(slurm):
    slurm.run(script="shards")
    assert "torchrun --standalone --nproc-per-node 8 -m engine.shards build --config recipe.toml" in slurm.calls.read_text()
