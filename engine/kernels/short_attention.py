"""engine::short_attention: self-attention of at most 128 tokens, softmax(q k^T size^-0.5 + mask) v, and its backward pass.

A whole sequence is one tile. So a program has a head of a sample, reads queries, keys and values straight from the stacked
projection, sees all scores of a row at once, and in the backward pass writes their gradients to where the projection's gradient
has them. Scores are computed again there: nothing is kept but the projection and the mask, and nothing is added atomically.
Keys come in two parts, since tiles are powers of two: 64 and 32 of them for 81 tokens are a quarter fewer scores than 128.

Per element of queries in bf16, from memory: forward 6 bytes read and 2 written, backward 8 and 6. Heads of a sample are
neighbours in the order of programs, which find its mask in the second-level cache.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import is_nvidia, on_its_device
from engine.kernels.layout import at_least_fp32

MOST_TOKENS = 128
SIZES = range(16, 129, 16)  # of heads
# Major compute capabilities on which the backward pass stays in registers (on 8 it would spill) and shared memory suffices.
CAPABILITIES = (9, 10)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _places(tokens, FIRST: tl.constexpr, COUNT: tl.constexpr, ROW: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of COUNT tokens' vectors from token FIRST on in rows of ROW elements, [COUNT, WIDTH], and which of them exist."""
    token, column = FIRST + tl.arange(0, COUNT)[:, None], tl.arange(0, WIDTH)[None, :]
    return token * ROW + column, (token < tokens) & (column < SIZE)


