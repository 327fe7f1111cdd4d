"""CUDA graphs: work of fixed shapes is launched once instead of kernel by kernel, so that the GPU never waits for the host."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from engine.config.options import TrainConfig
from engine.data.samples.batch import Batch
from engine.errors import UserError, first_line, innermost
from engine.messages import busy, say
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
    warm: whether a call has run as it is.
    graphs: for each kind, what replays it; empty until all are captured.
    """

    batch: Batch
    warm: bool = False
    graphs: dict[tuple[bool, ...], Callable[[], None]] = field(default_factory=dict)


class Captured:
    """A function of a batch, and of flags, whose device work is replayed from CUDA graphs.

    The function must read everything that changes from the device, keep its state there, and return only tensors; they are
    overwritten by the next call. Batches are copied to where the graphs read them: one graph for each shape and each kind of
    call, all in one pool of memory. All kinds of a shape are captured together, once each has run as it is for `WARM_UP`
    calls, in whatever shape, and one call in this shape has: what runs as it is cannot use the pool, and would need the
    activations' memory a second time beside it. So where a shape is new, the graphs of the others are given back first; each is
    captured again when it is next used. The same holds among several of these that share a pool.

    Captured are processes each by themselves: where there are several shapes, others may come to them at other steps.

    Args:
        kinds: the flags that the function is called with.
        expected: how many shapes there are.
        beside: what this shares a pool with; their calls follow each other, and results are not used beyond the other's calls.
        name: what it is, in messages.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        processes: Processes,
        kinds: Iterable[tuple[bool, ...]] = ((),),
        expected: int = 1,
        beside: "Captured | None" = None,
        name: str = "the step",
    ) -> None:
        self.expected, self.name = expected, name
        self.sharing: list[Captured] = beside.sharing if beside else []  # all of one pool and stream, which they all name
        self.sharing.append(self)
        self.function, self.processes, self.kinds = function, processes, tuple(dict.fromkeys(kinds))
        self.shapes: dict[Any, _Shape] = {}
        self.calls: Counter[tuple[bool, ...]] = Counter()  # how often each kind has run as it is
        self.results: dict[tuple[bool, ...], Any] = {}  # what each kind returns, in whatever shape
        self.on_gpu = processes.device.type == "cuda"
        self.captures = self.memory = 0  # how often a shape was captured; bytes of the graphs that there are
        self._said = not self.on_gpu
        self.stream: Any = beside.stream if beside else torch.cuda.Stream(processes.device) if self.on_gpu else None
        self.pool: Any = beside.pool if beside else torch.cuda.graph_pool_handle() if self.on_gpu else None

    def __call__(self, batch: Batch, *kind: bool) -> Any:
        key = tuple((name, tensor.shape) for name, tensor in batch.record.items())
        shape = self.shapes.setdefault(key, _Shape(batch))
        if shape.batch is not batch:
            torch._foreach_copy_(shape.batch.tensors, batch.tensors, non_blocking=True)
        if not shape.graphs:
            if not shape.warm or min(self.calls[each] for each in self.kinds) < WARM_UP:
                if any(each.graphs for each in self.sharing):
                    self.release()
                shape.warm = True
                self.calls[kind] += 1
                return self._on_stream(lambda: self.function(shape.batch, *kind))
            before = torch.cuda.memory_reserved() if self.on_gpu else 0
            shape.graphs = self._capture(shape.batch)
            self.captures += 1
            self.memory += torch.cuda.memory_reserved() - before if self.on_gpu else 0
            self._say_memory()
        shape.graphs[kind]()
        return self.results[kind]

    @property
    def graphs(self) -> int:
        """How many graphs there are to replay."""
        return sum(len(shape.graphs) for shape in self.shapes.values())

    def release(self) -> None:
        """Gives the graphs of the pool and their memory back, so that other work has it; the next calls capture again.

        No result may be used any more. Weights, the optimizer's state and what libraries prepared in the first calls lie
        outside the pool and stay.
        """
        if self.on_gpu:
            torch.cuda.synchronize(self.processes.device)  # replays that are under way, whose memory this is
        # The allocator refuses to capture into a pool that is given up while something in it still lives.
        pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        for each in self.sharing:
            for shape in each.shapes.values():
                shape.graphs = {}
            each.results, each.memory, each.pool = {}, 0, pool
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _capture(self, batch: Batch) -> dict[tuple[bool, ...], Callable[[], None]]:
        """One graph for each kind of call, from the same batch: nothing is executed.

        Raises:
            UserError: it failed, on this process alone. It cannot go on: torch leaves its thread on the capture's stream and
                the pool half allocated. The others, which wait for it in the next collective, learn that it is gone.
        """
        graphs: dict[tuple[bool, ...], Callable[[], None]] = {}
        try:
            with busy(f"Capturing {self.name} as CUDA graphs"):
                for kind in self.kinds:
                    graphs[kind], result = capture(partial(self._call, batch, kind), self.stream, self.pool)
                    self.results.setdefault(kind, result)
        except Exception as error:
            cause = innermost(error)
            if isinstance(cause, UserError) or not isinstance(cause, Exception):
                raise cause from None  # nothing that capturing did
            where = f" on process {self.processes.rank}" if self.processes.world > 1 else ""
            said = f"capturing {self.name} as a CUDA graph failed{where}: {first_line(cause)}"
            raise UserError(f"{said}; start again with --cuda_graphs off", alone=True) from None
        return graphs

    def _say_memory(self) -> None:
        """Says once, when all shapes are captured, what their graphs take."""
        if not self._said and sum(bool(shape.graphs) for shape in self.shapes.values()) == self.expected:
            of = f" of {self.name}" if self is not self.sharing[0] else ""
            of += f" of {self.expected} shapes" if self.expected > 1 else ""
            say(f"The CUDA graphs{of} take {self.memory / 2**30:.2f} GiB, captured {self.captures} times")
            self._said = True

    def _call(self, batch: Batch, kind: tuple[bool, ...]) -> Any:
        """A call whose results lie where those of other shapes do: a graph of each its own would keep all gradients."""
        result = self.function(batch, *kind)
        if kind not in self.results:
            return result
        for common, own in zip(tree_leaves(self.results[kind]), tree_leaves(result), strict=True):
            if common is not None:
                common.copy_(own)
        return None

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
