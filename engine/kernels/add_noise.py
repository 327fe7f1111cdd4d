"""engine::add_noise: the noisy input of a training step, x_t = alpha x0 + sigma (e + offset n + perturbation e'').

x0 = mean + std e' is one draw of the VAE posterior, or just mean. All noise is drawn in registers from the counter-based
generator (`engine/philox.py`): e and e' and e'' per element, n per channel. Nothing but x_t is written.

Per element of a bf16 latent: 4 bytes read (mean, std), 2 written, and two Philox draws, whose 4-word calls serve four
elements each; on current GPUs the arithmetic of the draws, not memory, sets the time, and the launch exceeds both for one
micro-batch of latents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine import philox
from engine.kernels import cpu
from engine.kernels.launch import on_its_device
from engine.kernels.layout import positions_of, stored_like, strides, tile, walkable
from engine.kernels.philox import INPUT_PERTURBATION, NOISE, NOISE_OFFSET, POSTERIOR, normal_of_element, normals4


@triton.jit
def sample_tile(ROWS: tl.constexpr, GROUPS: tl.constexpr, channels, positions):
    """The logical coordinates of this program's tile.

    Returns row [ROWS, 1], position [1, 4 * GROUPS], group of four elements [ROWS, GROUPS], element [ROWS, 4 * GROUPS] and
    whether each element exists.
    """
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    position = (tl.program_id(0) * 4 * GROUPS + tl.arange(0, 4 * GROUPS))[None, :]
    group_position = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[None, :]
    group = row * (positions // 4) + group_position
    element = row * positions + position
    return row, position, group, element, (row < channels) & (position < positions)


@triton.jit
def coefficient(coefficients_pointer, ROW: tl.constexpr, sample):
    """One of the coefficients [5 or 6, B]; the grid's last dimension is B."""
    return tl.load(coefficients_pointer + ROW * tl.num_programs(2) + sample)


@triton.jit
def clean_sample(mean_pointer, std_pointer, offsets, exists, seed, group, slot, HAS_STD: tl.constexpr):
    """x0 of a tile in fp32: the posterior's mean, or one draw from it."""
    clean = tl.load(mean_pointer + offsets, mask=exists, other=0.0).to(tl.float32)
    if HAS_STD:
        std = tl.load(std_pointer + offsets, mask=exists, other=0.0).to(tl.float32)
        clean += std * normals4(seed, group, slot, POSTERIOR)
    return clean


@triton.jit
def unit_noise(seed, group, element, row, slot, channel_positions, offset, HAS_OFFSET: tl.constexpr, FLAT: tl.constexpr):
    """The noise e + offset n of a tile in fp32; n is shared by a channel."""
    noise = normals4(seed, group, slot, NOISE)
    if HAS_OFFSET:
        channel = element // channel_positions if FLAT else row
        noise += offset * normal_of_element(seed, channel, slot, NOISE_OFFSET)
    return noise


