"""Published pipelines on disk or on the hub: where they are, their parts, and whether the parts belong together."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from engine.catalogue import INDEX
from engine.config.options import CacheConfig
from engine.errors import UserError, first_line
from engine.files import digest, lies_inside, reading
from engine.models.check import check_weights
from engine.models.configurations import LARGEST_SIDE, last_token, read_part, transformers_config
from engine.models.index import read_index
from engine.models.kinds import require_kind
from engine.models.single_file import open_single_file
from engine.models.weights import is_weights, present_variant, read_tensors, require_finite, weight_files

LONGEST_CAPTION = 8192  # tokens
LARGEST_PART = 2**37  # bytes of the files of a frozen model, in all their formats; those published have up to some 10 GiB


def locate(config: CacheConfig, option: str, skip: Sequence[str] = ()) -> Path:
    """The directory of the pipeline that an option names; a name on the hub is downloaded first, a single file opened.

    Args:
        skip: parts that need not be downloaded.

    Raises:
        UserError: neither a directory nor a file nor on the hub, or another kind of pipeline.
    """
    name = getattr(config, option)
    path = Path(name)
    if path.is_file():
        path = open_single_file(path, config)
    elif config.original_config or config.tokenizer_name:
        raise UserError(f"--{option} {name}: not a single file, so leave out --original_config and --tokenizer_name")
    elif not path.is_dir():
        path = _download(config, option, skip)
    if (path / INDEX).is_file():  # of a decoder's prior some parts are enough
        require_kind(path, config.family, option)
    return path


def _download(config: CacheConfig, option: str, skip: Sequence[str]) -> Path:
    name = getattr(config, option)
    try:
        return download(name, config.revision, config.variant, config.cache_dir, skip)
    except UserError:
        raise
    except Exception as error:  # a connection, a missing repository, a gated one: the library raises many kinds
        raise UserError(f"--{option} {name}: neither a directory nor on the hub: {first_line(error)}") from None


def download(
    name: str, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None, skip: Sequence[str] = ()
) -> Path:
    """The directory of a pipeline on the hub, with the parts but those to skip.

    The index comes first and is judged: by one that names classes of its own, diffusers would fetch and run programs. The rest
    is of the same revision.
    """
    index = Path(hf_hub_download(name, INDEX, revision=revision, cache_dir=cache_dir))
    read_index(index.parent)
    if re.fullmatch("[0-9a-f]{40}", index.parent.name):
        revision = index.parent.name
    options = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    return Path(DiffusionPipeline.download(name, **options, **dict.fromkeys(skip)))


def require_equal(where: str, left: tuple[str, Any], right: tuple[str, Any]) -> None:
    """Raises `UserError` unless two (name, value) pairs, which must agree for parts to fit each other, do."""
    if left[1] != right[1]:
        raise UserError(f"{where}: {left[0]} is {left[1]}, but {right[0]} is {right[1]}; these do not belong together")


def read_text_parts(pipeline: Path) -> tuple[Any, Any]:
    """The configuration of a pipeline's text encoder and its tokenizer, which must not pad captions beyond the positions that
    the encoder has."""
    config = transformers_config(pipeline / "text_encoder", CLIPTextConfig)
    tokenizer = read_tokenizer(pipeline)
    for name in ("vocab_size", "max_position_embeddings", "eos_token_id"):
        if type(value := getattr(config, name)) is not int:
            raise UserError(f"{pipeline / 'text_encoder' / 'config.json'}: its {name} is {value}; download it again")
    if (count := max(len(tokenizer), last_token(tokenizer) + 1)) > config.vocab_size:
        raise UserError(
            f"{pipeline}: the tokenizer has {count} tokens, but the text encoder {config.vocab_size} (vocab_size); "
            "these do not belong together"
        )
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise UserError(
            f"{pipeline}: tokenizer model_max_length is {tokenizer.model_max_length}, but the text encoder has "
            f"{config.max_position_embeddings} positions (max_position_embeddings); set model_max_length in "
            "tokenizer_config.json"
        )
    with reading(pipeline / "tokenizer", "download it again"):
        if tokenizer.model_max_length > LONGEST_CAPTION:
            raise ValueError(f"it makes {tokenizer.model_max_length} tokens of a caption")
        tokens, mask = tokenize(tokenizer, ["a photograph of a cat", ""])
        if tokens.shape != (2, tokenizer.model_max_length) or mask.shape != tokens.shape:
            raise ValueError(f"it makes {list(tokens.shape)} tokens of 2 captions")
        if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
            raise ValueError(f"it makes a token {int(tokens.max())} of {config.vocab_size}")
    return config, tokenizer


def read_tokenizer(pipeline: Path) -> Any:
    """A pipeline's tokenizer.

    Raises:
        UserError: it is not there, or damaged.
    """
    folder = pipeline / "tokenizer"
    tokenizer = read_part(folder, CLIPTokenizer.from_pretrained, pipeline)
    names = {file.name for file in folder.iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise UserError(f"{folder}: neither tokenizer.json nor vocab.json and merges.txt there; download it again")
    length = tokenizer.model_max_length
    if type(length) is not int or length <= 0:
        raise UserError(f"{folder / 'tokenizer_config.json'}: its model_max_length is {length}; download it again")
    return tokenizer


def read_scheduler(pipeline: Path, **overrides: Any) -> Any:
    """A pipeline's noise schedule.

    Args:
        overrides: what to have in the place of its configuration's values.

    Raises:
        UserError: it is not there, damaged, or none that noise can be added by.
    """
    scheduler = read_part(pipeline / "scheduler", partial(DDPMScheduler.from_pretrained, **overrides), pipeline)
    signal, file = scheduler.alphas_cumprod, pipeline / "scheduler" / "scheduler_config.json"
    if not bool(((signal >= 0) & (signal <= 1)).all()):
        raise UserError(f"{file}: its betas leave more than all of the image, or less than nothing of it; download it again")
    return scheduler


def read_image_parts(pipeline: Path) -> tuple[Any, Any]:
    """The configuration of a pipeline's CLIP image encoder and its image processor, which makes images of its size."""
    config = transformers_config(pipeline / "image_encoder", CLIPVisionConfig)
    # PIL's resampling on every machine: with torchvision installed, transformers' default would be another.
    processor = read_part(pipeline / "image_processor", CLIPImageProcessorPil.from_pretrained, pipeline)
    with reading(pipeline / "image_processor", f"take it and image_encoder from one model, of {config.image_size} px"):
        sizes = [
            side for size in (processor.size, processor.crop_size) for side in dict(size or {}).values() if side is not None
        ]
        if not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sizes):
            raise ValueError(f"it brings images to {sizes} px")
        pixels = processor(Image.new("RGB", (48, 32), "grey"), return_tensors="pt").pixel_values
        if pixels.shape != (1, 3, config.image_size, config.image_size) or not bool(pixels.isfinite().all()):
            raise ValueError(f"it makes {list(pixels.shape)} numbers of an image, or some that are not finite")
    return config, processor


