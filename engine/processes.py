"""The processes of a run: who this one is, which device it has, and how all of them agree."""

import contextlib
import datetime
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine import launcher
from engine.descriptors import allow_descriptors
from engine.errors import UserError, of_all, of_the_machine
from engine.files import LOCK, is_held, read_text, seen
from engine.liveness import Liveness, named
from engine.messages import warn
from engine.offline import offline

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(minutes=60)  # of a collective
NETWORK_LIMIT = 300.0  # seconds for the first collective on the host, and as many on the devices
# Processes from which gloo connects two when they first talk. Else each writes 3 messages for every other into the store, a
# minute for the two groups of 1,024. A connection that is made late has no deadline, but the signs of life have theirs.
LAZY_CONNECTIONS = 512


class Processes(Liveness):
    """This process among all: rank, world, local rank and device. One process needs no launcher and opens no port.

    Args:
        local_rank: where no launcher says; negative for none.
        device: instead of the GPU of that number, or of the CPU where there is none.
    """

    def __init__(self, local_rank: int = 0, device: torch.device | None = None) -> None:
        super().__init__(launcher.rank(), launcher.world(), launcher.local_rank(local_rank))
        self._connected = False
        if device is not None:
            self.device = device
        elif torch.cuda.is_available():
            count = torch.cuda.device_count()
            if self.local_rank >= count:
                raise UserError(
                    f"local rank {self.local_rank} has no GPU (this node has {count}); start fewer processes",
                    alone=True, passing=True,
                )  # fmt: skip
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")

    def connect(self) -> "Processes":
        """Joins the process group; NCCL for GPUs, gloo beside it for what stays on the host.

        The first exchange has a limit of its own, so that a bad network card does not hold up all others.

        Raises:
            LostProcess: some process did not come.
            UserError: this node allows too few open files, or the launcher would bring processes of two attempts together.
        """
        if dist.is_initialized():
            return self
        self._connected = True
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.world == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
            return self
        if launcher.keeps_its_store():
            raise UserError(
                "torchrun with --max-restarts on several nodes keeps the store of the attempt before, in which processes wait "
                "for those that are gone: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, with --rdzv-backend c10d (a "
                "static one keeps it all the same), or give --max-restarts 0"
            )
        allow_descriptors(self.rank, self.world)
        if self.world >= LAZY_CONNECTIONS:
            os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        self.meet()
        with self._network_limit():
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world, timeout=_TIMEOUT)
            self.barrier()
        if self.device.type == "cuda":
            with self._network_limit():
                self.sum_(torch.zeros(1, device=self.device))
                self.synchronize()
        self._beats.append("through", f"{self.rank} ")
        return self

    @contextlib.contextmanager
    def _network_limit(self) -> Iterator[None]:
        limit = threading.Timer(
            NETWORK_LIMIT, self.leave, ("the first exchange over the network has not ended", self._not_through)
        )
        limit.daemon = True
        limit.start()
        try:
            yield
        finally:
            limit.cancel()

    def _not_through(self) -> str:
        """Which processes have not ended the first exchange."""
        through = self._beats.get("through").split() if self._beats.check(["through"]) else []
        left = sorted(set(range(self.world)) - set(map(int, through)))
        return (
            f"in {NETWORK_LIMIT:g} seconds by {named(left)}; look at the network of these nodes (GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME say which interface to take, NCCL_DEBUG=INFO what NCCL does)"
        )

    def close(self) -> None:
        """Leaves the process group, if it was joined here; who still waits for this process learns of it.

        While an exception is under way several processes keep it: NCCL's end waits for all, and others may not come to it.
        `errors.exit_code` ends such a process, and with it its connections.
        """
        self.part()
        if self.world > 1 and sys.exc_info()[0] is not None:
            return
        if self._connected and dist.is_initialized():
            dist.destroy_process_group()
        self.end_guard()

    def wait_for_all(self) -> None:
        """Waits until every process has come here, however long it takes, as long as all live.

        Raises:
            LostProcess: a process left, or gives no sign of life.
        """
        if self.store is not None:
            self._waits += 1
            key = f"wait/{self._waits}"
            self.arrive(key)
            self.wait(key)
        self.barrier()  # so that the store does not end with the first process while others still look

    def computed_by_first(self, work: Callable[[], T], kinds: tuple[type[Exception], ...] = (UserError,)) -> T:
        """What the first process's `work` returns, on every process; it may take any time. One process just calls it.

        The result travels in pickled form by broadcast.

        Raises:
            UserError: that of `work`, or what else of `kinds` it raises, on every process; the first says it. What the disk did
                wrong is one, too.
            LostProcess: the first process left, or gives no sign of life.
        """
        if self.store is None:
            return work()
        self._waits += 1
        value: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                value = work()
            except kinds as raised:
                error = raised
            except OSError as raised:
                if (error := of_the_machine(raised)) is None:
                    raise
            self.store.set(f"wait/{self._waits}", "")
        else:
            self.wait(f"wait/{self._waits}")
        value, told = self.from_first((value, error))
        if told is not None:
            raise of_all([told]) if isinstance(told, UserError) else told
        return value

    def all_or_none(self, work: Callable[[], T], kinds: tuple[type[Exception], ...] = (UserError,)) -> list[T]:
        """What `work` returns on every process, by rank, however long it takes; what one raises is raised by all.

        Raises:
            UserError: those of all processes; the first says them.
            LostProcess: a process left, or gives no sign of life.
            Exception: else what the first of those raised that raised another of `kinds`.
        """
        if self.store is None:
            return [work()]
        value: T | None = None
        error: Exception | None = None
        try:
            value = work()
        except kinds as raised:
            error = raised
        told = self.gather_patiently((value, error))
        if errors := [error for _, error in told if error is not None]:
            mistakes = [error for error in errors if isinstance(error, UserError)]
            raise of_all(mistakes) if mistakes else errors[0]
        return [value for value, _ in told]

    def first_before_others(self, work: Callable[[], T]) -> T:
        """Calls `work` on every process: the first before all, then the first of each node, then the others, without the hub.

        So what is downloaded comes once to a shared cache, and once to each node's where they have their own.

        Raises:
            UserError: that of any process, on every process; the first says it.
            LostProcess: another process left, or gives no sign of life.
        """
        if self.store is None:
            return work()
        mine = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        values: list[T] = []

        def work_in(turn: int) -> None:
            if turn == mine:
                with offline() if turn == 2 else contextlib.nullcontext():
                    values.append(work())

        for turn in range(3):
            self.all_or_none(partial(work_in, turn))
        return values[0]

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

    def gather_patiently(self, value: Any) -> list[Any]:
        """As `gather_objects`, after work that may take any time.

        Raises:
            LostProcess: a process left, or gives no sign of life.
        """
        self.wait_for_all()
        return self.gather_objects(value)

    def gather_to_first(self, value: T, ranks: list[int]) -> dict[int, T]:
        """The `value` of these processes, by rank, on the first; all must be there, and know the same ranks."""
        host, got = torch.device("cpu"), {}
        for rank in ranks:
            if self.rank == rank == 0:
                got[rank] = value
            elif self.is_first:
                received: list[Any] = [None]
                dist.recv_object_list(received, src=rank, device=host)
                got[rank] = received[0]
            elif self.rank == rank:
                dist.send_object_list([value], dst=0, device=host)
        return got

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


def warn_of_local_locks(directory: Path, processes: Processes) -> None:
    """Has the first process of another node look whether it knows that the first of all holds a directory with `files.lock`.

    It looks once it sees the very file that the first locked, which that marks, and not one that an earlier run left.
    """
    if processes.world > launcher.local_world():
        file = directory / LOCK
        mark = processes.computed_by_first(lambda: _marked(file))
        looks = processes.rank == launcher.local_world() and mark and seen(file, lambda: mark in read_text(file))
        if False in processes.gather_patiently(is_held(directory) if looks else None):
            warn(
                f"{directory}: locks there hold on one node only (as mounted with `nolock`, `local_lock` or `localflock`), so "
                "nothing keeps a run of another node from writing there too; start none beside this one"
            )


def _marked(file: Path) -> str | None:
    """What was appended to a file, by which every node knows it, whatever number it has there; None where there is no room."""
    mark = secrets.token_hex(8)
    with contextlib.suppress(OSError), file.open("a") as opened:
        opened.write(f"{mark}\n")
        opened.flush()
        os.fsync(opened.fileno())
        return mark
    return None
