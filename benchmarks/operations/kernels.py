"""What do the fused operations gain over eager torch and torch.compile? `python -m benchmarks.operations.kernels`

Each operation runs at the shapes of the families, beside

- `script`: what the diffusers scripts do with torch's own operations and random numbers: draw the noise, keep it, combine; for
  the loss, the squared error against the noise that was kept, its mean, and its gradient by autograd; group normalisation and
  SiLU, GELU with its gate, and GELU, GlobalResponseNorm and dropout, with their backward passes; the norm of a gradient by
  `torch.linalg.vector_norm`;
- `eager`: the operation's reference in plain torch, with the same counter-based random numbers;
- `compiled`: that reference (normalisations and GELU: the script's operations) under torch.compile;
- `plain`: of the loss with Huber's or with a mask, the same operation without.

Medians of turns that alternate; on a GPU of replays of a graph of the calls (`benchmarks.tools.timing`). `copy` is the share of
a copy's bandwidth: the bytes that must move once, against a copy of the same size on this device. On a CPU, normalisations,
GELU and the norm are the reference itself: these kernels are for GPUs.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch.nn.functional as F
from diffusers.pipelines.wuerstchen.modeling_wuerstchen_common import GlobalResponseNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.tools.charts import BLUE, GREY, RED, save
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.timing import Work, compare
from engine.kernels import add_noise, diffusion_loss, geglu, gelu, gelu_response_norm, group_norm_silu, square_sum
from engine.kernels.add_noise import per_sample, reference_add_noise
from engine.kernels.diffusion_loss import reference_diffusion_loss
from engine.kernels.square_sum import reference_square_sum

Shapes = dict[str, tuple[int, ...]]
LATENTS: Shapes = {
    "SD 512 px, batch 16": (16, 4, 64, 64),
    "Kandinsky decoder 768 px, batch 16": (16, 4, 96, 96),
    "Kandinsky prior, batch 64": (64, 1280),
    "Wuerstchen, batch 16": (16, 16, 24, 24),
}
# Where the kernels, and not their launches, set the time.
LARGE_LATENTS: Shapes = {"SD 512 px, batch 4096": (4096, 4, 64, 64), "Kandinsky prior, batch 32768": (32768, 1280)}
SMALL_LATENTS: Shapes = {"small": (2, 4, 16, 16)}
# Activations that are normalised in groups of channels / 32, for batch 16.
ACTIVATIONS: Shapes = {
    "SD, 320 channels, 64 x 64": (16, 320, 64, 64), "SD, 960 channels, 64 x 64": (16, 960, 64, 64),
    "SD, 640 channels, 32 x 32": (16, 640, 32, 32), "SD, 1280 channels, 16 x 16": (16, 1280, 16, 16),
    "decoder, 384 channels, 96 x 96": (16, 384, 96, 96), "decoder, 1152 channels, 24 x 24": (16, 1152, 24, 24),
}  # fmt: skip
SMALL_ACTIVATIONS: Shapes = {"small": (2, 64, 8, 8)}
# As SD trains, at a large batch and a small one: each pass alone.
TRAINED_ACTIVATIONS: Shapes = {
    f"SD, {channels} channels, {side} x {side}, batch {batch}": (batch, channels, side, side)
    for batch, channels, side in [(32, 320, 64), (32, 960, 64), (32, 640, 32), (32, 1280, 16), (32, 1280, 8), (4, 320, 64)]
}
HIDDEN_STATES: Shapes = {"Wuerstchen, 6144 channels, 24 x 24": (16, 24, 24, 6144)}
SMALL_HIDDEN_STATES: Shapes = {"small": (2, 4, 4, 64)}
# What a linear layer gives to GELU, with its gate in SD, for batches of 32 and 256.
GATED: Shapes = {"SD, 2 x 1280, 64 x 64": (32, 4096, 2560), "SD, 2 x 5120, 16 x 16": (32, 256, 10240)}
UNGATED: Shapes = {"prior, 8192": (256, 81, 8192)}
SMALL_HIDDEN: Shapes = {"small": (2, 16, 64)}
GRADIENTS: Shapes = {"SD, 860 M parameters": (859_520_964,)}
SMALL_GRADIENTS: Shapes = {"small": (1_000_000,)}

Works = dict[str, Work]
BACKWARD = "group_norm_silu, backward"  # a pass alone, against a copy and nothing else


def script_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias))


def script_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


compiled_add_noise = torch.compile(reference_add_noise)
compiled_diffusion_loss = torch.compile(reference_diffusion_loss)
compiled_group_norm_silu = torch.compile(script_group_norm_silu)
compiled_geglu, compiled_gelu = torch.compile(script_geglu), torch.compile(F.gelu)
compiled_square_sum = torch.compile(reference_square_sum)


def latent_works(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device) -> dict[str, Works]:
    """`add_noise` and the loss of epsilon prediction, by operation and side."""

    def latents() -> Tensor:
        tensor = torch.randn(shape, device=device).to(dtype)
        return tensor.to(memory_format=torch.channels_last) if channels_last else tensor

    batch = shape[0]
    mean, std, prediction, noise = latents(), latents().abs(), latents(), latents()
    alpha, sigma, weight = (torch.rand(batch, device=device) for _ in range(3))
    coefficients = torch.stack([alpha, sigma, torch.zeros_like(alpha), torch.ones_like(alpha), weight])
    seed, slots = torch.tensor([7], device=device), torch.arange(batch, device=device)
    noising = (mean, std, coefficients, seed, slots, 0.0, 0.0)
    losing = (prediction, mean, std, coefficients, seed, slots, 0.0, torch.ones(1, device=device))
    huber = (*losing[:3], torch.cat([coefficients, torch.full_like(weight, 0.1)[None]]), *losing[4:])
    masked = (*losing, torch.randint(256, (batch, 1, *shape[2:]), dtype=torch.uint8, device=device))

    def script_add_noise() -> Tensor:
        clean = mean + std * torch.randn_like(mean)
        return per_sample(alpha, mean).to(dtype) * clean + per_sample(sigma, mean).to(dtype) * torch.randn_like(mean)

    def script_loss() -> Tensor | None:
        predicted = prediction.detach().requires_grad_()
        error = F.mse_loss(predicted.float(), noise.float(), reduction="none").flatten(1).mean(1)
        (error * weight).mean().backward()
        return predicted.grad

    def losses(arguments: tuple[Any, ...], others: Works) -> Works:
        return {
            "engine": lambda: diffusion_loss(*arguments), "eager": lambda: reference_diffusion_loss(*arguments),
            "compiled": lambda: compiled_diffusion_loss(*arguments), **others,
        }  # fmt: skip

    return {
        "add_noise": {
            "engine": lambda: add_noise(*noising), "script": script_add_noise, "eager": lambda: reference_add_noise(*noising),
            "compiled": lambda: compiled_add_noise(*noising),
        },
        "diffusion_loss": losses(losing, {"script": script_loss}),
        "diffusion_loss, Huber": losses(huber, {"plain": lambda: diffusion_loss(*losing)}),
        "diffusion_loss, masked": losses(masked, {"plain": lambda: diffusion_loss(*losing)}),
    }  # fmt: skip


def both_passes(
    name: str, sides: dict[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...], upstream: Tensor, *weights: Tensor
) -> dict[str, Works]:
    """Of each side the forward pass alone, and with the backward pass.

    Args:
        inputs: of a side.
        upstream: the gradient of its result.
        weights: that take a gradient beside the inputs.
    """

    def forward(function: Callable[..., Tensor]) -> Work:
        return torch.no_grad()(lambda: function(*inputs))

    def backward(function: Callable[..., Tensor]) -> Work:
        return lambda: torch.autograd.grad(function(*inputs), (*inputs, *weights), upstream)

    return {
        name: {side: forward(function) for side, function in sides.items()},
        f"{name}, both passes": {side: backward(function) for side, function in sides.items()},
    }


def group_norm_works(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Works]:
    """Group normalisation with SiLU, forward alone, backward alone, and forward with backward."""
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(shape[1], device=device).to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn_like(x)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, 32, 1e-5)

    sides = {"engine": ours, "script": script_group_norm_silu, "compiled": compiled_group_norm_silu}
    affine = [tensor.detach().expand(shape[:2]) for tensor in (weight, bias)]
    statistics = torch.ops.engine.group_norm_silu(x.detach(), *affine, 32, 1e-5, True)[1:]
    given = (upstream, x.detach(), *affine, *statistics)
    return {
        **both_passes("group_norm_silu", sides, (x, weight, bias), upstream),
        BACKWARD: {"engine": lambda: torch.ops.engine.group_norm_silu_backward(*given, 32, True)},
    }


def response_norm_works(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Works]:
    """What lies between the linear layers of Wuerstchen's residual block, in training: forward alone, and with backward."""
    u = torch.randn(shape, device=device).to(dtype).requires_grad_()
    norm = GlobalResponseNorm(shape[-1]).to(device, dtype)
    script = nn.Sequential(nn.GELU(), norm, nn.Dropout(0.1))

    def ours(u: Tensor) -> Tensor:
        return gelu_response_norm(u, norm.gamma.flatten(), norm.beta.flatten(), 0.1)

    sides: dict[str, Callable[..., Tensor]] = {"engine": ours, "script": script, "compiled": torch.compile(script)}
    return both_passes("gelu_response_norm", sides, (u,), torch.randn_like(u), norm.gamma, norm.beta)


