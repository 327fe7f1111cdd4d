"""What a process hands to collectives, as torch's dispatcher sees them."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Collective -> which of its arguments holds the whole, and not one process's part.
WHOLE = {
    "allreduce_": 0, "reduce_": 0, "_reduce_scatter_base_": 1, "reduce_scatter_tensor_coalesced_": 1,
    "_allgather_base_": 0, "allgather_": 0, "allgather_into_tensor_coalesced_": 0,
}  # fmt: skip
SCALARS = 8  # numbers up to which a tensor is a metric, a flag or a norm


class Collectives(TorchDispatchMode):
    """Adds up the bytes of the collectives that are called inside, in this thread and in backward passes on a CPU.

    bytes, calls: by collective, without metrics, flags and norms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        package, _, name = function._schema.name.partition("::")
        if package == "c10d" and name in WHOLE:
            tensors = [tensor for tensor in tree_leaves(args[WHOLE[name]]) if torch.is_tensor(tensor)]
            if sum(tensor.numel() for tensor in tensors) > SCALARS:
                self.bytes[name.strip("_")] += sum(tensor.nbytes for tensor in tensors)
                self.calls[name.strip("_")] += 1
        return function(*args, **(kwargs or {}))

    @property
    def reduced(self) -> int:
        return sum(size for name, size in self.bytes.items() if "gather" not in name)

    @property
    def gathered(self) -> int:
        return sum(size for name, size in self.bytes.items() if "gather" in name)
