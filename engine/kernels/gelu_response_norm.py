"""engine::gelu_response_norm: y = dropout(gamma g s + beta + g) for g = gelu(u), and its backward pass.

Between the two linear layers of Wuerstchen's residual block: the exact GELU, global response normalisation (arXiv:2301.00808)
over a sample's positions, s = N / (mean of N over the channels + 1e-6) with N a channel's Euclidean norm, and dropout. Two
passes over u each way, because a sample's mean is known when all of it was read: the norms, and the result; the sums over
positions that gradients need, and the gradient. Nothing but u, the norms and dropout's seed is kept in between.

Dropout's numbers are drawn again wherever they are needed: Philox with the seed as its key and counter (position * pieces +
piece, sample, 0, DROPOUT) serves a piece of 8 neighbouring channels with 16 bits each, of which the even channels have the low
ones. An element is dropped where its number is below 65536 p, rounded, and the others are divided by what that rounding keeps,
or by 1 where it keeps none.

Per element of a bf16 tensor, from memory: forward 4 bytes read and 2 written, backward 8 and 2.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine import philox
from engine.kernels.launch import on_its_device
from engine.kernels.layout import at_least_fp32
from engine.kernels.philox import words_of

WIDTH = 64  # channels of a program: a cache line of bf16
PIECE = 8  # channels that share a call of Philox, and 16 bytes of bf16
ELEMENTS = 16  # of a thread at a time
TURNS = 6  # tiles of a program where it does not walk through all positions
CHANCES = 65536
EPSILON = 1e-6
DROPOUT = tl.constexpr(philox.DROPOUT)
_NUMBERS = tl.constexpr(CHANCES)
_PIECE = tl.constexpr(PIECE)
_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _tail(x):
    """|x|, and the normal distribution's part beyond it as 2^polynomial, within 2^-11.8 of its value up to 5.5.

    Both fall to zero from there: |x| times their difference is below 5e-11.
    gelu.py's fit holds beyond, and for fp16 too, with two special functions; this one, for bf16, takes one.
    """
    size = tl.abs(x)
    outer = -0.0452387390 + size * (0.00498826371 - size * 0.000241196208)
    return size, tl.exp2(-1 + size * (-1.14767547 + size * (-0.46818121 + size * outer)))


@triton.jit
def _gelu(x, COARSE: tl.constexpr):
    """By ten instructions instead of thirty where bf16, which keeps 2^-8, hides the difference."""
    if COARSE:
        size, tail = _tail(x)
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - size * tail
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_and_slope(x, COARSE: tl.constexpr):
    if COARSE:
        _, tail = _tail(x)
        below = tl.where(x > 0, 1 - tail, tail)
    else:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * below, below + x * (0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817))


@triton.jit
def _places(CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A program's channels [WIDTH], whether they exist, and of its tiles [ROWS, WIDTH] the row and the offset."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)[:, None]
    return channel, channel < CHANNELS, row, row * CHANNELS + channel[None, :]


@triton.jit
def _from_the_last():
    """A program's sample, in the second of two passes: what the first read last is in the second-level cache still."""
    return (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)


@triton.jit
def _seed(seed_pointer, DROPPED: tl.constexpr):
    """Dropout's, or any where there is none."""
    return 0 if DROPPED == 0 else tl.load(seed_pointer)


@triton.jit
def _scale(DROPPED: tl.constexpr):
    """What dropout multiplies by what it keeps."""
    return _NUMBERS / (_NUMBERS - DROPPED + (DROPPED == _NUMBERS))


