"""What does a user gain over the diffusers recipe? Both train the same model on the same images, in turns, in one run.

    python -m benchmarks.runs.recipe [--config FILE | --tiny [FAMILY...] | --full_size] [--rounds 3] [--json FILE] [--minutes M]

Three sides, each a process of its own. `recipe` and `best` go from image files to steps as the scripts do, for any family
(benchmarks/tools/plain.py, with its flags or at its best): a DataLoader decodes and prepares images, in workers on a GPU, and
the frozen models encode them in every step. `engine` is `python -m engine.run`, on a GPU with `--compile`; the encoding of
its shards is counted apart. On a CPU nothing is compiled. Rates are over all steps but the first ten of each turn. In two
things the recipe is faster than the scripts: the engine's own code prepares its images, and its coefficients come from a table.

Trained is what FILE, a configuration of `engine.run`, says; by default the model that `make quickstart` leaves behind. `--tiny`
takes models of a few thousand weights of each family, `--full_size` SD 1.5 at 512 px with random weights.
`benchmarks.steps.step` compares the other families at full size, without the reading of images.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.tools.compiling import compiling_cheaply
from benchmarks.tools.environment import RESULTS, environment, folder_of
from benchmarks.tools.plain import PlainTraining
from benchmarks.tools.published import TINY, random_stable_diffusion
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import problem
from engine.catalogue import FAMILIES
from engine.config.command_line import parse, to_toml
from engine.config.options import TrainConfig
from engine.data.sources import open_source
from engine.data.sources.interface import Source
from engine.diffusion.schedules import DiscreteSchedule, Schedule
from engine.files import write_json
from engine.models.family import Family, open_family
from engine.quiet import quiet_libraries
from examples import tiny_models
from examples.photographs import write_images

WARM_UP = 10
SIDES = ("recipe", "best", "engine")
QUICKSTART = Path("build/quickstart")
FULL_SIZE_BATCH = 16
Prepared = tuple[dict[str, Tensor], str]


class _Images(Dataset[Prepared]):
    """Images as the frozen models take them, with their first captions."""

    def __init__(self, family: Family, source: Source) -> None:
        self.family, self.source = family, source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Prepared:
        captions = self.source.captions(index) if self.family.encoding.captioned else [""]
        image = self.source.decode(self.source.content(index))
        return self.family.encoding.prepare(image, index)[0], captions[0]


def _loader(family: Family, config: TrainConfig, best: bool) -> DataLoader[Prepared]:
    """All batches of the run, so that workers start once."""
    gpu = torch.cuda.is_available()
    images, samples = (
        _Images(family, open_source(config, family.encoding.captioned)),
        (config.max_train_steps or 1) * config.train_batch_size,
    )
    workers: dict[str, Any] = {}
    if gpu:
        count = min(8, os.cpu_count() or 1)
        # Forked before there is anything on the GPU: workers read the family's options and nothing else of it.
        workers = {"num_workers": count, "multiprocessing_context": "fork", "persistent_workers": best, "pin_memory": best}
    return DataLoader(images, config.train_batch_size, sampler=RandomSampler(images, num_samples=samples), **workers)


def _timesteps(schedule: Schedule, size: int) -> Tensor:
    """Timesteps [size], drawn as the scripts do."""
    return torch.randint(schedule.timesteps, (size,)) if isinstance(schedule, DiscreteSchedule) else torch.rand(size)


def recipe_rate(config: TrainConfig, best: bool) -> float:
    """Samples per second of the plain loop; in fp32 on a CPU, as the engine's side.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    torch.manual_seed(config.seed or 0)
    family = open_family(config)
    batches = iter(_loader(family, config, best))
    device = this_device()
    encoder = family.encoding.load_encoder(device)
    plain = PlainTraining(family, family.load_model(form=None).to(device), device, best, config.learning_rate)
    started = time.perf_counter()
    for step, (images, captions) in enumerate(batches, start=1):
        timesteps = _timesteps(family.schedule, config.train_batch_size)
        coefficients = family.schedule.coefficients(timesteps)
        plain.step(plain.encode(encoder, images, captions), plain.to_device(timesteps), plain.to_device(coefficients))
        if step == WARM_UP:
            started = time.perf_counter()
    plain.check()
    return (step - WARM_UP) * config.train_batch_size / (time.perf_counter() - started)


