"""Metrics: summed on the device, and read by the host every `--log_every` steps."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.data.samples.batch import Batch
from engine.loop.flops import Flops
from engine.loop.noise_scale import NoiseScale
from engine.loop.run import Run
from engine.processes import Processes

OFFENDING = 16  # slots that are kept for a message
TAKEN_BACK = 32  # steps that can be taken back; processes agree to leave within 20


class Metrics:
    """The running sums between two log points.

    Args:
        flops: to tell how well the device is used, where that is asked for.
        noise_scale: where it is asked for.
    """

    def __init__(
        self, run: Run, processes: Processes, flops: Flops | None = None, noise_scale: NoiseScale | None = None
    ) -> None:
        self.run, self.processes, self.flops, self.noise_scale = run, processes, flops, noise_scale
        device = processes.device
        self.loss_sum = torch.zeros((), device=device)
        self.offending = torch.full((OFFENDING,), -1, device=device)
        self.data_sets = run.streams.data_sets if len(run.streams.data_sets) > 1 else []
        # Of each data set the sum of its losses, and how many there were; and what these were multiplied by.
        self.of_data_sets = torch.zeros(2, len(self.data_sets), device=device)
        self.weights = [run.streams.loss_weights[name] for name in self.data_sets]
        self._numbers = torch.arange(len(self.data_sets), device=device)
        self.steps = 0
        # The sums and `steps` after each of the last steps, and before the first.
        self._after: deque[tuple[Tensor, int, Tensor]] = deque(maxlen=TAKEN_BACK + 1)
        self._after.append(self._sums())
        self._since = 0.0

    def start(self) -> None:
        """Begins to count the time."""
        self._since = time.perf_counter()

    def add(self, micro_batch_loss: Tensor, batch: Batch, accumulation: int) -> None:
        """Adds the losses [B] of one micro-batch; a step's loss is the mean over its micro-batches.

        Losses that are not finite count as 0, and their slots are kept.
        """
        counted = micro_batch_loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.loss_sum += counted.mean() / accumulation
        if self.data_sets:
            losses_and_samples = torch.stack([counted, counted.isfinite().to(counted.dtype)]).sum(1)
            self.of_data_sets += losses_and_samples[:, None] * (self._numbers == batch.data_set)
        offending = torch.where(counted == micro_batch_loss, -1, batch.slots)
        # The largest slots are the latest; -1 fills up. A fixed shape, so that the host need not know how many there are.
        self.offending.copy_(torch.cat([self.offending, offending]).topk(OFFENDING).values)

    def end_step(self) -> None:
        """To be called when all micro-batches of a step were added."""
        self.steps += 1
        self._after.append(self._sums())

    def _sums(self) -> tuple[Tensor, int, Tensor]:
        return self.loss_sum.clone(), self.steps, self.of_data_sets.clone()

    def take_back(self, steps: int) -> None:
        """Forgets the last steps, which trained nothing, whether they were read or not."""
        for _ in range(min(steps, len(self._after) - 1)):
            self._after.pop()
        self.resume(*self._after[-1])

    def resume(self, loss_sum: float | Tensor, steps: int, of_data_sets: Tensor | float = 0.0) -> None:
        """Goes on from the sums of losses and the number of steps that a checkpoint found since the last line."""
        self.loss_sum.fill_(loss_sum)
        self.of_data_sets.copy_(torch.as_tensor(of_data_sets))
        self.steps = steps
        self._after[-1] = self._sums()

    def exclude(self, work: Callable[[], Any]) -> None:
        """Runs work that is not training (a checkpoint, validation) without counting its time; the steps must be finished."""
        started = time.perf_counter()
        work()
        self._since += time.perf_counter() - started

    def read(self, step: int, rate: float, norm_and_skips: Tensor) -> dict[str, float | None]:
        """One line of metrics for the steps since the last; the only place where the host reads the device.

        Every process must call it. `norm_and_skips` [2] as `Optimizer.norm_and_skips` gives them.
        """
        sums = self.processes.sum_(torch.cat([self.loss_sum.view(1), self.of_data_sets.flatten()]))
        read = [sums[:1] / (self.steps * self.processes.world), norm_and_skips.to(sums.device), sums[1:]]
        if self.noise_scale:
            read.append(self.noise_scale.squares)
        loss, norm, skips, *rest = torch.cat(read).tolist()
        count = len(self.data_sets)
        losses, samples, squares = rest[:count], rest[count : 2 * count], rest[2 * count :]
        now = time.perf_counter()
        seconds = now - self._since
        per_second = self.steps * self.run.global_batch / seconds
        line: dict[str, float | None] = {
            "step": step,
            "epoch": step * self.run.global_batch / self.run.records,
            "loss": loss,
            **{
                f"loss/{name}": loss / many / weight if many and weight else None
                for name, loss, many, weight in zip(self.data_sets, losses, samples, self.weights, strict=True)
            },
            "lr": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped_steps": int(skips),
            "samples_per_second": per_second,
            "step_seconds": seconds / self.steps,
        }
        if self.flops:
            line["mfu"] = self.flops.step * per_second / self.processes.world / self.flops.per_second
        if self.noise_scale:
            line["gradient_noise_scale"] = self.noise_scale.of(squares)
        if self.loss_sum.is_cuda:
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.resume(0.0, 0)
        self._since = now
        return line

    def offending_slots(self) -> list[int]:
        """The latest slots whose losses were not finite, over all processes, which must all call it."""
        slots = {slot for part in self.processes.gather_objects(self.offending.tolist()) for slot in part}
        return sorted(slots - {-1})[-OFFENDING:]
