"""Where metrics are written: metrics.jsonl, the trackers, and curves.png at the end."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from PIL import Image

from engine.config.command_line import to_toml
from engine.config.options import TrainConfig
from engine.config.schema import SECRETS
from engine.errors import first_line
from engine.files import write_text
from engine.messages import warn
from engine.picture import curves

METRICS = "metrics.jsonl"


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
                project=config.tracker_project_name,
                name=config.tracker_run_name or self.output.resolve().name,
                dir=config.output_dir,
                config=config.model_dump(exclude=SECRETS),
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
        """Closes the trackers and draws what was logged into curves.png."""
        self.file.close()
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        if lines:
            try:
                curves(lines, ["loss", "grad_norm", "lr", "samples_per_second"], self.output / "curves.png")
            except Exception as error:  # a picture never costs a training
                warn(f"curves.png: {first_line(error)}")
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
