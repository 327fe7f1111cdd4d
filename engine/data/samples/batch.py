"""What a step is given: one micro-batch, and which of all samples it holds."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.data.samples.order import slots_of_micro_batches


@dataclass
class Batch:
    """One micro-batch on the device.

    record: the family's fields, each [B, *shape].
    slots: int64 [B].
    timesteps: [B], as the model takes them.
    coefficients: fp32 [5, B], the schedule's a, s, c_x, c_e and w; with a Huber loss [6, B], the last row its c.
    data_set: int64 [1], the number of the data set that all of it is of.
    copied: on a GPU, the event that the copy from the host is done.
    """

    record: dict[str, Tensor]
    slots: Tensor
    timesteps: Tensor
    coefficients: Tensor
    data_set: Tensor
    copied: torch.cuda.Event | None = field(default=None, kw_only=True)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.record.values(), self.slots, self.timesteps, self.coefficients, self.data_set]


@dataclass(frozen=True)
class BatchPlan:
    """Which part of the endless sequence of slots this process trains on."""

    micro_batch: int
    accumulation: int
    rank: int
    world: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world

    def slots(self, first: int, last: int) -> Tensor:
        """Those of micro-batches `first` to `last`, exclusive, counted from the start of training: int64 [last - first, B]."""
        return slots_of_micro_batches(first, last, self.micro_batch, self.rank, self.world)