def gelu_works(shape: tuple[int, ...], gated: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Works]:
    """GELU, gated or not, forward alone and forward with backward."""
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    name, ours, script, compiled = (
        ("geglu", geglu, script_geglu, compiled_geglu) if gated else ("gelu", gelu, F.gelu, compiled_gelu)
    )
    sides: dict[str, Callable[..., Tensor]] = {"engine": ours, "script": script, "compiled": compiled}
    return both_passes(name, sides, (x,), torch.randn_like(script(x)))


def square_sum_works(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Works]:
    gradient = torch.randn(shape, device=device).to(dtype)
    return {
        "square_sum": {
            "engine": lambda: square_sum(gradient), "script": lambda: torch.linalg.vector_norm(gradient, dtype=torch.float32),
            "compiled": lambda: compiled_square_sum(gradient),
        }
    }  # fmt: skip


# How often the elements must move: add_noise reads mean and std and writes; the loss reads and writes; normalisation and GELU
# read and write (gated half as much), and with their backward passes read x and the gradient again and write another; response
# normalisation, whose statistics are of a whole sample, reads twice each time; the norm reads.
MOVES = {
    "add_noise": 3, "diffusion_loss": 2, "diffusion_loss, Huber": 2, "diffusion_loss, masked": 2, "group_norm_silu": 2,
    BACKWARD: 3, "group_norm_silu, both passes": 5, "gelu_response_norm": 3,
    "gelu_response_norm, both passes": 8, "geglu": 1.5, "geglu, both passes": 4, "gelu": 2, "gelu, both passes": 5,
    "square_sum": 1,
}  # fmt: skip

