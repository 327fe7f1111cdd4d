"""What a measurement must name to be believed: device, driver, versions and commit; and where it is kept."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engine.files import write_json

RESULTS = Path(__file__).parent / "results"


def _processor() -> str:
    """The processor's name; `platform` does not know it on Linux."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cuda = torch.cuda.is_available()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split() if cuda else []
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {_processor()}, {torch.get_num_threads()} threads",
        **({"driver": driver[0], "cuda": torch.version.cuda} if driver else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in ("triton", "deepspeed", "diffusers", "transformers")},
    }


def write_result(path: Path | None, document: str, **measured: Any) -> None:
    """Keeps what a benchmark measured, where a file is named, under its question: the first line of its docstring."""
    if path is not None:
        write_json(path, {"question": document.splitlines()[0], **environment(), **measured})
