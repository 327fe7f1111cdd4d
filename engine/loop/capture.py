"""CUDA graphs: work of fixed shapes is launched once instead of kernel by kernel, so that the GPU never waits for the host."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.config.options import TrainConfig
from engine.data.samples.batch import Batch
from engine.errors import UserError, first_line, innermost
from engine.messages import busy
from engine.models.family import has_dropout
from engine.processes import Processes

WARM_UP = 3  # calls of each kind that run as they are, while kernels are compiled and libraries choose algorithms


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
    return reason is None


def capture(function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> tuple[Callable[[], None], Any]:
    """Captures the device's work of a call, which is not executed; returns what replays it, and what the call returned."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (the loader's) may allocate memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


@dataclass
class _Shape:
    """What belongs to batches of one shape.

    batch: where the graphs read.
    calls: how often each kind of call has run as it is.
    graphs: for each kind, what replays it and what it returned; empty until all are captured.
    """

    batch: Batch
    calls: Counter[tuple[bool, ...]] = field(default_factory=Counter)
    graphs: dict[tuple[bool, ...], tuple[Callable[[], None], Any]] = field(default_factory=dict)


class Captured:
    """A function of a batch, and of flags, whose device work is replayed from CUDA graphs.

    The function must read everything that changes from the device, keep its state there, and return only tensors; they are
    overwritten by the next call. Batches are copied to where the graphs read them: one graph for each shape and each kind of
    call, all in one pool of memory. All kinds of a shape are captured together, once each has run as it is for `WARM_UP`
    calls: what runs as it is cannot use the pool, and would need the activations' memory a second time beside it.

    Args:
        kinds: the flags that the function is called with.
    """

    def __init__(self, function: Callable[..., Any], processes: Processes, kinds: Iterable[tuple[bool, ...]] = ((),)) -> None:
        self.function, self.processes, self.kinds = function, processes, tuple(dict.fromkeys(kinds))
        self.shapes: dict[Any, _Shape] = {}
        self.on_gpu = processes.device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(processes.device) if self.on_gpu else None
        self.pool: Any = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def __call__(self, batch: Batch, *kind: bool) -> Any:
        key = tuple((name, tensor.shape) for name, tensor in batch.record.items())
        shape = self.shapes.setdefault(key, _Shape(batch))
        if shape.batch is not batch:
            torch._foreach_copy_(shape.batch.tensors, batch.tensors, non_blocking=True)
        if not shape.graphs:
            if min(shape.calls[each] for each in self.kinds) < WARM_UP:
                shape.calls[kind] += 1
                return self._on_stream(lambda: self.function(shape.batch, *kind))
            shape.graphs = self._capture(shape.batch)
        replay, result = shape.graphs[kind]
        replay()
        return result

    @property
    def graphs(self) -> int:
        """How many graphs there are to replay."""
        return sum(len(shape.graphs) for shape in self.shapes.values())

    def release(self) -> None:
        """Gives the graphs and their memory back, so that other work has it; the next call captures again.

        No replay may be under way, and no result may be used any more. Weights, the optimizer's state and what libraries
        prepared in the first calls lie outside the pool and stay.
        """
        for shape in self.shapes.values():
            shape.graphs = {}
        if self.on_gpu:
            # The allocator refuses to capture into a pool that is given up while something in it still lives.
            self.pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()

    def _capture(self, batch: Batch) -> dict[tuple[bool, ...], tuple[Callable[[], None], Any]]:
        """One graph for each kind of call, from the same batch: nothing is executed.

        Raises:
            UserError: on every process, where it failed on any. The one that failed cannot go on: torch leaves its thread on
                the capture's stream and the pool half allocated. The others would wait for it in the next collective.
        """
        graphs: dict[tuple[bool, ...], tuple[Callable[[], None], Any]] = {}
        problem = None
        try:
            with busy("Capturing the step as CUDA graphs"):
                for kind in self.kinds:
                    graphs[kind] = capture(partial(self.function, batch, *kind), self.stream, self.pool)
        except Exception as error:  # whatever it is, the other processes wait to hear of it
            cause = innermost(error)
            if isinstance(cause, UserError) or not isinstance(cause, Exception):
                raise cause from None  # nothing that capturing did
            problem = first_line(cause)
        for rank, said in enumerate(self.processes.gather_objects(problem)):
            if said is not None:
                where = f" on process {rank}" if self.processes.world > 1 else ""
                raise UserError(f"capturing the step as a CUDA graph failed{where}: {said}; start again with --cuda_graphs off")
        return graphs

    def _on_stream(self, work: Callable[[], Any]) -> Any:
        """Runs work where it will be captured, so that what libraries keep per stream is there by then."""
        if not self.on_gpu:
            return work()
        current = torch.cuda.current_stream(self.processes.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result
