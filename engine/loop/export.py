"""The trained pipeline: saved where the diffusers scripts leave it, and uploaded."""

import glob
import json
import shutil
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from torch import Tensor

from engine.catalogue import EMBEDDING, FAMILIES, INDEX, LORA_WEIGHTS
from engine.config.mixture import data_sets_of
from engine.config.options import TrainConfig
from engine.errors import UserError, first_line
from engine.failed import FAILED, LAUNCH
from engine.files import LOCK, PARTIAL, discard, lies_inside, sync, sync_files
from engine.loop.checkpoints.names import BEST, CHECKPOINT, LATEST
from engine.loop.weights.partition import Partition
from engine.loop.weights.whole import adapter_of, whole_tensors, write_published
from engine.messages import say
from engine.models.adapter import write_adapter
from engine.models.configurations import TOKENIZER_FILES
from engine.models.family import Family
from engine.models.inversion import VECTORS, write_vectors
from engine.models.parts import empty_copy, parts_of
from engine.models.pipelines import use_portable_names

# What is of the run and of no use to others; `attempt` is the script's for SLURM.
_OF_THE_RUN = (LOCK, LAUNCH, FAILED, "attempt")


def export(config: TrainConfig, family: Family, partition: Partition) -> None:
    """Saves the pipeline, or the adapter, with fp32 trained weights where the scripts leave it; every process must call it.

    Each component is written aside and renamed into place; model_index.json, without which nothing loads, goes first and comes
    back last.
    """
    whole = whole_tensors(partition)
    if partition.processes.is_first:
        save_result(config, family, partition.module, whole)
    else:
        deque(whole, maxlen=0)
    partition.processes.barrier()