def engine_rate(config: TrainConfig) -> dict[str, float]:
    """Samples per second of the engine, and the seconds that its shards took; of a run that has ended."""
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = sum(line["step_seconds"] for line in lines) / len(lines)
    encoded = json.loads((config.shards_path / "index.json").read_text())["encode_seconds"]
    return {"samples_per_second": config.train_batch_size / seconds, "encode_seconds": encoded, "loss": lines[-1]["loss"]}


def run_side(side: str, config: TrainConfig, file: Path) -> dict[str, float]:
    """One turn of a side in a process of its own.

    Raises:
        RuntimeError: it failed, with the last line that it wrote.
    """
    file.write_text(to_toml(config))
    module = ["engine.run"] if side == "engine" else ["benchmarks.runs.recipe", "--side", side]
    turn = subprocess.run([sys.executable, "-m", *module, "--config", str(file)], capture_output=True, text=True, check=False)
    if turn.returncode:
        last = (turn.stderr.strip().splitlines() or [""])[-1]
        raise RuntimeError(f"{side} ended with {turn.returncode}: {last}\n{turn.stderr}")
    return engine_rate(config) if side == "engine" else {"samples_per_second": float(turn.stdout.split()[-1])}


def quickstart(directory: Path) -> dict[str, Any]:
    model, images = str(QUICKSTART / "model"), str(QUICKSTART / "images")
    return {
        "family": "sd", "pretrained_model_name_or_path": model, "train_data_dir": images, "resolution": 32,
        "train_batch_size": 64, "learning_rate": 2e-3, "snr_gamma": 5.0,
    }  # fmt: skip


def tiny(family: str, directory: Path) -> dict[str, Any]:
    models, images = tiny_models.WRITERS[family](directory / "models"), write_images(directory / "images", longest=200)
    return {"family": family, **models, "train_data_dir": str(images), "resolution": TINY[family], "train_batch_size": 4}


def full_size(directory: Path) -> dict[str, Any]:
    device = this_device()
    random_stable_diffusion(directory, device, torch.float32).save_pretrained(directory / "model")
    return {
        "family": "sd", "pretrained_model_name_or_path": str(directory / "model"), "resolution": 512, "learning_rate": 1e-5,
        "train_data_dir": str(write_images(directory / "images")), "train_batch_size": FULL_SIZE_BATCH,
    }  # fmt: skip


def configuration(run: dict[str, Any], directory: Path, steps: int) -> TrainConfig:
    """The run of both sides, in the precision and with the levers that the device has."""
    gpu = torch.cuda.is_available()
    device = {"mixed_precision": "bf16", "compile": True, "allow_tf32": True} if gpu else {}
    crop = {"center_crop": True} if run["family"] == "sd" else {}
    ours = {
        "output_dir": str(directory / "out"), "shards_dir": str(directory / "shards"), "max_train_steps": WARM_UP + steps,
        "log_every": WARM_UP, "use_ema": True, "report_to": "none", "checkpointing_steps": 10**6, "seed": 0,
    }  # fmt: skip
    return TrainConfig.model_validate({**device, **crop, **run, **ours})


def compare(rows: Rows, name: str, config: TrainConfig, rounds: int, directory: Path) -> list[dict[str, Any]]:
    """The sides in turns: one row each."""
    # On a GPU by assumption: 60 s to open, 150 more to compile from cold caches, and at least 15 samples per second.
    steps = (config.max_train_steps or 0) * config.train_batch_size / 15
    about = {
        "run": name, "batch": config.train_batch_size, "resolution": config.resolution,
        "precision": config.mixed_precision, "measured_steps": (config.max_train_steps or 0) - WARM_UP,
    }  # fmt: skip
    measured = []
    for turn in range(1, rounds + 1):
        fresh = config.model_copy(update={"output_dir": str(directory / f"out-{turn}")})
        for side in SIDES:
            work = partial(run_side, side, fresh, directory / f"{side}.toml")
            seconds = 60 + steps + 150 * (side != "recipe") if torch.cuda.is_available() else 30
            measured.append(rows.measure(f"{name}, turn {turn}: {side}", seconds, work, side=side, turn=turn, **about))
    return measured


