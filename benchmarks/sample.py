"""How fast are images drawn, and where does the time go? `python -m benchmarks.sample [--size S] [--json FILE] [--minutes M]`

Whole pipelines with random weights draw as `python -m engine.sample` does: the plain one of diffusers, with the models in the
form of the engine's training, and with these compiled, in turns; how far the pictures are apart; and of each the seconds of
text encoders, denoisers, decoder and schedulers, synchronised around each, and of the host around them. The published models
are counted on the meta device, for one image with guidance: launches, operations and bytes of a call, and the values that the
host reads; by an assumed H200 the time that the device has per launch, and what fusing all but the products could give.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from diffusers.pipelines.wuerstchen import WuerstchenDiffNeXt

from benchmarks.tools import published
from benchmarks.tools.compiling import compiling_cheaply
from benchmarks.tools.cost import MATRIX_OPERATIONS, OneAttention
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import markdown
from benchmarks.tools.timing import seconds_in_turns, spread, synchronize
from benchmarks.tools.whole import SIDES, open_whole
from engine.models.drawing import DECODERS, DENOISERS, compile_models, draw, speed_up
from engine.prompts import Wanted
from engine.quiet import quiet_libraries

TURNS = 3
FLOPS, BANDWIDTH = 788e12, 4.3e12  # of an H200 per second, as `benchmarks.steps.sizes` assumes them
EXPECTED_SECONDS = {"tiny": 20, "small": 300, "full": 60}  # a family, with compiled code in the caches; assumed
WAYS = ("plain", "engine", "compiled")
TEXT_ENCODERS = ("text_encoder", "prior_text_encoder", "prior_image_encoder")


def open_way(way: str, family: str, size: str, device: torch.device) -> Any:
    pipeline = open_whole(family, size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if way != "plain":
        speed_up(pipeline)
    if way == "compiled":
        compile_models(pipeline, 1)
    return pipeline


def measure(
    family: str, size: str, images: int, steps: int, turns: int, device: torch.device, ways: Sequence[str] = WAYS
) -> dict[str, Any]:
    """Seconds of a call by way, medians and quartiles; of the first, which compiles; by part; and how far pixels are apart."""
    side = SIDES[family][size]
    wanted = [Wanted("a photograph", seed, width=side, height=side, steps=steps) for seed in range(images)]
    prior: dict[str, Any] = {} if family == "sd" else {"prior_num_inference_steps": steps}
    pipelines = {way: open_way(way, family, size, device) for way in ways}
    drawn: dict[str, np.ndarray] = {}

    def call(way: str) -> None:
        drawn[way] = np.stack([np.asarray(image, float) for _, image in draw(pipelines[way], wanted, images, **prior)])

    first = {}
    for way in ways:
        started = time.perf_counter()
        call(way)
        synchronize(device)
        first[way] = time.perf_counter() - started
    if "compiled" in ways:
        call("compiled")  # on a GPU it is a model's second call that makes its graph, and the decoder had one
    taken = seconds_in_turns([partial(call, way) for way in ways], turns, 0, device)
    medians = {way: spread(seconds) for way, seconds in zip(ways, taken, strict=True)}
    against = [way for way in ways if way != "plain"] if "plain" in ways else []
    return {
        "images": images, "pixels": side, "inference_steps": steps,
        "seconds": {way: median for way, (median, _, _) in medians.items()},
        "quartiles": {way: quartiles for way, (_, *quartiles) in medians.items()},
        "first_seconds": first,
        "gain": {way: medians["plain"][0] / medians[way][0] for way in against},
        "parts": {way: breakdown(pipelines[way], partial(call, way), device) for way in ways},
        "pixels_apart": {way: float(abs(drawn[way] - drawn["plain"]).max()) for way in against},
    }  # fmt: skip


def breakdown(pipeline: Any, call: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of a call by part."""
    seconds: dict[str, float] = dict.fromkeys(("text encoder", "denoiser", "decoder", "scheduler"), 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            synchronize(device)
            started = time.perf_counter()
            result = function(*arguments, **named)
            synchronize(device)
            seconds[part] += time.perf_counter() - started
            return result

        return run

    components = pipeline.components
    calls = [(name, "text encoder", "forward") for name in TEXT_ENCODERS]
    calls += [(name, "denoiser", "forward") for name in DENOISERS] + [(name, "decoder", "decode") for name in DECODERS]
    calls += [(name, "scheduler", "step") for name in ("scheduler", "prior_scheduler")]
    with contextlib.ExitStack() as stack:
        for name, part, method in calls:
            if name in components:
                stack.enter_context(replaced(components[name], method, timed(part, getattr(components[name], method))))
        started = time.perf_counter()
        call()
        synchronize(device)
        whole = time.perf_counter() - started
    return {**seconds, "host": whole - sum(seconds.values())}


@contextlib.contextmanager
def replaced(owner: Any, method: str, by: Any) -> Iterator[None]:
    """Another method in the place of an object's own while the `with` lasts."""
    before = vars(owner).get(method)
    vars(owner)[method] = by
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[method]
        else:
            vars(owner)[method] = before


class Counted(TorchDispatchMode):
    """Counts the operations that launch a kernel, the bytes that they move, and the values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.numbers = self.matrix_numbers = self.reads = 0

    def add(self, *tensors: Any) -> None:
        """An operation on tensors."""
        moved = sum(tensor.numel() for tensor in tree_leaves(tensors) if torch.is_tensor(tensor))
        self.launches += 1
        self.numbers += moved
        self.matrix_numbers += moved

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name == "aten::_local_scalar_dense":
            self.reads += 1
        elif not function.is_view and name not in ("aten::_unsafe_view", "aten::empty", "aten::detach"):
            moved = sum(tensor.numel() for tensor in tree_leaves((args, kwargs, result)) if torch.is_tensor(tensor))
            self.launches += 1
            self.numbers += moved
            self.matrix_numbers += moved if name in MATRIX_OPERATIONS else 0
        return result


def _inputs(name: str) -> tuple[Any, dict[str, Any]]:
    """A published denoiser on the meta device, and the inputs of a call for one image with guidance."""
    pair, texts = 2, (2, 77)
    if name == "SD 1.5, 512 px":
        return published.sd_1_5(), {
            "sample": torch.empty(pair, 4, 64, 64), "timestep": torch.tensor(1),
            "encoder_hidden_states": torch.empty(*texts, 768),
        }  # fmt: skip
    if name == "Kandinsky 2.2 prior":
        return published.kandinsky_prior(), {
            "hidden_states": torch.empty(pair, 1280), "timestep": torch.tensor(1), "proj_embedding": torch.empty(pair, 1280),
            "encoder_hidden_states": torch.empty(*texts, 1280), "attention_mask": torch.ones(*texts, dtype=torch.bool),
        }  # fmt: skip
    if name == "Kandinsky 2.2 decoder, 512 px":
        return published.kandinsky_decoder(), {
            "sample": torch.empty(pair, 4, 64, 64), "timestep": torch.tensor(1), "encoder_hidden_states": None,
            "added_cond_kwargs": {"image_embeds": torch.empty(pair, 1280)},
        }  # fmt: skip
    if name == "Wuerstchen prior, 1024 px":
        return published.wuerstchen_prior(), {
            "x": torch.empty(pair, 16, 24, 24), "r": torch.empty(pair), "c": torch.empty(*texts, 1280)
        }  # fmt: skip
    return WuerstchenDiffNeXt(), {
        "x": torch.empty(1, 4, 256, 256), "r": torch.empty(1), "effnet": torch.empty(1, 16, 24, 24),
        "clip": torch.empty(1, 77, 1024),
    }  # fmt: skip


# Denoisers, and which family's schedulers they go with.
COUNTED = {
    "SD 1.5, 512 px": "sd", "Kandinsky 2.2 prior": "kandinsky", "Kandinsky 2.2 decoder, 512 px": "kandinsky",
    "Wuerstchen prior, 1024 px": "wuerstchen", "Wuerstchen decoder, 1024 px": "wuerstchen",
}  # fmt: skip


@torch.no_grad()
def count(name: str) -> dict[str, Any]:
    """What a call of a published denoiser takes, with 2 bytes per number; and what the host reads per step of its family."""
    with torch.device("meta"):
        model, inputs = _inputs(name)
        counted = Counted()
        with OneAttention(counted), counted:
            model.eval()(**inputs)
        with FlopCounterMode(display=False) as operations:
            model(**inputs)
    flops, least = operations.get_total_flops(), 2 * counted.matrix_numbers
    products, others = max(flops / FLOPS, least / BANDWIDTH), (2 * counted.numbers - least) / BANDWIDTH
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters, "launches": counted.launches, "tflop": flops / 1e12, "mib": 2 * counted.numbers / 2**20,
        "least_mib": least / 2**20, "host_reads": host_reads(COUNTED[name]),
        "even_microseconds": 1e6 * (products + others) / counted.launches, "gain_at_most": (products + others) / products,
    }  # fmt: skip


def host_reads(family: str) -> float:
    """Values that the host reads in a step more, by the difference between two numbers of steps of the tiny pipelines."""
    pipeline = open_way("plain", family, "tiny", torch.device("cpu"))
    side, reads = SIDES[family]["tiny"], []
    for steps in (2, 6):
        with Counted() as counted:
            prior: dict[str, Any] = {} if family == "sd" else {"prior_num_inference_steps": steps}
            list(draw(pipeline, [Wanted("a", 0, width=side, height=side, steps=steps)], **prior))
        reads.append(counted.reads)
    return (reads[1] - reads[0]) / 4


def table(rows: list[dict[str, Any]]) -> str:
    measured = [row for row in rows if "launches" not in row]
    flat = [
        row | {f"{key}_{way}": value for key in ("seconds", "first_seconds", "gain", "pixels_apart")
               for way, value in row.get(key, {}).items()}
        for row in measured
    ]  # fmt: skip
    parts = [
        {"name": f"{row['name']}, {way}"} | row["parts"][way] for row in measured if "parts" in row for way in row["parts"]
    ]
    return "\n\n".join([
        markdown(flat, {
            "pipeline": "name", "images": "images", "pixels": "pixels", "steps": "inference_steps", "plain, s": "seconds_plain",
            "engine, s": "seconds_engine", "compiled, s": "seconds_compiled", "gain": "gain_engine",
            "gain, compiled": "gain_compiled", "compiled, first": "first_seconds_compiled",
            "apart, of 255": "pixels_apart_engine", "compiled, apart": "pixels_apart_compiled",
        }),
        markdown(parts, {
            "seconds": "name", "text encoder": "text encoder", "denoiser": "denoiser", "decoder": "decoder",
            "scheduler": "scheduler", "host": "host",
        }),
        markdown([row for row in rows if "launches" in row], {
            "one image, with guidance": "name", "parameters": "parameters", "launches": "launches", "TFLOP": "tflop",
            "MiB moved": "mib",
            "MiB of products alone": "least_mib", "µs per launch": "even_microseconds",
            "fused at most": "gain_at_most",
            "host reads per step of all stages": "host_reads",
        }),
    ])  # fmt: skip


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", choices=SIDES, default=list(SIDES), help="default: all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--size", choices=EXPECTED_SECONDS, default="full", help="of the models (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, help="at a time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of sampling, in each stage (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=TURNS, help="after a first call of each way (default: %(default)s)")
    parser.add_argument("--no_counts", action="store_true", help="leave the counts of the published models out")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    kept = Rows(options.json, __doc__, options.minutes)
    counted = [name for name, family in COUNTED.items() if family in options.families and not options.no_counts]
    rows = [kept.measure(name, 10, partial(count, name)) for name in counted]
    with compiling_cheaply() if options.size == "tiny" else contextlib.nullcontext():
        for family in options.families:
            work = partial(measure, family, options.size, options.images, options.steps, options.turns, device, options.ways)
            name = ", ".join([family, options.size, *(options.ways if set(options.ways) != set(WAYS) else ())])
            rows.append(kept.measure(name, EXPECTED_SECONDS[options.size], work))
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
