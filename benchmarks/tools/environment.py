"""What a measurement must name to be believed: device, driver, versions and commit; and the folder of its device."""

import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"  # DEVICE/QUESTION.json; `computed` holds what no device measured
COMMIT = "ENGINE_COMMIT"  # names the commit where there is no repository
SOURCES = ("engine", "benchmarks", "cpp_ext", "examples", "tests")
PACKAGES = ("triton", "deepspeed", "diffusers", "transformers", "torchao", "xformers")


def _processor() -> str:
    """The processor's name; `platform` does not know it on Linux."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _answer(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sources() -> str:
    """A name of this code where nothing else names it: another name after a change, so that what failed is tried again."""
    files = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp"))
    contents = b"\0".join(part for path in files for part in (str(path.relative_to(ROOT)).encode(), path.read_bytes()))
    return f"sources {hashlib.sha256(contents).hexdigest()[:12]}"


def environment() -> dict[str, Any]:
    """Where this process measures; what cannot be found out is None, and never ends a measurement.

    `commit` is what ENGINE_COMMIT says, or git, or a digest of the sources.
    """
    import torch  # here, because a campaign's own process reads the rest of this file and must not hold memory of the GPU

    cuda = torch.cuda.is_available()
    driver = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split() if cuda else []
    return {
        "commit": os.environ.get(COMMIT) or _answer("git", "-C", str(ROOT), "rev-parse", "HEAD") or _sources(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {_processor()}, {torch.get_num_threads()} threads",
        **({"driver": driver[0] if driver else None, "cuda": torch.version.cuda} if cuda else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
    }


def folder_of(device: str) -> str:
    """The folder of a device's results, by its name in `environment`: `cpu`, or say `h100-80gb-hbm3`."""
    return "cpu" if device.startswith("CPU") else re.sub(r"\W+", "-", device.lower().removeprefix("nvidia")).strip("-")
