"""engine::group_norm_silu: y = silu(groupnorm(x) * weight + bias) for tensors stored channels last, and its backward pass.

Group normalisation as in arXiv:1803.08494. Weight and bias are given per sample, so that a time embedding's scale and shift
fold into them. One program owns a few neighbouring groups of one sample, as many as make 16-byte pieces of memory. A small part
of a sample it reads once and keeps in registers; over a larger one it walks twice: for the statistics, and for the result. What
it read first it finds again in the second-level cache, because the programs that run at a time own no more than that holds.

Per element of a bf16 tensor, from memory: forward 2 bytes read and 2 written; backward 4 read and 2 written. Separate kernels
(to contiguous, statistics, normalise, SiLU, and back) move 16 forward.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import on_its_device

TILE_BYTES = 16 * 1024  # what a program moves at a time
WHOLE_BYTES = 32 * 1024  # a program's part of a sample that stays in registers: it is read once
VECTOR = 8  # bf16 values in a 16-byte piece
LARGE = 8192  # elements of a program's part of a sample; such a part is worth twice the threads
MAX_IDLE = 1 / 6  # of the lanes


@triton.jit
def _places(
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """What each lane [WIDTH] of a row has, and where a tile of STEPS rows lies.

    Channels go by way of pieces, so that the compiler sees that PIECE lanes are neighbours in memory.

    Returns:
        Each lane's channel of the program's, whether it has one, its group as [WIDTH, GROUPS]; and of each element
        [STEPS, WIDTH] the position and the offset from the program's first element.
    """
    SPAN: tl.constexpr = GROUP * GROUPS
    ROWS: tl.constexpr = WIDTH // SPAN
    lane = tl.arange(0, WIDTH)
    piece = lane // PIECE
    row, channel = piece // (SPAN // PIECE), piece % (SPAN // PIECE) * PIECE + lane % PIECE
    inside = row < ROWS
    member = inside[:, None] & (channel[:, None] // GROUP == tl.arange(0, GROUPS)[None, :])
    position = (tl.arange(0, STEPS) * ROWS)[:, None] + row[None, :]
    return channel, inside, member, position, position * CHANNELS + channel[None, :]


@triton.jit
def _affine(weight_pointer, bias_pointer, channel, inside):
    """Weight and bias of this sample's channels, fp32 [1, WIDTH]."""
    weight = tl.load(weight_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    return weight[None, :], bias[None, :]


@triton.jit
def _over_groups(values, member):
    """Values per lane [WIDTH], padded with zeros, added up within each group: [GROUPS]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _over_lanes(values, member):
    """A value per group [GROUPS], given to each of its lanes: [1, WIDTH]."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)[None, :]


@triton.jit
def _store_channels(pointer, values, SPAN: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Values per lane [WIDTH], padded with zeros, added up over the positions of a row and stored as [SPAN]."""
    piece, own = tl.arange(0, WIDTH // PIECE) % (SPAN // PIECE), tl.arange(0, PIECES)
    same = (piece[:, None] == own[None, :])[:, :, None]
    sums = tl.sum(tl.where(same, values.reshape(WIDTH // PIECE, 1, PIECE), 0.0), 0)
    place = own[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    tl.store(pointer + place, sums, mask=place < SPAN)


@triton.jit
def _sigmoid(x, TANH: tl.constexpr):
    """By one special function instead of two and a division where bf16 hides the difference of 2^-12."""
    if TANH:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], tl.float32, is_pure=True, pack=1)
        return 0.5 * tanh + 0.5
    return tl.sigmoid(x)


@triton.jit
def _sums(x, exists, shifts):
    difference = tl.where(exists, x.to(tl.float32) - shifts, 0.0)
    return difference, difference * difference


@triton.jit
def _normalise(x, means, factor, bias, SILU: tl.constexpr, TANH: tl.constexpr):
    y = (x.to(tl.float32) - means) * factor + bias
    if SILU:
        y *= _sigmoid(y, TANH)
    return y


@triton.jit
def group_norm_silu_kernel(
    y_pointer, mean_pointer, rstd_pointer, x_pointer, weight_pointer, bias_pointer, weight_stride, bias_stride,
    positions, epsilon,
    SILU: tl.constexpr, TANH: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    SPAN: tl.constexpr = GROUP * GROUPS
    ROWS: tl.constexpr = WIDTH // SPAN
    sample, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * SPAN
    channel, inside, member, position, offset = _places(CHANNELS, GROUP, GROUPS, WIDTH, STEPS, PIECE)
    group = tl.arange(0, GROUPS)
    x_pointer += sample * positions * CHANNELS + first
    y_pointer += sample * positions * CHANNELS + first

    # Sums of differences from one of a group's values: the variance then keeps its digits whatever the mean.
    shift = tl.load(x_pointer + group * GROUP).to(tl.float32)
    shifts = _over_lanes(shift, member)
    if WHOLE:
        exists = inside[None, :] & (position < positions)
        whole = tl.load(x_pointer + offset, mask=exists, other=0.0)
        total, squares = _sums(whole, exists, shifts)
    else:
        total = tl.zeros((STEPS, WIDTH), tl.float32)
        squares = tl.zeros((STEPS, WIDTH), tl.float32)
        for start in tl.range(0, positions, STEPS * ROWS, num_stages=STAGES):
            exists = inside[None, :] & (position < positions - start)
            x = tl.load(x_pointer + start * CHANNELS + offset, mask=exists, other=0.0, eviction_policy="evict_last")
            difference, square = _sums(x, exists, shifts)
            total += difference
            squares += square
    count = positions * GROUP
    difference = _over_groups(tl.sum(total, 0), member) / count
    variance = _over_groups(tl.sum(squares, 0), member) / count - difference * difference
    rstd = 1 / tl.sqrt(tl.maximum(variance, 0.0) + epsilon)
    mean = shift + difference
    statistic = sample * (CHANNELS // GROUP) + tl.program_id(0) * GROUPS + group
    tl.store(mean_pointer + statistic, mean)
    tl.store(rstd_pointer + statistic, rstd)

    weight, bias = _affine(
        weight_pointer + sample * weight_stride + first, bias_pointer + sample * bias_stride + first, channel, inside
    )
    factor, means = _over_lanes(rstd, member) * weight, _over_lanes(mean, member)
    if WHOLE:
        y = _normalise(whole, means, factor, bias, SILU, TANH)
        tl.store(y_pointer + offset, y, mask=inside[None, :] & (position < positions))
    else:
        for start in tl.range(0, positions, STEPS * ROWS, num_stages=STAGES):
            exists = inside[None, :] & (position < positions - start)
            x = tl.load(x_pointer + start * CHANNELS + offset, mask=exists, other=0.0, eviction_policy="evict_first")
            y = _normalise(x, means, factor, bias, SILU, TANH)
            tl.store(y_pointer + start * CHANNELS + offset, y, mask=exists)


@triton.jit
def _before_activation(x, gradient, mean, rstd, weight, bias, SILU: tl.constexpr, TANH: tl.constexpr):
    """A tile's normalised values, and the gradient with respect to what the activation was given."""
    normalised, gradient = (x.to(tl.float32) - mean) * rstd, gradient.to(tl.float32)
    if SILU:
        given = normalised * weight + bias
        sigmoid = _sigmoid(given, TANH)
        gradient *= sigmoid * (1 + given * (1 - sigmoid))
    return normalised, gradient


@triton.jit
def group_norm_silu_backward_kernel(
    x_gradient_pointer, weight_gradient_pointer, bias_gradient_pointer, y_gradient_pointer, x_pointer, weight_pointer,
    bias_pointer, mean_pointer, rstd_pointer, weight_stride, bias_stride, positions,
    SILU: tl.constexpr, TANH: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    SPAN: tl.constexpr = GROUP * GROUPS
    ROWS: tl.constexpr = WIDTH // SPAN
    sample, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * SPAN
    channel, inside, member, position, offset = _places(CHANNELS, GROUP, GROUPS, WIDTH, STEPS, PIECE)
    group = tl.arange(0, GROUPS)
    x_pointer += sample * positions * CHANNELS + first
    y_gradient_pointer += sample * positions * CHANNELS + first
    x_gradient_pointer += sample * positions * CHANNELS + first

    statistic = sample * (CHANNELS // GROUP) + tl.program_id(0) * GROUPS + group
    mean = _over_lanes(tl.load(mean_pointer + statistic), member)
    rstd = _over_lanes(tl.load(rstd_pointer + statistic), member)
    weight, bias = _affine(
        weight_pointer + sample * weight_stride + first, bias_pointer + sample * bias_stride + first, channel, inside
    )
    if WHOLE:
        exists = inside[None, :] & (position < positions)
        x = tl.load(x_pointer + offset, mask=exists, other=0.0)
        gradient = tl.load(y_gradient_pointer + offset, mask=exists, other=0.0)
        normalised, bias_sum = _before_activation(x, gradient, mean, rstd, weight, bias, SILU, TANH)
        weight_sum = bias_sum * normalised
    else:
        bias_sum = tl.zeros((STEPS, WIDTH), tl.float32)
        weight_sum = tl.zeros((STEPS, WIDTH), tl.float32)
        for start in tl.range(0, positions, STEPS * ROWS, num_stages=STAGES):
            exists = inside[None, :] & (position < positions - start)
            place = start * CHANNELS + offset
            x = tl.load(x_pointer + place, mask=exists, other=0.0, eviction_policy="evict_last")
            gradient = tl.load(y_gradient_pointer + place, mask=exists, other=0.0, eviction_policy="evict_last")
            normalised, gradient = _before_activation(x, gradient, mean, rstd, weight, bias, SILU, TANH)
            bias_sum += gradient
            weight_sum += gradient * normalised
    bias_gradient, weight_gradient = tl.sum(bias_sum, 0), tl.sum(weight_sum, 0)
    _store_channels(bias_gradient_pointer + sample * CHANNELS + first, bias_gradient, SPAN, WIDTH, PIECE, PIECES)
    _store_channels(weight_gradient_pointer + sample * CHANNELS + first, weight_gradient, SPAN, WIDTH, PIECE, PIECES)

    count = positions * GROUP
    weights = tl.sum(weight, 0)
    averages = _over_lanes(_over_groups(weights * bias_gradient, member) / count, member)
    alongs = _over_lanes(_over_groups(weights * weight_gradient, member) / count, member)
    if WHOLE:
        normalised, gradient = _before_activation(x, gradient, mean, rstd, weight, bias, SILU, TANH)
        x_gradient = rstd * (weight * gradient - averages - normalised * alongs)
        tl.store(x_gradient_pointer + offset, x_gradient, mask=inside[None, :] & (position < positions))
    else:
        for start in tl.range(0, positions, STEPS * ROWS, num_stages=STAGES):
            exists = inside[None, :] & (position < positions - start)
            place = start * CHANNELS + offset
            x = tl.load(x_pointer + place, mask=exists, other=0.0, eviction_policy="evict_first")
            gradient = tl.load(y_gradient_pointer + place, mask=exists, other=0.0, eviction_policy="evict_first")
            normalised, gradient = _before_activation(x, gradient, mean, rstd, weight, bias, SILU, TANH)
            x_gradient = rstd * (weight * gradient - averages - normalised * alongs)
            tl.store(x_gradient_pointer + place, x_gradient, mask=exists)


def tiling(
    channels: int, positions: int, groups: int, dtype: torch.dtype, nvidia: bool, tensors: int = 1
) -> tuple[int, dict[str, int]]:
    """Programs per sample, and the constants of a launch: the groups of a program, and the tile that it moves at a time.

    Args:
        nvidia: there, loads run two tiles ahead, through shared memory, and bf16 takes its sigmoid from the special function
            unit. (Triton's interpreter, whose tensors are on the CPU, runs without.)
        tensors: that a pass reads; two at a time are held in half as large tiles, for the registers.
    """
    group = channels // groups
    together = 1
    while together * group % VECTOR and groups % (2 * together) == 0:
        together *= 2
    span = together * group
    # Rows of lanes hold as many whole positions as fit: three of 40 channels leave 6 % of 128 idle, one of 64 would 37 %.
    widths = [triton.next_power_of_2(span) * factor for factor in (1, 2, 4, 8)]
    width = min(widths, key=lambda width: max(width % span / width, MAX_IDLE))
    steps = triton.next_power_of_2(-(-positions // (width // span)))
    bytes_per_step = width * dtype.itemsize * tensors
    whole = steps * bytes_per_step <= WHOLE_BYTES
    piece = math.gcd(span, VECTOR)
    return groups // together, {
        "CHANNELS": channels, "GROUP": group, "GROUPS": together, "WIDTH": width, "PIECE": piece,
        "PIECES": triton.next_power_of_2(span // piece), "STEPS": steps if whole else TILE_BYTES // bytes_per_step,
        "WHOLE": whole, "TANH": nvidia and dtype == torch.bfloat16, "STAGES": 3 if nvidia else 1,
        # Of 512 threads each has 128 registers; untold, ptxas stores some to memory for the sake of 64.
        **({"num_warps": 16, "maxnreg": 128} if nvidia and positions * span >= LARGE else {"num_warps": 8}),
    }  # fmt: skip


def channels_innermost(tensor: Tensor) -> Tensor:
    """`tensor` [B, C, ...] itself where its memory is [B, ..., C], else a copy that is so."""
    turned = tensor.movedim(1, -1)
    return tensor if turned.is_contiguous() else turned.contiguous().movedim(-1, 1)


def launch_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernel; arguments as `group_norm_silu`."""
    x = channels_innermost(x)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device) for _ in range(2))
    programs, constants = tiling(x.shape[1], x.shape[2:].numel(), groups, x.dtype, x.is_cuda and torch.version.hip is None)
    group_norm_silu_kernel[(programs, x.shape[0])](
        y, mean, rstd, x, weight, bias, weight.stride(0), bias.stride(0), x.shape[2:].numel(), epsilon, SILU=silu, **constants
    )
    return y, mean, rstd


def launch_group_norm_silu_backward(
    y_gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernel; arguments as `group_norm_silu_backward`."""
    x = channels_innermost(x)
    x_gradient = torch.empty_like(x)
    weight_gradient, bias_gradient = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    programs, constants = tiling(x.shape[1], x.shape[2:].numel(), groups, x.dtype, x.is_cuda and torch.version.hip is None, 2)
    group_norm_silu_backward_kernel[(programs, x.shape[0])](
        x_gradient, weight_gradient, bias_gradient, channels_innermost(y_gradient), x, weight, bias, mean, rstd,
        weight.stride(0), bias.stride(0), x.shape[2:].numel(), SILU=silu, **constants,
    )  # fmt: skip
    return x_gradient, weight_gradient, bias_gradient


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32; double precision stays, for checks of the formulas."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reference_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(groupnorm(x) * weight + bias), or without the activation.

    Args:
        x: [B, C, ...] in bf16, fp16 or fp32; memory is best [B, ..., C] (channels last).
        weight, bias: [B, C], strided over B at will (0 to share them), contiguous over C.

    Returns:
        y in the shape and dtype of x, channels last; mean and 1 / standard deviation of the groups, fp32 [B, groups].
    """
    wide = channels_innermost(_wide(x))
    grouped = wide.unflatten(1, (groups, -1)).flatten(2)
    mean = grouped.mean(2)
    rstd = (grouped.var(2, correction=0) + epsilon).rsqrt()
    per_channel = [*weight.shape, *[1] * (x.dim() - 2)]
    normalised = (wide - _per_channel(mean, x)) * _per_channel(rstd, x)
    y = normalised * _wide(weight).view(per_channel) + _wide(bias).view(per_channel)
    return channels_innermost((F.silu(y) if silu else y).to(x.dtype)), mean, rstd


def _per_channel(statistic: Tensor, x: Tensor) -> Tensor:
    """[B, groups] as [B, C, 1, ...]."""
    repeated = statistic.repeat_interleave(x.shape[1] // statistic.shape[1], 1)
    return repeated.view(*repeated.shape, *[1] * (x.dim() - 2))


def reference_group_norm_silu_backward(
    y_gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x (its shape and dtype), weight and bias (fp32 [B, C], per sample)."""
    wide, gradient = channels_innermost(_wide(x)), _wide(y_gradient)
    per_channel = [*weight.shape, *[1] * (x.dim() - 2)]
    spatial = list(range(2, x.dim()))
    scale = _wide(weight).view(per_channel)
    normalised = (wide - _per_channel(mean, x)) * _per_channel(rstd, x)
    if silu:
        given = normalised * scale + _wide(bias).view(per_channel)
        sigmoid = given.sigmoid()
        gradient = gradient * sigmoid * (1 + given * (1 - sigmoid))
    bias_gradient, weight_gradient = gradient.sum(spatial), (gradient * normalised).sum(spatial)
    count = x[0, 0].numel() * x.shape[1] // groups
    average, along = (
        (_wide(weight) * sums).unflatten(1, (groups, -1)).sum(2) / count for sums in (bias_gradient, weight_gradient)
    )
    x_gradient = _per_channel(rstd, x) * (scale * gradient - _per_channel(average, x) - normalised * _per_channel(along, x))
    return channels_innermost(x_gradient.to(x.dtype)), weight_gradient, bias_gradient


_forward = torch.library.custom_op("engine::group_norm_silu", reference_group_norm_silu, mutates_args=())
_forward.register_kernel("cuda")(on_its_device(launch_group_norm_silu))
_backward = torch.library.custom_op("engine::group_norm_silu_backward", reference_group_norm_silu_backward, mutates_args=())
_backward.register_kernel("cuda")(on_its_device(launch_group_norm_silu_backward))


def _empty_channels_innermost(x: Tensor) -> Tensor:
    return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)


@_forward.register_fake
def _(x, weight, bias, groups, epsilon, silu):
    statistic = x.new_empty((x.shape[0], groups), dtype=torch.promote_types(x.dtype, torch.float32))
    return _empty_channels_innermost(x), statistic, statistic.clone()


@_backward.register_fake
def _(y_gradient, x, weight, bias, mean, rstd, groups, silu):
    per_sample = x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    return _empty_channels_innermost(x), per_sample, per_sample.clone()


def _keep(ctx, inputs, output):
    x, weight, bias, groups, _, silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.groups, ctx.silu = groups, silu


def _differentiate(ctx, y_gradient, _mean, _rstd):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    x_gradient, weight_gradient, bias_gradient = _backward(y_gradient, x, weight, bias, mean, rstd, ctx.groups, ctx.silu)
    # A frozen norm's are by-products, which the gradient of x is made of.
    for_weight = weight_gradient.to(weight.dtype) if ctx.needs_input_grad[1] else None
    for_bias = bias_gradient.to(bias.dtype) if ctx.needs_input_grad[2] else None
    return x_gradient, for_weight, for_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool = True) -> Tensor:
    """silu(groupnorm(x) * weight + bias), differentiable; the activation can be left out.

    Args:
        x: [B, C, ...], best stored channels last.
        weight, bias: [C] for all samples, or [B, C].
    """
    weight, bias = (tensor.expand(x.shape[:2]) for tensor in (weight, bias))
    return _forward(x, weight, bias, groups, epsilon, silu)[0]
