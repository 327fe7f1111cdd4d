"""The exponential moving average of the weights, kept where and how the fp32 weights are kept."""

from collections.abc import Callable

import torch
from torch import Tensor


def decay_of_step(step: int, decay: float = 0.9999) -> float:
    """The decay after optimizer step `step`, counted from 1: diffusers' `EMAModel` with its defaults."""
    number = max(0, step - 1)
    return 0.0 if number == 0 else min((1 + number) / (10 + number), decay)


class Ema:
    """Averages of `masters`, updated in place: ema <- ema + (1 - decay) (weight - ema).

    On the device, and beside our own AdamW, that is done by the optimizer in its pass over the weights; `update` is for the
    other cases.

    Args:
        masters: the fp32 tensors that the optimizer updates.
        offload: keep the averages in host memory (pinned, for a GPU) and move them through the device in each update.
        allocate: gives the memory of the averages otherwise, laid out as a master.
    """

    def __init__(self, masters: list[Tensor], offload: bool, allocate: Callable[[Tensor], Tensor] = torch.empty_like) -> None:
        self.masters = [master.detach() for master in masters]
        self.offload = offload and self.masters[0].is_cuda
        if self.offload:
            self.averages = [torch.empty_like(master, device="cpu", pin_memory=True) for master in self.masters]
        else:
            self.averages = [allocate(master) for master in self.masters]
        for average, master in zip(self.averages, self.masters, strict=True):
            average.copy_(master)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after optimizer step `step`, counted from 1."""
        weight = 1 - decay_of_step(step)
        if not self.offload:
            torch._foreach_lerp_(self.averages, self.masters, weight)
            return
        for average, master in zip(self.averages, self.masters, strict=True):
            current = average.to(master.device, non_blocking=True)
            average.copy_(current.lerp_(master, weight), non_blocking=True)
