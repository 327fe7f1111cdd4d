"""Metrics: summed on the device, and read by the host every `--log_every` steps."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
        self.steps = 0
        # `loss_sum` and `steps` after each of the last steps, and before the first.
        self._after: deque[tuple[Tensor, int]] = deque([(self.loss_sum.clone(), 0)], maxlen=TAKEN_BACK + 1)
        self._since = 0.0

    def start(self) -> None:
        """Begins to count the time."""
        self._since = time.perf_counter()

    def add(self, micro_batch_loss: Tensor, slots: Tensor, accumulation: int) -> None:
        """Adds the losses [B] of one micro-batch; a step's loss is the mean over its micro-batches.

        Losses that are not finite count as 0, and their slots [B] are kept.
        """
        counted = micro_batch_loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.loss_sum += counted.mean() / accumulation
        offending = torch.where(counted == micro_batch_loss, -1, slots)
        # The largest slots are the latest; -1 fills up. A fixed shape, so that the host need not know how many there are.
        self.offending.copy_(torch.cat([self.offending, offending]).topk(OFFENDING).values)

    def end_step(self) -> None:
        """To be called when all micro-batches of a step were added."""
        self.steps += 1
        self._after.append((self.loss_sum.clone(), self.steps))

    def take_back(self, steps: int) -> None:
        """Forgets the last steps, which trained nothing, whether they were read or not."""
        for _ in range(min(steps, len(self._after) - 1)):
            self._after.pop()
        self.resume(*self._after[-1])

    def resume(self, loss_sum: float | Tensor, steps: int) -> None:
        """Goes on from the sum of losses and the number of steps that a checkpoint found since the last line."""
        self.loss_sum.fill_(loss_sum)
        self.steps = steps
        self._after[-1] = self.loss_sum.clone(), steps

    def exclude(self, work: Callable[[], Any]) -> None:
        """Runs work that is not training (a checkpoint, validation) without counting its time; the steps must be finished."""
        started = time.perf_counter()
        work()
        self._since += time.perf_counter() - started

    def read(self, step: int, rate: float, norm_and_skips: Tensor) -> dict[str, float | None]:
        """One line of metrics for the steps since the last; the only place where the host reads the device.

        Every process must call it. `norm_and_skips` [2] as `Optimizer.norm_and_skips` gives them.
        """
        mean_loss = self.processes.sum_(self.loss_sum.clone()) / (self.steps * self.processes.world)
        read = [mean_loss.view(1), norm_and_skips.to(mean_loss.device)]
        if self.noise_scale:
            read.append(self.noise_scale.squares)
        loss, norm, skips, *squares = torch.cat(read).tolist()
        now = time.perf_counter()
        seconds = now - self._since
        per_second = self.steps * self.run.global_batch / seconds
        line: dict[str, float | None] = {
            "step": step,
            "epoch": step * self.run.global_batch / self.run.records,
            "loss": loss,
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
