"""Where metrics are written: metrics.jsonl, the trackers, and curves.png at the end."""

import contextlib
import datetime
import json
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from engine.config.checks import installed
from engine.config.command_line import to_toml
from engine.config.options import TrainConfig
from engine.config.schema import SECRETS
from engine.errors import UserError, first_line
from engine.files import read_text, reading, write_text
from engine.loop.curves import curves
from engine.messages import warn

METRICS = "metrics.jsonl"
CURVES = "curves.png"


_WANDB_NEEDED = (0, 19)  # as the extra `wandb` asks
_WANDB_RUN = Path("wandb", "run-id")  # in the output directory: which run of Weights & Biases a resumed run goes on with


def check_trackers(config: TrainConfig) -> TrainConfig:
    """Tries the trackers of `--report_to`, before anything is encoded; `all` is left only where all of them can be used.

    Raises:
        UserError: one that was asked for by name is not installed, too old, not logged in or not reachable.
    """
    if config.report_to in ("tensorboard", "all"):
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(f"--report_to tensorboard: {first_line(error)}; install tensorboard, or give another") from None
    if config.report_to in ("wandb", "all") and (problem := _wandb_problem()):
        if config.report_to == "wandb":
            raise UserError(f"--report_to wandb: {problem}")
        warn(f"--report_to all: {problem}; without it metrics go to TensorBoard alone")
        return config.model_copy(update={"report_to": "tensorboard"})
    return config


def _wandb_problem() -> str | None:
    """Why Weights & Biases cannot be used, and what to do."""
    if not installed("wandb"):
        return "wandb is not installed: install the extra `wandb`"
    try:
        import wandb

        if tuple(map(int, re.findall(r"\d+", wandb.__version__)[:2])) < _WANDB_NEEDED:
            return f"wandb {wandb.__version__} is too old: install the extra `wandb` again"
    except Exception as error:  # a version that does not fit the other packages raises anything
        return f"wandb cannot be imported ({first_line(error)}): install the extra `wandb` again"
    try:
        wandb.login(timeout=30, verify=True)
    except Exception as error:  # no key, a wrong one, no connection: many kinds over its versions
        said = first_line(error).rstrip(".")
        return (
            f"{said}; `wandb login` or the variable WANDB_API_KEY gives a key, WANDB_MODE=offline keeps the run on this machine"
        )
    return None


class Log:
    """metrics.jsonl, and the trackers that `--report_to` names. Only the first process has one.

    Args:
        first_step: the one that the run goes on from.
        measured: the last whose held-out loss will not be taken again. Default: the same.
    """

    def __init__(self, config: TrainConfig, first_step: int, measured: int | None = None) -> None:
        self.output = Path(config.output_dir)
        self.path = self.output / METRICS
        _forget_after(self.path, first_step, first_step if measured is None else measured)
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard: Any = None
        self.wandb: Any = None
        if config.report_to in ("tensorboard", "all"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.output / config.logging_dir), purge_step=first_step + 1)
            self.tensorboard.add_text("config", f"```toml\n{to_toml(config)}```", first_step)
        if config.report_to in ("wandb", "all"):
            self.wandb = _open_wandb(config, first_step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line of metrics; trackers get those of groups in it by names of their own."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            self.file.write(json.dumps(dict(line) | {"time": now}) + "\n")
            self.file.flush()
        except OSError as error:  # what is not written now is written with the next line, where there is room then
            warn(f"{self.path}: {first_line(error)}; the training goes on")
        groups = {name: value if isinstance(value, dict) else {"": value} for name, value in line.items() if name != "step"}
        values = {
            f"{name}/{of}".removesuffix("/"): value
            for name, group in groups.items() for of, value in group.items() if value is not None
        }  # fmt: skip
        step = int(line["step"] or 0)
        try:
            if self.tensorboard:
                for name, value in values.items():
                    self.tensorboard.add_scalar(name if name.startswith("validation") else f"train/{name}", value, step)
            if self.wandb:
                self.wandb.log(values, step=step)
        except Exception as error:  # the libraries raise many kinds
            warn(f"the tracker: {first_line(error)}; the training goes on, and its metrics are in {self.path}")

    def picture(self, image: Image.Image, step: int) -> None:
        """A tracker that does not take it costs a warning."""
        try:
            self._picture(image, step)
        except Exception as error:  # the libraries raise many kinds
            warn(f"validation images of step {step} in the tracker: {first_line(error)}; the training goes on")

    def _picture(self, image: Image.Image, step: int) -> None:
        if self.tensorboard:
            import numpy as np

            self.tensorboard.add_image("validation", np.asarray(image), step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({"validation": wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Closes the trackers and draws what was logged into curves.png; what goes wrong here is never the run's own error."""
        ended_well = sys.exc_info()[0] is None
        for what, work in (
            (self.path, self.file.close),
            (self.output / CURVES, self._draw_curves),
            ("TensorBoard", lambda: self.tensorboard and self.tensorboard.close()),
            ("Weights & Biases", lambda: self.wandb and self.wandb.finish(exit_code=int(not ended_well))),
        ):
            try:
                work()
            except Exception as error:  # a full disk, and whatever the libraries raise
                warn(f"{what}: {first_line(error)}")

    def _draw_curves(self) -> None:
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        trained, held_out = ([line for line in lines if name in line] for name in ("loss", "validation_loss"))
        if lines:
            names = ["loss", "grad_norm", "lr", "samples_per_second"]
            curves(trained, names, self.output / CURVES, held_out)


def _open_wandb(config: TrainConfig, first_step: int) -> Any:
    """The run of Weights & Biases: a new one, or, where training goes on from a step, the one that it had."""
    import wandb

    output = Path(config.output_dir)
    file = output / _WANDB_RUN
    goes_on = first_step > 0 and file.exists()
    if not goes_on:
        file.parent.mkdir(exist_ok=True)
        write_text(file, secrets.token_hex(4))
    try:
        return wandb.init(
            project=config.tracker_project_name,
            # Not again: the run may have been named otherwise since.
            name=None if goes_on else config.tracker_run_name or output.resolve().name,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            allow_val_change=True,
            dir=config.output_dir,
            config=config.model_dump(exclude=SECRETS),
        )
    except Exception as error:
        raise UserError(
            f"--report_to {config.report_to}: {first_line(error)}; WANDB_MODE=offline keeps the run on this machine"
        ) from None


def _forget_after(path: Path, step: int, measured: int) -> None:
    """Drops the lines of steps that will be trained again, and a last line that a crash cut short.

    Args:
        measured: the last step whose held-out loss will not be taken again.
    """
    if not path.exists():
        return
    kept = []
    with reading(path, "move it away, or give another --output_dir"):
        for line in read_text(path).splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                values = json.loads(line)
                if values["step"] <= (measured if "validation_loss" in values else step):
                    kept.append(line + "\n")
    write_text(path, "".join(kept))
