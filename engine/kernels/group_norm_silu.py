"""engine::group_norm_silu: y = silu(groupnorm(x) * weight + bias) for tensors stored channels last, and its backward pass.

Group normalisation as in arXiv:1803.08494. Weight and bias are given per sample, so that a time embedding's scale and shift
fold into them. One program owns a few neighbouring groups of one sample, as many as make 16-byte pieces of memory, and walks
over its positions twice: for the statistics, and for the result. What it read first it finds again in the second-level cache,
because the programs that run at a time own no more than that holds.

Per element of a bf16 tensor, from memory: forward 2 bytes read and 2 written; backward 4 read and 2 written. Separate kernels
(to contiguous, statistics, normalise, SiLU, and back) move 16 forward.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import on_its_device

TILE_ELEMENTS = 8192
VECTOR = 8  # bf16 values in a 16-byte piece
LARGE = 32 * 1024  # elements of a program's part of a sample; such a part is worth twice the threads


@triton.jit
def _tile(start, positions, CHANNELS: tl.constexpr, SPAN: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets [POSITIONS, WIDTH] of a program's channels within a sample, and which of them exist."""
    position = (start + tl.arange(0, POSITIONS))[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    return position * CHANNELS + channel, (position < positions) & (channel < SPAN)


@triton.jit
def _affine(weight_pointer, bias_pointer, sample, weight_stride, bias_stride, first, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    """Weight and bias of this sample and program, fp32 [1, WIDTH]."""
    channel = tl.arange(0, WIDTH)
    inside = channel < SPAN
    weight = tl.load(weight_pointer + sample * weight_stride + first + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_pointer + sample * bias_stride + first + channel, mask=inside, other=0.0).to(tl.float32)
    return weight[None, :], bias[None, :]


@triton.jit
def _over_groups(values, GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Per-channel values [WIDTH], padded with zeros, added up within each group: [GROUPS]."""
    member = tl.arange(0, WIDTH)[:, None] // GROUP == tl.arange(0, GROUPS)[None, :]
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _over_channels(values, GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """A value per group [GROUPS], given to each of its channels: [1, WIDTH]."""
    member = tl.arange(0, WIDTH)[:, None] // GROUP == tl.arange(0, GROUPS)[None, :]
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)[None, :]


@triton.jit
def group_norm_silu_kernel(
    y_pointer, mean_pointer, rstd_pointer, x_pointer, weight_pointer, bias_pointer, weight_stride, bias_stride,
    positions, epsilon,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    SPAN: tl.constexpr = GROUP * GROUPS
    sample, channel = tl.program_id(1).to(tl.int64), tl.program_id(0) * SPAN
    first = sample * positions * CHANNELS + channel
    group = tl.arange(0, GROUPS)
    # Sums of differences from one of a group's values: the variance then keeps its digits whatever the mean.
    shift = tl.load(x_pointer + first + group * GROUP).to(tl.float32)
    shifts = _over_channels(shift, GROUP, GROUPS, WIDTH)
    total = tl.zeros((POSITIONS, WIDTH), tl.float32)
    squares = tl.zeros((POSITIONS, WIDTH), tl.float32)
    for start in range(0, positions, POSITIONS):
        offset, exists = _tile(start, positions, CHANNELS, SPAN, POSITIONS, WIDTH)
        x = tl.load(x_pointer + first + offset, mask=exists, other=0.0, eviction_policy="evict_last").to(tl.float32)
        difference = tl.where(exists, x - shifts, 0.0)
        total += difference
        squares += difference * difference
    count = positions * GROUP
    difference = _over_groups(tl.sum(total, 0), GROUP, GROUPS, WIDTH) / count
    variance = _over_groups(tl.sum(squares, 0), GROUP, GROUPS, WIDTH) / count - difference * difference
    rstd = 1 / tl.sqrt(tl.maximum(variance, 0.0) + epsilon)
    mean = shift + difference
    statistic = sample * (CHANNELS // GROUP) + tl.program_id(0) * GROUPS + group
    tl.store(mean_pointer + statistic, mean)
    tl.store(rstd_pointer + statistic, rstd)

    weight, bias = _affine(weight_pointer, bias_pointer, sample, weight_stride, bias_stride, channel, SPAN, WIDTH)
    factor = _over_channels(rstd, GROUP, GROUPS, WIDTH) * weight
    means = _over_channels(mean, GROUP, GROUPS, WIDTH)
    for start in range(0, positions, POSITIONS):
        offset, exists = _tile(start, positions, CHANNELS, SPAN, POSITIONS, WIDTH)
        x = tl.load(x_pointer + first + offset, mask=exists, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = (x - means) * factor + bias
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_pointer + first + offset, y, mask=exists)


@triton.jit
def _before_activation(
    y_gradient_pointer, x_pointer, offset, exists, mean, rstd, weight, bias, SILU: tl.constexpr, EVICTION: tl.constexpr
):
    """A tile's normalised values, and the gradient with respect to what the activation was given."""
    x = tl.load(x_pointer + offset, mask=exists, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    gradient = tl.load(y_gradient_pointer + offset, mask=exists, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    normalised = (x - mean) * rstd
    if SILU:
        given = normalised * weight + bias
        sigmoid = tl.sigmoid(given)
        gradient *= sigmoid * (1 + given * (1 - sigmoid))
    return normalised, gradient


@triton.jit
def group_norm_silu_backward_kernel(
    x_gradient_pointer, weight_gradient_pointer, bias_gradient_pointer, y_gradient_pointer, x_pointer, weight_pointer,
    bias_pointer, mean_pointer, rstd_pointer, weight_stride, bias_stride, positions,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    SPAN: tl.constexpr = GROUP * GROUPS
    sample, channel = tl.program_id(1).to(tl.int64), tl.program_id(0) * SPAN
    first = sample * positions * CHANNELS + channel
    statistic = sample * (CHANNELS // GROUP) + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mean = _over_channels(tl.load(mean_pointer + statistic), GROUP, GROUPS, WIDTH)
    rstd = _over_channels(tl.load(rstd_pointer + statistic), GROUP, GROUPS, WIDTH)
    weight, bias = _affine(weight_pointer, bias_pointer, sample, weight_stride, bias_stride, channel, SPAN, WIDTH)
    bias_sum = tl.zeros((POSITIONS, WIDTH), tl.float32)
    weight_sum = tl.zeros((POSITIONS, WIDTH), tl.float32)
    for start in range(0, positions, POSITIONS):
        offset, exists = _tile(start, positions, CHANNELS, SPAN, POSITIONS, WIDTH)
        normalised, gradient = _before_activation(
            y_gradient_pointer + first, x_pointer + first, offset, exists, mean, rstd, weight, bias, SILU, "evict_last"
        )
        bias_sum += gradient
        weight_sum += gradient * normalised
    bias_gradient, weight_gradient = tl.sum(bias_sum, 0), tl.sum(weight_sum, 0)
    inside = tl.arange(0, WIDTH) < SPAN
    place = sample * CHANNELS + channel + tl.arange(0, WIDTH)
    tl.store(bias_gradient_pointer + place, bias_gradient, mask=inside)
    tl.store(weight_gradient_pointer + place, weight_gradient, mask=inside)

    count = positions * GROUP
    weights = tl.sum(weight, 0)
    average = _over_groups(weights * bias_gradient, GROUP, GROUPS, WIDTH) / count
    along = _over_groups(weights * weight_gradient, GROUP, GROUPS, WIDTH) / count
    averages, alongs = _over_channels(average, GROUP, GROUPS, WIDTH), _over_channels(along, GROUP, GROUPS, WIDTH)
    for start in range(0, positions, POSITIONS):
        offset, exists = _tile(start, positions, CHANNELS, SPAN, POSITIONS, WIDTH)
        normalised, gradient = _before_activation(
            y_gradient_pointer + first, x_pointer + first, offset, exists, mean, rstd, weight, bias, SILU, "evict_first"
        )
        x_gradient = rstd * (weight * gradient - averages - normalised * alongs)
        tl.store(x_gradient_pointer + first + offset, x_gradient, mask=exists)


def tiling(channels: int, positions: int, groups: int) -> tuple[int, dict[str, int]]:
    """Programs per sample, and the constants of a launch: the groups of a program, and the tile that it moves at a time."""
    group = channels // groups
    together = 1
    while together * group % VECTOR and groups % (2 * together) == 0:
        together *= 2
    width = triton.next_power_of_2(together * group)
    return groups // together, {
        "CHANNELS": channels, "GROUP": group, "GROUPS": together, "WIDTH": width,
        "POSITIONS": min(max(TILE_ELEMENTS // width, 1), triton.next_power_of_2(positions)),
        "num_warps": 16 if positions * together * group >= LARGE else 8,
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
    programs, constants = tiling(x.shape[1], x.shape[2:].numel(), groups)
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
    programs, constants = tiling(x.shape[1], x.shape[2:].numel(), groups)
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
    return x_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(bias.dtype), None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool = True) -> Tensor:
    """silu(groupnorm(x) * weight + bias), differentiable; the activation can be left out.

    Args:
        x: [B, C, ...], best stored channels last.
        weight, bias: [C] for all samples, or [B, C].
    """
    weight, bias = (tensor.expand(x.shape[:2]) for tensor in (weight, bias))
    return _forward(x, weight, bias, groups, epsilon, silu)[0]
