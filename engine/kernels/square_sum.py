"""engine::square_sum: the sum of the squares of a flat tensor, for the norm of the gradients; nothing is read by the host.

Bytes: the tensor once, in 128-bit pieces; the first program takes the last `elements % VECTOR` one by one. Each program leaves
one partial sum, and a second small kernel adds those in double precision and in a fixed order, so that the norm, and with it
the clipping, is reproducible bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import on_its_device

BLOCK = 2048
VECTOR = 8  # elements in 16 bytes of bf16
PIECE = 2**20  # elements that the CPU converts at a time
TURNS = 4  # blocks per program: enough loads in flight, and few enough partial sums


@triton.jit(do_not_specialize=["elements"])
def square_sum_kernel(
    partial_pointer, tensor_pointer, elements, BLOCK: tl.constexpr, TURNS: tl.constexpr, VECTOR: tl.constexpr
):
    # A mask that holds for whole vectors or for none keeps loads 128 bits wide whatever the number of elements.
    whole = elements // VECTOR * VECTOR
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS)
    squares = tl.zeros((BLOCK,), tl.float32)
    for turn in tl.static_range(TURNS):
        element = first + turn * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(tensor_pointer + element, mask=element < whole, other=0.0).to(tl.float32)
        squares += value * value
    total = tl.sum(squares)
    if (tl.program_id(0) == 0) & (whole < elements):
        last = whole + tl.arange(0, VECTOR)
        rest = tl.load(tensor_pointer + last, mask=last < elements, other=0.0).to(tl.float32)
        total += tl.sum(rest * rest)
    tl.store(partial_pointer + tl.program_id(0), total)


def launch_square_sum(tensor: Tensor) -> Tensor:
    """Runs the Triton kernel; arguments as `square_sum`."""
    programs = -(-tensor.numel() // (BLOCK * TURNS))
    partial = torch.empty(programs, dtype=torch.float32, device=tensor.device)
    square_sum_kernel[(programs,)](partial, tensor, tensor.numel(), BLOCK=BLOCK, TURNS=TURNS, VECTOR=VECTOR)
    return partial.sum(dtype=torch.float64).float().view(1)


def reference_square_sum(tensor: Tensor) -> Tensor:
    """The sum of the squares of a contiguous tensor [n] in bf16, fp16 or fp32, as fp32 [1] on its device."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square().view(1)


square_sum = torch.library.custom_op("engine::square_sum", reference_square_sum, mutates_args=())
square_sum.register_kernel("cuda")(on_its_device(launch_square_sum))


@square_sum.register_kernel("cpu")
def square_sum_in_pieces(tensor: Tensor) -> Tensor:
    """As the reference, which on a CPU copies bf16 to fp32 whole (4 bytes per parameter) and adds up in fp32 until small
    squares vanish: of 860 million normal numbers a third."""
    buffer = torch.empty(min(PIECE, tensor.numel()), dtype=torch.float32)
    squares = [buffer[: piece.numel()].copy_(piece).square_().sum() for piece in tensor.split(PIECE)]
    return torch.stack(squares).sum(dtype=torch.float64).float().view(1)


@square_sum.register_fake
def _(tensor):
    return tensor.new_empty(1, dtype=torch.float32)
