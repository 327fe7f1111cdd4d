"""Batches ahead of time: a thread gathers the rows of the next micro-batches and copies them to the device beside the step.

What is a function of seed and slot alone (rows, timesteps, coefficients) is drawn for many micro-batches in a few operations.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from engine.data.samples.batch import Batch, BatchPlan
from engine.data.samples.draw import draw_rows
from engine.data.samples.dropout import Dropout
from engine.data.samples.streams import Streams
from engine.diffusion.schedules import Schedule

DEPTH = 2  # micro-batches ready ahead of the step
DRAWN = 4096  # slots drawn together: enough that arithmetic sets the time, and not the number of operations


class Loader:
    """Iterates over micro-batches from `first_step` to the end of `last_step`, exclusive.

    The host knows the slots, so it draws the timesteps and their coefficients for the device.

    Args:
        limits: what the numbers of some fields must stay below.
        dropout: of conditions.
    """

    def __init__(
        self,
        streams: Streams,
        plan: BatchPlan,
        seed: int,
        schedule: Schedule,
        device: torch.device,
        first_step: int,
        last_step: int,
        limits: Mapping[str, int] = MappingProxyType({}),
        dropout: Dropout | None = None,
    ) -> None:
        self.streams, self.plan, self.seed, self.schedule, self.device = streams, plan, seed, schedule, device
        self.shards = streams.streams[0].shards
        self.limits, self.dropout = limits, dropout
        self.on_gpu = device.type == "cuda"
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
            if self.on_gpu:
                # A device without a number is the current one. This thread's copies run beside the step.
                torch.cuda.set_stream(torch.cuda.Stream(self.device))
            for item in self._device_batches() if self.on_gpu else self._host_batches():
                self._ready.put(item)
                if self._stop.is_set():
                    return
            self._ready.put(None)
        except BaseException as error:  # raised again where the batches are consumed
            self._ready.put(error)

    def _host_batches(self) -> Iterator[Batch]:
        for rows, draws in self.shards.ahead(self._draws()):
            self._fill(buffers := self._buffers(), rows, draws[0])
            yield Batch(buffers, *draws)

    def _device_batches(self) -> Iterator[Batch]:
        """Micro-batches that are being copied to the device from a ring of pinned buffers."""
        ring = [(self._buffers(), torch.cuda.Event()) for _ in range(DEPTH + 1)]
        for number, (rows, draws) in enumerate(self.shards.ahead(self._draws())):
            buffers, copied = ring[number % len(ring)]
            copied.synchronize()
            self._fill(buffers, rows, draws[0])
            record = {name: self._send(tensor) for name, tensor in buffers.items()}
            sent = [self._send(tensor) for tensor in draws]
            copied.record()
            yield Batch(record, *sent, copied=copied)

    def _fill(self, buffers: dict[str, Tensor], rows: dict[str, Tensor], slots: Tensor) -> None:
        """The record of a micro-batch with slots [B]."""
        self.shards.gather_fields(rows, buffers, self.limits)
        if self.dropout:
            self.dropout.overwrite(buffers, self.dropout.draw(self.seed, slots))

    def _send(self, pinned: Tensor) -> Tensor:
        return pinned.to(self.device, non_blocking=True)

    def _buffers(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(self.plan.micro_batch, *field.shape, dtype=field.dtype, pin_memory=self.on_gpu)
            for name, field in self.shards.fields.items()
        }

    def _draws(self) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
        """Of every micro-batch, in order: the rows that it reads; and its slots, timesteps, coefficients and data set.

        They are drawn for one micro-batch first, so that it is soon there, then for twice as many each time.
        """
        first, end = (step * self.plan.accumulation for step in (self.steps.start, self.steps.stop))
        count, most = 1, min(DRAWN, self.shards.found_together)
        while first < end:
            last = min(first + count, end)
            if self.shards.horizon:
                self._expect(first, end)
            rows, draws = self._draw(self.plan.slots(first, last))
            for number in range(last - first):
                yield {of: numbers[number] for of, numbers in rows.items()}, [tensor[number] for tensor in draws]
            first, count = last, min(2 * count, max(most // self.plan.micro_batch, 1))

    def _expect(self, first: int, end: int) -> None:
        """Lets the shards fetch what the micro-batches from `first` on read; of many samples some are looked at."""
        slots = self.plan.slots(first, min(first + -(-self.shards.horizon // self.plan.micro_batch), end)).flatten()
        self.shards.expect(self.streams.find(slots[:: -(-len(slots) // DRAWN)])[1])

    def _draw(self, slots: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The same of micro-batches with slots [M, B]: rows [M, B]; and [M, B], [M, B], [M, 5, B], [M, 1]."""
        flat = slots.flatten()
        _, records = self.streams.find(flat)
        drawn = draw_rows(self.shards, self.seed, flat, records)
        rows = {of: numbers.view(slots.shape) for of, numbers in drawn.items()}
        timesteps = self.schedule.draw(torch.tensor([self.seed]), flat, self.plan.global_batch)
        coefficients = self.schedule.coefficients(timesteps).unflatten(1, slots.shape).transpose(0, 1).contiguous()
        data_sets = torch.zeros(len(slots), 1, dtype=torch.int64)
        draws = [slots, timesteps.view(slots.shape), coefficients, data_sets]
        return rows, [tensor.pin_memory() for tensor in draws] if self.on_gpu else draws