SECONDS = 40  # that a row takes at most, most of them for torch.compile


def measure(small: bool, compiled: bool, device: torch.device, rows: Rows | None = None) -> list[dict[str, Any]]:
    """A row for each operation, shape, dtype and layout; kept in `rows` where they are given."""
    rows = rows or Rows(None, __doc__)
    gpu = device.type == "cuda"
    cases: list[tuple[tuple[str, ...], str, tuple[int, ...], torch.dtype, str, Callable[[], dict[str, Works]]]] = []
    for name, shape in (SMALL_LATENTS if small else LATENTS | (LARGE_LATENTS if gpu else {})).items():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last")[: 2 if len(shape) == 4 else 1]:
                build = partial(latent_works, shape, dtype, layout == "channels_last", device)
                losses = ("diffusion_loss", "diffusion_loss, Huber", "diffusion_loss, masked")[: 3 if len(shape) == 4 else 1]
                cases.append((("add_noise", *losses), name, shape, dtype, layout, build))
    if gpu or small:
        dtype = torch.bfloat16
        for name, shape in (SMALL_ACTIVATIONS if small else ACTIVATIONS).items():
            operations: tuple[str, ...] = ("group_norm_silu", "group_norm_silu, both passes")
            cases.append((operations, name, shape, dtype, "channels_last", partial(group_norm_works, shape, dtype, device)))
        for name, shape in (SMALL_ACTIVATIONS if small else TRAINED_ACTIVATIONS).items():
            operations = (BACKWARD,) if small else ("group_norm_silu", BACKWARD)
            cases.append((operations, name, shape, dtype, "channels_last", partial(group_norm_works, shape, dtype, device)))
        for name, shape in (SMALL_HIDDEN_STATES if small else HIDDEN_STATES).items():
            operations = ("gelu_response_norm", "gelu_response_norm, both passes")
            cases.append((operations, name, shape, dtype, "contiguous", partial(response_norm_works, shape, dtype, device)))
        for gated, shapes in ((True, GATED), (False, UNGATED)):
            operations = ("geglu", "geglu, both passes") if gated else ("gelu", "gelu, both passes")
            for name, shape in (SMALL_HIDDEN if small else shapes).items():
                build = partial(gelu_works, shape, gated, dtype, device)
                cases.append((operations, name, shape, dtype, "contiguous", build))
        for name, shape in (SMALL_GRADIENTS if small else GRADIENTS).items():
            cases.append((("square_sum",), name, shape, dtype, "flat", partial(square_sum_works, shape, dtype, device)))
    measured = []
    for operations, name, shape, dtype, layout, build in tqdm(cases, desc="Kernels", disable=None):
        torch._dynamo.reset()
        for operation in operations:
            about = {"operation": operation, "shape": name, "dtype": str(dtype).removeprefix("torch."), "layout": layout}
            moved = int(MOVES[operation] * torch.Size(shape).numel() * dtype.itemsize)
            work = partial(compare, partial(_sides, build, operation, compiled), moved, device)
            seconds = SECONDS if compiled and operation != BACKWARD else 1
            measured.append(rows.measure(", ".join(about.values()), seconds, work, **about))
    return measured


