"""engine::adamw_ema_: AdamW, the moving average and the cast to the training precision in one pass over flat memory.

AdamW as in "Decoupled weight decay regularization" (arXiv:1711.05101), in torch's order: decay, moments, update. What changes
from step to step (learning rate, clip factor, step number, weight of the average) is read from device memory, so that a
captured graph can be replayed.

Per element, with bf16 gradients and weights: master, two moments and average read and written in fp32 (32 bytes), the gradient
read (2) and the weight written (2): 36 bytes and some 20 operations, so that memory sets the time. Separate passes (clip,
AdamW, average, cast) move 62 bytes. Whole vectors move in 128-bit pieces; the first program takes the last `elements % VECTOR`
one by one, because a partition of ZeRO 1 or 2 has any even number of elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.launch import on_its_device

BLOCK = 1024
VECTOR = 8  # elements in 16 bytes of bf16


@triton.jit
def _step(pointers, scalars, options, element, exists, HAS_WEIGHTS: tl.constexpr, HAS_EMA: tl.constexpr):
    """The step of those of these elements that exist."""
    master_pointer, exp_avg_pointer, exp_avg_sq_pointer, gradient_pointer, weights_pointer, ema_pointer = pointers
    factor, rate, update_rate, root_correction, ema_weight = scalars
    rest_1, beta_2, rest_2, epsilon, weight_decay = options
    gradient = tl.load(gradient_pointer + element, mask=exists, other=0.0).to(tl.float32) * factor
    master = tl.load(master_pointer + element, mask=exists, other=0.0)
    exp_avg = tl.load(exp_avg_pointer + element, mask=exists, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_pointer + element, mask=exists, other=0.0)

    exp_avg += rest_1 * (gradient - exp_avg)
    exp_avg_sq = beta_2 * exp_avg_sq + rest_2 * gradient * gradient
    master -= rate * weight_decay * master
    master -= update_rate * exp_avg / (tl.sqrt(exp_avg_sq) * root_correction + epsilon)

    tl.store(exp_avg_pointer + element, exp_avg, mask=exists)
    tl.store(exp_avg_sq_pointer + element, exp_avg_sq, mask=exists)
    tl.store(master_pointer + element, master, mask=exists)
    if HAS_WEIGHTS:
        tl.store(weights_pointer + element, master, mask=exists)
    if HAS_EMA:
        ema = tl.load(ema_pointer + element, mask=exists, other=0.0)
        tl.store(ema_pointer + element, ema + ema_weight * (master - ema), mask=exists)


@triton.jit(do_not_specialize=["elements"])
def adamw_ema_kernel(
    master_pointer, exp_avg_pointer, exp_avg_sq_pointer, gradient_pointer, weights_pointer, ema_pointer, scalars_pointer,
    elements, rest_1, beta_2, rest_2, epsilon, weight_decay,
    HAS_WEIGHTS: tl.constexpr, HAS_EMA: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    factor = tl.load(scalars_pointer)
    if factor > 0:
        pointers = (master_pointer, exp_avg_pointer, exp_avg_sq_pointer, gradient_pointer, weights_pointer, ema_pointer)
        scalars = (
            factor, tl.load(scalars_pointer + 1), tl.load(scalars_pointer + 2), tl.load(scalars_pointer + 3),
            tl.load(scalars_pointer + 4),
        )  # fmt: skip
        options = (rest_1, beta_2, rest_2, epsilon, weight_decay)
        # A mask that holds for whole vectors or for none keeps accesses 128 bits wide whatever the number of elements.
        whole = elements // VECTOR * VECTOR
        element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _step(pointers, scalars, options, element, element < whole, HAS_WEIGHTS, HAS_EMA)
        if (tl.program_id(0) == 0) & (whole < elements):
            last = whole + tl.arange(0, VECTOR)
            _step(pointers, scalars, options, last, last < elements, HAS_WEIGHTS, HAS_EMA)


def _corrected(learning_rate: Tensor, step: Tensor, beta_1: float, beta_2: float) -> tuple[Tensor, Tensor]:
    """rate / (1 - beta_1^t) and 1 / sqrt(1 - beta_2^t), fp32 [1] each.

    By way of double precision: after the first step 1 - 0.999 would keep four digits in fp32.
    """
    exact = step.double()
    return (learning_rate / (1 - beta_1**exact)).float(), (1 - beta_2**exact).rsqrt().float()


def launch_adamw_ema_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    weights: Tensor | None,
    ema: Tensor | None,
    learning_rate: Tensor,
    factor: Tensor,
    step: Tensor,
    ema_weight: Tensor,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """Runs the Triton kernel; arguments as `adamw_ema_`."""
    scalars = torch.cat((factor, learning_rate, *_corrected(learning_rate, step, beta_1, beta_2), ema_weight))
    elements = master.numel()
    adamw_ema_kernel[(-(-elements // BLOCK),)](
        master, exp_avg, exp_avg_sq, gradient, master if weights is None else weights, master if ema is None else ema, scalars,
        elements, 1 - beta_1, beta_2, 1 - beta_2, epsilon, weight_decay,
        HAS_WEIGHTS=weights is not None, HAS_EMA=ema is not None, BLOCK=BLOCK, VECTOR=VECTOR,
    )  # fmt: skip


def reference_adamw_ema_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    weights: Tensor | None,
    ema: Tensor | None,
    learning_rate: Tensor,
    factor: Tensor,
    step: Tensor,
    ema_weight: Tensor,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """One step of AdamW on `factor` * gradient, then ema += ema_weight * (master - ema) and weights = master, in place.

    Args:
        master, exp_avg, exp_avg_sq: fp32 [n], contiguous.
        gradient: [n] in bf16, fp16 or fp32, contiguous.
        weights: [n] in the training precision, or None.
        ema: fp32 [n], or None.
        learning_rate, ema_weight: fp32 [1] on the device.
        factor: fp32 [1], multiplies the gradient (clipping); 0 leaves everything as it is (a gradient that is not finite).
        step: fp32 [1], the number of this step, counted from 1.
    """
    update_rate, root_correction = _corrected(learning_rate, step, beta_1, beta_2)
    # Selecting instead of branching: the host does not know the factor.
    taken = factor > 0
    scaled = gradient.float() * factor
    first = exp_avg + (1 - beta_1) * (scaled - exp_avg)
    second = beta_2 * exp_avg_sq + (1 - beta_2) * scaled * scaled
    moved = master - learning_rate * weight_decay * master
    moved = moved - update_rate * first / (second.sqrt() * root_correction + epsilon)
    exp_avg.copy_(torch.where(taken, first, exp_avg))
    exp_avg_sq.copy_(torch.where(taken, second, exp_avg_sq))
    if ema is not None:
        ema.copy_(torch.where(taken, ema + ema_weight * (moved - ema), ema))
    master.copy_(torch.where(taken, moved, master))
    if weights is not None:
        weights.copy_(torch.where(taken, master.to(weights.dtype), weights))


adamw_ema_ = torch.library.custom_op(
    "engine::adamw_ema_", reference_adamw_ema_, mutates_args=("master", "exp_avg", "exp_avg_sq", "weights", "ema")
)
adamw_ema_.register_kernel("cuda")(on_its_device(launch_adamw_ema_))
adamw_ema_.register_kernel("cpu")(cpu.or_else(reference_adamw_ema_)(cpu.run_adamw_ema_))


@adamw_ema_.register_fake
def _(*arguments, **named):
    return None
