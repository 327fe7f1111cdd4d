"""engine::diffusion_loss: the weighted error of a prediction and its gradient, in one pass over the prediction.

loss[b] = weight[b] * mean over elements of m h(prediction - target), target = c_x x0 + c_e (e + offset n). The noise e and the
posterior draw in x0 are drawn again from the counter-based generator, so that neither they nor the target were ever stored.
h(d) is d^2 or, where the coefficients have a sixth row c, the pseudo-Huber loss of arXiv:2403.16728: 2 c (sqrt(d^2 + c^2) - c),
which is d^2 for small d and 2 c |d| for large ones. The weight m of a position is given by a mask, or one.

Per element of a bf16 prediction: 2 bytes read and 2 written; mean and std (4 bytes) and the posterior's draw are skipped for
samples with c_x = 0, that is for epsilon prediction. Huber adds no byte, and 18 instructions to 140 (predicted 12: a root and
a division); a mask 1 byte per position, read by every program of its channels, and 5 instructions (predicted 4). Both are
chosen when the kernel is compiled. On a CPU all of it vectorises (`python -m benchmarks.operations.kernels`).

Each program writes one partial sum, and a second small kernel adds them in a fixed order, so that the loss is reproducible bit
for bit; atomics would not be.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.add_noise import (
    clean_sample,
    coefficient,
    per_sample,
    reference_clean,
    reference_noise,
    sample_tile,
    unit_noise,
)
from engine.kernels.launch import on_its_device
from engine.kernels.layout import positions_of, stored_like, strides, tile, walkable

# What one level of a mask weighs. As a factor and not as a division by 255, which not all of the three would round alike; 255
# of them are exactly one.
MASK_UNIT = tl.constexpr(1 / 255)
# Of an error above it, whose square may overflow, sqrt(error^2 + c^2) is the error.
LARGE = tl.constexpr(1e18)


@triton.jit
def diffusion_loss_kernel(
    gradient_pointer, partial_pointer, prediction_pointer, mean_pointer, std_pointer,
    coefficients_pointer, seed_pointer, slot_pointer, scale_pointer, mask_pointer,
    offset, channels, positions, channel_positions,
    prediction_batch_stride, prediction_channel_stride, prediction_position_stride,
    mean_batch_stride, mean_channel_stride, mean_position_stride,
    HAS_STD: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_MASK: tl.constexpr, HUBER: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    seed = tl.load(seed_pointer)
    slot = tl.load(slot_pointer + sample)
    c_x = coefficient(coefficients_pointer, 2, sample)
    c_e = coefficient(coefficients_pointer, 3, sample)
    row, position, group, element, exists = sample_tile(ROWS, GROUPS, channels, positions)

    target = c_e * unit_noise(seed, group, element, row, slot, channel_positions, offset, HAS_OFFSET, FLAT)
    if c_x != 0.0:
        offsets = sample * mean_batch_stride + row * mean_channel_stride + position * mean_position_stride
        target += c_x * clean_sample(mean_pointer, std_pointer, offsets, exists, seed, group, slot, HAS_STD)

    offsets = sample * prediction_batch_stride + row * prediction_channel_stride + position * prediction_position_stride
    prediction = tl.load(prediction_pointer + offsets, mask=exists, other=0.0).to(tl.float32)
    error = tl.where(exists, prediction - target, 0.0)
    factor = coefficient(coefficients_pointer, 4, sample) / (channels * positions)
    # The loss of an element is its slope, which becomes the gradient, times another factor: both are the error at first.
    slope = error
    if HAS_MASK:
        masked = sample * channel_positions + (position % channel_positions if FLAT else position)
        slope *= tl.load(mask_pointer + masked, mask=position < positions, other=0).to(tl.float32) * MASK_UNIT
    if HUBER:
        c = coefficient(coefficients_pointer, 5, sample)
        large = tl.abs(error) > LARGE
        root = tl.rsqrt(tl.where(large, tl.abs(error), error * error + c * c))
        share = c * tl.where(large, root * root, root)  # of the squared error's slope, which is left
        slope *= share
        error *= 2.0 / (1.0 + share)
    tl.store(gradient_pointer + offsets, 2.0 * factor * tl.load(scale_pointer) * slope, mask=exists)

    programs = tl.num_programs(0) * tl.num_programs(1)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_pointer + sample * programs + program, factor * tl.sum(slope * error))


def launch_diffusion_loss(
    prediction: Tensor,
    mean: Tensor,
    std: Tensor | None,
    coefficients: Tensor,
    seed: Tensor,
    slots: Tensor,
    offset: float,
    gradient_scale: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel; arguments as `diffusion_loss`."""
    prediction = walkable(prediction)
    mean = walkable(mean)
    std = None if std is None else stored_like(std, mean)
    gradient = torch.empty_like(prediction)
    gradient[:, mean.shape[1] :].zero_()
    tiling = tile(prediction, mean.shape[1])
    grid = tiling.grid(prediction.shape[0])
    partial = torch.empty(prediction.shape[0], grid[0] * grid[1], dtype=torch.float32, device=prediction.device)
    diffusion_loss_kernel[grid](
        gradient, partial, prediction, mean, mean if std is None else std,
        coefficients.contiguous(), seed, slots, gradient_scale, seed if mask is None else mask.contiguous(),
        offset, tiling.channels, tiling.positions, positions_of(mean),
        *strides(prediction, tiling), *strides(mean, tiling),
        HAS_STD=std is not None, HAS_OFFSET=offset != 0, HAS_MASK=mask is not None, HUBER=len(coefficients) == 6,
        FLAT=tiling.positions != positions_of(prediction), ROWS=tiling.rows, GROUPS=tiling.groups,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    return partial.sum(dim=1), gradient


def reference_diffusion_loss(
    prediction: Tensor,
    mean: Tensor,
    std: Tensor | None,
    coefficients: Tensor,
    seed: Tensor,
    slots: Tensor,
    offset: float,
    gradient_scale: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted mean error of each sample, and its gradient.

    Args:
        prediction: [B, C', ...] in bf16, fp16 or fp32, contiguous or channels-last, C' >= C; channels past the target's
            (learned variance) get zero gradient.
        mean, std, seed, slots, offset: as given to `add_noise`.
        coefficients: fp32 [5, B] as given to `add_noise`, of which c_x, c_e and weight are read: the error is squared. Or
            [6, B] with Huber's constant c last, from 1e-6 to 1e6.
        gradient_scale: fp32 [1], a factor that the gradient carries, to fold in the mean over the batch and to keep fp16
            gradients in range.
        mask: uint8 [B, 1, ...] of the size of the target, the weight of a position in all channels times 255. The mean is over
            all elements, whatever they weigh.

    Returns:
        loss fp32 [B], and gradient_scale * d loss[b] / d prediction in the shape, dtype and memory format of `prediction`.
    """
    channels = mean.shape[1]
    clean = reference_clean(mean, std, seed, slots)
    noise = reference_noise(seed, slots, mean.shape[1:], offset)
    c_x, c_e, weight = coefficients[2:5]
    target = per_sample(c_x, mean) * clean + per_sample(c_e, mean) * noise
    error = prediction[:, :channels].float() - target
    factor = weight / mean.shape[1:].numel()
    slope = error if mask is None else error * (mask.float() * MASK_UNIT.value)
    if len(coefficients) == 6:
        c = per_sample(coefficients[5], mean)
        size = error.abs()
        share = c / torch.where(size > LARGE.value, size, (error.square() + c.square()).sqrt())
        slope, error = slope * share, error * (2 / (1 + share))
    gradient = torch.zeros_like(prediction)
    gradient[:, :channels] = per_sample(2 * factor * gradient_scale, mean) * slope
    return (slope * error).flatten(1).sum(1) * factor, gradient


diffusion_loss = torch.library.custom_op("engine::diffusion_loss", reference_diffusion_loss, mutates_args=())
diffusion_loss.register_kernel("cuda")(on_its_device(launch_diffusion_loss))
diffusion_loss.register_kernel("cpu")(cpu.or_else(reference_diffusion_loss)(cpu.run_diffusion_loss))


@diffusion_loss.register_fake
def _(prediction, *others):
    return prediction.new_empty(len(prediction), dtype=torch.float32), torch.empty_like(prediction)
