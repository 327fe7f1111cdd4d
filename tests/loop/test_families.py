"""The loop with the Kandinsky and Wuerstchen families: resuming, low precision, several processes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.wuerstchen import WuerstchenPrior
from safetensors.torch import load_file

from engine.config.options import TrainConfig
from engine.loop.trainer import train
from tests.commands import ON_GPU, run_two
from tests.loop.runs import SLACK, checkpoint_tensors, command, published_order, relative_distance

RESOLUTION = {"kandinsky-prior": 32, "kandinsky-decoder": 32, "wuerstchen": 128}
FAMILIES = list(RESOLUTION)


def config(family: str, models: dict[str, str], images: Path, output: Path, **options) -> TrainConfig:
    defaults = {
        "train_batch_size": 4, "max_train_steps": 6, "checkpointing_steps": 3, "seed": 5, "learning_rate": 1e-3,
        "log_every": 1, "report_to": "none", "use_ema": True, "resolution": RESOLUTION.get(family, 16), "deterministic": ON_GPU,
    }  # fmt: skip
    return TrainConfig.model_validate(
        {"family": family, **models, "train_data_dir": str(images), "output_dir": str(output), **defaults, **options}
    )


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_the_same_run(family, published, photographs, tmp_path):
    models = published(family)  # Wuerstchen's with its dropout
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {"shards_dir": str(tmp_path / "shards")}
    assert train(config(family, models, photographs, whole, **options)) == 0
    options["resume_from_checkpoint"] = str(whole / "checkpoint-3")
    assert train(config(family, models, photographs, resumed, **options)) == 0
    assert losses(resumed) == losses(whole)[3:]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        first, second = (checkpoint_tensors(output / "checkpoint-6", kind) for output in (whole, resumed))
        assert first.keys() == second.keys() != set()
        assert all(torch.equal(first[name], second[name]) for name in first)
    trained = "prior_pipeline/prior" if family == "wuerstchen" else "unet" if family == "kandinsky-decoder" else "prior"
    exported = [load_file(output / trained / "diffusion_pytorch_model.safetensors") for output in (whole, resumed)]
    part = trained.rpartition("/")[2]
    opened = load_file(resumed / "checkpoint-6" / f"{part}_ema" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(opened[name], exported[0][name]) for name in exported[0] | opened)
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_follows_full_precision(family, published, photographs, tmp_path):
    models = published(family, dropout=0.0)
    for precision in ("no", "bf16"):
        options = {"mixed_precision": precision, "gradient_accumulation_steps": 2, "snr_gamma": 5.0}
        assert train(config(family, models, photographs, tmp_path / precision, **options)) == 0
    full, low = losses(tmp_path / "no"), losses(tmp_path / "bf16")
    assert low != full
    assert low == pytest.approx(full, rel=0.1)


@pytest.mark.two_processes
def test_two_processes_train_what_one_trains(published, photographs, tmp_path):
    models = published("wuerstchen", dropout=0.0)
    options = {"shards_dir": str(tmp_path / "shards"), "checkpointing_steps": 6}
    one = config("wuerstchen", models, photographs, tmp_path / "one", gradient_accumulation_steps=2, **options)
    assert train(one) == 0
    two = config("wuerstchen", models, photographs, tmp_path / "two", zero_stage=1, **options)
    run_two(command(two))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5 * SLACK)
    prior = WuerstchenPrior.from_pretrained(models["pretrained_prior_model_name_or_path"], subfolder="prior")
    start = dict(prior.named_parameters())
    for kind in ("weight", "ema"):
        ours, theirs = (
            published_order(prior, checkpoint_tensors(tmp_path / name / "checkpoint-6", kind)) for name in ("two", "one")
        )
        seen = {name: value for name, value in theirs.items() if not name.endswith("to_k.bias")}
        assert relative_distance(ours, seen, start) < 1e-4 * SLACK


@pytest.mark.parametrize("family", FAMILIES)
def test_validation_images_are_drawn(family, published, photographs, tmp_path):
    options = {"validation_prompts": ["a cat"], "max_train_steps": 2}
    assert train(config(family, published(family), photographs, tmp_path / "out", **options)) == 0
    assert (tmp_path / "out" / "samples" / "step-2.png").exists()
