"""How fast is a training step, and what does each lever give? `python -m benchmarks.step [--checkpoints NAME...] [--json FILE]`

Per checkpoint (the published sizes with random weights, over a batch that stays on the device) one row per lever and batch; the
levers are `LEVERS`: the diffusers recipe (benchmarks/plain.py) and then the engine, each with what the one before has. Rows
that leave the defaults alone are what a user gets, with and without `--compile`.

Each row is kept in FILE the moment it is measured, and a further call goes on with what is missing (exit code 75 says that
something is): with `--minutes`, no row begins that would not end in time. A row fails, and only it, unless its optimizer moved
the weights, skipped no step and left everything finite, and where steps should be captured, unless the graph was there before
the first window.

Batches are the largest powers of two, up to `AIMS`, for which the recipe's memory should fit the card (`largest_batch`). Where
the recipe then still runs out of memory, every lever of that checkpoint takes half the batch, so that ratios stay fair.

Model FLOP utilisation is against a matrix product of the same precision measured beforehand, and against the card's data
sheet. `--sweep` runs what `--compile` gives at further batch sizes. `--tiny` takes models of a few thousand weights, to try the
benchmark itself.
"""

import argparse
import contextlib
import gc
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from torch import Tensor, nn
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel
from tqdm import tqdm

from benchmarks.environment import OUT_OF_MEMORY, Rows
from benchmarks.plain import PlainTraining, published_model
from benchmarks.published import TINY, open_random, open_tiny, trained_model
from benchmarks.sizes import Cost, count
from benchmarks.timing import data_sheet_flops_per_second, spread, synchronize
from engine.backends import configure
from engine.config.options import TrainConfig
from engine.config.schema import options_lacking
from engine.data.samples.loader import Batch, BatchPlan
from engine.loop import capture
from engine.loop.metrics import matrix_flops_per_second
from engine.loop.trainer import Training, keep_compiled_code
from engine.models.family import PRECISIONS, Family
from engine.models.training_form import FUSE_NORMS_WHEN_COMPILED, fusing
from engine.processes import Processes
from engine.quiet import quiet_libraries
from examples.photographs import photographs

# Checkpoint -> the batch that its waterfall aims at, and further ones of the sweep.
AIMS = {
    "SD 1.5, 512 px": (32, [8, 16, 64]),
    "Kandinsky 2.2 prior": (128, [32, 256]),
    "Kandinsky 2.2 decoder, 512 px": (32, [8, 64]),
    "Kandinsky 2.2 decoder, 768 px": (16, [4, 32]),
    "Wuerstchen v2 prior, 768 px": (32, [8, 64]),
}
TINY_AIM = (4, [2])
PRECISION = {"cuda": "bf16", "cpu": "no"}
WARM_UP = capture.WARM_UP + 3  # steps: as they are, one to capture, and replays
WINDOWS = 7
WINDOW_SECONDS = 1.5  # or one step, where that takes longer
LEARNING_RATE = 1e-5  # small beside the random weights, so that nothing diverges, and large enough to move each in fp32

CONVOLUTIONAL = ("sd", "kandinsky-decoder", "wuerstchen")
NORMALISED = ("sd", "kandinsky-decoder")  # with group normalisation
TRANSFORMERS = ("kandinsky-prior", "wuerstchen")


