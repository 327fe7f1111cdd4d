"""What captions of the data become before they are encoded: their tags in other orders, in templates, behind a prefix."""

import hashlib

import torch

from engine import philox
from engine.config.options import CacheConfig


def texts_of(config: CacheConfig, caption: str) -> list[str]:
    """The texts that are stored of a caption, as many as `config.stored_variants`; some may be equal.

    They are functions of the caption alone, so that another run, and a data set that has grown, has the same.
    """
    key = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], signed=True)
    variants = [caption] * config.stored_variants
    if config.shuffle_tags:
        variants = _shuffled(caption, config.keep_tokens, len(variants), key)
    if templates := config.caption_template:
        variants = [
            templates[(key + number) % len(templates)].replace("{caption}", text) for number, text in enumerate(variants)
        ]
    if prefix := config.caption_prefix:
        apart = "" if prefix[-1].isspace() else " "
        variants = [f"{prefix}{apart}{text}".strip() for text in variants]
    return variants


def _shuffled(caption: str, kept: int, count: int, key: int) -> list[str]:
    """A caption with its tags in `count` random orders, of which the first `kept` tags stay where they are."""
    tags = [tag for each in caption.split(",") if (tag := each.strip())]
    first, others = tags[:kept], tags[kept:]
    words = philox.draw_words(torch.tensor([key]), torch.arange(count), philox.CAPTION, -(-len(others) // 4))
    orders = words.flatten(1)[:, : len(others)].argsort(dim=1, stable=True).tolist()
    return [", ".join([*first, *(others[place] for place in order)]) for order in orders]