def tokenize(tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token numbers and attention mask, int64 [captions, length], padded and truncated to the tokenizer's length."""
    tokens = tokenizer(
        captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    )
    return tokens.input_ids, tokens.attention_mask


def digest_parts(pipeline: Path, models: dict[str, Any], variant: str | None = None) -> dict[str, Callable[[], str]]:
    """What computes the digests of parts, by name, and raises `UserError` unless their weights are whole.

    Args:
        models: the class of each part, None for those without weights.
    """

    def digest_part(folder: Path, model: Any) -> str:
        if model:
            present = present_variant(folder, variant)
            check_weights(folder, model, present)
            for file in weight_files(folder, model, present):
                require_finite(file, read_tensors(file))
        return digest_folder(folder)

    return {part: partial(digest_part, pipeline / part, model) for part, model in models.items()}


def digest_folder(folder: Path) -> str:
    """One digest over the names and contents of a folder's files; of what links lead to elsewhere, weights alone are.

    Raises:
        UserError: it holds more than any part does.
    """
    total = hashlib.sha256()
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (is_weights(path) or lies_inside(path, folder) or lies_inside(path, folder.parent))
    ]
    if (size := sum(path.stat().st_size for path in files)) > LARGEST_PART:
        raise UserError(f"{folder}: holds {size >> 30} GiB, more than any frozen model; leave its own files there alone")
    for path in files:
        total.update(os.fsencode(f"{path.relative_to(folder).as_posix()}\0{digest(path)}\0"))
    return total.hexdigest()


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """One digest over the names, shapes, dtypes and values of tensors, whichever kind of file they came from."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
