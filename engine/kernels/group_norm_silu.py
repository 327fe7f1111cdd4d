"""engine::group_norm_silu: y = silu(groupnorm(x) * weight + bias) for tensors stored channels last, and its backward pass.

Group normalisation as in arXiv:1803.08494. Weight and bias are given per sample, so that a time embedding's scale and shift
fold into them. Each pass is two kernels of many small programs, which own some positions of a few neighbouring channels: the
first leaves sums per channel; the second adds them up for the groups that its channels belong to, in an order that depends on
shapes alone, and walks the tensors again. It begins with the samples that the first read last, which the second-level cache
still holds.

Per element of a bf16 tensor: forward 4 bytes read and 2 written; backward 8 read and 2 written; half of the reads need not come
from memory where the cache holds all. Separate kernels (to contiguous, statistics, normalise, SiLU, and back) move 16 forward.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import is_nvidia, on_its_device
from engine.kernels.layout import at_least_fp32

# How the work is cut: as was fastest on an H200 at 64 x 64 positions and more (benchmarks/results/h200/tilings.txt).
WIDTH = 64  # channels of a program: whole lines of memory in bf16, and a divisor of what published models have
# Elements that a program reads at a time of a tensor, and how many tiles it has in flight or in work. The backward pass's loads
# run ahead through shared memory: into registers, the second tensor's would wait until the first's has come and been used.
TILE, STAGES = 2048, 3
NUM_WARPS = 4
TURNS = 8  # tiles of a program, over which what it does once is spread
PROGRAMS = 2560  # of a kernel, where they have their turns
FEWEST = 640  # of a kernel, were it by shorter ones
MAX_CHUNKS = 16  # of a sample's positions: each program of the second kernel reads the sums of all

# Arguments for whose values no kernel is compiled again: addresses are aligned by the channels alone.
_SIZES = ["positions", "chunk"]


@triton.jit
def _place(positions, chunk, REVERSED: tl.constexpr, WIDTH: tl.constexpr):
    """The sample of a program, its first channel, its chunk, and that one's first position and the one after its last."""
    sample, part = tl.program_id(2), tl.program_id(1)
    if REVERSED:
        sample, part = tl.num_programs(2) - 1 - sample, tl.num_programs(1) - 1 - part
    start = part * chunk
    return sample.to(tl.int64), tl.program_id(0) * WIDTH, part, start, tl.minimum(start + chunk, positions)


@triton.jit
def _exists(row, count, inside, FULL: tl.constexpr):
    """Which elements of a tile [ROWS, WIDTH] there are: `count` rows, of the channels that are `inside`."""
    return (row < count)[:, None] & inside[None, :] | FULL


