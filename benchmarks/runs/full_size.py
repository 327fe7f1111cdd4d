"""How much memory does a whole run take at full size? `python -m benchmarks.runs.full_size [--family F ...] [--json FILE]`

Pipelines of the published sizes with random weights, and a few random records, are written to a temporary directory. Then
`python -m engine.run --mixed_precision bf16 --use_ema --train_batch_size 1` (256 px; 768 for Wuerstchen) loads, takes two
steps, writes a checkpoint and exports; a second run resumes, takes a step, draws (`--validate`) and exports; and
`python -m engine.checkpoint export` exports once more. From outside, the peak of the process's resident memory is read phase
by phase (VmHWM, reset at every look), and beside it the part that is no page of a file, which the kernel may drop.

A family that this machine cannot hold is not run; what it would need is computed: the state in a step, or the state and the
frozen models beside it in the export, from bytes per parameter, and 1.5 GiB for the program and what a step computes.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.published import frozen_models, open_tiny, trained_model, write_pipelines
from benchmarks.tools.rows import Rows
from benchmarks.tools.shards import write_shards
from benchmarks.tools.tables import problem
from engine.files import PARTIAL
from engine.models.family import open_family

FAMILIES = {
    "sd": "SD 1.5, 512 px", "kandinsky-prior": "Kandinsky 2.2 prior", "kandinsky-decoder": "Kandinsky 2.2 decoder, 512 px",
    "wuerstchen": "Wuerstchen v2 prior, 768 px",
}  # fmt: skip
RESOLUTIONS = {"wuerstchen": 768}
RECORDS, PIXELS = 4, 256
# fp32 masters, two moments and average; bf16 weights and gradients; and, until they are laid out flat, gradients once more.
STATE_BYTES, STEP_BYTES = 20, 22
BESIDE = 1.5 * 2**30
LOOK_SECONDS = 0.01


def parameters_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def computed_needs(family: str) -> dict[str, Any]:
    """Parameters and bytes that a run needs, from counts."""
    checkpoint = FAMILIES[family]
    with torch.device("meta"):
        trained = parameters_of(trained_model(checkpoint))
        frozen = sum(parameters_of(model) for model in frozen_models(checkpoint).values())
    needed = max(STEP_BYTES * trained, STATE_BYTES * trained + 4 * frozen) + BESIDE
    return {"family": family, "parameters": trained, "frozen_parameters": frozen, "computed_gib": needed / 2**30}


def prepare(family: str, tiny: bool, directory: Path) -> None:
    """Writes pipelines and shards, and the options of a run on them (options.json)."""
    options = {"mixed_precision": "bf16", "use_ema": True, "shards_dir": str(directory / "shards"), "train_batch_size": 1}
    options["trust_shards"] = True  # their records are random
    if tiny:
        opened = open_tiny(family, directory, **options)
        config = opened.config
    else:
        config = write_pipelines(FAMILIES[family], directory, resolution=RESOLUTIONS.get(family, PIXELS), **options)
        opened = open_family(config)
    (directory / "shards").mkdir()
    write_shards(directory / "shards", RECORDS, family, opened.encoding.record_spec)
    (directory / "options.json").write_text(json.dumps(config.model_dump(exclude_unset=True)))


def apart(work: Callable[..., None], *arguments: Any) -> None:
    """Does work in a process of its own, so that its memory is given back."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the pipelines could not be written: exit code {process.exitcode}")


def command(directory: Path, **more: Any) -> list[str]:
    options = json.loads((directory / "options.json").read_text()) | more
    single = {name: value for name, value in options.items() if value is not None and not isinstance(value, bool | list)}
    arguments = [f"--{name}={value}" for name, value in single.items()]
    lists = [word for name, value in options.items() if isinstance(value, list) for word in (f"--{name}", *value)]
    switches = [f"--{name}" for name, value in options.items() if value is True]
    return [sys.executable, "-m", "engine.run", *arguments, *lists, *switches]


def phase(output: Path, first: str, last_step: int | None) -> str:
    """What a run is doing, from the files that it writes; `last_step`, if it draws after that."""
    if (output / f"pipeline{PARTIAL}").exists():
        return "export"
    if any(output.glob(f"checkpoint-*{PARTIAL}")):
        return "checkpoint"
    metrics = output / "metrics.jsonl"
    if not metrics.exists():
        return first
    lines = metrics.read_text().splitlines()
    return "validation" if lines and json.loads(lines[-1])["step"] == last_step else "step"


