"""The fused operations on the CPU, in C++ (`cpp_ext/operations.cpp`); what they compute is said where they are registered.

The library is plain C, built on first use for the processor at hand. Its threads are torch's own: it is handed the entry point
of at::parallel_for that torch's stable C interface exports.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpp_ext
from engine.kernels.layout import positions_of, stored_like, strides, tile, walkable

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FLAGS = ("-march=native", "-fno-math-errno", "-fno-trapping-math")
_UNFUSED = ("-ffp-contract=off",)  # for what gives the same bits on every device

_Pointer = ctypes.c_void_p
_Strides = ctypes.c_int64 * 3


class _Walk(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "rows", "positions", "channel_positions")),
        ("strides", _Strides), ("mean_strides", _Strides),
        *((name, _Pointer) for name in ("coefficients", "seed", "slots", "mean", "std")), ("offset", ctypes.c_float),
    ]  # fmt: skip


class _AddNoise(ctypes.Structure):
    _fields_ = [("walk", _Walk), ("noisy", _Pointer), ("perturbation", ctypes.c_float)]


class _DiffusionLoss(ctypes.Structure):
    _fields_ = [
        ("walk", _Walk),
        *((name, _Pointer) for name in ("gradient", "prediction", "scale")),
        ("target_elements", ctypes.c_int64), ("loss", _Pointer), ("partial", _Pointer),
        ("mask", _Pointer), ("huber", ctypes.c_bool),
    ]  # fmt: skip


class _AdamWEma(ctypes.Structure):
    _fields_ = [
        *((name, _Pointer) for name in ("master", "exp_avg", "exp_avg_sq", "gradient", "weights", "ema")),
        *((name, _Pointer) for name in ("learning_rate", "factor", "step", "ema_weight")),
        *((name, ctypes.c_double) for name in ("beta_1", "beta_2", "epsilon", "weight_decay")),
        ("rounding", _Pointer), ("elements", ctypes.c_int64), ("lion", ctypes.c_bool),
    ]  # fmt: skip


@functools.cache
def library(flags: tuple[str, ...] = ()) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """The C++ operations and torch's parallel loop; None where either is missing.

    Args:
        flags: beside the usual ones.
    """
    operations = cpp_ext.load("operations", (*_FLAGS, *flags))
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if operations is None or not torch_library.exists():
        return None
    parallel_for = getattr(ctypes.CDLL(str(torch_library)), "torch_parallel_for", None)
    return None if parallel_for is None else (operations, ctypes.cast(parallel_for, _Pointer))


def or_else(reference: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes an operation fall back on its torch reference where the C++ library, or a dtype in it, is missing."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            floating = (value for value in arguments if isinstance(value, Tensor) and value.is_floating_point())
            if library() is None or any(tensor.dtype not in TYPES for tensor in floating):
                return reference(*arguments)
            return function(*arguments)

        return run

    return decorate


def run_add_noise(
    mean: Tensor, std: Tensor | None, coefficients: Tensor, seed: Tensor, slots: Tensor, offset: float, perturbation: float
) -> Tensor:
    mean = walkable(mean)
    std = None if std is None else stored_like(std.to(mean.dtype), mean)
    noisy = torch.empty_like(mean)
    coefficients, slots = coefficients.contiguous(), slots.contiguous()
    walk = _walk(noisy, mean, std, coefficients, seed, slots, offset)
    task = _AddNoise(walk, noisy.data_ptr(), perturbation)
    _call("add_noise", task, TYPES[mean.dtype])
    return noisy


def run_diffusion_loss(
    prediction: Tensor, mean: Tensor, std: Tensor | None, coefficients: Tensor, seed: Tensor, slots: Tensor, offset: float,
    gradient_scale: Tensor, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    prediction, mean = walkable(prediction), walkable(mean)
    std = None if std is None else stored_like(std.to(mean.dtype), mean)
    gradient = torch.empty_like(prediction)
    loss = torch.empty(prediction.shape[0], dtype=torch.float32)
    coefficients, slots = coefficients.contiguous(), slots.contiguous()
    mask = None if mask is None else mask.contiguous()
    walk = _walk(gradient, mean, std, coefficients, seed, slots, offset)
    task = _DiffusionLoss(
        walk, gradient.data_ptr(), prediction.data_ptr(), gradient_scale.data_ptr(), mean.shape[1:].numel(), loss.data_ptr(),
        None, None if mask is None else mask.data_ptr(), len(coefficients) == 6,
    )  # fmt: skip
    _call("diffusion_loss", task, TYPES[prediction.dtype], TYPES[mean.dtype])
    return loss, gradient


def run_adamw_ema_(*arguments: Any, lion: bool = False) -> None:
    """The structure begins with the arguments of the operation, in their order."""
    tensors, options, rounding = arguments[:10], arguments[10:14], arguments[14] if len(arguments) > 14 else None
    master, _, _, gradient, weights = tensors[:5]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (*tensors, rounding)]
    task = _AdamWEma(*pointers[:-1], *options, pointers[-1], master.numel(), lion)
    kinds = TYPES[gradient.dtype], TYPES[(master if weights is None else weights).dtype]
    _call("adamw_ema", task, *kinds, flags=() if rounding is None else _UNFUSED)


def run_lion_ema_(*arguments: Any) -> None:
    """As AdamW, without a second moment and an epsilon."""
    master, exp_avg, *others, beta_1, beta_2, weight_decay = arguments[:12]
    run_adamw_ema_(master, exp_avg, None, *others, beta_1, beta_2, 0.0, weight_decay, *arguments[12:], lion=True)


def _walk(
    written: Tensor, mean: Tensor, std: Tensor | None, coefficients: Tensor, seed: Tensor, slots: Tensor, offset: float
) -> _Walk:
    tiling = tile(written, written.shape[1])
    return _Walk(
        written.shape[0], tiling.channels, tiling.positions, positions_of(written), _Strides(*strides(written, tiling)),
        _Strides(*strides(mean, tiling)), coefficients.data_ptr(), seed.data_ptr(), slots.data_ptr(), mean.data_ptr(),
        None if std is None else std.data_ptr(), offset,
    )  # fmt: skip


def _call(name: str, task: ctypes.Structure, *types: int, flags: tuple[str, ...] = ()) -> None:
    loaded = library(flags) if flags else library()
    assert loaded is not None
    operations, parallel_for = loaded
    failed = getattr(operations, name)(ctypes.byref(task), *(ctypes.c_int32(kind) for kind in types), parallel_for)
    if failed:
        raise RuntimeError(f"engine::{name}: torch's parallel loop failed with {failed}")