@triton.jit
def _affine(weight_pointer, bias_pointer, channel, inside):
    """Weight and bias of a sample's channels, fp32 [WIDTH]."""
    weight = tl.load(weight_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _silu(half, TANH: tl.constexpr):
    """Of twice `half`. One special function instead of two and a division where bf16 hides the difference of 2^-12."""
    if TANH:
        return half * _tanh(half) + half
    return 2 * half * tl.sigmoid(2 * half)


@triton.jit
def _silu_slope(half, TANH: tl.constexpr):
    """Its derivative at twice `half`."""
    if TANH:
        tanh = _tanh(half)
        return 0.5 * (half * (1 - tanh * tanh) + tanh) + 0.5
    sigmoid = tl.sigmoid(2 * half)
    return sigmoid * (1 + 2 * half * (1 - sigmoid))


@triton.jit(do_not_specialize=_SIZES)
def group_norm_sums_kernel(
    sums_pointer, x_pointer, positions, chunk,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of each channel and chunk: the mean, and the sum of the squares of differences from it; fp32 [B, chunks, 2, C]."""
    sample, first, part, start, end = _place(positions, chunk, False, WIDTH)
    row, channel = tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
    inside = channel < CHANNELS
    x_pointer += sample * positions * CHANNELS

    # Sums of differences from one of the channel's values: the variance then keeps its digits whatever the mean.
    shift = tl.load(x_pointer + start * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for turn in tl.range(start, end, ROWS, num_stages=STAGES):
        exists = _exists(row, end - turn, inside, FULL)
        x = tl.load(x_pointer + turn * CHANNELS + row[:, None] * CHANNELS + channel[None, :], mask=exists, other=0.0)
        difference = tl.where(exists, x.to(tl.float32) - shift[None, :], 0.0)
        total += difference
        squares += difference * difference
    sums_pointer += (sample * tl.num_programs(1) + part) * 2 * CHANNELS + channel
    total, share = tl.sum(total, 0), 1 / (end - start).to(tl.float32)
    difference = total * share
    tl.store(sums_pointer, shift + difference, mask=inside)
    tl.store(sums_pointer + CHANNELS, tl.sum(squares, 0) - total * difference, mask=inside)


@triton.jit
def _of_groups(
    sums_pointer, sample, first, CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """What the first kernel left for the groups that a program's channels belong to.

    Returns:
        The first GROUPS numbers of these groups; channels of these, and which there are [GROUPS, MEMBERS]; chunks, and which
        elements there are [CHUNKS, GROUPS, MEMBERS]; both sums of these.
    """
    group, member, part = first // GROUP + tl.arange(0, GROUPS), tl.arange(0, MEMBERS), tl.arange(0, CHUNKS)
    channel = group[:, None] * GROUP + member[None, :]
    known = (member < GROUP)[None, :] & (channel < CHANNELS)
    exists = (part < tl.num_programs(1))[:, None, None] & known[None, :, :]
    pointer = sums_pointer + sample * tl.num_programs(1) * 2 * CHANNELS
    place = pointer + part[:, None, None] * (2 * CHANNELS) + channel[None, :, :]
    one, other = tl.load(place, mask=exists, other=0.0), tl.load(place + CHANNELS, mask=exists, other=0.0)
    return group, channel, known, part, exists, one, other


@triton.jit
def _over_channels(values, group, channel, GROUP: tl.constexpr):
    """A value per group [GROUPS], given to each of its channels: [WIDTH]."""
    return tl.sum(tl.where((channel // GROUP)[:, None] == group[None, :], values[None, :], 0.0), 1)


@triton.jit
def _statistics(
    sums_pointer, sample, first, positions, chunk, epsilon,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Numbers, means and 1 / standard deviations of the groups that a program's channels belong to, [GROUPS].

    Chunks and channels combine as in Chan, Golub and LeVeque's "Updating formulae" (1979), from one of the means.
    """
    group, _, _, parts, summed, means, squares = _of_groups(
        sums_pointer, sample, first, CHANNELS, GROUP, GROUPS, MEMBERS, CHUNKS
    )
    in_chunk = tl.minimum(chunk, positions - parts * chunk).to(tl.float32)[:, None, None]
    counts = tl.where(summed, in_chunk, 0.0)
    shift = tl.load(sums_pointer + sample * tl.num_programs(1) * 2 * CHANNELS + group * GROUP, mask=group * GROUP < CHANNELS)
    differences = tl.where(summed, means - shift[None, :, None], 0.0)
    count = positions * GROUP
    difference = tl.sum(tl.sum(differences * counts, 0), 1) / count
    differences -= difference[None, :, None]
    variance = tl.sum(tl.sum(squares + counts * differences * differences, 0), 1) / count
    return group, shift + difference, 1 / tl.sqrt(tl.maximum(variance, 0.0) + epsilon)


@triton.jit(do_not_specialize=_SIZES)
def group_norm_silu_kernel(
    y_pointer, mean_pointer, rstd_pointer, x_pointer, weight_pointer, bias_pointer, sums_pointer, weight_stride, bias_stride,
    positions, chunk, epsilon,
    SILU: tl.constexpr, TANH: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    sample, first, part, start, end = _place(positions, chunk, True, WIDTH)
    row, channel = tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
    inside = channel < CHANNELS

    group, mean, rstd = _statistics(
        sums_pointer, sample, first, positions, chunk, epsilon, CHANNELS, GROUP, GROUPS, MEMBERS, CHUNKS
    )
    if part == 0:
        owned = (group * GROUP >= first) & (group * GROUP < tl.minimum(first + WIDTH, CHANNELS))
        statistic = sample * (CHANNELS // GROUP) + group
        tl.store(mean_pointer + statistic, mean, mask=owned)
        tl.store(rstd_pointer + statistic, rstd, mask=owned)

    weight, bias = _affine(weight_pointer + sample * weight_stride, bias_pointer + sample * bias_stride, channel, inside)
    factor = _over_channels(rstd, group, channel, GROUP) * weight
    offset = bias - _over_channels(mean, group, channel, GROUP) * factor
    if SILU:
        factor, offset = 0.5 * factor, 0.5 * offset
    x_pointer += sample * positions * CHANNELS
    y_pointer += sample * positions * CHANNELS
    for turn in tl.range(start, end, ROWS, num_stages=STAGES):
        exists = _exists(row, end - turn, inside, FULL)
        place = turn * CHANNELS + row[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_pointer + place, mask=exists, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = x * factor[None, :] + offset[None, :]
        if SILU:
            y = _silu(y, TANH)
        tl.store(y_pointer + place, y, mask=exists)


@triton.jit
def _before_activation(gradient, x, factor, offset, SILU: tl.constexpr, TANH: tl.constexpr):
    """A tile's gradient with respect to what the activation was given, of which factor * x + offset is half."""
    if SILU:
        return gradient * _silu_slope(x * factor[None, :] + offset[None, :], TANH)
    return gradient


@triton.jit(do_not_specialize=_SIZES)
def group_norm_gradient_sums_kernel(
    sums_pointer, y_gradient_pointer, x_pointer, weight_pointer, bias_pointer, mean_pointer, rstd_pointer, weight_stride,
    bias_stride, positions, chunk,
    SILU: tl.constexpr, TANH: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of each channel and chunk: the sums of the gradient before the activation, and of it times the normalised value.

    As fp32 [B, chunks, 2, C]: parts of the gradients of bias and weight.
    """
    sample, first, part, start, end = _place(positions, chunk, False, WIDTH)
    row, channel = tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
    inside = channel < CHANNELS
    statistic = sample * (CHANNELS // GROUP) + channel // GROUP
    rstd = tl.load(rstd_pointer + statistic, mask=inside, other=0.0)
    against = -tl.load(mean_pointer + statistic, mask=inside, other=0.0) * rstd
    weight, bias = _affine(weight_pointer + sample * weight_stride, bias_pointer + sample * bias_stride, channel, inside)
    weight, bias = 0.5 * weight, 0.5 * bias
    x_pointer += sample * positions * CHANNELS
    y_gradient_pointer += sample * positions * CHANNELS
    bias_sum = tl.zeros((ROWS, WIDTH), tl.float32)
    weight_sum = tl.zeros((ROWS, WIDTH), tl.float32)
    for turn in tl.range(start, end, ROWS, num_stages=STAGES):
        exists = _exists(row, end - turn, inside, FULL)
        place = turn * CHANNELS + row[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_pointer + place, mask=exists, other=0.0).to(tl.float32)
        gradient = tl.load(y_gradient_pointer + place, mask=exists, other=0.0).to(tl.float32)
        normalised = x * rstd[None, :] + against[None, :]
        gradient = _before_activation(gradient, normalised, weight, bias, SILU, TANH)
        bias_sum += gradient
        weight_sum += gradient * normalised
    sums_pointer += (sample * tl.num_programs(1) + part) * 2 * CHANNELS + channel
    tl.store(sums_pointer, tl.sum(bias_sum, 0), mask=inside)
    tl.store(sums_pointer + CHANNELS, tl.sum(weight_sum, 0), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def group_norm_silu_backward_kernel(
    x_gradient_pointer, weight_gradient_pointer, bias_gradient_pointer, y_gradient_pointer, x_pointer, weight_pointer,
    bias_pointer, mean_pointer, rstd_pointer, sums_pointer, weight_stride, bias_stride, positions, chunk,
    SILU: tl.constexpr, TANH: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    sample, first, part, start, end = _place(positions, chunk, True, WIDTH)
    row, channel = tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
    inside = channel < CHANNELS
    weight_pointer += sample * weight_stride

    group, members, known, _, _, bias_sums, weight_sums = _of_groups(
        sums_pointer, sample, first, CHANNELS, GROUP, GROUPS, MEMBERS, CHUNKS
    )
    bias_gradient, weight_gradient = tl.sum(bias_sums, 0), tl.sum(weight_sums, 0)
    if part == 0:
        owned = known & (members >= first) & (members < first + WIDTH)
        tl.store(bias_gradient_pointer + sample * CHANNELS + members, bias_gradient, mask=owned)
        tl.store(weight_gradient_pointer + sample * CHANNELS + members, weight_gradient, mask=owned)
    weights = tl.load(weight_pointer + members, mask=known, other=0.0).to(tl.float32)
    count = positions * GROUP
    average = _over_channels(tl.sum(weights * bias_gradient, 1) / count, group, channel, GROUP)
    along = _over_channels(tl.sum(weights * weight_gradient, 1) / count, group, channel, GROUP)

    # rstd * (weight * gradient - average - normalised * along), with one factor each for gradient and x.
    weight, bias = _affine(weight_pointer, bias_pointer + sample * bias_stride, channel, inside)
    statistic = sample * (CHANNELS // GROUP) + channel // GROUP
    mean = tl.load(mean_pointer + statistic, mask=inside, other=0.0)
    rstd = tl.load(rstd_pointer + statistic, mask=inside, other=0.0)
    for_gradient, for_x = rstd * weight, -rstd * rstd * along
    rest = -rstd * average - mean * for_x
    factor, offset = 0.5 * for_gradient, 0.5 * (bias - mean * for_gradient)
    x_pointer += sample * positions * CHANNELS
    y_gradient_pointer += sample * positions * CHANNELS
    x_gradient_pointer += sample * positions * CHANNELS
    for turn in tl.range(start, end, ROWS, num_stages=STAGES):
        exists = _exists(row, end - turn, inside, FULL)
        place = turn * CHANNELS + row[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_pointer + place, mask=exists, other=0.0, eviction_policy="evict_first").to(tl.float32)
        gradient = tl.load(y_gradient_pointer + place, mask=exists, other=0.0, eviction_policy="evict_first").to(tl.float32)
        gradient = _before_activation(gradient, x, factor, offset, SILU, TANH)
        x_gradient = gradient * for_gradient[None, :] + (x * for_x[None, :] + rest[None, :])
        tl.store(x_gradient_pointer + place, x_gradient, mask=exists)


class Tiling(NamedTuple):
    """The grid of both kernels of a pass, the positions of a chunk, and the compile-time arguments of both."""

    grid: tuple[int, int, int]
    chunk: int
    constants: dict[str, int]

    def known_to(self, kernel: Any) -> dict[str, int]:
        return {name: value for name, value in self.constants.items() if name in kernel.arg_names}


def tiling(x: Tensor, groups: int, silu: bool, nvidia: bool) -> Tiling:
    """How the kernels of either pass walk tensors like `x` [B, C, ...].

    Args:
        nvidia: there, loads run ahead, and bf16 takes its sigmoid from the special function unit. (Triton's interpreter, whose
            tensors are on the CPU, runs without.)
    """
    (batch, channels), positions = x.shape[:2], x.shape[2:].numel()
    group = channels // groups
    width = min(WIDTH, triton.next_power_of_2(channels))
    rows = min(TILE // width, triton.next_power_of_2(positions))
    blocks, tiles = triton.cdiv(channels, width), triton.cdiv(positions, rows)
    # Powers of two, because most numbers of tiles are some, or multiples of large ones.
    fewest, wanted = (triton.next_power_of_2(triton.cdiv(programs, blocks * batch)) for programs in (FEWEST, PROGRAMS))
    chunks = min(max(min(fewest, tiles), min(wanted, tiles // TURNS)), MAX_CHUNKS)
    per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, per_chunk)
    touched = max((min(first + width, channels) - 1) // group - first // group + 1 for first in range(0, channels, width))
    return Tiling((blocks, chunks, batch), per_chunk * rows, {
        "SILU": silu, "TANH": nvidia and x.dtype == torch.bfloat16, "STAGES": STAGES if nvidia else 1,
        "CHANNELS": channels, "WIDTH": width, "ROWS": rows, "FULL": channels % width == 0 and positions % rows == 0,
        "GROUP": group, "MEMBERS": triton.next_power_of_2(group), "GROUPS": triton.next_power_of_2(touched),
        "CHUNKS": triton.next_power_of_2(chunks),
    })  # fmt: skip


def channels_innermost(tensor: Tensor) -> Tensor:
    """`tensor` [B, C, ...] itself where its memory is [B, ..., C], else a copy that is so."""
    turned = tensor.movedim(1, -1)
    return tensor if turned.is_contiguous() else turned.contiguous().movedim(-1, 1)


def launch_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernels; arguments as `group_norm_silu`."""
    x = channels_innermost(x)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device) for _ in range(2))
    tiles = tiling(x, groups, silu, is_nvidia(x.device))
    _, chunks, batch = tiles.grid
    sums = torch.empty(batch, chunks, 2, x.shape[1], dtype=torch.float32, device=x.device)
    positions = x.shape[2:].numel()
    group_norm_sums_kernel[tiles.grid](
        sums, x, positions, tiles.chunk, **tiles.known_to(group_norm_sums_kernel), num_warps=NUM_WARPS
    )
    group_norm_silu_kernel[tiles.grid](
        y, mean, rstd, x, weight, bias, sums, weight.stride(0), bias.stride(0), positions, tiles.chunk, epsilon,
        **tiles.known_to(group_norm_silu_kernel), num_warps=NUM_WARPS,
    )  # fmt: skip
    return y, mean, rstd


def launch_group_norm_silu_backward(
    y_gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernels; arguments as `group_norm_silu_backward`."""
    x, y_gradient = channels_innermost(x), channels_innermost(y_gradient)
    x_gradient = torch.empty_like(x)
    weight_gradient, bias_gradient = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    tiles = tiling(x, groups, silu, is_nvidia(x.device))
    _, chunks, batch = tiles.grid
    sums = torch.empty(batch, chunks, 2, x.shape[1], dtype=torch.float32, device=x.device)
    given = (y_gradient, x, weight, bias, mean, rstd)
    sizes = (weight.stride(0), bias.stride(0), x.shape[2:].numel(), tiles.chunk)
    group_norm_gradient_sums_kernel[tiles.grid](
        sums, *given, *sizes, **tiles.known_to(group_norm_gradient_sums_kernel), num_warps=NUM_WARPS
    )
    group_norm_silu_backward_kernel[tiles.grid](
        x_gradient, weight_gradient, bias_gradient, *given, sums, *sizes,
        **tiles.known_to(group_norm_silu_backward_kernel), num_warps=NUM_WARPS,
    )  # fmt: skip
    return x_gradient, weight_gradient, bias_gradient


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
    wide = channels_innermost(at_least_fp32(x))
    grouped = wide.unflatten(1, (groups, -1)).flatten(2)
    mean = grouped.mean(2)
    rstd = (grouped.var(2, correction=0) + epsilon).rsqrt()
    per_channel = [*weight.shape, *[1] * (x.dim() - 2)]
    normalised = (wide - _per_channel(mean, x)) * _per_channel(rstd, x)
    y = normalised * at_least_fp32(weight).view(per_channel) + at_least_fp32(bias).view(per_channel)
    return channels_innermost((F.silu(y) if silu else y).to(x.dtype)), mean, rstd


def _per_channel(statistic: Tensor, x: Tensor) -> Tensor:
    """[B, groups] as [B, C, 1, ...]."""
    repeated = statistic.repeat_interleave(x.shape[1] // statistic.shape[1], 1)
    return repeated.view(*repeated.shape, *[1] * (x.dim() - 2))


def reference_group_norm_silu_backward(
    y_gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x (its shape and dtype), weight and bias (fp32 [B, C], per sample)."""
    wide, gradient = channels_innermost(at_least_fp32(x)), at_least_fp32(y_gradient)
    per_channel = [*weight.shape, *[1] * (x.dim() - 2)]
    spatial = list(range(2, x.dim()))
    scale = at_least_fp32(weight).view(per_channel)
    normalised = (wide - _per_channel(mean, x)) * _per_channel(rstd, x)
    if silu:
        given = normalised * scale + at_least_fp32(bias).view(per_channel)
        sigmoid = given.sigmoid()
        gradient = gradient * sigmoid * (1 + given * (1 - sigmoid))
    bias_gradient, weight_gradient = gradient.sum(spatial), (gradient * normalised).sum(spatial)
    count = x[0, 0].numel() * x.shape[1] // groups
    average, along = (
        (at_least_fp32(weight) * sums).unflatten(1, (groups, -1)).sum(2) / count for sums in (bias_gradient, weight_gradient)
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
