"""Validation images, and the export of the trained pipeline."""

import itertools
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from torch import Tensor

from engine.config.options import TrainConfig
from engine.errors import UserError, first_line
from engine.files import PARTIAL, discard, sync
from engine.loop.weights.partition import Partition
from engine.models.family import Family
from engine.models.published import draw, use_portable_names
from engine.models.training_form import to_published_form
from engine.picture import labelled_grid, save_png
from engine.processes import Processes
from engine.tensors import write_one_by_one


def whole_tensors(partition: Partition, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Parameters, with weights from `tensors` (laid out as the masters), and buffers of the published model, one at a time.

    Every process must iterate to the end. On a single one they are views of what training holds.
    """
    partition.processes.synchronize()
    others = partition.frozen.items(), partition.module.named_buffers()
    return to_published_form(partition.module, itertools.chain(partition.gather(tensors), *others))


def assemble(partition: Partition, tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> Any:
    """The published model to draw with, on the first process; None on the others. Every process must call it.

    Where dtype and device are those of `tensors`, their memory is the model's.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in whole_tensors(partition, tensors):
        if partition.processes.is_first:
            state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    return published_model(partition.module, state) if state else None


def published_model(module: Any, state: dict[str, Tensor]) -> Any:
    """The published model of one in training form, with `state`'s parameters and buffers, which it takes over."""
    model = empty_published_model(module)
    model.load_state_dict(state, assign=True, strict=False)
    for name, _ in list(model.named_buffers()):
        # Some are no part of a state dictionary.
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = state[name]
    return model.eval()


def empty_published_model(module: Any) -> Any:
    """The published model of one in training form, on the meta device."""
    with torch.device("meta"):
        return type(module).from_config(module.config)


def validate(
    config: TrainConfig,
    family: Family,
    partition: Partition,
    tensors: list[Tensor],
    processes: Processes,
    seed: int,
    step: int,
) -> Image.Image | None:
    """Draws the validation images into samples/step-N.png, and returns them, on the first process; all must call it."""
    grid = None
    model = assemble(partition, tensors, family.dtype, processes.device)
    if model is not None:
        with torch.no_grad():
            pipeline, arguments = family.preview(model)
            pipeline = pipeline.to(processes.device)
            pipeline.set_progress_bar_config(disable=True)
            prompts = config.validation_prompts or []
            rows = list(draw(pipeline, prompts, config.num_validation_images, seed, **arguments))
        grid = labelled_grid(rows)
        save_png(grid, Path(config.output_dir) / "samples" / f"step-{step}.png")
    processes.barrier()
    return grid


def export(config: TrainConfig, family: Family, partition: Partition, tensors: list[Tensor], processes: Processes) -> None:
    """Saves the pipeline with fp32 trained weights where the scripts leave it; every process must call it.

    Each component is written aside and renamed into place; model_index.json, without which nothing loads, comes last.
    """
    whole = whole_tensors(partition, tensors)
    if processes.is_first:
        save_pipeline(Path(config.output_dir), family, partition.module, whole)
    else:
        deque(whole, maxlen=0)
    processes.barrier()


def save_pipeline(directory: Path, family: Family, module: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes the family's published pipeline into its folder of a directory.

    Args:
        module: the trained module, in training form.
        tensors: parameters and buffers of the published model, written in fp32 one after another.
    """
    model = empty_published_model(module)
    layout = model.state_dict()

    def write(folder: str) -> None:
        model.save_config(folder)
        stored = ((name, tensor) for name, tensor in tensors if name in layout)
        write_one_by_one(Path(folder) / SAFETENSORS_WEIGHTS_NAME, layout, stored, {"format": "pt"})

    # The pipeline saves its parts by this method.
    model.save_pretrained = write
    output = directory / family.result
    output.mkdir(parents=True, exist_ok=True)
    aside = directory / f"pipeline{PARTIAL}"
    discard(aside)
    pipeline = family.pipeline(model)
    use_portable_names(pipeline)
    pipeline.save_pretrained(aside, safe_serialization=True)
    if (aside / "tokenizer").is_dir():
        # transformers 5 saves tokenizer.json alone; older releases read the vocabulary and the merges beside it.
        shutil.copytree(family.path / "tokenizer", aside / "tokenizer", dirs_exist_ok=True)
    for path in sorted(aside.rglob("*")):
        sync(path)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == "model_index.json"):
        discard(output / path.name)
        shutil.move(path, output / path.name)
    sync(output)
    aside.rmdir()


def create_repository(config: TrainConfig) -> str:
    """Creates the repository of `--push_to_hub`, where there is none yet, and returns its full name.

    Raises:
        UserError: not logged in, no permission, no connection; better known before the training than after.
    """
    name = config.hub_model_id or Path(config.output_dir).name
    try:
        return HfApi(token=config.hub_token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the library raises many kinds
        raise UserError(f"--push_to_hub: cannot create {name}: {first_line(error)}; log in with `hf auth login`") from None


def push_to_hub(config: TrainConfig, family: Family, repository: str) -> None:
    """Uploads the trained pipeline with a model card."""
    output = Path(config.output_dir)
    data = config.dataset_name or config.train_data_dir or "its own latent shards"
    card = ModelCard(
        "---\n"
        f"base_model: {family.base_model}\n"
        "library_name: diffusers\n"
        "tags: [text-to-image, diffusers, diffusers-training]\n"
        "---\n\n"
        f"# {repository}\n\n"
        f"Fine-tuned from `{family.base_model}` on `{data}`: {config.max_train_steps} steps at learning "
        f"rate {config.learning_rate}, {config.resolution} px, precision {config.mixed_precision}.\n"
    )
    card.save(output / "README.md")
    HfApi(token=config.hub_token).upload_folder(
        repo_id=repository,
        folder_path=output,
        commit_message="End of training",
        ignore_patterns=["checkpoint-*", "shards/*", "logs/*", "wandb/*", "latest"],
    )
