"""Capture the step, or overlap its reductions with its backward pass? With several processes it is one or the other.

The reductions of a captured step follow its backward pass. Launched kernel by kernel, DeepSpeed reduces one bucket while the
backward pass fills the next; but then the GPU may wait for the host. docs/scaling.md derives the estimate that decides.
"""

import statistics
import time

import torch
import torch.distributed as dist
from torch import nn

from engine.config.options import TrainConfig
from engine.loop.flops import Flops
from engine.loop.weights.zero_options import OVERLAPPED_BUCKET, machinery_stage, reduction_precision
from engine.messages import say
from engine.processes import Processes

UTILISATION = 0.45  # of a matrix product's speed, over a whole step: assumed
KERNELS_PER_TENSOR = 8  # of an uncompiled step per parameter: 3 x 2.4 (SD) to 3 x 3.3 (Wuerstchen), counted on the meta device
LAUNCH_SECONDS = 6e-6  # of the host for each: assumed
# DeepSpeed's Python per parameter, in its hooks and again after the pass, which it ends by synchronizing the device: assumed
# from 37 and 35 microseconds on a core of an AMD EPYC, copies included.
HOOK_SECONDS = 30e-6
EPILOGUE_SECONDS = 30e-6


def hidden_seconds(reduction: float, operations: float, buckets: int) -> float:
    """The part of a reduction that runs behind the backward pass, two thirds of the operations: all but the last bucket."""
    return min(reduction * (1 - 1 / buckets), operations * 2 / 3)


def host_seconds(tensors: int) -> float:
    """What launching a micro-batch kernel by kernel takes the host, for a model of so many parameter tensors."""
    return tensors * (KERNELS_PER_TENSOR * LAUNCH_SECONDS + HOOK_SECONDS)


def overlap_gain(
    operations: float, reduction: float, tensors: int, buckets: int, micro_batches: int = 1, reductions: int = 1
) -> float:
    """Seconds by which a step that overlaps is faster than a captured one; negative where it is slower.

    Args:
        operations: seconds of a micro-batch's operations on the device.
        reduction: seconds of one reduction of all gradients.
        tensors: number of trained parameter tensors.
        buckets: how many buckets a reduction has.
        micro_batches, reductions: of a step; stage 2 reduces every micro-batch, stage 1 the last one's sum.
    """
    waiting = max(0.0, host_seconds(tensors) - operations)
    per_reduction = hidden_seconds(reduction, operations, buckets) - tensors * EPILOGUE_SECONDS
    return reductions * per_reduction - micro_batches * waiting


def overlap_pays(config: TrainConfig, model: nn.Module, flops: Flops | None, processes: Processes) -> bool:
    """The choice of `--cuda_graphs auto` where capturing is possible; the first process decides for all, and says so."""
    # Nothing can overlap a backward pass that hands over all gradients at its end: a compiled one, or one that they are taken
    # from to be looked at.
    at_its_end = config.compile or config.gradient_noise_scale
    if config.cuda_graphs != "auto" or at_its_end or processes.world == 1 or flops is None:
        return False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    elements = sum(parameter.numel() for parameter in trained)
    size = elements * (4 if reduction_precision(config, processes.world) == "fp32" else 2)
    operations, micro_batches = flops.step * config.train_batch_size, config.micro_batches
    gain = processes.from_first(
        overlap_gain(
            operations / (flops.per_second * UTILISATION),
            size * reduction_seconds_per_byte(processes),
            len(trained),
            -(-elements // OVERLAPPED_BUCKET),
            micro_batches,
            micro_batches if machinery_stage(config) == 2 else 1,
        )
    )
    if processes.is_first:
        with_graphs, with_overlap = "from CUDA graphs", "with reductions that overlap the backward pass"
        chosen, other = (with_overlap, with_graphs) if gain > 0 else (with_graphs, with_overlap)
        say(f"Training {chosen}: by estimate {abs(gain) * 1e3:.1f} ms a step faster than {other}")
    return gain > 0


def reduction_seconds_per_byte(processes: Processes, size: int = 2**26) -> float:
    """Measures an all-reduce of `size` bytes in bf16 over all processes; all must call it."""
    tensor = torch.zeros(size // 2, dtype=torch.bfloat16, device=processes.device)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / size  # the first one also connects
