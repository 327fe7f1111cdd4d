"""Validation images."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from engine.config.options import TrainConfig
from engine.errors import first_line
from engine.loop.weights.partition import Partition
from engine.loop.weights.whole import assemble
from engine.messages import warn
from engine.models.family import Family
from engine.models.pipelines import draw
from engine.picture import labelled_grid, save_png


def validate(config: TrainConfig, family: Family, partition: Partition, seed: int, step: int) -> Image.Image | None:
    """Draws the validation images into samples/step-N.png, and returns them, on the first process; all must call it.

    Pictures never cost a training: what keeps them from being drawn is a warning.
    """
    grid = None
    try:
        model = assemble(partition, family.encoding.dtype)
        if model is not None:
            grid = _grid(config, family, model, partition.processes.device, seed)
            save_png(grid, Path(config.output_dir) / "samples" / f"step-{step}.png")
    except Exception as error:  # of diffusers, of the disk, of memory: any
        if not partition.processes.is_first:
            raise  # a collective failed
        warn(f"validation images of step {step}: {type(error).__name__}: {first_line(error)}; the training goes on")
    partition.processes.barrier()
    return grid


@torch.no_grad()
def _grid(config: TrainConfig, family: Family, model: Any, device: torch.device, seed: int) -> Image.Image:
    pipeline, arguments = family.preview(model)
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = config.validation_prompts or []
    return labelled_grid(list(draw(pipeline, prompts, config.num_validation_images, seed, **arguments)))