def ratios(rows: list[dict[str, Any]], against: str) -> list[float]:
    """The engine's rate over another side's, turn by turn, where both are there."""
    rates = {(row["turn"], row["side"]): row["samples_per_second"] for row in rows if "samples_per_second" in row}
    turns = sorted({turn for turn, _ in rates})
    return [
        rates[turn, "engine"] / rates[turn, against] for turn in turns if {(turn, "engine"), (turn, against)} <= rates.keys()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over the turns of each run as a Markdown table, and what failed."""
    lines = ["| run | batch | recipe, samples/s | at its best | engine | against the recipe | against its best | encoding, s |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for run, device in dict.fromkeys((row["run"], row["device"]) for row in rows):
        turns = [row for row in rows if (row["run"], row["device"]) == (run, device)]
        cells = []
        for side in SIDES:
            rates = [row["samples_per_second"] for row in turns if row["side"] == side and "samples_per_second" in row]
            why = next((problem(row) or "" for row in turns if row["side"] == side), "")
            cells.append(f"{statistics.median(rates):.4g}" if rates else why)
        for side in SIDES[:2]:
            gains = ratios(turns, side)
            cells.append(f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})" if gains else "")
        encoding = [row["encode_seconds"] for row in turns if "encode_seconds" in row]
        lines.append(f"| {run} | {turns[0]['batch']} | {' | '.join(cells)} | {f'{encoding[0]:.1f}' if encoding else ''} |")
    return "\n".join(lines)


def measure_all(rows: Rows, runs: dict[str, Any], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Every run in turn; `runs` has for each what writes its models and images into a directory and returns its options."""
    measured = []
    for name, write in runs.items():
        with tempfile.TemporaryDirectory() as directory:
            config = configuration(write(Path(directory)), Path(directory), steps)
            measured += compare(rows, name, config, rounds, Path(directory))
    return measured


def main() -> int:
    parser = command_line(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", help="a configuration of `engine.run`: models, images, resolution, batch, learning rate")
    what.add_argument("--tiny", nargs="*", choices=FAMILIES, help="a few thousand weights, of these families (default: all)")
    what.add_argument("--full_size", action="store_true", help="SD 1.5 at 512 px, with random weights")
    parser.add_argument("--steps", type=int, default=60, help="measured steps per turn, a multiple of 10 (default: 60)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--side", choices=SIDES[:2], help="run one turn of --config and print its rate")
    options = parser.parse_args()
    quiet_libraries()
    arguments = ["--config", options.config] if options.config else []
    if options.side:
        config = parse(TrainConfig, "benchmarks.runs.recipe", "", arguments)
        with contextlib.nullcontext() if torch.cuda.is_available() else compiling_cheaply():
            print(recipe_rate(config, options.side == "best"))
        return 0
    runs: dict[str, Any] = {"quickstart": quickstart}
    if options.config:
        given = parse(TrainConfig, "benchmarks.runs.recipe", "", arguments).model_dump(exclude_unset=True)
        runs = {options.config: lambda directory: given}
    elif options.tiny is not None:
        runs = {name: lambda directory, name=name: tiny(name, directory) for name in options.tiny or FAMILIES}
    elif options.full_size:
        runs = {"SD 1.5, 512 px": full_size}
    rows = Rows(options.json, __doc__, options.minutes)
    measured = measure_all(rows, runs, options.steps, options.rounds)
    print(table(measured))
    if options.json is None:
        kept = {"question": rows.question, "environments": rows.environments, "rows": rows.rows}
        folder = RESULTS / folder_of(environment()["device"])
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "recipe.json", kept)
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
