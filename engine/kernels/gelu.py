"""engine::gelu: y = gelu(x), or gated, y = value * gelu(gate) for (value, gate) the halves of x; and its backward pass.

The exact GELU, x times the normal distribution's part below x (arXiv:1606.08415), and GEGLU (arXiv:2002.05202). In bf16 and
fp16 the part beyond |x| is the density times Mills' ratio M(|x|), and the latter t (a + b t + c t^2 + d t^3) with
t = 1 / sqrt(1 + p |x| + q x^2): it has the limit of M, and six constants fitted to the least relative error, 2^-16. So one
exponential serves value and slope, and the result is as precise for a large negative x as elsewhere. fp32 has erf.
(gelu_response_norm.py, in bf16 alone, does with one special function instead of two, by a fit that ends at |x| = 5.5.)

Per element of a bf16 result, from memory: forward 2 bytes read and 2 written, gated 4 and 2; backward 4 and 2, gated 6 and 4.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import on_its_device
from engine.kernels.layout import at_least_fp32

ELEMENTS = 2048  # of a program's tile: two 16-byte pieces of bf16 per thread and tensor, all asked for before any is used
WIDTH = 256  # columns of a tile at most: a warp's pieces


@triton.jit
def _below_and_density(x, COARSE: tl.constexpr):
    """The normal distribution's part below x, and its density there."""
    density = tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361595)
    if COARSE:
        size = tl.abs(x)
        t = tl.rsqrt(1 + size * (0.66614657 + size * 0.13189123))
        beyond = density * t * (0.36256629 + t * (0.34171374 + t * (0.24101292 + t * 0.30800358)))
        below = tl.where(x < 0, beyond, 1 - beyond)
    else:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return below, density


@triton.jit
def _places(rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A program's first row, and of its tile [ROWS, WIDTH] each element's row and column in it, and whether it exists."""
    TILES: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    first = (tl.program_id(0) // TILES).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % TILES * WIDTH + tl.arange(0, WIDTH))[None, :]
    exists = row < rows - first
    if COLUMNS % WIDTH != 0:
        exists = exists & (column < COLUMNS)
    return first, row, column, exists


@triton.jit(do_not_specialize=["rows"])
def gelu_kernel(
    y_pointer, x_pointer, rows,
    GATED: tl.constexpr, COARSE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, row, column, exists = _places(rows, COLUMNS, ROWS, WIDTH)
    STRIDE: tl.constexpr = COLUMNS * (2 if GATED else 1)
    x_pointer += first * STRIDE + row * STRIDE + column
    if GATED:
        value = tl.load(x_pointer, mask=exists, other=0.0).to(tl.float32)
    x = tl.load(x_pointer + (STRIDE - COLUMNS), mask=exists, other=0.0).to(tl.float32)
    y = x * _below_and_density(x, COARSE)[0]
    if GATED:
        y *= value
    tl.store(y_pointer + first * COLUMNS + row * COLUMNS + column, y, mask=exists)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(
    x_gradient_pointer, y_gradient_pointer, x_pointer, rows,
    GATED: tl.constexpr, COARSE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, row, column, exists = _places(rows, COLUMNS, ROWS, WIDTH)
    STRIDE: tl.constexpr = COLUMNS * (2 if GATED else 1)
    place = first * STRIDE + row * STRIDE + column
    gradient = tl.load(y_gradient_pointer + first * COLUMNS + row * COLUMNS + column, mask=exists, other=0.0).to(tl.float32)
    if GATED:
        value = tl.load(x_pointer + place, mask=exists, other=0.0).to(tl.float32)
    x = tl.load(x_pointer + (STRIDE - COLUMNS) + place, mask=exists, other=0.0).to(tl.float32)
    below, density = _below_and_density(x, COARSE)
    if GATED:
        tl.store(x_gradient_pointer + place, gradient * (x * below), mask=exists)
        gradient *= value
    tl.store(x_gradient_pointer + (STRIDE - COLUMNS) + place, gradient * (below + x * density), mask=exists)


def tiling(columns: int, dtype: torch.dtype) -> dict[str, int]:
    """The constants of a launch for results of so many columns."""
    width = min(WIDTH, triton.next_power_of_2(columns))
    coarse = dtype in (torch.bfloat16, torch.float16)
    return {"COARSE": coarse, "COLUMNS": columns, "ROWS": ELEMENTS // width, "WIDTH": width}


def _rows_and_programs(x: Tensor, columns: int, constants: dict[str, int]) -> tuple[int, tuple[int]]:
    rows = x.shape[:-1].numel()
    return rows, (triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(columns, constants["WIDTH"]),)


def _empty_result(x: Tensor, gated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1]))


def launch_gelu(x: Tensor, gated: bool) -> Tensor:
    """Runs the Triton kernel; arguments as `reference_gelu`."""
    y = _empty_result(x, gated)
    constants = tiling(y.shape[-1], x.dtype)
    rows, programs = _rows_and_programs(x, y.shape[-1], constants)
    gelu_kernel[programs](y, x.contiguous(), rows, GATED=gated, **constants)
    return y


def launch_gelu_backward(y_gradient: Tensor, x: Tensor, gated: bool) -> Tensor:
    """Runs the Triton kernel; arguments as `reference_gelu_backward`."""
    x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    constants = tiling(y_gradient.shape[-1], x.dtype)
    rows, programs = _rows_and_programs(x, y_gradient.shape[-1], constants)
    gelu_backward_kernel[programs](x_gradient, y_gradient.contiguous(), x.contiguous(), rows, GATED=gated, **constants)
    return x_gradient


def reference_gelu(x: Tensor, gated: bool) -> Tensor:
    """gelu(x), or value * gelu(gate) with (value, gate) the halves of x, rounded once.

    Args:
        x: [..., C], gated [..., 2 C], in bf16, fp16 or fp32; best contiguous.

    Returns:
        [..., C] in the dtype of x, contiguous.
    """
    if not gated:
        return F.gelu(at_least_fp32(x)).to(x.dtype).contiguous()
    value, gate = at_least_fp32(x).chunk(2, -1)
    return (value * F.gelu(gate)).to(x.dtype).contiguous()


def reference_gelu_backward(y_gradient: Tensor, x: Tensor, gated: bool) -> Tensor:
    """The gradient with respect to x, in its shape and dtype, contiguous."""
    value, gate = at_least_fp32(x).chunk(2, -1) if gated else (1, at_least_fp32(x))
    gradient = at_least_fp32(y_gradient)
    through = torch.ops.aten.gelu_backward(gradient * value, gate)
    both = torch.cat([gradient * F.gelu(gate), through], -1) if gated else through
    return both.to(x.dtype).contiguous()


_forward = torch.library.custom_op("engine::gelu", reference_gelu, mutates_args=())
_forward.register_kernel("cuda")(on_its_device(launch_gelu))
_backward = torch.library.custom_op("engine::gelu_backward", reference_gelu_backward, mutates_args=())
_backward.register_kernel("cuda")(on_its_device(launch_gelu_backward))
_forward.register_fake(_empty_result)


@_backward.register_fake
def _(y_gradient, x, gated):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    x, ctx.gated = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, y_gradient):
    (x,) = ctx.saved_tensors
    return _backward(y_gradient, x, ctx.gated), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU of x [..., C], differentiable, rounded once; of fp32 by erf itself."""
    return _forward(x, False)


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate) [..., C] with (value, gate) the halves of x [..., 2 C], differentiable; rounded once."""
    return _forward(x, True)
