"""The loss over held-out records: at fixed timesteps and with noise of its own, so that only the weights move it.

Every record is compared at a grid of timesteps. Pairs of a record and a timestep are taken in batches of the run's unit, which
are divided among the processes; each batch is the same whoever has it, and what the samples lose is added exactly. So the
number is the same, bit for bit, however many processes there are. It is the run's own loss, weights included, without what is
random in training alone: DREAM, perturbed inputs, dropped conditions and the model's dropout. It reads the first variant of an
image and its first caption.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config.options import TrainConfig
from engine.data.format.reader import Rows, Shards, ahead
from engine.data.samples.batch import Batch
from engine.data.samples.streams import shape_of
from engine.diffusion.schedules import WEIGHT
from engine.errors import LostProcess, first_line, of_all
from engine.files import digest_of
from engine.loop.capture import Captured
from engine.loop.checkpoints.state import Best
from engine.loop.damage import SoundBatches
from engine.loop.step import predict_and_compare
from engine.loop.weights.partition import Partition
from engine.models.family import Family

SEED = int.from_bytes(b"held out")  # of the noise, in every run
LOADING_LIMIT, BATCH_LIMIT = 3600.0, 120.0  # seconds for what is compiled or captured first, and for a batch

Line = dict[str, float | dict[str, float | None] | None]  # of metrics.jsonl


@dataclass(frozen=True)
class Records:
    """Those of one part that the loss is taken over.

    shards: a reader of its own, for one thread has each.
    numbers: int64 [N], increasing.
    loss_weight: what their losses are multiplied by.
    """

    shards: Shards
    numbers: Tensor
    loss_weight: float = 1.0


class NotTaken(Exception):
    """A round that came to no end, as all processes know, so that they can still save.

    error: what this process is to raise.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(first_line(error))
        self.error = error


