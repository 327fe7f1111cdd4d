"""A CUDA graph without a GPU: a call's operations are recorded with their tensors, and carried out again on the same memory.

What a real graph would freeze is frozen here too: every number that the host passed, and the address of every tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_local_scalar_dense":
            raise RuntimeError("the host read a value of the device while it was captured")
        # Arguments that are lists may be changed by the caller afterwards.
        args = tuple(list(value) if isinstance(value, list) else value for value in args)
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result


def capture(function: Callable[[], Any], stream: Any, pool: Any) -> tuple[Callable[[], None], Any]:
    """Takes the place of `engine.loop.capture.capture`. Unlike it, the recording call is carried out: it is undone first."""
    recorder = _Recorder()
    before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with recorder, _Undo(before):
        result = function()
    for tensor, content in before.values():
        tensor.copy_(content)

    def replay() -> None:
        with torch.no_grad():
            for operation, args, kwargs, old in recorder.operations:
                new = operation(*args, **kwargs)
                for target, value in zip(tree_leaves(old), tree_leaves(new), strict=True):
                    if torch.is_tensor(target) and target.data_ptr() != value.data_ptr():
                        target.copy_(value)

    return replay, result


class _Undo(TorchDispatchMode):
    """Keeps what tensors held before an operation wrote to them for the first time."""

    def __init__(self, before: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.before = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for number, argument in enumerate(function._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                if torch.is_tensor(tensor) and tensor.numel():
                    self.before.setdefault(tensor.data_ptr(), (tensor.detach(), tensor.detach().clone()))
        return function(*args, **kwargs)
