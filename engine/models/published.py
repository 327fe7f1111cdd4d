"""Published pipelines on disk or on the hub: where they are, their parts, and whether the parts belong together."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from engine.config.options import CacheConfig
from engine.errors import UserError, first_line
from engine.files import digest
from engine.models.check import INDEX, check_weights, present_variant, read_part
from engine.models.kinds import require_kind
from engine.models.single_file import open_single_file


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
        return Path(
            DiffusionPipeline.download(
                name,
                revision=config.revision,
                variant=config.variant,
                cache_dir=config.cache_dir,
                **dict.fromkeys(skip),
            )
        )
    except Exception as error:  # a connection, a missing repository, a gated one: the library raises many kinds
        raise UserError(f"--{option} {name}: neither a directory nor on the hub: {first_line(error)}") from None


def require_equal(where: str, left: tuple[str, Any], right: tuple[str, Any]) -> None:
    """Raises `UserError` unless two (name, value) pairs, which must agree for parts to fit each other, do."""
    if left[1] != right[1]:
        raise UserError(f"{where}: {left[0]} is {left[1]}, but {right[0]} is {right[1]}; these do not belong together")


def read_text_parts(pipeline: Path) -> tuple[Any, Any]:
    """The configuration of a pipeline's text encoder and its tokenizer, which must not pad captions beyond the positions that
    the encoder has."""
    config = read_part(pipeline, "text_encoder", CLIPTextConfig.from_pretrained)
    tokenizer = read_part(pipeline, "tokenizer", CLIPTokenizer.from_pretrained)
    names = {file.name for file in (pipeline / "tokenizer").iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise UserError(
            f"{pipeline / 'tokenizer'}: neither tokenizer.json nor vocab.json and merges.txt there; download it again"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{pipeline}: the tokenizer has {len(tokenizer)} tokens, but the text encoder {config.vocab_size} (vocab_size); "
            "these do not belong together"
        )
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise UserError(
            f"{pipeline}: tokenizer model_max_length is {tokenizer.model_max_length}, but the text encoder has "
            f"{config.max_position_embeddings} positions (max_position_embeddings); set model_max_length in "
            "tokenizer_config.json"
        )
    return config, tokenizer


def read_image_parts(pipeline: Path) -> tuple[Any, Any]:
    """The configuration of a pipeline's CLIP image encoder and its image processor."""
    config = read_part(pipeline, "image_encoder", CLIPVisionConfig.from_pretrained)
    # PIL's resampling on every machine: with torchvision installed, transformers' default would be another.
    return config, read_part(pipeline, "image_processor", CLIPImageProcessorPil.from_pretrained)


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
            check_weights(folder, model, present_variant(folder, variant))
        return digest_folder(folder)

    return {part: partial(digest_part, pipeline / part, model) for part, model in models.items()}


def digest_folder(folder: Path) -> str:
    """One digest over the names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(folder).as_posix()}\0{digest(path)}\0".encode())
    return total.hexdigest()


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """One digest over the names, shapes, dtypes and values of tensors, whichever kind of file they came from."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
