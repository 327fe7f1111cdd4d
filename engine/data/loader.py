"""Batches ahead of time: a thread gathers the rows of the next micro-batches and copies them to the device beside the step."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.order import slots_of_micro_batch
from engine.data.shards import Shards
from engine.diffusion import Schedule

DEPTH = 2  # micro-batches ready ahead of the step


@dataclass
class Batch:
    """One micro-batch on the device.

    record: the family's fields, each [B, *shape].
    slots: int64 [B].
    timesteps: [B], as the model takes them.
    coefficients: fp32 [5, B], the schedule's a, s, c_x, c_e and w.
    copied: on a GPU, the event that the copy from the host is done.
    """

    record: dict[str, Tensor]
    slots: Tensor
    timesteps: Tensor
    coefficients: Tensor
    copied: torch.cuda.Event | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.record.values(), self.slots, self.timesteps, self.coefficients]


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

    def slots(self, step: int, accumulation_index: int) -> Tensor:
        return slots_of_micro_batch(step, self.global_batch, self.micro_batch, accumulation_index, self.rank, self.world)


class Loader:
    """Iterates over micro-batches from `first_step` to the end of `last_step`, exclusive.

    The host knows the slots, so it draws the timesteps and their coefficients for the device.
    """

    def __init__(
        self,
        shards: Shards,
        plan: BatchPlan,
        seed: int,
        schedule: Schedule,
        device: torch.device,
        first_step: int,
        last_step: int,
    ) -> None:
        self.shards, self.plan, self.seed, self.schedule, self.device = shards, plan, seed, schedule, device
        self.steps = range(first_step, last_step)
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(DEPTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item.copied is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(item.copied)
                for tensor in item.tensors:
                    tensor.record_stream(stream)
            yield item

    def close(self) -> None:
        """Ends the thread; to be called also when the iteration was left early."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _work(self) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            for item in self._device_batches() if self.device.type == "cuda" else self._host_batches():
                self._ready.put(item)
                if self._stop.is_set():
                    return
            self._ready.put(None)
        except BaseException as error:  # raised again where the batches are consumed
            self._ready.put(error)

    def _host_batches(self, buffers: Iterator[dict[str, Tensor]] | None = None) -> Iterator[Batch]:
        """Micro-batches in host memory; into the given (pinned) buffers, or fresh ones."""
        seed = torch.tensor([self.seed])
        for step in self.steps:
            for accumulation_index in range(self.plan.accumulation):
                slots = self.plan.slots(step, accumulation_index)
                rows = self.shards.rows_of(self.seed, slots)
                record = next(buffers) if buffers is not None else self._buffers(pinned=False)
                for name, field in self.shards.fields.items():
                    self.shards.gather(name, rows[field.per], record[name])
                timesteps = self.schedule.draw(seed, slots)
                yield Batch(record, slots, timesteps, self.schedule.coefficients(timesteps))

    def _buffers(self, pinned: bool) -> dict[str, Tensor]:
        return {
            name: torch.empty(self.plan.micro_batch, *field.shape, dtype=field.dtype, pin_memory=pinned)
            for name, field in self.shards.fields.items()
        }

    def _device_batches(self) -> Iterator[Batch]:
        """Micro-batches copied to the device on a side stream."""
        stream = torch.cuda.Stream(self.device)
        ring = [(self._buffers(pinned=True), torch.cuda.Event()) for _ in range(DEPTH + 1)]

        def free_buffers() -> Iterator[dict[str, Tensor]]:
            while True:
                for buffers, copied in ring:
                    copied.synchronize()
                    yield buffers

        for number, batch in enumerate(self._host_batches(free_buffers())):
            copied = ring[number % len(ring)][1]
            with torch.cuda.stream(stream):
                record = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.record.items()}
                slots, timesteps, coefficients = (
                    tensor.pin_memory().to(self.device, non_blocking=True)
                    for tensor in (batch.slots, batch.timesteps, batch.coefficients)
                )
                copied.record(stream)
            yield Batch(record, slots, timesteps, coefficients, copied)