def save_result(config: TrainConfig, family: Family, module: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes what was trained into the output directory: the pipeline, the adapter, or the vectors of a new token.

    Args:
        module: the trained module, in training form.
        tensors: what is saved, in published form.
    """
    if config.lora_rank:
        save_adapter(config, module, family.part, tensors)
    elif config.placeholder_token:
        write_vectors(result_of(config, family)[1], config.placeholder_token, dict(tensors)[VECTORS])
    else:
        save_pipeline(Path(config.output_dir), family, module, tensors)


def result_of(config: TrainConfig, family: Family) -> tuple[str, Path]:
    """What there is of a training in the end, in a word, and where."""
    if config.lora_rank:
        return "adapter", adapter_path(config)
    if config.placeholder_token:
        return f"embedding of {config.placeholder_token}", Path(config.output_dir) / EMBEDDING
    return "pipeline", Path(config.output_dir) / family.result


def save_adapter(config: TrainConfig, module: Any, part: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes the adapter into the output directory, in the form of `--save_format`.

    Args:
        module: the trained module, in training form.
        part: as `parts_of` takes it.
        tensors: of the adapter, in published form.
    """
    path, base = adapter_path(config), getattr(config, FAMILIES[config.family].pipeline)
    said = {  # that web interfaces show, by the names of kohya's scripts
        "sd_model_name": Path(base).name, "output_name": path.stem, "learning_rate": config.learning_rate,
        "max_train_steps": config.max_train_steps, "resolution": config.resolution,
    }  # fmt: skip
    about = {f"ss_{name}": str(value) for name, value in said.items()} if config.save_format == "kohya" else {}
    write_adapter(path, adapter_of(module, part, tensors, torch.float32), config.save_format, about)


def adapter_path(config: TrainConfig) -> Path:
    """Where the adapter goes: a file, in the form of PEFT the output directory itself."""
    output = Path(config.output_dir)
    if config.save_format == "peft":
        return output
    return output / (LORA_WEIGHTS if config.save_format == "diffusers" else f"{output.resolve().name}.safetensors")


def save_pipeline(directory: Path, family: Family, module: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes the family's published pipeline into its folder of a directory.

    Args:
        module: the trained module, in training form.
        tensors: parameters and buffers of the published model, written in fp32 one after another.
    """
    parts = parts_of(empty_copy(module), family.part)
    for model in parts.values():
        model.save_pretrained = lambda folder: None  # which the pipeline saves its parts by
    output = directory / family.result
    output.mkdir(parents=True, exist_ok=True)
    aside = directory / f"pipeline{PARTIAL}"
    discard(aside)
    pipeline = family.pipeline(parts)
    use_portable_names(pipeline)
    pipeline.save_pretrained(aside, safe_serialization=True)
    write_published({name: aside / name for name in parts}, module, tensors, torch.float32)
    if (aside / "tokenizer").is_dir():
        _copy_tokenizer(family.encoding.path, aside / "tokenizer")
    sync_files(aside)
    discard(output / INDEX)
    sync(output)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == INDEX):
        discard(output / path.name)
        shutil.move(path, output / path.name)
    sync(output)
    aside.rmdir()


def _copy_tokenizer(pipeline: Path, folder: Path) -> None:
    """Copies what is known of a pipeline's tokenizer and lies in it: links of others could lead to any file.

    transformers 5 saves tokenizer.json alone; older releases read the vocabulary and the merges beside it.
    """
    left = []
    for file in sorted((pipeline / "tokenizer").iterdir()):
        if file.name in TOKENIZER_FILES and file.is_file() and lies_inside(file, pipeline):
            shutil.copyfile(file, folder / file.name)
        elif file.name in TOKENIZER_FILES or file.is_symlink() or not file.name.startswith("."):
            left.append(file.name)
    if left:
        say(f"{pipeline / 'tokenizer'}: left out of the result: {', '.join(left)}")


def create_repository(config: TrainConfig) -> str:
    """Creates the repository of `--push_to_hub`, where there is none yet, and returns its full name.

    Raises:
        UserError: not logged in, no permission, no connection; better known before the training than after.
    """
    name = config.hub_model_id or Path(config.output_dir).name
    try:
        return HfApi(token=config.hub_token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the library raises many kinds
        said = first_line(error).replace(config.hub_token or "\0", "...")  # libraries quote a header that cannot be sent
        raise UserError(f"--push_to_hub: cannot create {name}: {said}; log in with `hf auth login`") from None


def push_to_hub(config: TrainConfig, family: Family, repository: str) -> None:
    """Uploads the trained pipeline, or the adapter, with a model card."""
    output = Path(config.output_dir)
    data = ", ".join(data_set.config.source or data_set.name or "its own latent shards" for data_set in data_sets_of(config))
    tags = ["text-to-image", "diffusers", "diffusers-training"]
    tags += ["lora"] * bool(config.lora_rank) + ["dreambooth"] * config.is_dreambooth
    front = [
        *([] if Path(family.base_model).exists() else [f"base_model: {family.base_model}"]),  # the hub refuses what is no name
        "library_name: diffusers",
        f"tags: [{', '.join(tags)}]",
        *([f"instance_prompt: {json.dumps(config.instance_prompt)}"] if config.instance_prompt else []),
    ]
    card = ModelCard(
        "\n".join(["---", *front, "---"]) + f"\n\n# {repository}\n\n"
        f"{'A LoRA of' if config.lora_rank else 'Fine-tuned from'} `{family.base_model}` on `{data}`: "
        f"{config.max_train_steps} steps at learning rate {config.learning_rate}, {config.resolution} px, precision "
        f"{config.mixed_precision}.\n{_how_to_load(config, family, repository) if config.lora_rank else ''}"
    )
    discard(output / "README.md")  # which may be a link
    card.save(output / "README.md")
    links = [path.relative_to(output) for path in output.rglob("*") if path.is_symlink() and not lies_inside(path, output)]
    if links:
        say(f"{output}: not published, because these links lead elsewhere: {', '.join(map(str, links))}")
    others = [f"{glob.escape(str(link))}{within}" for link in links for within in ("", "/*")]
    HfApi(token=config.hub_token).upload_folder(
        repo_id=repository,
        folder_path=output,
        commit_message="End of training",
        ignore_patterns=[f"{CHECKPOINT}*", "shards/*", "logs/*", "wandb/*", LATEST, BEST, *_OF_THE_RUN, *others],
    )


def _how_to_load(config: TrainConfig, family: Family, repository: str) -> str:
    """Code that puts a published adapter into its pipeline, for a model card; none where no library reads the form."""
    name, entry = adapter_path(config).name, FAMILIES[config.family]
    kind, imports = entry.classes[entry.pipeline], ""
    if config.save_format == "peft":
        parts = ("unet", "text_encoder") if config.train_text_encoder else (entry.part,)
        imports = "from peft import PeftModel\n"
        within = [f', subfolder="{part}"' if len(parts) > 1 else "" for part in parts]
        load = "\n".join(
            f'pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, "{repository}"{folder})'
            for part, folder in zip(parts, within, strict=True)
        )
    elif config.family == "sd" or (config.family == "wuerstchen" and config.save_format == "diffusers"):
        load = f'pipeline.load_lora_weights("{repository}", weight_name="{name}")'
    elif config.save_format == "diffusers":
        load = f'pipeline.{entry.part}.load_lora_adapter("{repository}", prefix="{entry.part}", weight_name="{name}")'
    else:
        return ""
    code = f'{imports}\npipeline = {kind}.from_pretrained("{family.base_model}")\n{load}'
    return f"\n```python\nfrom diffusers import {kind}\n{code}\n```\n"
