"""Compiles what a campaign will run, side by side: `python -m benchmarks.steps.compilation [--processes N] [--json FILE]`

torch.compile keeps one core busy for minutes. Here a process compiles each form that the planned rows of
`benchmarks.steps.step` and `benchmarks.steps.overhead` need, many at once, into the caches that the environment names
(TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR): a row then finds its code and traces alone. `benchmarks.sample` and
`benchmarks.operations.kernels` are run instead, for their code alone.

A process holds the model in the form of the row and one batch of its size, and no optimizer. Forward and backward are compiled
by the row's own calls; where the compiled code would run, the process ends (`only_compiling`). Rows are kept of this commit
alone: code of another is other code.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any
from unittest import mock

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from torch._dynamo.utils import counters
from torch._functorch import aot_autograd
from torch._inductor import compile_fx

from benchmarks.tools import plain
from benchmarks.tools.checkpoints import AIMS, Checkpoint, opened
from benchmarks.tools.levers import LEVERS, SHIPPED, Lever
from benchmarks.tools.planned import LARGER, SMALL_BATCH, levers_of
from benchmarks.tools.published import CHECKPOINTS, TINY
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.settings import settings_kept, settle_attention
from benchmarks.tools.sides import RecipeSide, random_batch
from benchmarks.tools.tables import markdown
from engine.backends import compile_model, configure
from engine.data.samples.batch import Batch
from engine.errors import TRY_AGAIN
from engine.loop import attention
from engine.loop.step import predict_and_compare
from engine.models.encoder import PRECISIONS
from engine.quiet import quiet_libraries

HOST, DEVICE = 12 * 2**30, 10 * 2**30  # bytes of memory per process, with as much for what runs beside; assumed
# What runs for its compiled code alone, and its arguments of the interpreter.
OTHERS = {
    # One family after another: whole pipelines take the most memory.
    "sampling": (
        "-m", "benchmarks.sample", "--families", "wuerstchen", "sd", "kandinsky", "--ways", "compiled", "--steps", "2",
        "--turns", "1", "--no_counts",
    ),
    "kernels": ("-m", "benchmarks.operations.kernels"),
}  # fmt: skip
# What takes long comes first.
ORDER = sorted(AIMS, key=lambda name: CHECKPOINTS[name][0] not in ("wuerstchen", "sd"))


class Compiled(Exception):
    """Raised where compiled code would run."""


@contextlib.contextmanager
def only_compiling() -> Iterator[None]:
    """At the first call of a compiled model, forward and backward are compiled and kept in caches, and `Compiled` is raised.

    The keys of both caches stay those of a run: torch's configuration is part of them, so that the backward pass is asked for
    at once where its setting `force_non_lazy_backward_lowering` arrives, and not by the setting.
    """
    compiles, configuration = compile_fx.compile_fx, aot_autograd.AOTConfig

    def stop(*arguments: Any) -> None:
        raise Compiled

    def compile_and_stop(*arguments: Any, **named: Any) -> Any:
        compiles(*arguments, **named)
        return stop

    def at_once(*arguments: Any, **named: Any) -> Any:
        return configuration(*arguments, **named | {"force_non_lazy_backward_lowering": True})

    with (
        mock.patch.object(compile_fx, "compile_fx", compile_and_stop),
        mock.patch.object(aot_autograd, "AOTConfig", at_once),
    ):
        yield


def compile_form(checkpoint: Checkpoint, lever: Lever, size: int) -> dict[str, Any]:
    """How many graphs were compiled, and how many the caches had.

    Raises:
        RuntimeError: the model called no compiled code, but for tiny ones, which are compiled cheaply.
    """
    counters.clear()
    with settings_kept(), only_compiling():
        torch.manual_seed(7)
        batch = random_batch(checkpoint.family, size, checkpoint.device)
        try:
            (call_recipe if lever.options is None else call_engine)(checkpoint, lever, batch)
        except Compiled:
            pass
        else:
            if not checkpoint.tiny:
                raise RuntimeError("no compiled code was called")
    inductor = counters["inductor"]
    return {"compiled": inductor["fxgraph_cache_miss"], "found": inductor["fxgraph_cache_hit"]}


def call_recipe(checkpoint: Checkpoint, lever: Lever, batch: Batch) -> None:
    """The recipe's model, as its first step calls it; without the moving average."""
    with mock.patch.object(plain, "EMAModel"):
        RecipeSide(checkpoint, lever, batch).step()


