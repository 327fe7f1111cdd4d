"""What a slot reads of its record: one of the stored variants of the image, and one of the captions."""

import torch
from torch import Tensor

from engine import philox
from engine.data.format.reader import Shards


def draw_rows(shards: Shards, seed: int, slots: Tensor, records: Tensor) -> dict[str, Tensor]:
    """The rows that each slot [B] reads of its record [B], as `Shards.rows_of` gives them: int64 [B] each."""
    key = torch.tensor([seed])
    places = shards.find(records)
    variants = philox.choices(key, slots, philox.IMAGE_VARIANT, torch.from_numpy(places.image_counts))
    captions = philox.choices(key, slots, philox.CAPTION, torch.from_numpy(places.caption_counts))
    return shards.rows_of(places, variants, captions)