@triton.jit
def add_noise_kernel(
    noisy_pointer, mean_pointer, std_pointer, coefficients_pointer, seed_pointer, slot_pointer,
    offset, perturbation, channels, positions, channel_positions,
    noisy_batch_stride, noisy_channel_stride, noisy_position_stride,
    mean_batch_stride, mean_channel_stride, mean_position_stride,
    HAS_STD: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_PERTURBATION: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    seed = tl.load(seed_pointer)
    slot = tl.load(slot_pointer + sample)
    alpha = coefficient(coefficients_pointer, 0, sample)
    sigma = coefficient(coefficients_pointer, 1, sample)
    row, position, group, element, exists = sample_tile(ROWS, GROUPS, channels, positions)

    mean_offsets = sample * mean_batch_stride + row * mean_channel_stride + position * mean_position_stride
    clean = clean_sample(mean_pointer, std_pointer, mean_offsets, exists, seed, group, slot, HAS_STD)
    noise = unit_noise(seed, group, element, row, slot, channel_positions, offset, HAS_OFFSET, FLAT)
    if HAS_PERTURBATION:
        noise += perturbation * normals4(seed, group, slot, INPUT_PERTURBATION)

    noisy_offsets = sample * noisy_batch_stride + row * noisy_channel_stride + position * noisy_position_stride
    tl.store(noisy_pointer + noisy_offsets, alpha * clean + sigma * noise, mask=exists)


def launch_add_noise(
    mean: Tensor, std: Tensor | None, coefficients: Tensor, seed: Tensor, slots: Tensor, offset: float, perturbation: float
) -> Tensor:
    """Runs the Triton kernel; arguments as `add_noise`."""
    mean = walkable(mean)
    std = None if std is None else stored_like(std, mean)
    noisy = torch.empty_like(mean)
    tiling = tile(mean, mean.shape[1])
    add_noise_kernel[tiling.grid(mean.shape[0])](
        noisy, mean, mean if std is None else std, coefficients.contiguous(), seed, slots,
        offset, perturbation, tiling.channels, tiling.positions, positions_of(mean),
        *strides(noisy, tiling), *strides(mean, tiling),
        HAS_STD=std is not None, HAS_OFFSET=offset != 0, HAS_PERTURBATION=perturbation != 0,
        FLAT=tiling.positions != positions_of(mean), ROWS=tiling.rows, GROUPS=tiling.groups,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    return noisy


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...] with the dimensions of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def reference_clean(mean: Tensor, std: Tensor | None, seed: Tensor, slots: Tensor) -> Tensor:
    """x0 in fp32: the posterior's mean, or one draw from it."""
    if std is None:
        return mean.float()
    return mean.float() + std.float() * philox.normals(seed, slots, philox.POSTERIOR, mean.shape[1:])


def reference_noise(seed: Tensor, slots: Tensor, shape: torch.Size, offset: float) -> Tensor:
    """e + offset n in fp32 for samples of `shape` (C, ...)."""
    noise = philox.normals(seed, slots, philox.NOISE, shape)
    if offset:
        shared = philox.normals(seed, slots, philox.NOISE_OFFSET, (shape[0], *[1] * (len(shape) - 1)))
        noise = noise + offset * shared
    return noise


def reference_add_noise(
    mean: Tensor, std: Tensor | None, coefficients: Tensor, seed: Tensor, slots: Tensor, offset: float, perturbation: float
) -> Tensor:
    """The noisy samples alpha x0 + sigma (e + offset n + perturbation e''), with x0 = mean + std e', or mean without std.

    Args:
        mean, std: [B, C, ...] in bf16, fp16 or fp32, contiguous or channels-last.
        coefficients: fp32 [5 or 6, B], the rows alpha, sigma, c_x, c_e and weight of `engine.diffusion`, and Huber's constant;
            the first two are read.
        seed: int64 [1]; slots: int64 [B]. Every draw is a pure function of these.
        offset, perturbation: scales of the channel-wide and of the input-only noise.

    Returns:
        x_t, in the shape, dtype and memory format of `mean`.
    """
    clean = reference_clean(mean, std, seed, slots)
    noise = reference_noise(seed, slots, mean.shape[1:], offset)
    if perturbation:
        noise = noise + perturbation * philox.normals(seed, slots, philox.INPUT_PERTURBATION, mean.shape[1:])
    alpha, sigma = (per_sample(row, mean) for row in coefficients[:2])
    return torch.empty_like(mean).copy_(alpha * clean + sigma * noise)


add_noise = torch.library.custom_op("engine::add_noise", reference_add_noise, mutates_args=())
add_noise.register_kernel("cuda")(on_its_device(launch_add_noise))
add_noise.register_kernel("cpu")(cpu.or_else(reference_add_noise)(cpu.run_add_noise))
add_noise.register_fake(lambda mean, *others: torch.empty_like(mean))