def call_engine(checkpoint: Checkpoint, lever: Lever, batch: Batch) -> None:
    """The engine's model, as the first step of `Training` calls it; its weights lie each for itself, of which caches know
    nothing."""
    options, family, device = lever.options or {}, checkpoint.family, checkpoint.device
    model = checkpoint.load_model(lever.training_form, **options)
    config = family.config.model_copy(update={"use_ema": True, "train_batch_size": len(batch.slots)} | options)
    configure(config)
    attention.prepare(config, family, model, device, loud=False)
    model.to(device, PRECISIONS[config.mixed_precision])
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    compile_model(model, config, 1)
    seed, scale = torch.tensor([7], device=device), torch.ones(1, device=device)
    predict_and_compare(model, family, batch, config, seed, scale)


def forms(names: Sequence[str], wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What is to be compiled, by name, with the arguments of the interpreter.

    Args:
        names: of checkpoints, or tiny families.
        wanted: names of levers; none for the planned.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        seen = []
        fitting = [lever for lever in LEVERS if lever.fits(family_of(name))]
        for lever in [lever for lever in fitting if lever.name in wanted] if wanted else levers_of(name, family_of(name)):
            if lever.compiles and lever.form not in seen:
                seen.append(lever.form)
                found[f"{name}: {lever.name}"] = command_of(name, lever.name)
    return found


def command_of(name: str, lever: str, *others: str) -> tuple[str, ...]:
    """What compiles a form in its own process."""
    module = "benchmarks.steps.compilation"
    return "-m", module, "--processes", "0", "--checkpoints", name, "--levers", lever, *others


def family_of(name: str) -> str:
    return name if name in TINY else CHECKPOINTS[name][0]


def side_by_side(rows: Rows, works: dict[str, tuple[str, ...]], processes: int, minutes: float | None) -> list[dict[str, Any]]:
    """Runs each in a process of its own, so many at once; a row for each that ended. One that fails has a second attempt, in a
    further call."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    cores = len(os.sched_getaffinity(0))
    variables = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(2 * cores // processes, 1)), **os.environ}

    def run(arguments: tuple[str, ...]) -> dict[str, Any]:
        started = time.monotonic()
        left = None if minutes is None else max(deadline - started, 0.1)
        ended = subprocess.run(
            [sys.executable, *arguments], env=variables, timeout=left, capture_output=True, text=True, check=False
        )
        if ended.returncode != 0:
            print(ended.stderr, file=sys.stderr)
            raise RuntimeError((ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1])
        last = ended.stdout.splitlines()[-1:]
        counted = json.loads(last[0]) if last and last[0].startswith("{") else {}
        return {"seconds": time.monotonic() - started, **counted}

    done = {row["name"]: row for row in rows.rows if "failed" not in row}
    before = {row["name"] for row in rows.rows} - done.keys()
    rows.rows[:] = done.values()
    with ThreadPoolExecutor(processes) as pool:
        futures: dict[Future[dict[str, Any]], str] = {
            pool.submit(run, arguments): name for name, arguments in works.items() if name not in done
        }
        for future in as_completed(futures):
            name, error = futures[future], future.exception()
            timed_out = isinstance(error, subprocess.TimeoutExpired)
            if not timed_out:
                done[name] = rows.measure(name, 0, future.result, attempts=1 + (name in before))
            if timed_out or (error and name not in before):
                rows.exit_code = TRY_AGAIN
    return [done[name] for name in works if name in done]


def most_processes(device: torch.device) -> int:
    """As many as there is memory for, on the host and on the device, of half the cores."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // HOST
    free = torch.cuda.mem_get_info(device)[0] // DEVICE if device.type == "cuda" else host
    return max(1, min(len(os.sched_getaffinity(0)) // 2, host, free))


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {"form": "name", "s": "seconds", "graphs compiled": "compiled", "found in the caches": "found"})


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--checkpoints", nargs="+", choices=[*AIMS, *TINY], help="default: all, and what other parts compile")
    parser.add_argument("--levers", nargs="+", choices=[lever.name for lever in LEVERS], default=[], help="default: as planned")
    parser.add_argument("--batch", type=int, help="instead of each checkpoint's own")
    parser.add_argument("--processes", type=int, help="at once (default: by cores and memory); 0 compiles in this one")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    if options.processes == 0:
        settle_attention(device)
        for name in options.checkpoints:
            with opened(name, device) as checkpoint:
                for lever in (lever for lever in LEVERS if lever.name in options.levers):
                    print(json.dumps(compile_form(checkpoint, lever, options.batch or checkpoint.batch)))
        return 0
    rows = Rows(options.json, __doc__)
    rows.rows[:] = [row for row in rows.rows if row["environment"] == rows.number]
    works = forms(options.checkpoints or ORDER, options.levers)
    if not options.checkpoints:
        for name, size in (*LARGER.items(), ("SD 1.5, 512 px", SMALL_BATCH)):
            works[f"{name}: {SHIPPED.name}, batch {size}"] = command_of(name, SHIPPED.name, "--batch", str(size))
        works = OTHERS | works
    print(table(side_by_side(rows, works, options.processes or most_processes(device), options.minutes)))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
