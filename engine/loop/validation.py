"""Validation images."""

from pathlib import Path

import torch
from PIL import Image

from engine.config.options import TrainConfig
from engine.loop.weights.partition import Partition
from engine.loop.weights.whole import assemble
from engine.models.family import Family
from engine.models.pipelines import draw
from engine.picture import labelled_grid, save_png


def validate(config: TrainConfig, family: Family, partition: Partition, seed: int, step: int) -> Image.Image | None:
    """Draws the validation images into samples/step-N.png, and returns them, on the first process; all must call it."""
    grid = None
    model = assemble(partition, family.encoding.dtype)
    if model is not None:
        with torch.no_grad():
            pipeline, arguments = family.preview(model)
            pipeline = pipeline.to(partition.processes.device)
            pipeline.set_progress_bar_config(disable=True)
            prompts = config.validation_prompts or []
            rows = list(draw(pipeline, prompts, config.num_validation_images, seed, **arguments))
        grid = labelled_grid(rows)
        save_png(grid, Path(config.output_dir) / "samples" / f"step-{step}.png")
    partition.processes.barrier()
    return grid
