"""The exponential moving average of the weights, kept where and how the fp32 weights are kept."""

import itertools
import weakref
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
        offload: keep the averages in host memory, pinned for a GPU, and move slices of them through the device in each update.
        allocate: gives the memory of the averages otherwise, laid out as a master.
        slice_bytes: how much is moved at a time; the device holds two slices.
    """

    def __init__(
        self,
        masters: list[Tensor],
        offload: bool,
        allocate: Callable[[Tensor], Tensor] = torch.empty_like,
        slice_bytes: int = 64 * 2**20,
    ) -> None:
        self.masters = [master.detach() for master in masters]
        self.offload = offload
        if offload:
            self.averages = [torch.empty_like(master, dtype=torch.float32, device="cpu") for master in self.masters]
            device, dtype = self.masters[0].device, torch.float32
            self._buffers = [torch.empty(slice_bytes // dtype.itemsize, dtype=dtype, device=device) for _ in range(2)]
            # Each buffer is filled, averaged and emptied on its own stream: one comes while the other goes.
            self._streams = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in self._buffers]
            if device.type == "cuda":
                _pin(self, self.averages)
        else:
            self.averages = [allocate(master) for master in self.masters]
        for average, master in zip(self.averages, self.masters, strict=True):
            average.copy_(master)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after optimizer step `step`, counted from 1; with `offload`, `wait` before the masters change again."""
        weight = 1 - decay_of_step(step)
        if not self.offload:
            torch._foreach_lerp_(self.averages, self.masters, weight)
            return
        for side in filter(None, self._streams):
            side.wait_stream(torch.cuda.current_stream(side.device))
        ways = itertools.cycle(zip(self._buffers, self._streams, strict=True))
        for average, master in zip(self.averages, self.masters, strict=True):
            size = self._buffers[0].numel()
            for there, weights in zip(average.view(-1).split(size), master.view(-1).split(size), strict=True):
                buffer, stream = next(ways)
                with torch.cuda.stream(stream):
                    here = buffer[: there.numel()].copy_(there, non_blocking=True)
                    there.copy_(here.lerp_(weights.float(), weight), non_blocking=True)

    @torch.no_grad()
    def exchange(self, most: int = 2**20) -> None:
        """Puts the averages where the masters are, and these where they were, bit for bit; `most` elements at a time."""
        self.wait()
        for average, master in zip(self.averages, self.masters, strict=True):
            for there, here in zip(average.view(-1).split(most), master.view(-1).split(most), strict=True):
                kept = here.clone()
                here.copy_(there)
                there.copy_(kept)

    def wait(self) -> None:
        """Lets the device's current work go on only when the averages have been moved; the host does not wait."""
        if self.offload:
            for side in filter(None, self._streams):
                torch.cuda.current_stream(side.device).wait_stream(side)


def _pin(owner: object, tensors: list[Tensor]) -> None:
    """Locks the memory of host tensors in place for as long as `owner` lives.

    torch's allocator of pinned memory would round each up to a power of two: 3.2 GiB to 4, 4.7 to 8.
    """
    runtime = torch.cuda.cudart()
    for tensor in tensors:
        torch.cuda.check_error(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        # The finalizer holds the tensor: its memory is unlocked before it is freed.
        weakref.finalize(owner, lambda held: runtime.cudaHostUnregister(held.data_ptr()), tensor)
