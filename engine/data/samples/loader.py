"""Batches ahead of time: a thread gathers the rows of the next micro-batches and copies them to the device beside the step.

What is a function of seed and slot alone (rows, timesteps, coefficients) is drawn for many micro-batches in a few operations.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from engine.data.format.reader import Rows, Shards, ahead
from engine.data.samples.batch import Batch, BatchPlan
from engine.data.samples.draw import draw_rows
from engine.data.samples.dropout import Dropout
from engine.data.samples.streams import Streams
from engine.diffusion.schedules import WEIGHT, Schedule

DEPTH = 2  # micro-batches ready ahead of the step
ALIGNMENT = 64  # bytes, of fields in memory
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
        for shards, rows, draws in ahead(self._draws()):
            room = torch.empty(self._bytes_of(shards), dtype=torch.uint8)
            yield Batch(self._gather(shards, rows, draws[0], room), *draws)

    def _device_batches(self) -> Iterator[Batch]:
        """Micro-batches that are being copied to the device from a ring of pinned memory, of the size of the largest."""
        size = max(self._bytes_of(stream.shards) for stream in self.streams.streams)
        ring = [(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(DEPTH + 1)]
        for number, (shards, rows, draws) in enumerate(ahead(self._draws())):
            room, copied = ring[number % len(ring)]
            copied.synchronize()
            record = {name: self._send(tensor) for name, tensor in self._gather(shards, rows, draws[0], room).items()}
            sent = [self._send(tensor) for tensor in draws]
            copied.record()
            yield Batch(record, *sent, copied=copied)

    def _send(self, pinned: Tensor) -> Tensor:
        return pinned.to(self.device, non_blocking=True)

    def _gather(self, shards: Shards, rows: Rows, slots: Tensor, room: Tensor) -> dict[str, Tensor]:
        """The record of a micro-batch with slots [B], in `room`, uint8 [bytes]."""
        count, start, record = self.plan.micro_batch, 0, {}
        for name, field in shards.fields.items():
            record[name] = room[start : start + count * field.row_bytes].view(field.dtype).view(count, *field.shape)
            start += _aligned(count * field.row_bytes)
        shards.gather_fields(rows, record, self.limits)
        if self.dropout:
            self.dropout.overwrite(record, self.dropout.draw(self.seed, slots))
        return record

    def _bytes_of(self, shards: Shards) -> int:
        return sum(_aligned(self.plan.micro_batch * field.row_bytes) for field in shards.fields.values())

    def _draws(self) -> Iterator[tuple[Shards, Rows, list[Tensor]]]:
        """Of every micro-batch, in order: who reads its rows; these; and its slots, timesteps, coefficients and data set.

        They are drawn for one micro-batch first, so that it is soon there, then for twice as many each time.
        """
        first, end = (step * self.plan.accumulation for step in (self.steps.start, self.steps.stop))
        readers = [stream.shards for stream in self.streams.streams]
        count, most = 1, min(DRAWN, *(reader.found_together for reader in readers))
        horizon = sum(reader.horizon for reader in readers)
        while first < end:
            last = min(first + count, end)
            if horizon:
                self._expect(self.plan.slots(first, min(first + -(-horizon // self.plan.micro_batch), end)).flatten())
            yield from self._draw(self.plan.slots(first, last))
            first, count = last, min(2 * count, max(most // self.plan.micro_batch, 1))

    def _expect(self, slots: Tensor) -> None:
        """Lets the shards fetch what slots read; of many some are looked at."""
        streams, records = self.streams.find(slots[:: -(-len(slots) // DRAWN)])
        for number, stream in enumerate(self.streams.streams):
            stream.shards.expect(records[streams == number])

    def _draw(self, slots: Tensor) -> Iterator[tuple[Shards, Rows, list[Tensor]]]:
        """The same of micro-batches with slots [M, B]."""
        flat = slots.flatten()
        found, records = (each.view(slots.shape) for each in self.streams.find(flat))
        timesteps = self.schedule.draw(torch.tensor([self.seed]), flat, self.plan.global_batch)
        coefficients = self.schedule.coefficients(timesteps)
        self._weigh(coefficients, timesteps, found.flatten())
        coefficients = coefficients.unflatten(1, slots.shape).transpose(0, 1).contiguous()
        data_sets = self.streams.data_set_numbers[found[:, :1]]
        draws = [slots, timesteps.view(slots.shape), coefficients, data_sets]
        draws = [tensor.pin_memory() for tensor in draws] if self.on_gpu else draws
        rows: list[Rows] = [{}] * len(slots)
        for number in found[:, 0].unique().tolist():
            here = (found[:, 0] == number).nonzero()[:, 0]
            drawn = draw_rows(self.streams.streams[number].shards, self.seed, slots[here].flatten(), records[here].flatten())
            for place, micro_batch in enumerate(here.tolist()):
                rows[micro_batch] = {of: numbers.view(-1, slots.shape[1])[place] for of, numbers in drawn.items()}
        for micro_batch, number in enumerate(found[:, 0].tolist()):
            yield self.streams.streams[number].shards, rows[micro_batch], [tensor[micro_batch] for tensor in draws]

    def _weigh(self, coefficients: Tensor, timesteps: Tensor, found: Tensor) -> None:
        """Puts what the losses of streams count on the coefficients [rows, N] of timesteps [N], by the stream of each."""
        for number, stream in enumerate(self.streams.streams):
            if stream.weighs_alike:
                here = found == number
                coefficients[:, here] = self.schedule.coefficients(timesteps[here], weighed=False)
            if stream.loss_weight != 1:
                coefficients[WEIGHT, found == number] *= stream.loss_weight


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
