"""A tiny pipeline and images, and commands that train on them as a user would."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from examples import tiny_models
from examples.photographs import write_images

STEPS = 40
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Place:
    """A tiny pipeline and images, and commands that train on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = tiny_models.write_stable_diffusion(root / "model")["pretrained_model_name_or_path"]
        self.images = write_images(root / "images", longest=64)
        self.base = root / "base"

    def copy_of_base(self, name: str) -> Path:
        """A directory in which six steps were trained."""
        return Path(shutil.copytree(self.base, self.root / name))

    def command(self, output: Path, *options: str, steps: int = STEPS) -> list[str]:
        return [
            sys.executable, "-m", "engine.run", "--family", "sd", "--pretrained_model_name_or_path", self.model,
            "--train_data_dir", str(self.images), "--output_dir", str(output), "--resolution", "16", "--center_crop",
            "--shard_records", "4", "--train_batch_size", "4", "--max_train_steps", str(steps), "--seed", "1", "--use_ema",
            "--checkpointing_steps", "3", "--checkpoints_total_limit", "2", "--log_every", "1", "--report_to", "none",
            "--resume_from_checkpoint", "latest", *options,
        ]  # fmt: skip


def weights(output: Path) -> dict[str, Tensor]:
    """Those that a run has exported."""
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The difference of two results over how far training moved them; L2, without biases that have no gradient."""
    names = [name for name in theirs if not name.endswith("to_k.bias")]
    difference = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in names)
    return (difference / sum(float((theirs[name].double() - start[name].double()).square().sum()) for name in names)) ** 0.5


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT | variables)


def start(command: list[str], output: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output, text=True)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.001)
