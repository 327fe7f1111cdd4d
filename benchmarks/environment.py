"""What a measurement must name to be believed: device, driver, versions and commit."""

import platform
import subprocess
from importlib.metadata import version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cuda = torch.cuda.is_available()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split() if cuda else []
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        **({"driver": driver[0], "cuda": torch.version.cuda} if driver else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in ("triton", "deepspeed", "diffusers", "transformers")},
    }