def _sides(build: Callable[[], dict[str, Works]], operation: str, compiled: bool) -> Works:
    return {side: work for side, work in build()[operation].items() if compiled or side != "compiled"}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| operation | shape | dtype | layout | us | GB/s | copy | script | eager | compiled | plain |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        described = f"| {row['operation']} | {row['shape']} | {row['dtype']} | {row['layout']}"
        if "gain" not in row:
            lines.append(f"{described} | {row.get('failed') or row['missing']} | | | | | | |")
            continue
        gains = " | ".join(
            f"{row['gain'][side]:.2f} x" if side in row["gain"] else "" for side in ("script", "eager", "compiled", "plain")
        )
        lines.append(
            f"{described} | {row['microseconds']['engine']:.3g} | "
            f"{row['bytes_per_second'] / 1e9:.0f} | {row['share_of_copy_bandwidth']:.0%} | {gains} |"
        )
    notes = [f"- {row['name']}: {side} {note}" for row in rows for side, note in row.get("notes", {}).items()]
    return "\n".join([*lines, "", *notes] if notes else lines)


def chart(rows: list[dict[str, Any]], optimizer: dict[str, Any], path: Path) -> None:
    """The share of a copy's bandwidth that each kernel reaches, beside its strongest rival's.

    Args:
        rows: those without a share are left out, and so is a rival that has no time.
        optimizer: of `benchmarks.operations.optimizer`, may be empty.
    """
    named = [(f"{row['operation']}\n{row['shape']}, {row['layout']}", row) for row in rows if row.get("dtype") == "bfloat16"]
    named = [(label, row) for label, row in [*named, ("adamw_ema_", optimizer)] if "share_of_copy_bandwidth" in row]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(named)), layout="constrained")
    panel = figure.subplots()
    ours = {place: row["share_of_copy_bandwidth"] for place, (_, row) in enumerate(named)}
    rivals = {place: ours[place] / min(row["gain"].values()) for place, (_, row) in enumerate(named) if row.get("gain")}
    panel.barh(list(ours), list(ours.values()), height=0.4, color=BLUE, label="engine")
    panel.barh([p + 0.4 for p in rivals], list(rivals.values()), height=0.4, color=GREY, label="fastest other")
    panel.axvline(1, color=RED, linewidth=1)
    panel.set_yticks([place + 0.2 for place in ours], [label for label, _ in named], fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel("bytes that must move, against a copy of as many")
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--small", action="store_true", help="small shapes and no torch.compile, to try the benchmark itself")
    options = parser.parse_args()
    device = this_device()
    rows = Rows(options.json, __doc__, options.minutes)
    print(table(measure(options.small, not options.small, device, rows)))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
