"""Whole trainings that are small: a few thousand weights of a family, on photographs."""

import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools.published import TINY
from engine.config.options import TrainConfig
from examples import tiny_models
from examples.photographs import write_images


@functools.cache
def _written(family: str, directory: Path) -> dict[str, str]:
    """The options that name a family's models and images, written under a directory."""
    images = write_images(directory / "images", longest=200)
    return {**tiny_models.WRITERS[family](directory / family), "train_data_dir": str(images)}


def small_run(family: str, directory: Path, **options: Any) -> TrainConfig:
    """The configuration of a training whose model, images and shards lie under `directory`, written there where missing.

    Args:
        options: of the training, beside what names its inputs; in bf16 on a GPU unless they say otherwise.
    """
    precision = "bf16" if torch.cuda.is_available() else "no"
    defaults = {
        "resolution": TINY[family], "mixed_precision": precision, "train_batch_size": 4, "seed": 7, "learning_rate": 1e-4,
        "report_to": "none", "checkpointing_steps": 10**9, "output_dir": str(directory / f"{family}-out"),
        "shards_dir": str(directory / f"{family}-shards-{options.get('mixed_precision', precision)}"),
    }  # fmt: skip
    return TrainConfig.model_validate({"family": family, **_written(family, directory), **defaults, **options})