@dataclass(frozen=True)
class Lever:
    """What is measured: the recipe, or the engine with options of its command line.

    options: of the engine; None for the recipe.
    encoders: images and captions are encoded in every step.
    best: the recipe with what no script has.
    projections, norms: of the training form, where they differ from what ships (`training_form.fusing`).
    cudnn_benchmark: likewise.
    families: that have what the lever changes; none for all.
    """

    name: str
    options: dict[str, Any] | None = None
    encoders: bool = False
    best: bool = False
    projections: bool | None = None
    norms: bool | None = None
    cudnn_benchmark: bool | None = None
    families: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What it sets, to be kept beside what was measured."""
        unset = (None, False, ())
        return {name: value for name, value in asdict(self).items() if name not in ("name", "families") and value not in unset}

    @property
    def compiles(self) -> bool:
        return self.best or bool(self.options and self.options.get("compile"))

    @property
    def form(self) -> tuple[Any, ...]:
        """What torch.compile makes anew: the same again comes from its cache."""
        options = {name: value for name, value in (self.options or {}).items() if name != "cuda_graphs"}
        norms = FUSE_NORMS_WHEN_COMPILED if self.norms is None else self.norms
        return self.best, self.options is None, sorted(options.items()), self.projections, norms

    def fits(self, family: str) -> bool:
        """Whether a family has what the lever changes, and this engine its options."""
        lacking = options_lacking(TrainConfig, family)
        known = TrainConfig.model_fields
        options = (self.options or {}).items()
        return (not self.families or family in self.families) and all(
            name in known and name not in lacking and (value in get_args(known[name].annotation) or isinstance(value, bool))
            for name, value in options
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Models opened and first called inside have the lever's form; torch's settings are afterwards as before."""
        matmul, cudnn, compiler = torch.backends.cuda.matmul, torch.backends.cudnn, torch.compiler.config
        before = matmul.allow_tf32, cudnn.benchmark, cudnn.allow_tf32, compiler.cache_key_tag
        try:
            # The engine sets the order of attention's kernels for the process; the recipe has torch's own.
            kernels = _cur_sdpa_kernel_backends(with_priority=True)
            with fusing(self.norms, self.projections), sdpa_kernel(kernels, set_priority=True):
                yield
        finally:
            matmul.allow_tf32, cudnn.benchmark, cudnn.allow_tf32, compiler.cache_key_tag = before


UNCAPTURED = {"cuda_graphs": "off"}
EAGER = Lever("stacked projections", UNCAPTURED, cudnn_benchmark=False)
SHIPPED = Lever("compiled and captured", {"compile": True})
LEVERS = [
    Lever("recipe", encoders=True),
    Lever("recipe at its best", encoders=True, best=True),
    Lever("recipe, cached"),
    Lever("recipe at its best, cached", best=True),
    # bf16 weights, channels last, and fused noise, loss, norms and AdamW.
    Lever("engine", UNCAPTURED, projections=False, cudnn_benchmark=False),
    EAGER,
    Lever("cuDNN's search", UNCAPTURED, cudnn_benchmark=True, families=CONVOLUTIONAL),
    Lever("captured", {}),
    Lever("compiled", {"compile": True, **UNCAPTURED}, norms=False),
    Lever("compiled, own norms", {"compile": True, **UNCAPTURED}, norms=True, families=NORMALISED),
    SHIPPED,
    # Beside "captured", since no kernel of attention needs torch.compile, and each would compile the model anew.
    *(Lever(f"captured, {kind} attention", {"attention": kind}) for kind in ("cudnn", "flash", "efficient")),
    Lever("max-autotune", {"compile": True, "compile_mode": "max-autotune-no-cudagraphs"}),
    Lever("fp8 matrix products", {"compile": True, "matrix_precision": "fp8"}, families=TRANSFORMERS),
]


def random_batch(family: Family, size: int, device: torch.device) -> Batch:
    """Random records of the family, with the timesteps and coefficients of the first slots."""
    record = {}
    for name, spec in family.record_spec.items():
        values = torch.randn(size, *spec.shape, device=device)
        record[name] = (values.abs() if name == family.std else values).to(spec.dtype)
    seed, slots = torch.tensor([7]), torch.arange(size)
    timesteps = family.schedule.draw(seed, slots)
    return Batch(record, slots.to(device), timesteps.to(device), family.schedule.coefficients(timesteps).to(device))


