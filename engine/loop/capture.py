"""CUDA graphs: work of fixed shapes is launched once instead of kernel by kernel, so that the GPU never waits for the host."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.config import TrainConfig
from engine.data.loader import Batch
from engine.errors import UserError, first_line
from engine.models.family import has_dropout

WARM_UP = 3  # calls that run as they are, while kernels are compiled and libraries choose algorithms


def reason_against(config: TrainConfig, device: torch.device, model: nn.Module) -> str | None:
    """Why this run cannot be captured; None where it can."""
    if device.type != "cuda":
        return "there is no GPU"
    if config.zero_stage == 3:
        return "--zero_stage 3 gathers weights from Python around every module"
    if config.gradient_checkpointing and has_dropout(model) and not config.compile:
        return "--gradient_checkpointing keeps the state of dropout's generator on the host; --compile would not"
    return None


def wanted(config: TrainConfig, device: torch.device, model: nn.Module) -> bool:
    """Whether to capture, by `--cuda_graphs`.

    Raises:
        UserError: `on`, where it is impossible.
    """
    if config.cuda_graphs == "off":
        return False
    reason = reason_against(config, device, model)
    if reason and config.cuda_graphs == "on":
        raise UserError(f"--cuda_graphs on: {reason}; leave the option out")
    if reason and device.type == "cuda":
        print(f"Training without CUDA graphs: {reason}", file=sys.stderr)
    return reason is None


def capture(function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> tuple[Callable[[], None], Any]:
    """Captures the device's work of a call, which is not executed; returns what replays it, and what the call returned."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (the loader's) may allocate memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


@dataclass
class _Graph:
    calls: int = 0
    replay: Callable[[], None] | None = None
    result: Any = None


class Captured:
    """A function of a batch, and of flags, whose device work is replayed from CUDA graphs.

    The function must read everything that changes from the device, keep its state there, and return only tensors; they are
    overwritten by the next call. Batches are copied to where the graphs read them: one graph for each shape and each value of
    the flags, all in one pool of memory.

    Args:
        required: raise `UserError` where capturing fails, instead of going on without.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, required: bool) -> None:
        self.function, self.device, self.required = function, device, required
        self.batches: dict[Any, Batch] = {}
        self.graphs: dict[Any, _Graph] = {}
        self.stream: Any = None
        self.pool: Any = None
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.failed = False

    def __call__(self, batch: Batch, *flags: bool) -> Any:
        if self.failed:
            return self.function(batch, *flags)
        shapes = tuple((name, tensor.shape) for name, tensor in batch.record.items())
        fixed = self.batches.setdefault(shapes, batch)
        if fixed is not batch:
            torch._foreach_copy_(fixed.tensors, batch.tensors, non_blocking=True)
        graph = self.graphs.setdefault((shapes, flags), _Graph())
        graph.calls += 1
        if graph.calls <= WARM_UP:
            return self._on_stream(lambda: self.function(fixed, *flags))
        if graph.replay is None:
            try:
                graph.replay, graph.result = capture(lambda: self.function(fixed, *flags), self.stream, self.pool)
            except RuntimeError as error:
                if self.required:
                    raise UserError(f"--cuda_graphs on: capturing failed: {first_line(error)}") from error
                print(f"Training without CUDA graphs: capturing failed: {first_line(error)}", file=sys.stderr)
                self.failed = True
                return self.function(fixed, *flags)
        graph.replay()
        return graph.result

    def _on_stream(self, work: Callable[[], Any]) -> Any:
        """Runs work where it will be captured, so that what libraries keep per stream is there by then."""
        if self.stream is None:
            return work()
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result
