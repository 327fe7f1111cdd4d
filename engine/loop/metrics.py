"""Metrics: summed on the device, read by the host every `--log_every` steps, written to metrics.jsonl and the trackers."""

import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.config.command_line import to_toml
from engine.config.options import TrainConfig
from engine.config.schema import SECRETS
from engine.files import write_text
from engine.models.family import Family
from engine.models.training_form import to_training_form
from engine.picture import curves
from engine.processes import Processes

METRICS = "metrics.jsonl"
OFFENDING = 16  # slots that are kept for a message


class Metrics:
    """The running sums between two log points."""

    def __init__(self, device: torch.device, global_batch: int, records: int) -> None:
        self.loss_sum = torch.zeros((), device=device)
        self.offending = torch.full((OFFENDING,), -1, device=device)
        self.steps = 0
        self.global_batch, self.records = global_batch, records
        self.flops_per_sample = self.peak_flops = 0.0
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

    def exclude(self, work: Callable[[], Any]) -> None:
        """Runs work that is not training (a checkpoint, validation) without counting its time; the steps must be finished."""
        started = time.perf_counter()
        work()
        self._since += time.perf_counter() - started

    def read(self, step: int, rate: float, grad_norm: Tensor, skipped: Tensor, processes: Processes) -> dict[str, float | None]:
        """One line of metrics for the steps since the last; the only place where the host reads the device."""
        mean_loss = processes.sum_(self.loss_sum.clone()) / (self.steps * processes.world)
        others = [value.view(()).to(mean_loss.device) for value in (grad_norm, skipped)]
        loss, norm, skips = torch.stack([mean_loss, *others]).tolist()
        now = time.perf_counter()
        seconds = now - self._since
        per_second = self.steps * self.global_batch / seconds
        line: dict[str, float | None] = {
            "step": step,
            "epoch": step * self.global_batch / self.records,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped_steps": int(skips),
            "samples_per_second": per_second,
            "step_seconds": seconds / self.steps,
        }
        if self.loss_sum.is_cuda:
            if self.peak_flops:
                line["mfu"] = 3 * self.flops_per_sample * per_second / processes.world / self.peak_flops
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.loss_sum.zero_()
        self.steps = 0
        self._since = now
        return line

    def offending_slots(self, processes: Processes) -> list[int]:
        """The latest slots whose losses were not finite, over all processes, which must all call it."""
        slots = {slot for part in processes.gather_objects(self.offending.tolist()) for slot in part}
        return sorted(slots - {-1})[-OFFENDING:]


def forward_on_meta(family: Family, model: Any, batch: int = 1, training_form: bool = False) -> None:
    """A forward pass that computes nothing, of the published model or of its training form, for modes that look on."""
    timesteps = family.schedule.draw(torch.tensor([0]), torch.arange(batch)).to("meta")
    with torch.device("meta"):
        shadow = type(model).from_config(model.config)
        if training_form:
            to_training_form(shadow, fuse_projections=True)
        record = {name: torch.empty(batch, *field.shape) for name, field in family.record_spec.items()}
        family.predict(shadow, record[family.mean], timesteps, record)


def forward_flops(family: Family, model: torch.nn.Module) -> float:
    """Operations of one forward pass for one sample, attention included."""
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(family, model)
    return float(counter.get_total_flops())


def matrix_flops_per_second(device: torch.device, dtype: torch.dtype, warm_up: float = 0.5) -> float:
    """What a large matrix product reaches on this device: the measure that model FLOP utilisation is relative to.

    The median of five windows, after `warm_up` seconds of work in which the clocks settle.
    """
    gpu = device.type == "cuda"
    size, products = 8192 if gpu else 1024, 5
    left, right = torch.randn(2, size, size, device=device).to(dtype)

    def window() -> float:
        started = time.perf_counter()
        for _ in range(products):
            left @ right
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    warm = window()
    while warm < warm_up:
        warm += window()
    return 2 * size**3 * products / statistics.median(window() for _ in range(5))


class Log:
    """metrics.jsonl, and the trackers that `--report_to` names. Only the first process has one."""

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        self.output = Path(config.output_dir)
        self.path = self.output / METRICS
        _forget_after(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard: Any = None
        self.wandb: Any = None
        if config.report_to in ("tensorboard", "all"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.output / config.logging_dir), purge_step=first_step + 1)
            self.tensorboard.add_text("config", f"```toml\n{to_toml(config)}```", first_step)
        if config.report_to == "wandb" or (config.report_to == "all" and importlib.util.find_spec("wandb")):
            import wandb

            self.wandb = wandb.init(
                project=config.tracker_project_name, dir=config.output_dir, config=config.model_dump(exclude=SECRETS)
            )

    def write(self, line: dict[str, float | None]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        values = {name: value for name, value in line.items() if name != "step" and value is not None}
        step = int(line["step"] or 0)
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"train/{name}", value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def picture(self, image: Image.Image, step: int) -> None:
        if self.tensorboard:
            import numpy as np

            self.tensorboard.add_image("validation", np.asarray(image), step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({"validation": wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Closes the trackers and draws what was logged into curves.png."""
        self.file.close()
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        if lines:
            curves(lines, ["loss", "grad_norm", "lr", "samples_per_second"], self.output / "curves.png")
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps that will be trained again, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(kept))
