"""What the diffusers examples test of `train_text_to_image.py`: which checkpoints there are, and that diffusers opens them."""

import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, UNet2DConditionModel

from engine.loop.trainer import train
from tests.loop.runs import config

OPTIONS = {"train_batch_size": 1, "learning_rate": 5e-4, "scale_lr": True, "lr_warmup_steps": 0, "use_ema": False, "seed": 0}


def checkpoints(output: Path) -> set[str]:
    return {path.name for path in output.iterdir() if "checkpoint" in path.name}


def draws(path: Path, **parts) -> bool:
    pipeline = DiffusionPipeline.from_pretrained(path, safety_checker=None, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a prompt", num_inference_steps=1).images[0].size == (16, 16)


def test_two_steps_leave_a_pipeline(model, images, shards, tmp_path):
    assert train(config(model, images, shards, tmp_path / "out", **OPTIONS | {"max_train_steps": 2})) == 0
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").is_file()


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_checkpoint_between_is_opened_and_one_beyond_the_end_is_gone_on_from(use_ema, model, images, shards, tmp_path):
    output, options = tmp_path / "out", OPTIONS | {"use_ema": use_ema}
    assert train(config(model, images, shards, output, **options | {"max_train_steps": 4, "checkpointing_steps": 2})) == 0
    assert draws(output)
    assert checkpoints(output) == {"checkpoint-2", "checkpoint-4"}
    for folder in ("unet", "unet_ema")[: 1 + use_ema]:
        assert draws(model, unet=UNet2DConditionModel.from_pretrained(output, subfolder=f"checkpoint-2/{folder}"))
    shutil.rmtree(output / "checkpoint-2")
    options |= {"max_train_steps": 2, "checkpointing_steps": 1, "resume_from_checkpoint": "checkpoint-4"}
    assert train(config(model, images, shards, output, **options)) == 0
    assert draws(output)
    assert checkpoints(output) == {"checkpoint-4", "checkpoint-5"}


def test_the_limit_takes_the_oldest_and_several_at_once(model, images, shards, tmp_path):
    output, options = tmp_path / "out", OPTIONS | {"checkpointing_steps": 2}
    assert train(config(model, images, shards, output, **options | {"max_train_steps": 6, "checkpoints_total_limit": 2})) == 0
    assert checkpoints(output) == {"checkpoint-4", "checkpoint-6"}
    assert train(config(model, images, shards, tmp_path / "more", **options | {"max_train_steps": 4})) == 0
    assert checkpoints(tmp_path / "more") == {"checkpoint-2", "checkpoint-4"}
    options |= {"max_train_steps": 8, "resume_from_checkpoint": "checkpoint-4", "checkpoints_total_limit": 2}
    assert train(config(model, images, shards, tmp_path / "more", **options)) == 0
    assert checkpoints(tmp_path / "more") == {"checkpoint-6", "checkpoint-8"}
    assert draws(tmp_path / "more")
