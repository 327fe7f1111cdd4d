"""Buckets, mixtures, dropped captions, a held-out loss and the objectives, all in one run."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
import torch
from diffusers import UNet2DConditionModel

from engine.config.command_line import load, read_toml
from engine.config.options import TrainConfig
from engine.loop.trainer import train
from tests import tiny
from tests.commands import ON_GPU, Command, run, run_two
from tests.loop.runs import SLACK, checkpoint_tensors, published_order, relative_distance

STEPS = 12


@pytest.fixture(scope="module")
def everything(model, tmp_path_factory) -> dict:
    """What a TOML file holds: two data sets, one of two sizes, the other with hardly more images than a unit has slots."""
    root = tmp_path_factory.mktemp("everything")
    first = tiny.write_images(root / "first", count=9, size=(32, 16))
    captions = (first / "metadata.jsonl").read_text().splitlines()
    tiny.write_images(first / "squares", count=5)
    squares = [json.loads(line) for line in (first / "squares" / "metadata.jsonl").read_text().splitlines()]
    captions += [
        json.dumps(line | {"file_name": f"squares/{line['file_name']}", "text": "small, square, red"}) for line in squares
    ]
    (first / "squares" / "metadata.jsonl").unlink()
    (first / "metadata.jsonl").write_text("\n".join(captions) + "\n")
    few = tiny.write_images(root / "few", count=3, size=(16, 32))
    return {
        "family": "sd", "pretrained_model_name_or_path": str(model), "shards_dir": str(root / "shards"), "resolution": 16,
        "buckets": ["16x16", "24x16", "16x24"], "cache_text": "tokens", "random_flip": True, "shard_records": 5,
        "data": [
            {"name": "first", "train_data_dir": str(first), "weight": 3, "shuffle_tags": True, "caption_variants": 4},
            {"name": "few", "train_data_dir": str(few), "weight": 1, "caption_prefix": "sks"},
        ],
        "train_batch_size": 2, "max_train_steps": STEPS, "checkpointing_steps": 4, "seed": 11, "learning_rate": 1e-3,
        "lr_warmup_steps": 0, "use_ema": True, "log_every": 1, "report_to": "none", "deterministic": ON_GPU,
        "proportion_empty_prompts": 0.3, "validation_fraction": 0.2, "validation_steps": 4, "validation_timesteps": 3,
        "best_checkpoint": True, "timestep_sampling": "stratified", "loss_weighting": "soft_min_snr", "snr_gamma": 5.0,
        "loss_type": "huber", "huber_schedule": "snr", "pyramid_noise_discount": 0.3,
    }  # fmt: skip


def write(values: dict, output: Path, **options) -> Path:
    """The TOML file of a run."""
    file = output.with_suffix(".toml")
    file.write_text(tomli_w.dumps(values | {"output_dir": str(output)} | options))
    return file


def metrics(output: Path) -> list[dict]:
    """The lines of a run without what differs between machines."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = ("samples_per_second", "step_seconds", "validation_seconds", "time")
    return [{name: value for name, value in line.items() if name not in kept} for line in lines]


def numbers(line: dict) -> Iterator[float]:
    """All of a line, those by data set or timestep too; -1 where there is none."""
    for value in line.values():
        yield from numbers(value) if isinstance(value, dict) else (-1.0 if value is None else value,)


@pytest.fixture(scope="module")
def one_process(everything, tmp_path_factory) -> Path:
    """One process that accumulates two micro-batches."""
    output = tmp_path_factory.mktemp("one") / "out"
    file = write(everything, output, gradient_accumulation_steps=2)
    assert train(load(TrainConfig, read_toml(TrainConfig, file, ""))) == 0
    return output


@pytest.mark.two_processes
def test_two_processes_train_as_one(one_process, everything, model, tmp_path):
    output = tmp_path / "two"
    run_two([sys.executable, "-m", "engine.run", "--config", str(write(everything, output, zero_stage=2))])
    ours, theirs = metrics(output), metrics(one_process)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert [*numbers(one)] == pytest.approx([*numbers(other)], rel=1e-4 * SLACK)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    weights = [published_order(unet, checkpoint_tensors(out / f"checkpoint-{STEPS}", "ema")) for out in (output, one_process)]
    assert relative_distance(*weights, dict(unet.named_parameters())) < 1e-4 * SLACK


def test_kills_change_nothing(one_process, everything, tmp_path):
    """kill -9 after a few steps, in the middle of others and beside a checkpoint; the last run goes through."""
    output = tmp_path / "killed"
    file = write(everything, output, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    command = [sys.executable, "-m", "engine.run", "--config", str(file)]
    for step in (3, 6, 9):
        process = Command(command)
        while not (lines := output / "metrics.jsonl").exists() or len(lines.read_text().splitlines()) < step:
            assert process.poll() is None, process.errors
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = run(command)
    assert result.returncode == 0, result.errors
    assert metrics(output) == metrics(one_process)
    assert (output / "best").read_text() == (one_process / "best").read_text()
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        ours, theirs = (checkpoint_tensors(out / f"checkpoint-{STEPS}", kind) for out in (output, one_process))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
