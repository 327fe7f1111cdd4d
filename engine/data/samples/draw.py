"""What a slot reads of its record: one of the stored variants of the image, and one of the captions."""

import torch
from torch import Tensor

from engine import philox
from engine.data.format.shard import Shards
from engine.data.samples.order import records_of


def draw_rows(shards: Shards, seed: int, slots: Tensor) -> dict[str, Tensor]:
    """The image row and, where there are captions, the caption row of each slot [B]: int64 [B], numbered over all shards."""
    key = torch.tensor([seed])
    records = records_of(seed, slots, len(shards))
    variants = philox.choices(key, slots, philox.IMAGE_VARIANT, shards.image_counts[records])
    captions = philox.choices(key, slots, philox.CAPTION, shards.caption_counts[records])
    return shards.rows_of(records, variants, captions)
