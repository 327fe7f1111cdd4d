"""engine::adamw_ema_: AdamW, the moving average and the cast to the training precision in one pass over flat memory.

AdamW as in "Decoupled weight decay regularization" (arXiv:1711.05101), in torch's order: decay, moments, update. What changes
from step to step (learning rate, clip factor, step number, weight of the average) is read from device memory, so that a
captured graph can be replayed.

Per element, with bf16 gradients and weights: master, two moments and average read and written in fp32 (32 bytes), the gradient
read (2) and the weight written (2): 36 bytes and some 20 operations, so that memory sets the time. Separate passes (clip,
AdamW, average, cast) move 62 bytes. Whole vectors move in 128-bit pieces; the first program takes the last `elements % VECTOR`
one by one, because a partition of ZeRO 1 or 2 has any even number of elements.

Weights without fp32 masters are bf16, as their moments are, and are rounded stochastically (`rounding.py`): 14 bytes per
element, 22 with the average, and a quarter of a Philox call, some 25 integer operations. That the same bits come of it on every
device, products and sums are not fused there, and quotient and root are rounded as IEEE 754 has it.

Lion (arXiv:2302.06675) goes the same way with one moment: 28 bytes with masters and average, 10 with neither.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.launch import on_its_device
from engine.kernels.rounding import (
    TILE,
    of_moment,
    of_weight,
    reference_of_moment,
    reference_round,
    reference_words,
    round_to_bf16,
    rounding_words,
)

BLOCK = 1024
VECTOR = 8  # elements in 16 bytes of bf16


@triton.jit
def _step(
    pointers, scalars, options, element, exists, word, LION: tl.constexpr, ROUNDS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_EMA: tl.constexpr,
):  # fmt: skip
    """The step of those of these elements that exist.

    Args:
        word: with `ROUNDS`, of each element.
    """
    master_pointer, exp_avg_pointer, exp_avg_sq_pointer, gradient_pointer, weights_pointer, ema_pointer = pointers
    factor, rate, update_rate, root_correction, ema_weight = scalars
    beta_1, rest_1, beta_2, rest_2, epsilon, weight_decay = options
    gradient = tl.load(gradient_pointer + element, mask=exists, other=0.0).to(tl.float32) * factor
    master = tl.load(master_pointer + element, mask=exists, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_pointer + element, mask=exists, other=0.0).to(tl.float32)

    if LION:
        update = beta_1 * exp_avg + rest_1 * gradient
        exp_avg = beta_2 * exp_avg + rest_2 * gradient
        master -= rate * weight_decay * master
        master -= rate * ((update > 0).to(tl.float32) - (update < 0).to(tl.float32))
    else:
        exp_avg_sq = tl.load(exp_avg_sq_pointer + element, mask=exists, other=0.0).to(tl.float32)
        exp_avg += rest_1 * (gradient - exp_avg)
        exp_avg_sq = beta_2 * exp_avg_sq + rest_2 * gradient * gradient
        master -= rate * weight_decay * master
        if ROUNDS:
            master -= tl.div_rn(update_rate * exp_avg, tl.sqrt_rn(exp_avg_sq) * root_correction + epsilon)
            exp_avg_sq = round_to_bf16(exp_avg_sq, of_moment(word, 1))
        else:
            master -= update_rate * exp_avg / (tl.sqrt(exp_avg_sq) * root_correction + epsilon)
        tl.store(exp_avg_sq_pointer + element, exp_avg_sq, mask=exists)
    if ROUNDS:
        exp_avg = round_to_bf16(exp_avg, of_moment(word, 0))
        master = round_to_bf16(master, of_weight(word))

    tl.store(exp_avg_pointer + element, exp_avg, mask=exists)
    tl.store(master_pointer + element, master, mask=exists)
    if HAS_WEIGHTS:
        tl.store(weights_pointer + element, master, mask=exists)
    if HAS_EMA:
        ema = tl.load(ema_pointer + element, mask=exists, other=0.0)
        tl.store(ema_pointer + element, ema + ema_weight * (master - ema), mask=exists)


@triton.jit(do_not_specialize=["elements"])
def adamw_ema_kernel(
    master_pointer, exp_avg_pointer, exp_avg_sq_pointer, gradient_pointer, weights_pointer, ema_pointer, scalars_pointer,
    rounding_pointer, elements, beta_1, rest_1, beta_2, rest_2, epsilon, weight_decay,
    LION: tl.constexpr, ROUNDS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_EMA: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    factor = tl.load(scalars_pointer)
    if factor > 0:
        pointers = (master_pointer, exp_avg_pointer, exp_avg_sq_pointer, gradient_pointer, weights_pointer, ema_pointer)
        scalars = (
            factor, tl.load(scalars_pointer + 1), tl.load(scalars_pointer + 2), tl.load(scalars_pointer + 3),
            tl.load(scalars_pointer + 4),
        )  # fmt: skip
        options = (beta_1, rest_1, beta_2, rest_2, epsilon, weight_decay)
        # A mask that holds for whole vectors or for none keeps accesses 128 bits wide whatever the number of elements.
        whole = elements // VECTOR * VECTOR
        lane, tail = tl.arange(0, BLOCK), tl.arange(0, VECTOR)
        program = tl.program_id(0).to(tl.int64)
        last = whole + tail
        if ROUNDS:
            step = tl.load(scalars_pointer + 5)
            words = rounding_words(rounding_pointer, step, program * BLOCK + lane)
            for quarter in tl.static_range(4):
                element = (4 * program + quarter) * BLOCK + lane
                _step(pointers, scalars, options, element, element < whole, words[quarter], LION, ROUNDS, HAS_WEIGHTS, HAS_EMA)
            if (program == 0) & (whole < elements):
                held = whole // BLOCK % 4
                ends = rounding_words(rounding_pointer, step, whole // (4 * BLOCK) * BLOCK + whole % BLOCK + tail)
                word = tl.where(held < 2, tl.where(held == 0, ends[0], ends[1]), tl.where(held == 2, ends[2], ends[3]))
                _step(pointers, scalars, options, last, last < elements, word, LION, ROUNDS, HAS_WEIGHTS, HAS_EMA)
        else:
            element = program * BLOCK + lane
            _step(pointers, scalars, options, element, element < whole, element, LION, ROUNDS, HAS_WEIGHTS, HAS_EMA)
            if (program == 0) & (whole < elements):
                _step(pointers, scalars, options, last, last < elements, last, LION, ROUNDS, HAS_WEIGHTS, HAS_EMA)


def _corrected(learning_rate: Tensor, step: Tensor, beta_1: float, beta_2: float) -> tuple[Tensor, Tensor]:
    """rate / (1 - beta_1^t) and 1 / sqrt(1 - beta_2^t), fp32 [1] each.

    By way of double precision: after the first step 1 - 0.999 would keep four digits in fp32.
    """
    exact = step.double()
    return (learning_rate / (1 - beta_1**exact)).float(), (1 - beta_2**exact).rsqrt().float()


def _launch(
    tensors: tuple[Tensor | None, ...], scalars: tuple[Tensor, ...], options: tuple[float, ...], rounding: Tensor | None,
    lion: bool,
) -> None:  # fmt: skip
    master, *_, weights, ema = tensors
    assert master is not None
    elements = master.numel()
    given = (master if tensor is None else tensor for tensor in tensors)
    unfused = {} if rounding is None else {"enable_fp_fusion": False}
    adamw_ema_kernel[(-(-elements // (BLOCK if rounding is None else TILE)),)](
        *given, torch.cat(scalars), scalars[0] if rounding is None else rounding, elements, *options,
        LION=lion, ROUNDS=rounding is not None, HAS_WEIGHTS=weights is not None, HAS_EMA=ema is not None, BLOCK=BLOCK,
        VECTOR=VECTOR, **unfused,
    )  # fmt: skip


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
    rounding: Tensor | None = None,
) -> None:
    """Runs the Triton kernel; arguments as `adamw_ema_`."""
    scalars = (factor, learning_rate, *_corrected(learning_rate, step, beta_1, beta_2), ema_weight, step)
    options = (beta_1, 1 - beta_1, beta_2, 1 - beta_2, epsilon, weight_decay)
    _launch((master, exp_avg, exp_avg_sq, gradient, weights, ema), scalars, options, rounding, lion=False)


def launch_lion_ema_(
    master: Tensor,
    exp_avg: Tensor,
    gradient: Tensor,
    weights: Tensor | None,
    ema: Tensor | None,
    learning_rate: Tensor,
    factor: Tensor,
    step: Tensor,
    ema_weight: Tensor,
    beta_1: float,
    beta_2: float,
    weight_decay: float,
    rounding: Tensor | None = None,
) -> None:
    """Runs the Triton kernel; arguments as `lion_ema_`."""
    scalars = (factor, learning_rate, learning_rate, factor, ema_weight, step)
    options = (beta_1, 1 - beta_1, beta_2, 1 - beta_2, 0.0, weight_decay)
    _launch((master, exp_avg, None, gradient, weights, ema), scalars, options, rounding, lion=True)


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
    rounding: Tensor | None = None,
) -> None:
    """One step of AdamW on `factor` * gradient, then ema += ema_weight * (master - ema) and weights = master, in place.

    Args:
        master, exp_avg, exp_avg_sq: fp32 [n], contiguous; with `rounding` bf16.
        gradient: [n] in bf16, fp16 or fp32, contiguous.
        weights: [n] in the training precision, or None.
        ema: fp32 [n], or None.
        learning_rate, ema_weight: fp32 [1] on the device.
        factor: fp32 [1], multiplies the gradient (clipping); 0 leaves everything as it is (a gradient that is not finite).
        step: fp32 [1], the number of this step, counted from 1.
        rounding: int64 [2], the run's seed and the number of these weights, by which they are rounded stochastically.
    """
    update_rate, root_correction = _corrected(learning_rate, step, beta_1, beta_2)
    scaled = gradient.float() * factor
    before = master.float()
    first = exp_avg.float() + (1 - beta_1) * (scaled - exp_avg.float())
    second = beta_2 * exp_avg_sq.float() + (1 - beta_2) * scaled * scaled
    moved = before - learning_rate * weight_decay * before
    moved = moved - update_rate * first / (second.sqrt() * root_correction + epsilon)
    _store(factor, step, (moved, master), [(first, exp_avg), (second, exp_avg_sq)], weights, ema, ema_weight, rounding)


def reference_lion_ema_(
    master: Tensor,
    exp_avg: Tensor,
    gradient: Tensor,
    weights: Tensor | None,
    ema: Tensor | None,
    learning_rate: Tensor,
    factor: Tensor,
    step: Tensor,
    ema_weight: Tensor,
    beta_1: float,
    beta_2: float,
    weight_decay: float,
    rounding: Tensor | None = None,
) -> None:
    """One step of Lion on `factor` * gradient, in place; arguments as `adamw_ema_`, `exp_avg` being the momentum."""
    scaled = gradient.float() * factor
    before, momentum = master.float(), exp_avg.float()
    update = beta_1 * momentum + (1 - beta_1) * scaled
    kept = beta_2 * momentum + (1 - beta_2) * scaled
    moved = before - learning_rate * weight_decay * before
    moved = moved - learning_rate * update.sign()
    _store(factor, step, (moved, master), [(kept, exp_avg)], weights, ema, ema_weight, rounding)


def _store(
    factor: Tensor, step: Tensor, moved: tuple[Tensor, Tensor], moments: list[tuple[Tensor, Tensor]], weights: Tensor | None,
    ema: Tensor | None, ema_weight: Tensor, rounding: Tensor | None,
) -> None:  # fmt: skip
    """Puts new fp32 values where the old ones are, of a step that is taken."""
    taken = factor > 0  # selecting instead of branching: the host does not know the factor
    value, master = moved
    if rounding is not None:
        words = reference_words(rounding, step, master.numel())
        value = reference_round(value, words & 0xFFFF)
        moments = [(reference_round(new, reference_of_moment(words, n)), old) for n, (new, old) in enumerate(moments)]
    for new, old in moments:
        old.copy_(torch.where(taken, new, old.float()))
    if ema is not None:
        ema.copy_(torch.where(taken, ema + ema_weight * (value - ema), ema))
    master.copy_(torch.where(taken, value, master.float()))
    if weights is not None:
        weights.copy_(torch.where(taken, master.to(weights.dtype), weights))


adamw_ema_ = torch.library.custom_op(
    "engine::adamw_ema_", reference_adamw_ema_, mutates_args=("master", "exp_avg", "exp_avg_sq", "weights", "ema")
)
adamw_ema_.register_kernel("cuda")(on_its_device(launch_adamw_ema_))
adamw_ema_.register_kernel("cpu")(cpu.or_else(reference_adamw_ema_)(cpu.run_adamw_ema_))

lion_ema_ = torch.library.custom_op(
    "engine::lion_ema_", reference_lion_ema_, mutates_args=("master", "exp_avg", "weights", "ema")
)
lion_ema_.register_kernel("cuda")(on_its_device(launch_lion_ema_))
lion_ema_.register_kernel("cpu")(cpu.or_else(reference_lion_ema_)(cpu.run_lion_ema_))


@lion_ema_.register_fake
@adamw_ema_.register_fake
def _(*arguments, **named):
    return None