def _look(process: int) -> tuple[int, int]:
    """The largest resident memory of a process since the last look, and its part now that is no file's; bytes."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    values = {line.partition(":")[0]: line.partition(":")[2].split() for line in status}
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return int(values["VmHWM"][0]) * 1024, int(values["RssAnon"][0]) * 1024


def watch(command: list[str], phase: Callable[[], str]) -> dict[str, dict[str, float]]:
    """Runs a command; by phase: seconds, peak of resident memory and of its part that is no file's, in GiB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    phases: dict[str, dict[str, float]] = {}
    now, looked = phase(), time.monotonic()
    while process.poll() is None:
        time.sleep(LOOK_SECONDS)
        try:
            resident, anonymous = _look(process.pid)
        except (OSError, KeyError):  # it has just ended
            break
        row = phases.setdefault(now, {"seconds": 0.0, "peak_gib": 0.0, "anonymous_gib": 0.0})
        row["seconds"] += time.monotonic() - looked
        row["peak_gib"] = max(row["peak_gib"], resident / 2**30)
        row["anonymous_gib"] = max(row["anonymous_gib"], anonymous / 2**30)
        looked = time.monotonic()
        now = now if now == "export" else phase()
    _, errors = process.communicate()
    if process.returncode:
        # The kernel's killer leaves no message.
        raise RuntimeError(f"exit code {process.returncode} in {now}: {' '.join(errors.splitlines()[-1:])}")
    return phases


def measure(family: str, tiny: bool, validate: bool, directory: Path) -> dict[str, Any]:
    """Memory by phase of both runs and of the export command."""
    apart(prepare, family, tiny, directory)
    output = directory / "out"
    common = {"output_dir": output, "report_to": "none", "log_every": 1, "seed": 0, "checkpoints_total_limit": 1}
    run = partial(command, directory, **common)
    phases = watch(run(max_train_steps=2, checkpointing_steps=2), partial(phase, output, "load", None))
    (output / "metrics.jsonl").unlink()
    drawing = {"validation_prompts": "a photograph", "num_validation_images": 1} if validate else {}
    resumed = run(max_train_steps=3, checkpointing_steps=1000, resume_from_checkpoint="latest", **drawing)
    again = watch(resumed, partial(phase, output, "resume", 3 if validate else None))
    exporting = [sys.executable, "-m", "engine.checkpoint", "export", str(output), "--output_dir", str(directory / "exported")]
    exported = watch(exporting, lambda: "export command")
    for name, row in (again | exported).items():
        before = phases.setdefault(name, row)
        phases[name] = {key: max(value, before[key]) for key, value in row.items()}
    return {"phases": phases, "peak_gib": max(row["peak_gib"] for row in phases.values())}


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def run_or_compute(family: str, tiny: bool, validate: bool, directory: str | None) -> dict[str, Any]:
    needs: dict[str, Any] = {"family": family} if tiny else computed_needs(family)
    if not tiny and needs["computed_gib"] * 2**30 > available_bytes():
        return needs | {"available_gib": available_bytes() / 2**30}
    folder = Path(tempfile.mkdtemp(dir=directory))
    try:
        return needs | measure(family, tiny, validate, folder)
    finally:
        shutil.rmtree(folder)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: memory by phase, measured, or what is needed, computed."""
    lines = [
        "| family | phase | peak, GiB | without mapped files, GiB | bytes per parameter | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "phases" not in row:
            why = problem(row) or (
                f"not run: needs {row['computed_gib']:.1f} GiB (computed), {row['available_gib']:.1f} available"
            )  # fmt: skip
            lines.append(f"| {row['name']} | {why} | | | | |")
        for name, measured in row.get("phases", {}).items():
            parameters = row.get("parameters", math.nan)
            lines.append(
                f"| {row['name']} | {name} | {measured['peak_gib']:.2f} | {measured['anonymous_gib']:.2f} | "
                f"{measured['anonymous_gib'] * 2**30 / parameters:.1f} | {measured['seconds']:.0f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.full_size", description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--validate", action="store_true", help="draw a validation image too (minutes on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights, to try the benchmark")
    parser.add_argument("--directory", help="where the temporary directory goes: some 30 GB (default: the system's)")
    parser.add_argument("--json", type=Path, help="keep the results there, and what they hold")
    options = parser.parse_args()
    rows = Rows(options.json, __doc__)
    measured = [
        rows.measure(family, 600, partial(run_or_compute, family, options.tiny, options.validate, options.directory))
        for family in options.family
    ]
    print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