def sample(weights: Iterable[Tensor]) -> Tensor:
    """Some 64 numbers of every weight."""
    return torch.cat([weight.detach().flatten()[:: max(1, weight.numel() // 64)] for weight in weights])


class EngineSide:
    """The engine's own training, on one batch again and again."""

    def __init__(self, family: Any, lever: Lever, batch: Batch, device: torch.device) -> None:
        size = len(batch.slots)
        config = family.training.model_copy(update={"use_ema": True, "train_batch_size": size, **(lever.options or {})})
        configure(config)
        run = {"seed": 7, "global_batch": size, "fingerprint": ""}
        self.training = Training(
            config, family, range(1000), BatchPlan(size, 1, 0, 1), Processes(), run, 10**6  # type: ignore[arg-type]
        )  # fmt: skip
        self.batches = repeat(batch)
        self.captures = device.type == "cuda" and config.cuda_graphs != "off"

    def step(self) -> None:
        self.training._train_step(self.batches, LEARNING_RATE)

    @property
    def weights(self) -> list[Tensor]:
        partition = self.training.partition
        return [partition.view(piece, partition.masters) for piece in partition.slices]

    def graphs(self) -> int:
        """How many graphs its steps replay.

        Raises:
            RuntimeError: steps should be captured and are not, or are and should not.
        """
        captured = self.training.captured
        graphs = sum(len(shape.graphs) for shape in captured.shapes.values()) if captured else 0
        if bool(graphs) != self.captures:
            raise RuntimeError(f"{graphs} graphs were captured, {'some' if self.captures else 'none'} should be")
        return graphs

    def loss(self) -> float:
        """The mean loss of all steps.

        Raises:
            RuntimeError: a step was skipped, or a loss was not finite.
        """
        metrics, skipped = self.training.metrics, int(self.training.partition.optimizer.skipped)
        offending = int((metrics.offending >= 0).sum())
        if skipped or offending:
            raise RuntimeError(f"{skipped} steps were skipped, {offending} losses and more were not finite")
        return float(metrics.loss_sum) / metrics.steps


class RecipeSide:
    """The recipe, on one batch again and again; with encoders, on as many photographs, prepared as workers would."""

    def __init__(self, family: Any, lever: Lever, batch: Batch, device: torch.device) -> None:
        self.plain = PlainTraining(family, published_model(family).to(device), device, lever.best, LEARNING_RATE)
        self.batch, self.images = batch, {}
        self.captions: list[str] = []
        if lever.encoders:
            family.load_encoders(device)
            pictures = list(photographs().items())
            chosen = [pictures[number % len(pictures)] for number in range(len(batch.slots))]
            distinct = {caption: family.prepare(image, 0)[0] for caption, image in pictures[: len(chosen)]}
            self.captions = [caption for caption, _ in chosen]
            prepared = [distinct[caption] for caption in self.captions]
            images = {name: torch.stack([item[name] for item in prepared]) for name in prepared[0]}
            pins = lever.best and device.type == "cuda"
            self.images = {name: tensor.pin_memory() if pins else tensor for name, tensor in images.items()}

    def step(self) -> None:
        record = self.plain.encode(self.images, self.captions) if self.images else self.batch.record
        self.plain.step(record, self.batch.timesteps, self.batch.coefficients)

    @property
    def weights(self) -> list[Tensor]:
        return self.plain.parameters

    def graphs(self) -> int:
        return 0

    def loss(self) -> float:
        return self.plain.loss


def open_side(family: Any, lever: Lever, size: int, device: torch.device) -> EngineSide | RecipeSide:
    """A training with a lever, ready for its first step; to be opened and stepped within `lever.applied()`."""
    torch.manual_seed(7)
    batch = random_batch(family, size, device)
    side = (RecipeSide if lever.options is None else EngineSide)(family, lever, batch, device)
    if lever.cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = lever.cudnn_benchmark
    return side


def measure_lever(family: Any, lever: Lever, size: int, device: torch.device, window_seconds: float) -> dict[str, Any]:
    """Samples per second (median and quartiles over windows), the loss, and peak memory.

    Raises:
        RuntimeError: a step did not do what it should; and whatever a step raises.
    """
    gpu, held = device.type == "cuda", set(vars(family))
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        with lever.applied():
            started = time.perf_counter()
            side = open_side(family, lever, size, device)
            before = sample(side.weights)
            for _ in range(WARM_UP):
                side.step()
            graphs = side.graphs()
            synchronize(device)
            ready = time.perf_counter()
            side.step()
            synchronize(device)
            steps = max(1, math.ceil(window_seconds / (time.perf_counter() - ready)))
            rates = []
            for _ in range(WINDOWS):
                synchronize(device)
                window = time.perf_counter()
                for _ in range(steps):
                    side.step()
                synchronize(device)
                rates.append(steps * size / (time.perf_counter() - window))
        row = dict(zip(("samples_per_second", "low", "high"), spread(rates), strict=True))
        row |= {"steps_per_window": steps, "ready_seconds": ready - started, "graphs": graphs}
        if gpu:
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            row |= {"memory_gib": allocated / 2**30, "reserved_gib": reserved / 2**30}
        if side.graphs() != graphs:
            raise RuntimeError("a graph was captured within a window")
        return row | check(side, before)
    finally:
        for name in set(vars(family)) - held:
            delattr(family, name)  # the encoders, also where loading them failed half-way
        torch._dynamo.reset()
        gc.collect()


def check(side: EngineSide | RecipeSide, before: Tensor) -> dict[str, Any]:
    """The loss of a training, and the share of its weights that moved since a sample of them was taken.

    Raises:
        RuntimeError: something is not finite, or the optimizer left the weights alone.
    """
    loss, moved = side.loss(), float((sample(side.weights) != before).float().mean())
    finite = all(bool(weight.isfinite().all()) for weight in side.weights)
    if not math.isfinite(loss) or not finite:
        raise RuntimeError(f"the loss is {loss}, the weights are {'' if finite else 'not '}finite")
    if moved < 0.5:
        raise RuntimeError(f"only {moved:.0%} of the weights moved")
    return {"loss": loss, "moved": moved}


def largest_batch(aim: int, cost: Cost, memory: float) -> int:
    """The largest power of two, up to `aim`, with which the recipe should fit a card's memory in bytes.

    Per parameter it keeps 4 bytes each for the weight, the gradient, two moments, the average and the temporaries of
    `foreach`, and 2 for autocast's copy. Per sample autograd keeps, by count of its saved tensors in bf16, 0.6 to 1.2 times
    what matrix products, convolutions and attention read and write in a forward pass; 1.3 leaves room for the norms, which
    autocast runs in fp32. A tenth of the card is for the allocator, the context and libraries' workspaces.
    """
    free = 0.9 * memory - 26 * cost.parameters
    batch = aim
    while batch > 1 and batch * 1.3 * cost.sample_bytes / 3 > free:
        batch //= 2
    return batch


def expected_seconds(lever: Lever, cost: Cost, size: int, cached_code: bool) -> float:
    """How long a row should take on an H100. Assumed, not measured, and meant to be too long rather than too short:

    - 15 s to draw weights and open the training, 15 more for the encoders (up to 2.5 billion weights);
    - torch.compile from cold caches 0.1 s per million parameters twice over (some 180 s for SD), five times that for
      max-autotune; 40 s with warm ones, mostly tracing;
    - steps at 12 % of 800 TFLOP/s, with encoders twice as long; and windows of `WINDOW_SECONDS`, or of one step.
    """
    opening = 15 + 15 * lever.encoders
    cold = 0.2e-6 * cost.parameters * (5 if "compile_mode" in (lever.options or {}) else 1)
    compiling = (min(40, cold) if cached_code else cold) if lever.compiles else 0.0
    step = size * cost.training_flops / (0.12 * 800e12) * (1 + lever.encoders)
    return opening + compiling + (WARM_UP + 1) * step + WINDOWS * max(WINDOW_SECONDS + step, step)


def row_name(checkpoint: str, lever: Lever, size: int) -> str:
    return f"{checkpoint}: {lever.name}, batch {size}"


@dataclass
class Checkpoint:
    """A checkpoint, or tiny family, under measurement."""

    name: str
    family: Any
    cost: Cost
    peak: dict[str, Any]
    device: torch.device
    rows: Rows

    def waterfall(self, levers: list[Lever], size: int) -> list[dict[str, Any]]:
        """A row for every lever; at half the batch where the recipe needs too much memory."""
        measured: list[dict[str, Any]] = []
        seen: list[Any] = []
        for lever in tqdm(levers, desc=f"{self.name}, batch {size}", disable=None, leave=False):
            row = self.measure(lever, size, lever.form in seen)
            measured.append(row)
            if row_name(self.name, lever, size) in self.rows.begun:  # rows of an earlier call may be another machine's
                seen.append(lever.form)
            if lever.options is None and row.get("failed") == OUT_OF_MEMORY and size > 1:
                return measured + self.waterfall(levers, size // 2)
        return measured

    def measure(self, lever: Lever, size: int, cached_code: bool) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            row = measure_lever(self.family, lever, size, self.device, 0.0 if self.name in TINY else WINDOW_SECONDS)
            flops = row["samples_per_second"] * self.cost.training_flops
            row |= {"training_flops_per_sample": self.cost.training_flops, "bytes_per_step": self.cost.bytes_per_step(size)}
            return row | {f"mfu_{kind}": flops / value for kind, value in self.peak.items() if value}

        about = {"checkpoint": self.name, "family": self.family.config.family, "lever": lever.name, "batch": size,
                 "settings": lever.settings, "precision": self.family.config.mixed_precision}  # fmt: skip
        seconds = 5.0 if self.name in TINY else expected_seconds(lever, self.cost, size, cached_code)
        return self.rows.measure(row_name(self.name, lever, size), seconds, work, **about)


def measured_peak(rows: Rows, device: torch.device, precision: str) -> dict[str, Any]:
    """Operations per second of a matrix product, `measured` here and by the card's `data_sheet`; None where unknown."""

    def work() -> dict[str, Any]:
        promised = data_sheet_flops_per_second(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return {"measured": matrix_flops_per_second(device, PRECISIONS[precision]), "data_sheet": promised}

    row = rows.measure(f"matrix product, {precision}", 10, work)
    return {kind: row.get(kind) for kind in ("measured", "data_sheet")}


def measure_all(
    rows: Rows,
    names: list[str],
    device: torch.device,
    batch: int | None = None,
    sweep: bool = False,
    wanted: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Every checkpoint, or tiny family, in turn.

    Args:
        batch: of the waterfalls, instead of each checkpoint's own.
        wanted: names of levers; none for all.
    """
    precision = PRECISION[device.type]
    if device.type == "cuda":
        # At its first choice torch writes its order of attention's kernels, which every row then starts from.
        nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 8, 64, device=device, dtype=torch.bfloat16))
    peak = measured_peak(rows, device, precision)
    measured = []
    for name in names:
        with opened(name, device) as (family, cost, size):
            checkpoint = Checkpoint(name, family, cost, peak, device, rows)
            levers = [lever for lever in LEVERS if lever.fits(family.config.family) and (not wanted or lever.name in wanted)]
            measured += checkpoint.waterfall(levers, batch or size)
            for further in AIMS.get(name, TINY_AIM)[1] if sweep else ():
                measured.append(checkpoint.measure(SHIPPED, further, True))
    return measured


@contextlib.contextmanager
def opened(name: str, device: torch.device, **options: Any) -> Iterator[tuple[Any, Cost, int]]:
    """The family of a checkpoint at its published size with random weights, or a tiny one; its cost; its waterfall's batch.

    Args:
        options: of the training; its precision is that of the device, unless they say otherwise.
    """
    tiny = name in TINY
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
    with tempfile.TemporaryDirectory() as directory, compiling_cheaply() if tiny else contextlib.nullcontext():
        options = {"mixed_precision": PRECISION[device.type], "output_dir": directory, **options}
        family: Any = (
            open_tiny(name, Path(directory), **options) if tiny else open_random(name, Path(directory), device, **options)
        )
        with torch.device("cpu" if tiny else "meta"):
            cost = count(family, published_model(family) if tiny else trained_model(name))
        yield family, cost, largest_batch(AIMS.get(name, TINY_AIM)[0], cost, memory)


@contextlib.contextmanager
def compiling_cheaply() -> Iterator[None]:
    """Models compiled inside are traced and no more: inductor takes minutes for a UNet on a CPU."""
    compile_module = nn.Module.compile
    with mock.patch.object(nn.Module, "compile", lambda module, **unused: compile_module(module, backend="eager")):
        yield


def by_checkpoint(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of levers by checkpoint and device."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "lever" in row:
            groups.setdefault((row["checkpoint"], row["device"]), []).append(row)
    return groups


def batch_of_waterfall(rows: list[dict[str, Any]]) -> int:
    """The batch that most levers of a checkpoint were measured at."""
    batches = Counter(row["batch"] for row in rows if "samples_per_second" in row)
    return max(batches, key=lambda batch: (batches[batch], batch)) if batches else rows[0]["batch"]


def rate(rows: list[dict[str, Any]], lever: str, batch: int) -> float | None:
    return next((row.get("samples_per_second") for row in rows if (row["lever"], row["batch"]) == (lever, batch)), None)


def table(rows: list[dict[str, Any]]) -> str:
    """The waterfalls as a Markdown table, and what they say about batches and norms."""
    lines = ["| model | lever | batch | samples/s | quartiles | against the recipe | against its best | MFU, measured peak | "
             "MFU, data sheet | GiB allocated | GiB reserved |", "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    notes = []
    for (checkpoint, device), group in by_checkpoint(rows).items():
        for row in group:
            start = f"| {checkpoint} | {row['lever']} | {row['batch']} |"
            speed = row.get("samples_per_second")
            if speed is None:
                lines.append(f"{start} {row.get('failed') or row.get('missing')} | | | | | | | |")
                continue
            bases = [rate(group, lever, row["batch"]) for lever in ("recipe", "recipe at its best")]
            ratios = [f"{speed / base:.2f}" if base else "" for base in bases]
            shares = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu_measured", "mfu_data_sheet")]
            memory = [f"{row[key]:.1f}" if key in row else "" for key in ("memory_gib", "reserved_gib")]
            cells = [f"{speed:.4g}", f"{row['low']:.4g} to {row['high']:.4g}", *ratios, *shares, *memory]
            lines.append(f"{start} {' | '.join(cells)} |")
        where = f"{checkpoint} on {device}"
        short = {row["batch"] for row in group if row["settings"].get("options") is None and row.get("failed") == OUT_OF_MEMORY}
        notes += [f"- {where}: the recipe does not fit batch {batch}; every lever took half." for batch in sorted(short)]
        notes += [f"- {where}: {verdict}" for verdict in [norms_verdict(group)] if verdict]
    return "\n".join([*lines, "", *notes])


def norms_verdict(rows: list[dict[str, Any]]) -> str:
    """Which value of `FUSE_NORMS_WHEN_COMPILED` the rows of a checkpoint support; nothing without both levers on a GPU."""
    batch = batch_of_waterfall(rows)
    levers = {row["lever"]: row for row in rows if row["batch"] == batch and "memory_gib" in row}
    theirs, ours = levers.get("compiled"), levers.get("compiled, own norms")
    if theirs is None or ours is None:
        return ""
    ratio = f"own norms give {ours['samples_per_second'] / theirs['samples_per_second']:.3f} times inductor's"
    if ours["low"] > theirs["high"]:
        return f"{ratio}: FUSE_NORMS_WHEN_COMPILED = True"
    if ours["high"] < theirs["low"]:
        return f"{ratio}: FUSE_NORMS_WHEN_COMPILED = False"
    return f"{ratio}, within the quartiles: no reason to change FUSE_NORMS_WHEN_COMPILED"


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead of the published size")
    parser.add_argument("--checkpoints", nargs="+", choices=[*AIMS, *TINY], help="default: all")
    parser.add_argument("--levers", nargs="+", choices=[lever.name for lever in LEVERS], default=[], help="default: all")
    parser.add_argument("--without", nargs="+", choices=[lever.name for lever in LEVERS], default=[], help="leave these out")
    parser.add_argument("--batch", type=int, help="batch of the waterfall, instead of each checkpoint's own")
    parser.add_argument("--sweep", action="store_true", help="measure further batch sizes too")
    parser.add_argument("--minutes", type=float, help="begin no row that would not end in time")
    parser.add_argument("--json", type=Path, help="keep the rows there, and go on from those that are there")
    parser.add_argument("--compile_cache_dir", type=Path, help="keep compiled code there (default: as torch's variables say)")
    options = parser.parse_args()
    quiet_libraries()
    if options.compile_cache_dir:
        keep_compiled_code(options.compile_cache_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = Rows(options.json, __doc__, options.minutes)
    names = options.checkpoints or (list(TINY) if options.tiny else list(AIMS))
    wanted = [
        lever.name for lever in LEVERS if lever.name in (options.levers or [lever.name]) and lever.name not in options.without
    ]
    measured = measure_all(rows, names, device, options.batch, options.sweep, wanted)
    print(table(measured))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
