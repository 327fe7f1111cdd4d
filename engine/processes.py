"""The processes of a run: who this one is, which device it has, and how all of them agree."""

import datetime
import os
import signal
from typing import Any

import torch
import torch.distributed as dist

from engine import launcher
from engine.errors import UserError

_TIMEOUT = datetime.timedelta(minutes=60)


class Processes:
    """This process among all: rank, world, local rank and device. One process needs no launcher and opens no port.

    Args:
        local_rank: where no launcher says; negative for none.
        device: instead of the GPU of that number, or of the CPU where there is none.
    """

    def __init__(self, local_rank: int = 0, device: torch.device | None = None) -> None:
        self.rank, self.world, self.local_rank = launcher.rank(), launcher.world(), launcher.local_rank(local_rank)
        self._connected = False
        if device is not None:
            self.device = device
        elif torch.cuda.is_available():
            count = torch.cuda.device_count()
            if self.local_rank >= count:
                raise UserError(
                    f"local rank {self.local_rank} has no GPU (this node has {count}); start fewer processes",
                    alone=True,
                )
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def connect(self) -> "Processes":
        """Joins the process group; NCCL for GPUs, gloo beside it for what stays on the host."""
        if dist.is_initialized():
            return self
        self._connected = True
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.world == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
        else:
            dist.init_process_group(backend, store=self._store(), rank=self.rank, world_size=self.world, timeout=_TIMEOUT)
        return self

    def _store(self) -> dist.Store:
        """The launcher's store; what a killed attempt left in it is out of sight.

        torchrun on one node keeps its store over restarts, with the addresses of processes that are gone. On several nodes the
        count of restarts may differ, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun start a new store instead.
        """
        store = next(iter(dist.rendezvous("env://", self.rank, self.world, timeout=_TIMEOUT)))[0]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"
        return dist.PrefixStore(f"attempt-{attempt}", store)

    def close(self) -> None:
        """Leaves the process group, if it was joined here."""
        if self._connected and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    def synchronize(self) -> None:
        """Waits until the device has done what it was asked, copies to the host included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's `value` on every process."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


class StopSignal:
    """SIGTERM, SIGUSR1 and the first Ctrl-C, turned into one step at which every process stops. A second Ctrl-C ends at once.

    A process may be told before the others. Each step starts a reduction of the flags on the host, and the next step reads
    its result, so that all processes see the same answer at the same step and none waits for it.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received = False
        self._pending: tuple[torch.Tensor, Any] | None = None
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell leaves it for what runs in its background
            numbers.append(signal.SIGINT)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
            if self.processes.is_first:
                # Not through Python's stream, in the middle of whose work this may be.
                os.write(2, b"\nLeaving after this step, with a checkpoint; Ctrl-C again ends at once\n")

    def agreed(self) -> bool:
        """Whether to stop after this step. To be called once a step by every process."""
        if self.processes.world == 1:
            return self.received
        stop = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            stop = bool(flag[0] > 0)
        flag = torch.tensor([float(self.received)])
        self._pending = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True))
        return stop

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None:
            self._pending[1].wait()