@triton.jit
def _load(
    pointer, tokens, FIRST: tl.constexpr, COUNT: tl.constexpr, ROW: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    offset, exists = _places(tokens, FIRST, COUNT, ROW, SIZE, WIDTH)
    return tl.load(pointer + offset, mask=exists, other=0.0)


@triton.jit
def _store(
    pointer, values, tokens, FIRST: tl.constexpr, COUNT: tl.constexpr, ROW: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    offset, exists = _places(tokens, FIRST, COUNT, ROW, SIZE, WIDTH)
    tl.store(pointer + offset, values, mask=exists)


@triton.jit
def _load_mask(mask_pointer, tokens, row_stride, FIRST: tl.constexpr, COUNT: tl.constexpr, TOKENS: tl.constexpr):
    """What is added to scores with COUNT keys from key FIRST on, [TOKENS, COUNT]; -inf for keys that do not exist."""
    row, key = tl.arange(0, TOKENS)[:, None], FIRST + tl.arange(0, COUNT)[None, :]
    if mask_pointer is None:
        mask = tl.where(key < tokens, 0.0, float("-inf"))
    else:
        mask = tl.load(mask_pointer + (row * row_stride + key), mask=row < tokens, other=0.0)
    return mask


@triton.jit
def _scores(query, key, mask, SCALE: tl.constexpr):
    """Logarithms to the base of 2."""
    return tl.dot(query, key.T) * (SCALE * _LOG2_E) + mask.to(tl.float32) * _LOG2_E


@triton.jit
def _exponentials(query, key_0, key_1, mask_0, mask_1, SCALE: tl.constexpr):
    """2^(score - the row's largest) with both parts of the keys, and one over each row's sum; of a row of -inf, zeros."""
    scores_0, scores_1 = _scores(query, key_0, mask_0, SCALE), _scores(query, key_1, mask_1, SCALE)
    largest = tl.maximum(tl.max(scores_0, 1), tl.max(scores_1, 1))
    largest = tl.where(largest == float("-inf"), 0.0, largest)[:, None]
    powers_0, powers_1 = tl.exp2(scores_0 - largest), tl.exp2(scores_1 - largest)
    total = tl.sum(powers_0, 1) + tl.sum(powers_1, 1)
    return powers_0, powers_1, (1 / tl.where(total == 0, 1.0, total))[:, None]


@triton.jit
def _load_parts(
    pointer, tokens, CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    KEYS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A head's queries, and both parts of its keys and of its values: of COUNT tokens each, [COUNT, WIDTH]."""
    ROW: tl.constexpr = 3 * CHANNELS
    query = _load(pointer, tokens, 0, TOKENS, ROW, SIZE, WIDTH)
    key_0 = _load(pointer + CHANNELS, tokens, 0, KEYS, ROW, SIZE, WIDTH)
    key_1 = _load(pointer + CHANNELS, tokens, KEYS, REST, ROW, SIZE, WIDTH)
    value_0 = _load(pointer + 2 * CHANNELS, tokens, 0, KEYS, ROW, SIZE, WIDTH)
    value_1 = _load(pointer + 2 * CHANNELS, tokens, KEYS, REST, ROW, SIZE, WIDTH)
    return query, key_0, key_1, value_0, value_1


@triton.jit
def _load_masks(mask_pointer, tokens, row_stride, TOKENS: tl.constexpr, KEYS: tl.constexpr, REST: tl.constexpr):
    """What is added to scores with both parts of the keys."""
    mask_0 = _load_mask(mask_pointer, tokens, row_stride, 0, KEYS, TOKENS)
    mask_1 = _load_mask(mask_pointer, tokens, row_stride, KEYS, REST, TOKENS)
    return mask_0, mask_1


@triton.jit
def short_attention_kernel(
    y_pointer, projected_pointer, mask_pointer, tokens, sample_stride, row_stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr,
    KEYS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = HEADS * SIZE
    ROW: tl.constexpr = 3 * CHANNELS
    sample, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    y_pointer += sample * tokens * CHANNELS + head * SIZE
    projected_pointer += sample * tokens * ROW + head * SIZE
    if mask_pointer is not None:
        mask_pointer += sample * sample_stride
    query, key_0, key_1, value_0, value_1 = _load_parts(projected_pointer, tokens, CHANNELS, SIZE, WIDTH, TOKENS, KEYS, REST)
    mask_0, mask_1 = _load_masks(mask_pointer, tokens, row_stride, TOKENS, KEYS, REST)

    powers_0, powers_1, factor = _exponentials(query, key_0, key_1, mask_0, mask_1, SCALE)
    y = tl.dot(powers_0.to(value_0.dtype), value_0)
    y = tl.dot(powers_1.to(value_1.dtype), value_1, y) * factor
    _store(y_pointer, y, tokens, 0, TOKENS, CHANNELS, SIZE, WIDTH)


@triton.jit
def short_attention_backward_kernel(
    projected_gradient_pointer, y_gradient_pointer, projected_pointer, mask_pointer, tokens, sample_stride, row_stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr,
    KEYS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = HEADS * SIZE
    ROW: tl.constexpr = 3 * CHANNELS
    sample, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    y_gradient_pointer += sample * tokens * CHANNELS + head * SIZE
    projected_pointer += sample * tokens * ROW + head * SIZE
    projected_gradient_pointer += sample * tokens * ROW + head * SIZE
    if mask_pointer is not None:
        mask_pointer += sample * sample_stride
    query, key_0, key_1, value_0, value_1 = _load_parts(projected_pointer, tokens, CHANNELS, SIZE, WIDTH, TOKENS, KEYS, REST)
    gradient = _load(y_gradient_pointer, tokens, 0, TOKENS, CHANNELS, SIZE, WIDTH)
    mask_0, mask_1 = _load_masks(mask_pointer, tokens, row_stride, TOKENS, KEYS, REST)

    powers_0, powers_1, factor = _exponentials(query, key_0, key_1, mask_0, mask_1, SCALE)
    # In the precision in which they weigh values, and in half the registers.
    weights_0, weights_1 = (powers_0 * factor).to(query.dtype), (powers_1 * factor).to(query.dtype)
    place = projected_gradient_pointer + 2 * CHANNELS
    _store(place, tl.dot(weights_0.T, gradient), tokens, 0, KEYS, ROW, SIZE, WIDTH)
    _store(place, tl.dot(weights_1.T, gradient), tokens, KEYS, REST, ROW, SIZE, WIDTH)

    by_weights_0, by_weights_1 = tl.dot(gradient, value_0.T), tl.dot(gradient, value_1.T)
    wide_0, wide_1 = weights_0.to(tl.float32), weights_1.to(tl.float32)
    along = (tl.sum(wide_0 * by_weights_0, 1) + tl.sum(wide_1 * by_weights_1, 1))[:, None]
    by_scores_0 = (wide_0 * (by_weights_0 - along)).to(query.dtype)
    by_scores_1 = (wide_1 * (by_weights_1 - along)).to(query.dtype)
    by_query = tl.dot(by_scores_1, key_1, tl.dot(by_scores_0, key_0))
    _store(projected_gradient_pointer, by_query * SCALE, tokens, 0, TOKENS, ROW, SIZE, WIDTH)
    place = projected_gradient_pointer + CHANNELS
    _store(place, tl.dot(by_scores_0.T, query) * SCALE, tokens, 0, KEYS, ROW, SIZE, WIDTH)
    _store(place, tl.dot(by_scores_1.T, query) * SCALE, tokens, KEYS, REST, ROW, SIZE, WIDTH)


def fits(tokens: int, size: int, dtype: torch.dtype, mask: Tensor | None) -> bool:
    """Whether the kernels take sequences of so many tokens and heads of this size, under a mask if there is one.

    Which is added to the scores, a number for each key in its last dimension, and has no gradient.
    """
    if mask is not None and (not mask.is_floating_point() or mask.shape[-1] != tokens or mask.requires_grad):
        return False
    return tokens <= MOST_TOKENS and size in SIZES and dtype in (torch.bfloat16, torch.float16)


def pays_on(device: torch.device) -> bool:
    """Whether the kernels are made for a device: Hopper, and Blackwell in data centres. AMD's gfx942 calls itself (9, 4)."""
    return is_nvidia(device) and torch.cuda.get_device_capability(device)[0] in CAPABILITIES


def tiles(tokens: int) -> tuple[int, int, int]:
    """Queries of a program, and the two parts of its keys."""
    return (64, 32, 32) if tokens <= 64 else (128, 64, 32) if tokens <= 96 else (128, 64, 64)


def tiling(tokens: int, heads: int, size: int, amd: bool) -> dict[str, int | float]:
    """Constants of both kernels."""
    queries, keys, rest = tiles(tokens)
    return {
        "HEADS": heads, "SIZE": size, "WIDTH": triton.next_power_of_2(size), "SCALE": size**-0.5, "TOKENS": queries,
        "KEYS": keys, "REST": rest, "num_warps": queries // (32 if amd else 16),
    }  # fmt: skip


def most_registers(constants: dict[str, int | float], capability: tuple[int, int] | None) -> dict[str, int]:
    """Of the backward pass at 81 tokens in heads of 64: a multiprocessor of Hopper holds two programs with 128, not with 131.

    Untold, ptxas stores some to memory on Blackwell for the sake of 128.
    """
    alike = constants["TOKENS"] == 128 and constants["REST"] == 32 and constants["WIDTH"] == 64
    if capability is None or not alike:
        return {}
    limit = {9: 128, 10: 160}.get(capability[0])
    return {} if limit is None else {"maxnreg": limit}


def _layout(projected: Tensor, mask: Tensor | None, heads: int) -> tuple[tuple[int, ...], dict[str, int | float]]:
    """Integer arguments and constants of both kernels."""
    batch, tokens, channels = projected.shape
    strides = (0, 0) if mask is None else mask.expand(batch, 1, tokens, -1).stride()[::2]
    return (tokens, *strides), tiling(tokens, heads, channels // (3 * heads), torch.version.hip is not None)


def launch_short_attention(projected: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Runs the Triton kernel; arguments as `reference_short_attention`."""
    projected = projected.contiguous()
    integers, constants = _layout(projected, mask, heads)
    y = projected.new_empty(*projected.shape[:2], projected.shape[2] // 3)
    short_attention_kernel[(projected.shape[0] * heads,)](y, projected, mask, *integers, **constants)
    return y


def launch_short_attention_backward(y_gradient: Tensor, projected: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Runs the Triton kernel; arguments as `reference_short_attention_backward`."""
    y_gradient, projected = y_gradient.contiguous(), projected.contiguous()
    integers, constants = _layout(projected, mask, heads)
    capability = torch.cuda.get_device_capability(projected.device) if is_nvidia(projected.device) else None
    found = torch.empty_like(projected)
    short_attention_backward_kernel[(projected.shape[0] * heads,)](
        found, y_gradient, projected, mask, *integers, **constants, **most_registers(constants, capability)
    )
    return found


def _weights(projected: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, N, size], at least fp32, and the weights of attention, [B, heads, N, N]."""
    query, key, value = at_least_fp32(projected).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask[..., : scores.shape[-1]]
    nowhere = scores.amax(-1, keepdim=True) == -torch.inf
    return query, key, value, scores.softmax(-1).masked_fill(nowhere, 0.0)


def reference_short_attention(projected: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """softmax(q k^T size^-0.5 + mask) v for each head.

    Args:
        projected: queries, keys and values [B, N, 3 * heads * size], of which the last dimension is [3, heads, size]; what
            `fits` in bf16 or fp16, best contiguous.
        mask: as `widened` makes it; a constant, without a gradient. A row that is -inf everywhere attends to nothing.

    Returns:
        [B, N, heads * size] in the dtype of `projected`, contiguous.
    """
    *_, value, weights = _weights(projected, mask, heads)
    return (weights @ value).transpose(1, 2).flatten(2).to(projected.dtype)


def reference_short_attention_backward(y_gradient: Tensor, projected: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """The gradient with respect to `projected`, in its shape and dtype, contiguous."""
    query, key, value, weights = _weights(projected, mask, heads)
    gradient = y_gradient.to(weights.dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
    by_weights = gradient @ value.mT
    by_scores = weights * (by_weights - (weights * by_weights).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    parts = torch.stack([by_scores @ key, by_scores.mT @ query, weights.mT @ gradient])
    return parts.permute(1, 3, 0, 2, 4).flatten(2).to(projected.dtype)


_forward = torch.library.custom_op("engine::short_attention", reference_short_attention, mutates_args=())
_forward.register_kernel("cuda")(on_its_device(launch_short_attention))
_backward = torch.library.custom_op("engine::short_attention_backward", reference_short_attention_backward, mutates_args=())
_backward.register_kernel("cuda")(on_its_device(launch_short_attention_backward))


@_forward.register_fake
def _(projected, mask, heads):
    return projected.new_empty(*projected.shape[:2], projected.shape[2] // 3)


@_backward.register_fake
def _(y_gradient, projected, mask, heads):
    return torch.empty_like(projected, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    projected, mask, ctx.heads = inputs
    ctx.save_for_backward(projected, mask)


def _differentiate(ctx, y_gradient):
    return _backward(y_gradient, *ctx.saved_tensors, ctx.heads), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def widened(mask: Tensor) -> Tensor:
    """A mask [B or 1, 1, N or 1, N] with -inf for the keys beyond N that fill a program's tile: rows of whole vectors.

    An operation of its own, since a model's layers have one mask: compiled, this happens once.
    """
    _, keys, rest = tiles(mask.shape[-1])
    return F.pad(mask, (0, keys + rest - mask.shape[-1]), value=-torch.inf).contiguous()


def short_attention(projected: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Attention within short sequences, differentiable; arguments as `reference_short_attention`.

    Args:
        mask: that broadcasts to [B, 1, N, N], whose rows are whole; of any floating precision.
    """
    return _forward(projected, None if mask is None else widened(mask), heads)
