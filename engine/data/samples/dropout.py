"""Samples that are trained without their condition, so that sampling has something to guide against (arXiv:2207.12598)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import philox


@dataclass(frozen=True)
class Dropout:
    """Which samples these are, and what they are trained with.

    proportion: of all samples, 0 to 1.
    rows: a row [*shape] of every field of the condition, on the host.
    """

    proportion: float
    rows: dict[str, Tensor]

    def draw(self, seed: int, slots: Tensor) -> Tensor:
        """Whether each slot [B] is trained without its condition: bool [B]."""
        return philox.chances(torch.tensor([seed]), slots, philox.CAPTION_DROPOUT, self.proportion)

    def overwrite(self, record: dict[str, Tensor], dropped: Tensor) -> None:
        """Puts the rows in the place of those that `dropped` [B] tells of, in the fields [B, *shape] of a record."""
        for name, row in self.rows.items():
            record[name].view(torch.uint8)[dropped] = row.view(torch.uint8)  # as bytes: torch moves no uint16 by a mask
