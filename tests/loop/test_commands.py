"""The command as users and launchers run it: kills, signals and several processes."""

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from benchmarks.runs import faults
from benchmarks.tools.place import Place
from engine.loop.stop import StopSignal
from engine.loop.trainer import train
from engine.processes import Processes
from tests.commands import Command, run, run_two, start_two
from tests.loop.runs import SLACK, checkpoint_tensors, command, config, published_order, relative_distance


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def exported(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def progress(output: Path) -> int:
    """How many lines of metrics a running training has written."""
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_five_kills_change_nothing(model, images, tmp_path):
    """kill -9 at random instants, the first while shards are built or the model loads; the last run goes through."""
    options = {"max_train_steps": 120, "checkpointing_steps": 4, "checkpoints_total_limit": 2, "mixed_precision": "no"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run(command(config(model, images, whole / "shards", whole, **options)))
    assert result.returncode == 0, result.errors

    resumable = command(config(model, images, killed / "shards", killed, resume_from_checkpoint="latest", **options))
    moments = random.Random(2026)
    seen = []
    for kill in range(5):
        before = progress(killed)
        process = Command(resumable)
        if kill == 0:
            time.sleep(moments.uniform(2.0, 6.0))
        else:
            # Resuming drops lines first, so that any change means that steps are running.
            while progress(killed) in (0, before) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        seen.append(progress(killed))
    result = run(resumable)
    assert result.returncode == 0, result.errors
    assert max(seen) > 0, "no kill fell into training"
    ours, theirs = exported(killed), exported(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        left = checkpoint_tensors(killed / "checkpoint-120", kind)
        right = checkpoint_tensors(whole / "checkpoint-120", kind)
        assert all(torch.equal(left[name], right[name]) for name in right)
    assert losses(killed) == losses(whole)
    assert not list(killed.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_leaves(number, model, images, shards, tmp_path):
    output = tmp_path / "out"
    options = config(model, images, shards, output, max_train_steps=100_000, checkpointing_steps=100_000)
    process = Command(command(options))
    while progress(output) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == 0, process.errors
    step = int((output / "latest").read_text().split("-")[1])
    assert f"Stopped after step {step}" in process.output
    assert progress(output) == step
    resumed = options.model_copy(update={"max_train_steps": step + 3, "resume_from_checkpoint": "latest"})
    resumed.__pydantic_fields_set__.add("resume_from_checkpoint")
    result = run(command(resumed))
    assert result.returncode == 0, result.errors
    assert len(losses(output)) == step + 3


def test_a_second_interrupt_ends_at_once(capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has not
    stop = StopSignal(Processes())
    signal.raise_signal(signal.SIGINT)
    assert stop.agreed()
    assert "Ctrl-C again ends at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stop.close()
    stop.release()
    signal.signal(signal.SIGINT, before)


def test_a_process_that_was_told_to_stop_is_not_ended_by_being_told_again():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal(Processes())
    signal.raise_signal(signal.SIGTERM)
    stop.close()
    signal.raise_signal(signal.SIGTERM)  # while the checkpoint is written
    stop.release()
    assert signal.getsignal(signal.SIGTERM) == before


def test_signals_are_given_back_where_nobody_was_told_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    StopSignal(Processes()).close()
    assert signal.getsignal(signal.SIGTERM) == before


def noise_scales(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["gradient_noise_scale"] for line in lines[6:]]  # averaged for a while


@pytest.fixture(scope="module")
def one_process(model, images, shards, tmp_path_factory):
    """One process that accumulates two micro-batches of two."""
    output = tmp_path_factory.mktemp("runs") / "one"
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 12, "checkpointing_steps": 12}
    assert train(config(model, images, shards, output, gradient_noise_scale=True, **options)) == 0
    return output


@pytest.mark.two_processes
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_train_as_one(stage, one_process, model, images, shards, tmp_path):
    output = tmp_path / "two"
    options = config(
        model, images, shards, output, train_batch_size=2, zero_stage=stage, max_train_steps=12, checkpointing_steps=12,
        validation_prompts=["a red square"], gradient_noise_scale=stage < 3,
    )  # fmt: skip
    run_two(command(options))
    assert losses(output) == pytest.approx(losses(one_process), abs=1e-6 * SLACK)
    if stage < 3:
        scales = (noise_scales(run) for run in (output, one_process))
        assert next(scales) == pytest.approx(next(scales), rel=1e-3 * SLACK)
    assert (output / "samples" / "step-12.png").exists()
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    start = dict(unet.named_parameters())
    for kind in ("weight", "ema"):
        ours = published_order(unet, checkpoint_tensors(output / "checkpoint-12", kind))
        theirs = published_order(unet, checkpoint_tensors(one_process / "checkpoint-12", kind))
        assert relative_distance(ours, theirs, start) < 1e-4 * SLACK
    assert relative_distance(exported(output), exported(one_process), start) < 1e-4 * SLACK
    opened = UNet2DConditionModel.from_pretrained(output, subfolder="checkpoint-12/unet_ema").state_dict()
    assert all(torch.equal(opened[name], value) for name, value in exported(output).items())


@pytest.mark.two_processes
def test_a_checkpoint_of_two_processes_continues_on_one(one_process, model, images, shards, tmp_path):
    output = tmp_path / "two"
    options = {"train_batch_size": 2, "max_train_steps": 6, "checkpointing_steps": 6}
    run_two(command(config(model, images, shards, output, zero_stage=2, **options)))
    shutil.rmtree(output / "unet")
    options |= {"max_train_steps": 12, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "latest"}
    assert train(config(model, images, shards, output, **options)) == 0
    start = dict(UNet2DConditionModel.from_pretrained(model, subfolder="unet").named_parameters())
    assert relative_distance(exported(output), exported(one_process), start) < 1e-4 * SLACK


@pytest.mark.two_processes
def test_the_deepspeed_launcher_starts_the_same_command(one_process, model, images, shards, tmp_path):
    output = tmp_path / "launched"
    options = config(model, images, shards, output, train_batch_size=2, max_train_steps=12)
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--module", "engine.run"]
    result = run(command(options, *launcher))
    assert result.returncode == 0, result.errors
    assert losses(output) == pytest.approx(losses(one_process), abs=1e-6 * SLACK)


@pytest.mark.two_processes
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(model, images, shards, tmp_path):
    output = tmp_path / "out"
    options = config(model, images, shards, output, train_batch_size=2, max_train_steps=100_000, checkpointing_steps=100_000)
    both = start_two(command(options))
    while progress(output) < 3:
        assert both[0].poll() is None, both[0].errors
        time.sleep(0.02)
    both[1].send_signal(signal.SIGUSR1)
    assert [process.wait() for process in both] == [0, 0]
    step = int((output / "latest").read_text().split("-")[1])
    state = json.loads((output / f"checkpoint-{step}" / "state.json").read_text())
    assert (state["step"], state["world"]) == (step, 2)


@pytest.mark.two_processes
def test_a_killed_process_ends_the_attempt_and_the_next_continues(tmp_path):
    result = faults.killed_in_a_collective(Place(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "Continuing from" in result.stderr
