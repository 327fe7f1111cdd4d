"""What becomes of a run whose shards turn out to be damaged: all processes leave together, with a checkpoint."""

from collections.abc import Iterator

import torch

from engine.data.samples.batch import Batch
from engine.errors import MEND_THE_PLACE, UserError, first_line


class SoundBatches:
    """Micro-batches for as long as the shards give them; after those, ones that train nothing.

    One process may meet damage alone, while the others are in a step that they cannot leave. So it takes part in that one, and
    in those until all agree to stop, with losses that are no numbers: all processes skip such steps.

    damage: what was met.
    given: how many micro-batches came before it.

    Args:
        like: what has a micro-batch's shapes. Default: the first one, before which nothing can be lost.
    """

    def __init__(self, batches: Iterator[Batch], like: Batch | None = None) -> None:
        self.damage: UserError | None = None
        self.given = 0
        self._batches = batches
        self._like = like and _in_meta(like)
        self._device = like.slots.device if like else None

    def __iter__(self) -> "SoundBatches":
        return self

    def __next__(self) -> Batch:
        if self.damage is None:
            try:
                batch = next(self._batches)
            except (UserError, OSError) as error:
                if self._like is None:  # nothing was trained that could be lost
                    raise
                mend = f"{first_line(error)}; {MEND_THE_PLACE}"
                self.damage = error if isinstance(error, UserError) else UserError(mend, passing=True)
            else:
                self.given += 1
                self._like = self._like or _in_meta(batch)
                self._device = batch.slots.device
                return batch
        assert self._like is not None
        return _untrained(self._like, self._device)


def _in_meta(batch: Batch) -> Batch:
    record = {name: tensor.to("meta") for name, tensor in batch.record.items()}
    return Batch(record, *(tensor.to("meta") for tensor in (batch.slots, batch.timesteps, batch.coefficients, batch.data_set)))


def _untrained(like: Batch, device: torch.device | None) -> Batch:
    """A micro-batch of no slots, of which every loss is no number."""
    record = {name: torch.zeros_like(tensor, device=device) for name, tensor in like.record.items()}
    slots, timesteps = torch.full_like(like.slots, -1, device=device), torch.zeros_like(like.timesteps, device=device)
    coefficients = torch.full_like(like.coefficients, torch.nan, device=device)
    return Batch(record, slots, timesteps, coefficients, torch.zeros_like(like.data_set, device=device))