@triton.jit
def _drop(values, seed, sample, start, DROPPED: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile's values [ROWS, WIDTH] from position `start` on, with zeros for what is dropped."""
    if DROPPED > 0:
        PIECES: tl.constexpr = (CHANNELS + _PIECE - 1) // _PIECE
        own = tl.program_id(0) * (WIDTH // _PIECE) + tl.arange(0, WIDTH // _PIECE)[None, :]
        piece = (start + tl.arange(0, ROWS)[:, None]) * PIECES + own
        word_0, word_1, word_2, word_3 = words_of(seed, piece, sample, DROPOUT)
        # Joining on a new last axis puts the last join innermost: pair, word of the pair and half of the word are in the order
        # of the channels. A number's lower neighbour does not change on which side of the bound it lies.
        words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
        numbers = tl.join(words << 16, words).reshape(ROWS, WIDTH)
        values = tl.where(numbers > (DROPPED << 16) - 1, values, 0.0)  # a bound of 32 bits where all are dropped, too
    return values


@triton.jit
def _mean(totals_pointer, sample, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr):
    """The mean over a sample's channels of what each program has added up over its own."""
    COUNT: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    program = tl.arange(0, PROGRAMS)
    return tl.sum(tl.load(totals_pointer + sample * COUNT + program, mask=program < COUNT, other=0.0)) / CHANNELS


@triton.jit
def gelu_norms_kernel(
    norms_pointer, totals_pointer, u_pointer, positions,
    COARSE: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    channel, exists, row, offset = _places(CHANNELS, ROWS, WIDTH)
    u_pointer += sample * positions * CHANNELS
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, positions, ROWS):
        inside = exists[None, :] & (row < positions - start)
        u = tl.load(u_pointer + start * CHANNELS + offset, mask=inside, other=0.0)
        g = _gelu(u.to(tl.float32), COARSE)
        squares += g * g
    norms = tl.sqrt(tl.sum(squares, 0))
    tl.store(norms_pointer + sample * CHANNELS + channel, norms, mask=exists)
    tl.store(totals_pointer + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(norms))


@triton.jit
def gelu_response_norm_kernel(
    y_pointer, mean_pointer, u_pointer, gamma_pointer, beta_pointer, norms_pointer, totals_pointer, seed_pointer, positions,
    DROPPED: tl.constexpr, COARSE: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr, TURNS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = _from_the_last()
    channel, exists, row, offset = _places(CHANNELS, ROWS, WIDTH)
    u_pointer += sample * positions * CHANNELS
    y_pointer += sample * positions * CHANNELS
    mean = _mean(totals_pointer, sample, CHANNELS, WIDTH, PROGRAMS)
    if tl.program_id(0) + tl.program_id(2) == 0:
        tl.store(mean_pointer + sample, mean)
    gamma = tl.load(gamma_pointer + channel, mask=exists, other=0.0).to(tl.float32)
    beta = tl.load(beta_pointer + channel, mask=exists, other=0.0).to(tl.float32)
    norms = tl.load(norms_pointer + sample * CHANNELS + channel, mask=exists, other=0.0)
    scale = _scale(DROPPED)
    factor, shift = (1 + gamma * (norms / (mean + _EPSILON))) * scale, beta * scale
    seed = _seed(seed_pointer, DROPPED)
    first = tl.program_id(2) * TURNS * ROWS
    for start in range(first, tl.minimum(first + TURNS * ROWS, positions), ROWS):
        inside = exists[None, :] & (row < positions - start)
        u = tl.load(u_pointer + start * CHANNELS + offset, mask=inside, other=0.0)
        y = _gelu(u.to(tl.float32), COARSE) * factor[None, :] + shift[None, :]
        y = _drop(y, seed, sample, start, DROPPED, CHANNELS, ROWS, WIDTH)
        tl.store(y_pointer + start * CHANNELS + offset, y, mask=inside)


@triton.jit
def gelu_response_sums_kernel(
    along_pointer, totals_pointer, gamma_gradient_pointer, beta_gradient_pointer, y_gradient_pointer, u_pointer, gamma_pointer,
    norms_pointer, mean_pointer, seed_pointer, positions,
    DROPPED: tl.constexpr, COARSE: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    channel, exists, row, offset = _places(CHANNELS, ROWS, WIDTH)
    u_pointer += sample * positions * CHANNELS
    y_gradient_pointer += sample * positions * CHANNELS
    seed = _seed(seed_pointer, DROPPED)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    along = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, positions, ROWS):
        inside = exists[None, :] & (row < positions - start)
        u = tl.load(u_pointer + start * CHANNELS + offset, mask=inside, other=0.0)
        gradient = tl.load(y_gradient_pointer + start * CHANNELS + offset, mask=inside, other=0.0).to(tl.float32)
        gradient = _drop(gradient, seed, sample, start, DROPPED, CHANNELS, ROWS, WIDTH)
        total += gradient
        along += gradient * _gelu(u.to(tl.float32), COARSE)
    scale = _scale(DROPPED)
    totals, alongs = tl.sum(total, 0) * scale, tl.sum(along, 0) * scale
    gamma = tl.load(gamma_pointer + channel, mask=exists, other=0.0).to(tl.float32)
    place = sample * CHANNELS + channel
    norms = tl.load(norms_pointer + place, mask=exists, other=0.0)
    tl.store(beta_gradient_pointer + place, totals, mask=exists)
    tl.store(gamma_gradient_pointer + place, alongs * (norms / (tl.load(mean_pointer + sample) + _EPSILON)), mask=exists)
    tl.store(along_pointer + place, alongs, mask=exists)
    tl.store(totals_pointer + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(gamma * alongs * norms))


@triton.jit
def gelu_response_backward_kernel(
    u_gradient_pointer, y_gradient_pointer, u_pointer, gamma_pointer, norms_pointer, mean_pointer, along_pointer,
    totals_pointer, seed_pointer, positions,
    DROPPED: tl.constexpr, COARSE: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr, TURNS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = _from_the_last()
    channel, exists, row, offset = _places(CHANNELS, ROWS, WIDTH)
    u_pointer += sample * positions * CHANNELS
    y_gradient_pointer += sample * positions * CHANNELS
    u_gradient_pointer += sample * positions * CHANNELS
    gamma = tl.load(gamma_pointer + channel, mask=exists, other=0.0).to(tl.float32)
    norms = tl.load(norms_pointer + sample * CHANNELS + channel, mask=exists, other=0.0)
    alongs = tl.load(along_pointer + sample * CHANNELS + channel, mask=exists, other=0.0)
    divisor = tl.load(mean_pointer + sample) + _EPSILON
    factor = (1 + gamma * (norms / divisor)) * _scale(DROPPED)
    # Gradients with respect to the norms, over them; of a channel of zeros, as torch's, none.
    mean = _mean(totals_pointer, sample, CHANNELS, WIDTH, PROGRAMS)
    by_norms = (gamma * alongs - mean / divisor) / divisor
    pull = tl.where(norms > 0, by_norms / tl.where(norms > 0, norms, 1.0), 0.0)
    seed = _seed(seed_pointer, DROPPED)
    first = tl.program_id(2) * TURNS * ROWS
    for start in range(first, tl.minimum(first + TURNS * ROWS, positions), ROWS):
        inside = exists[None, :] & (row < positions - start)
        place = start * CHANNELS + offset
        u = tl.load(u_pointer + place, mask=inside, other=0.0)
        gradient = tl.load(y_gradient_pointer + place, mask=inside, other=0.0).to(tl.float32)
        gradient = _drop(gradient, seed, sample, start, DROPPED, CHANNELS, ROWS, WIDTH)
        g, slope = _gelu_and_slope(u.to(tl.float32), COARSE)
        u_gradient = (gradient * factor[None, :] + g * pull[None, :]) * slope
        tl.store(u_gradient_pointer + place, u_gradient, mask=inside)


def dropped_of(probability: float) -> int:
    """How many of 65536 numbers drop an element."""
    return round(probability * CHANCES)


def _dropped(seed: Tensor | None, probability: float) -> int:
    """As `dropped_of`; without a seed nothing is."""
    return 0 if seed is None else dropped_of(probability)


def tilings(channels: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the kernels that add up over a sample's positions, and of those that write a tensor."""
    common = {"CHANNELS": channels, "WIDTH": WIDTH, "COARSE": dtype == torch.bfloat16}
    adding, writing = ({**common, "ROWS": warps * 32 * ELEMENTS // WIDTH, "num_warps": warps} for warps in (8, 4))
    programs = triton.next_power_of_2(triton.cdiv(channels, WIDTH))
    return adding, {**writing, "PROGRAMS": programs, "TURNS": TURNS}


def _grids(u: Tensor, writing: dict[str, int]) -> tuple[tuple[int, int], tuple[int, int, int]]:
    programs = triton.cdiv(u.shape[-1], WIDTH), u.shape[0]
    return programs, (*programs, triton.cdiv(u.shape[1:-1].numel(), TURNS * writing["ROWS"]))


def launch_gelu_response_norm(
    u: Tensor, gamma: Tensor, beta: Tensor, seed: Tensor | None, probability: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernels; arguments as `reference_gelu_response_norm`."""
    u = u.contiguous()
    samples, channels, positions = u.shape[0], u.shape[-1], u.shape[1:-1].numel()
    adding, writing = tilings(channels, u.dtype)
    some, all_of_them = _grids(u, writing)
    y = torch.empty_like(u)
    norms, totals, mean = (
        torch.empty(shape, dtype=torch.float32, device=u.device) for shape in ((samples, channels), some, (samples,))
    )
    dropped = _dropped(seed, probability)
    gelu_norms_kernel[some](norms, totals, u, positions, **adding)
    gelu_response_norm_kernel[all_of_them](y, mean, u, gamma, beta, norms, totals, seed, positions, DROPPED=dropped, **writing)
    return y, norms, mean


def launch_gelu_response_norm_backward(
    y_gradient: Tensor, u: Tensor, gamma: Tensor, norms: Tensor, mean: Tensor, seed: Tensor | None, probability: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernels; arguments as `reference_gelu_response_norm_backward`."""
    y_gradient, u = y_gradient.contiguous(), u.contiguous()
    adding, writing = tilings(u.shape[-1], u.dtype)
    some, all_of_them = _grids(u, writing)
    u_gradient, positions = torch.empty_like(u), u.shape[1:-1].numel()
    along, gamma_gradient, beta_gradient = (torch.empty_like(norms) for _ in range(3))
    totals = torch.empty(some, dtype=torch.float32, device=u.device)
    dropped = _dropped(seed, probability)
    gelu_response_sums_kernel[some](
        along, totals, gamma_gradient, beta_gradient, y_gradient, u, gamma, norms, mean, seed, positions, DROPPED=dropped,
        **adding,
    )  # fmt: skip
    gelu_response_backward_kernel[all_of_them](
        u_gradient, y_gradient, u, gamma, norms, mean, along, totals, seed, positions, DROPPED=dropped, **writing
    )
    return u_gradient, gamma_gradient, beta_gradient


def _wide(tensor: Tensor) -> Tensor:
    """[B, positions, C]."""
    return at_least_fp32(tensor.flatten(1, -2))


def _weights(u: Tensor, seed: Tensor | None, probability: float) -> Tensor | float:
    """What dropout multiplies each element of `u` by, [B, positions, C]."""
    if seed is None:
        return 1.0
    dropped, pieces = dropped_of(probability), -(-u.shape[-1] // PIECE)
    samples = torch.arange(u.shape[0], device=u.device)
    words = philox.draw_words(seed, samples, philox.DROPOUT, u.shape[1:-1].numel() * pieces)
    numbers = torch.stack([words & 0xFFFF, words >> 16], -1).view(u.shape[0], -1, pieces * PIECE)[..., : u.shape[-1]]
    return (numbers >= dropped) * (CHANCES / max(CHANCES - dropped, 1))


def reference_gelu_response_norm(
    u: Tensor, gamma: Tensor, beta: Tensor, seed: Tensor | None, probability: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dropout(gamma g s + beta + g) for g = gelu(u), and s each channel's norm over the mean norm.

    Args:
        u: [B, ..., C] in bf16, fp16 or fp32, of fewer than 2^31 elements per sample; memory is best contiguous.
        gamma, beta: [C], contiguous.
        seed: of dropout, int64 [1]; None for no dropout.
        probability: with which an element is dropped.

    Returns:
        y in the shape and dtype of u, contiguous; the norms, fp32 [B, C], and their means over channels, [B].
    """
    g = F.gelu(_wide(u))
    norms = torch.linalg.vector_norm(g, dim=1)
    mean = norms.mean(1)
    stand = norms / (mean[:, None] + EPSILON)
    y = (g * (1 + gamma * stand)[:, None] + beta) * _weights(u, seed, probability)
    return y.to(u.dtype).view(u.shape), norms, mean


def reference_gelu_response_norm_backward(
    y_gradient: Tensor, u: Tensor, gamma: Tensor, norms: Tensor, mean: Tensor, seed: Tensor | None, probability: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to u (its shape and dtype), gamma and beta (fp32 [B, C], per sample)."""
    x, gradient = _wide(u), _wide(y_gradient) * _weights(u, seed, probability)
    g, divisor = F.gelu(x), mean[:, None] + EPSILON
    along = (gradient * g).sum(1)
    by_norms = (gamma * along - (gamma * along * norms).mean(1, keepdim=True) / divisor) / divisor
    pull = torch.where(norms > 0, by_norms / norms, 0.0)
    slope = torch.special.ndtr(x) + x * torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
    u_gradient = (gradient * (1 + gamma * norms / divisor)[:, None] + g * pull[:, None]) * slope
    return u_gradient.to(u.dtype).view(u.shape), along * norms / divisor, gradient.sum(1)


_forward = torch.library.custom_op("engine::gelu_response_norm", reference_gelu_response_norm, mutates_args=())
_forward.register_kernel("cuda")(on_its_device(launch_gelu_response_norm))
_backward = torch.library.custom_op(
    "engine::gelu_response_norm_backward", reference_gelu_response_norm_backward, mutates_args=()
)
_backward.register_kernel("cuda")(on_its_device(launch_gelu_response_norm_backward))


@_forward.register_fake
def _(u, gamma, beta, seed, probability):
    norms = u.new_empty((u.shape[0], u.shape[-1]), dtype=torch.promote_types(u.dtype, torch.float32))
    return torch.empty_like(u, memory_format=torch.contiguous_format), norms, norms.new_empty(u.shape[0])


@_backward.register_fake
def _(y_gradient, u, gamma, norms, mean, seed, probability):
    u_gradient = torch.empty_like(u, memory_format=torch.contiguous_format)
    return u_gradient, torch.empty_like(norms), torch.empty_like(norms)


def _keep(ctx, inputs, output):
    u, gamma, beta, seed, ctx.probability = inputs
    _, norms, mean = output
    ctx.mark_non_differentiable(norms, mean)
    ctx.save_for_backward(u, gamma, norms, mean, seed)
    ctx.beta_dtype = beta.dtype


def _differentiate(ctx, y_gradient, _norms, _mean):
    u, gamma, norms, mean, seed = ctx.saved_tensors
    found, by_gamma, by_beta = _backward(y_gradient, u, gamma, norms, mean, seed, ctx.probability)
    # Where they are frozen, these are by-products that the gradient of u is made of.
    for_gamma = by_gamma.sum(0).to(gamma.dtype) if ctx.needs_input_grad[1] else None
    for_beta = by_beta.sum(0).to(ctx.beta_dtype) if ctx.needs_input_grad[2] else None
    return found, for_gamma, for_beta, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def gelu_response_norm(u: Tensor, gamma: Tensor, beta: Tensor, probability: float = 0.0) -> Tensor:
    """dropout(gamma g s + beta + g) for g = gelu(u), differentiable; arguments as `reference_gelu_response_norm`.

    Dropout takes a seed from torch's generator of the device, so that what repeats that generator's state repeats the mask.
    """
    # Of 31 bits, which inductor's generated kernels take whatever their type of indices.
    seed = torch.randint(2**31 - 1, (1,), device=u.device) if probability else None
    return _forward(u, gamma, beta, seed, probability)[0]
