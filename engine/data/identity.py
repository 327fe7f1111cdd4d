"""What shapes the content of shards, and in which words two such differ."""

import socket
from typing import Any

from engine.config.options import CacheConfig
from engine.errors import UserError
from engine.models.encoder import Encoding

# What an identity calls an option -> the option.
_OPTIONS = {
    "interpolation": "image_interpolation_mode",
    "precision": "mixed_precision",
    "samples": "max_train_samples",
    "sample_seed": "subset_seed",
}
_OF_CAPTIONS = (
    "cache_text", "prompt", "keep_empty_captions", "caption_prefix", "caption_template", "shuffle_tags", "keep_tokens",
    "placeholder_token", "num_vectors",
)  # fmt: skip
# Options of the data that are part of the identity where they are not left at their defaults.
_SHAPING = ("image_mode", "background", "max_upscale", "metadata_encoding", "follow_links", "mask_column", *_OF_CAPTIONS)


def recipe_of(config: CacheConfig, encoding: Encoding) -> dict[str, Any]:
    """Everything that shapes the content of the shards, but the samples."""
    shaping = [name for name in _SHAPING if encoding.captioned or name not in _OF_CAPTIONS]
    return {
        "family": config.family,
        "models": encoding.encoder_identity(),
        "preprocessing": encoding.preprocessing_identity(),
        "precision": config.mixed_precision,
        "caption_column": config.caption_column if encoding.captioned and config.prompt is None else None,
        "shard_records": config.shard_records,
        **({"caption_variants": config.stored_variants} if config.stored_variants > 1 else {}),
        **{name: value for name in shaping if (value := getattr(config, name)) != CacheConfig.model_fields[name].default},
    }


def refuse_other_models(encoding: Encoding, recipe: dict[str, Any]) -> None:
    """To be called by a process that another one gave the recipe, before it encodes: each node may have models of its own.

    Raises:
        UserError: this process's frozen models are others than those of the recipe, or cannot be read.
    """
    node = f"node {socket.gethostname()}"  # the same line in all of its processes
    try:
        found = differences(recipe["models"], encoding.encoder_identity())
    except UserError as error:
        raise UserError(*(f"{node}: {line}" for line in error.lines), alone=True, passing=error.passing) from None
    if found:
        raise UserError(
            f"{node}: {encoding.path}: {found} than the first process has, so their shards would not belong together; give "
            "every node the same files",
            alone=True,
        )


def without_source(identity: dict[str, Any]) -> dict[str, Any]:
    """The recipe in an identity: all of it but what tells the samples."""
    return {name: value for name, value in identity.items() if name != "source"}


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In what an identity, or a part of one, differs from an earlier one: `--resolution 32, now 64; another vae`."""
    return "; ".join(said for key in before | now if (said := _difference(key, before.get(key), now.get(key))))


def _difference(key: str, before: Any, now: Any) -> str:
    if before == now:
        return ""
    if isinstance(before, dict) and isinstance(now, dict):
        if before.get("kind") != now.get("kind"):
            return f"{before.get('kind')}, now {now.get('kind')}"
        return differences(before, now)
    if key in ("files", "fingerprint", "content"):
        return "other files or rows of data"
    if key == "random_crops" and None in (before, now):
        return f"--random_crops {before}, now --center_crop" if now is None else f"--center_crop, now --random_crops {now}"
    if any(isinstance(value, str) and len(value) == 64 for value in (before, now)):
        return f"another {key}"
    option = _OPTIONS.get(key, key)
    if option in _SHAPING:  # which are left out at their defaults
        default = CacheConfig.model_fields[option].default
        before, now = (default if value is None else value for value in (before, now))
    return f"--{option} {before}, now {now}" if option in CacheConfig.model_fields else f"{option} {before}, now {now}"