class HeldOutLoss:
    """The loss over some records, of the weights as they are; every process must call it.

    Args:
        unit: how many samples are compared at a time.
        step: what of the training's step is captured as CUDA graphs, where it is: so is this, in the same memory.
        text_encoder: frozen, on the device, where captions are tokens.
    """

    def __init__(
        self, config: TrainConfig, family: Family, partition: Partition, records: Sequence[Records], unit: int,
        step: Captured | None, text_encoder: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.family, self.partition, self.records, self.unit = family, partition, records, unit
        self.text_encoder = text_encoder
        self.config = config.model_copy(update={"input_perturbation": 0.0, "dream_training": False})
        self.grid, self.ranges = family.schedule.draw.grid(config.validation_timesteps)
        self.predict = partition.predict if config.zero_stage == 3 else partition.module  # stage 3 gathers weights for it
        processes, device = partition.processes, partition.processes.device
        self.seed, self.scale = torch.tensor([SEED], device=device), torch.ones(1, device=device)
        self.shapes = len({shape_of(of.shards) for of in records})
        self.losses: Callable[[Batch], Tensor] = self.compare
        if step:
            self.losses = Captured(self.compare, processes, expected=self.shapes, beside=step, name="the held-out loss")
        # Of every batch: the part that it is of, and its first pair there.
        self.batches = [
            (part, first) for part, of in enumerate(records) for first in range(0, len(of.numbers) * len(self.grid), unit)
        ]

    @property
    def of(self) -> str:
        """What tells this loss from others that cannot be compared with it."""
        of_parts = [
            [of.shards.index.fingerprint, digest_of(of.numbers.tolist()), *([of.loss_weight] if of.loss_weight != 1 else [])]
            for of in self.records
        ]
        return digest_of([of_parts, self.grid.tolist(), bool(self.partition.ema)])

    @property
    def words(self) -> str:
        """What the loss is taken over."""
        count, data, every = (
            sum(len(of.numbers) for of in self.records),
            self.config.validation_data_dir,
            self.config.validation_steps,
        )
        whose = f"of {data}" if data else f"of the fraction {self.config.validation_fraction:g} of each shard's"
        return f"the loss over {count:,} records {whose}, at {len(self.grid)} timesteps, every {every:,} steps and at the end"

    @property
    def seconds_at_most(self) -> float:
        """After which time a round that has not ended is given up for hung."""
        return LOADING_LIMIT + BATCH_LIMIT * 2 * -(-len(self.batches) // self.partition.processes.world)

    def measure(self, step: int) -> Line:
        """A line of metrics: the loss of the weights and of their average, over all timesteps and in each range of them.

        Raises:
            NotTaken: shards are damaged, or a process could not go on.
        """
        started, partition = time.perf_counter(), self.partition
        line: Line = {"step": step, **self._described("validation_loss", self())}
        if partition.ema:
            with partition.averaged():
                losses = self()
            line |= self._described("validation_loss_ema", losses)
        return line | {"validation_seconds": time.perf_counter() - started}

    def __call__(self) -> Tensor:
        """The loss of every record at every timestep of the grid, in the order of parts and records: fp64 [records, grid]."""
        processes, module = self.partition.processes, self.partition.module
        rounds = -(-len(self.batches) // processes.world)
        # Collectives of ZeRO 3 need every process in every round: who has no batch left takes the last one.
        mine = [min(number * processes.world + processes.rank, len(self.batches) - 1) for number in range(rounds)]
        batches = SoundBatches(self._read([self.batches[number] for number in mine]), self._like())
        found = torch.empty(rounds, self.unit, device=processes.device)
        failure: Exception | None = None
        module.eval()
        try:
            for losses in found:
                losses.copy_(self.losses(next(batches)))
            found = found.cpu()
        except Exception as error:
            if self.config.zero_stage == 3 and processes.world > 1:  # the others wait for its part of the weights
                raise
            failure = error
        finally:
            module.train()
        told = processes.gather_objects((None, None, first_line(failure)) if failure else (found, batches.damage, None))
        if failed := [(rank, said) for rank, (_, _, said) in enumerate(told) if said is not None]:
            rank, said = failed[0]
            raise NotTaken(failure or LostProcess(f"process {rank} could not take the held-out loss: {said}"))
        if damages := [damage for _, damage, _ in told if damage]:
            raise NotTaken(of_all(damages))
        by_batch = [told[number % processes.world][0][number // processes.world] for number in range(len(self.batches))]
        pairs = [len(self.records[part].numbers) * len(self.grid) for part, _ in self.batches]
        whole = [losses[: all_of - first] for losses, all_of, (_, first) in zip(by_batch, pairs, self.batches, strict=True)]
        return torch.cat(whole).double().view(-1, len(self.grid))

    def compare(self, batch: Batch) -> Tensor:
        """The loss of each sample of a batch: fp32 [B]."""
        with torch.no_grad():
            return predict_and_compare(
                self.predict, self.family, batch, self.config, self.seed, self.scale, self.text_encoder
            )[0]  # fmt: skip

    def _read(self, batches: list[tuple[int, int]]) -> Iterator[Batch]:
        for shards, rows, given in ahead(self._asked(part, first) for part, first in batches):
            record = self._room(shards, "cpu")
            shards.gather_fields(rows, record, self.family.encoding.limits)
            yield self._batch(record, *given)

    def _asked(self, part: int, first: int) -> tuple[Shards, Rows, tuple[Tensor, Tensor, float]]:
        """Of a batch: who reads its rows; these; its slots, timesteps and weight. A part's last is filled up with its last
        pair."""
        of, grid = self.records[part], len(self.grid)
        pairs = torch.arange(first, first + self.unit).clamp(max=len(of.numbers) * grid - 1)
        records, places = of.numbers[pairs // grid], pairs % grid
        slots = (part << 48) + records * grid + places
        return of.shards, of.shards.rows_of(of.shards.find(records)), (slots, self.grid[places], of.loss_weight)

    def _room(self, shards: Shards, device: str) -> dict[str, Tensor]:
        return {
            name: torch.empty(self.unit, *field.shape, dtype=field.dtype, device=device)
            for name, field in shards.fields.items()
        }

    def _batch(self, record: dict[str, Tensor], slots: Tensor, timesteps: Tensor, loss_weight: float = 1.0) -> Batch:
        coefficients = self.family.schedule.coefficients(timesteps)
        coefficients[WEIGHT] *= loss_weight
        tensors = slots, timesteps, coefficients, torch.zeros(1, dtype=torch.int64)
        device = self.partition.processes.device
        return Batch({name: tensor.to(device) for name, tensor in record.items()}, *(tensor.to(device) for tensor in tensors))

    def _like(self) -> Batch:
        """A batch's shapes."""
        slots = torch.zeros(self.unit, dtype=torch.int64)
        batch = self._batch({}, slots, self.grid[slots])
        batch.record = self._room(self.records[0].shards, "meta")
        return batch

    def _described(self, name: str, losses: Tensor) -> Line:
        by_range = {of: _mean(losses[:, place]) for place, of in enumerate(self.ranges)}
        return {name: _mean(losses.flatten()), f"{name}_by_timestep": by_range}

    def close(self) -> None:
        """Ends what the shards are fetching."""
        for of in self.records:
            of.shards.close()


def _mean(losses: Tensor) -> float | None:
    """Added exactly; None where it is no number."""
    mean = math.fsum(losses.tolist()) / len(losses) if losses.isfinite().all() else math.nan
    return mean if math.isfinite(mean) else None


def judged(best: Best | None, of: str, line: Line) -> Best:
    """What was best so far and now, by the average where there is one.

    Args:
        of: what tells the loss from others; one that cannot be compared with this begins anew.
    """
    step, loss = int(line["step"]), line.get("validation_loss_ema", line["validation_loss"])  # type: ignore[arg-type]
    assert not isinstance(loss, dict)
    before = best if best is not None and best.of == of else None
    if before is None or (loss is not None and (before.loss is None or loss < before.loss)):
        return Best(loss=loss, step=step, last=step, rounds=0, of=of)
    return before.model_copy(update={"last": step, "rounds": before.rounds + 1})
