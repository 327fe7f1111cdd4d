"""The processes of a run: who this one is, which device it has, and how all of them agree."""

import contextlib
import datetime
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from engine import launcher
from engine.errors import TRY_AGAIN, LostProcess, UserError, first_line, leaving
from engine.files import is_held
from engine.messages import warn

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(minutes=60)  # of a collective
JOIN_LIMIT = 900.0  # seconds for all processes to come: imports from a cold shared disk, and nodes that start late
NETWORK_LIMIT = 300.0  # seconds for the first collective on the host, and as many on the devices
BEAT = 10.0  # seconds between two signs of life
SILENCE = (
    300.0  # seconds without one after which a process is taken for dead; C code may hold Python's lock for a minute or two
)
LAST_LOOK = 10.0  # seconds for asking the store about the others before leaving
FIRST_WORD = 5.0  # seconds that the first process may take to say for all what is wrong
SPARE = 512  # open files for libraries, NCCL, shards and checkpoints
GRACE = 30.0  # seconds between the loss of the store and leaving, in which the main thread may say more of it
NAMED = 16  # processes in a line


def named(ranks: list[int]) -> str:
    """Processes for a line: the first of them, and how many more there are."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks[:NAMED]))}{more}"


class Processes:
    """This process among all: rank, world, local rank and device. One process needs no launcher and opens no port.

    Several share a store, which torchrun or the first process keeps: a dictionary for a few bytes each. Every process has two
    connections to it, and one more for each `own_store`. Each tells it every `BEAT` seconds that it lives, so that whoever
    waits knows for whom; for 1,024 processes the store does 102 operations a second for that, and 1,024 while all wait.

    Args:
        local_rank: where no launcher says; negative for none.
        device: instead of the GPU of that number, or of the CPU where there is none.
    """

    store: dist.Store | None = None  # of this attempt, once several processes are connected; for the main thread

    def __init__(self, local_rank: int = 0, device: torch.device | None = None) -> None:
        self.rank, self.world, self.local_rank = launcher.rank(), launcher.world(), launcher.local_rank(local_rank)
        self.step = -1  # told to the others with each sign of life
        self._connected = False
        self._waits = 0  # how often all waited for each other so far, which tells the store's keys apart
        self._seen: dict[int, tuple[bytes, float]] = {}  # the last sign of life of a process, and when it was first seen
        self._closed = threading.Event()
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

    @property
    def is_first(self) -> bool:
        return self.rank == 0

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
                "for those that are gone: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, or give --max-restarts 0"
            )
        self._allow_descriptors()
        self.store = self._open_store()
        self._beats = self.own_store()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self.beat()
        self._thread.start()
        self._meet()
        limit = threading.Timer(
            NETWORK_LIMIT, self.leave, ("the first exchange over the network has not ended", self._not_through)
        )
        limit.daemon = True
        limit.start()
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world, timeout=_TIMEOUT)
        self.barrier()
        if self.device.type == "cuda":
            self.sum_(torch.zeros(1, device=self.device))
            self.synchronize()
        self._beats.append("through", f"{self.rank} ")  # type: ignore[attr-defined]
        limit.cancel()
        return self

    def _not_through(self) -> str:
        """Which processes have not ended the first exchange."""
        through = self._beats.get("through").split() if self._beats.check(["through"]) else []
        left = sorted(set(range(self.world)) - set(map(int, through)))
        return (
            f"in {NETWORK_LIMIT:g} seconds by {named(left)}; look at the network of these nodes (GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME say which interface to take, NCCL_DEBUG=INFO what NCCL does)"
        )

    def _allow_descriptors(self) -> None:
        """Raises the limit of open files to what the connections need, and to what the store's host needs for its.

        A group of gloo takes world + 3 descriptors, and there are two: ours, and DeepSpeed's, which takes one more. The store's
        host has three connections with every process, each process three. So 1,024 need 2,056, and the host of the store 5,128.
        """
        own, hosts = 2 * (self.world + 4) + SPARE, 3 * self.world + SPARE
        torchrun_hosts = launcher.hosts_the_store()
        if self.is_first and not torchrun_hosts:
            _allow_open_files(0, own + hosts, f"process 0 of {self.world}, which keeps their store,")
        else:
            _allow_open_files(0, own, f"each of {self.world} processes")
        if self.is_first and torchrun_hosts:
            _allow_open_files(os.getppid(), hosts, f"torchrun, which keeps the store of {self.world} processes,")

    def _open_store(self) -> dist.Store:
        """The launcher's store; what a killed attempt left in it is out of sight.

        torchrun on one node keeps its store over restarts, with the addresses of processes that are gone. On several nodes the
        count of restarts may differ, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun start a new store instead.
        """
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not host or not port.isdecimal():
            raise UserError(
                f"WORLD_SIZE is {self.world}, but MASTER_ADDR and MASTER_PORT do not say where the processes meet; start them "
                "with torchrun or deepspeed"
            )
        serves = self.is_first and not launcher.hosts_the_store()
        try:
            store = dist.TCPStore(
                host, int(port), self.world, serves, datetime.timedelta(seconds=JOIN_LIMIT),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error):
                raise UserError(
                    f"port {port} of this node is in use; give the launcher another --master_port",
                    alone=True,
                    passing=True,
                ) from None
            raise LostProcess(f"nobody answers at {host}:{port}, where the processes meet: {first_line(error)}") from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"
        return dist.PrefixStore(f"attempt-{attempt}", store)

    def _meet(self) -> None:
        """Waits until every process has come to the store, each with its first sign of life."""
        assert self.store is not None
        self.store.append("came", f"{self.rank} ")  # type: ignore[attr-defined]
        if self.store.add("count", 1) == self.world:
            self.store.set("all came", "")
        started = time.monotonic()
        while not self.store.check(["all came"]):
            if time.monotonic() - started > JOIN_LIMIT:
                missing = set(range(self.world)) - set(map(int, self.store.get("came").split()))
                raise LostProcess(f"{named(sorted(missing))} did not come within {JOIN_LIMIT:g} seconds; look at the node")
            _sleep(started)

    def own_store(self) -> dist.Store:
        """Another client of the store: whoever waits blocks all that share its client. It costs the store's host a descriptor.

        Only where several processes are connected.
        """
        assert self.store is not None
        return self.store.clone()  # type: ignore[attr-defined]

    def beat(self) -> None:
        """Tells the others that this process lives, and at which step; any thread may. Does nothing for one process.

        Raises:
            dist.DistNetworkError: the store is gone; not before the second time.
        """
        if self.store is not None:
            self._beats.set(f"alive/{self.rank}", f"{time.monotonic_ns()} {self.step}")

    def _live(self) -> None:
        """Gives signs of life, and ends the process when there is nobody to give them to."""
        try:
            while not self._closed.wait(BEAT):
                self.beat()
        except RuntimeError:
            if self._closed.wait(GRACE):
                return
            self.leave("this process can tell no other that it lives;", lambda: f"it is at step {self.steps()[self.rank]}")

    def leave(self, line: str, look: Callable[[], str]) -> NoReturn:
        """Ends the process from any thread, whatever the others are blocked in, with exit code `TRY_AGAIN`.

        One process of each node says the line. Where the store is gone two of each do, of which the first may be gone too. The
        first process, which may keep the store, stays until the others have looked.

        Args:
            look: what is known of the others, for the end of the line; the store, which it asks, has `LAST_LOOK` seconds.
        """
        heard: list[tuple[str, bool]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                heard.append((look(), self.store is None or self.first_to(f"leave/{self.rank - self.local_rank}")))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(LAST_LOOK)
        silent = "the store of the processes, which the first one or torchrun on its node keeps, does not answer"
        others, says = heard[0] if heard else (silent, self.local_rank < 2)
        if says:
            print(f"engine.run: error: process {self.rank}: {leaving(f'{line} {others}')}", file=sys.stderr, flush=True)
        if self.is_first and self.store is not None:
            time.sleep(LAST_LOOK)
        os._exit(TRY_AGAIN)

    def close(self) -> None:
        """Leaves the process group, if it was joined here; who still waits for this process learns of it."""
        self._closed.set()
        if self.store is not None:
            self._thread.join()
            with contextlib.suppress(RuntimeError):  # the store is gone
                self._beats.set(f"alive/{self.rank}", f"left {self.step}")
        if self._connected and dist.is_initialized():
            dist.destroy_process_group()

    def let_the_first_speak(self, error: UserError) -> None:
        """Before leaving for a mistake that all meet, waits a few seconds for the first process, which says it, to leave.

        A launcher ends all processes when one has left.
        """
        started = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the store went with the first process
            while self.store is not None and not (self.is_first or error.alone) and time.monotonic() - started < FIRST_WORD:
                if self.store.get("alive/0").startswith(b"left"):
                    time.sleep(0.5)
                    return
                _sleep(started)

    def steps(self) -> list[int]:
        """The step that each process told last, in one look-up; any thread may. Only where several processes are connected."""
        return [int(sign.split()[1]) for sign in self._beats.multi_get([f"alive/{rank}" for rank in range(self.world)])]

    def first_to(self, what: str) -> bool:
        """Whether no other process asked this before; any thread may. Without a store it is the first process."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            if self.store is not None:
                return self._beats.add(what, 1) == 1
        return self.is_first

    def _gone(self, ranks: list[int]) -> tuple[list[int], list[int]]:
        """Which of the processes left, and which give no sign of life any more."""
        now, left, silent = time.monotonic(), [], []
        for rank, sign in zip(ranks, self._beats.multi_get([f"alive/{rank}" for rank in ranks]), strict=True):
            if self._seen.get(rank, (b"", 0.0))[0] != sign:
                self._seen[rank] = sign, now
            if sign.startswith(b"left"):
                left.append(rank)
            elif now - self._seen[rank][1] > SILENCE:
                silent.append(rank)
        return left, silent

    def is_mine(self, what: str) -> bool:
        """Whether this process may do what one alone should: the first that asks, and when that is gone the next."""
        if self.store is None:
            return True
        holder, mine = self.store.compare_set(what, "", str(self.rank)), str(self.rank).encode()
        if holder != mine and any(self._gone([int(holder)])):
            holder = self.store.compare_set(what, holder.decode(), str(self.rank))
        return bool(holder == mine)

    def _look(self) -> None:
        """Raises `LostProcess` where one that is waited for is gone: the first looks at all, the others at the first."""
        left, silent = self._gone(list(range(self.world) if self.is_first else [0]))
        if left:
            raise LostProcess(f"{named(left)} left; the message of that one, or the launcher's, says why")
        if silent:
            raise LostProcess(f"{named(silent)} gave no sign of life for {SILENCE:g} seconds")

    def wait(self, key: str, store: dist.Store | None = None, limit: float = math.inf) -> bool:
        """Waits for a key of the store, as long as those live for whom this process waits; False when that took too long.

        Args:
            store: a thread's own client, where it is not the main one that waits.
            limit: seconds.

        Raises:
            LostProcess: a process left, or gives no sign of life.
        """
        store = store or self.store
        assert store is not None
        started = looked = time.monotonic()
        while not store.check([key]):
            now = time.monotonic()
            if now - started > limit:
                return False
            if now - looked > BEAT / 2:
                looked = now
                try:
                    self._look()
                except LostProcess:  # which may have come here before it left
                    if not store.check([key]):
                        raise
            _sleep(started)
        return True

    def wait_for_all(self) -> None:
        """Waits until every process has come here, however long it takes, as long as all live.

        Raises:
            LostProcess: a process left, or gives no sign of life.
        """
        if self.store is not None:
            self._waits += 1
            key = f"wait/{self._waits}"
            if self.store.add(f"{key}/count", 1) == self.world:
                self.store.set(key, "")
            self.wait(key)
        self.barrier()  # so that the store does not end with the first process while others still look

    def computed_by_first(self, work: Callable[[], T]) -> T:
        """What the first process's `work` returns, on every process; it may take any time. One process just calls it.

        The result travels in pickled form by broadcast.

        Raises:
            UserError: that of `work`, on every process; the first says it.
            LostProcess: the first process left, or gives no sign of life.
        """
        if self.store is None:
            return work()
        self._waits += 1
        value: T | None = None
        error: UserError | None = None
        if self.is_first:
            try:
                value = work()
            except UserError as raised:
                error = raised
            self.store.set(f"wait/{self._waits}", "")
        else:
            self.wait(f"wait/{self._waits}")
        value, lines = self.from_first((value, error and error.lines))
        if lines is not None:
            raise error or UserError(*lines, shared=True)
        return value

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
        value: T | None = None
        for turn in range(3):
            error: UserError | None = None
            if turn == mine:
                try:
                    with _offline() if turn == 2 else contextlib.nullcontext():
                        value = work()
                except UserError as raised:
                    error = raised
            told = self.gather_patiently(error and error.lines)
            if lines := list(dict.fromkeys(line for lines in told for line in lines or ())):
                raise UserError(*lines, shared=True)
        return value  # type: ignore[return-value]

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


def _allow_open_files(process: int, needed: int, who: str) -> None:
    """Raises the limit of a process, 0 for this one, as far as it is lower.

    Raises:
        UserError: its hard limit is lower.
    """
    try:
        soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
        if resource.RLIM_INFINITY != soft < needed:
            if resource.RLIM_INFINITY != hard < needed:
                raise UserError(
                    f"{who} needs {needed:,} open files, and this node allows {hard:,}: raise its hard limit (ulimit -Hn, or "
                    "LimitNOFILE of the service that starts the job)"
                )
            resource.prlimit(process, resource.RLIMIT_NOFILE, (needed, hard))
    except (PermissionError, ProcessLookupError):
        pass  # of the parent, which may be another's


def _sleep(started: float) -> None:
    """Between two looks at what is waited for since `started`: a tenth of the time so far, a second at most."""
    time.sleep(min(1.0, 0.01 + (time.monotonic() - started) / 10))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keeps the hub's libraries to what is on the disk, whether they were imported before or are inside."""
    variables, before = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), dict(os.environ)
    modules = ("huggingface_hub.constants", "datasets.config")  # which read the variables once

    def switch(offline: bool) -> None:
        for module in filter(None, map(sys.modules.get, modules)):
            for name in variables:
                if hasattr(module, name):
                    setattr(module, name, offline)

    was = any(before.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in (*variables, "TRANSFORMERS_OFFLINE"))
    os.environ.update(dict.fromkeys(variables, "1"))
    switch(True)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
        switch(was)


def warn_of_local_locks(directory: Path, processes: Processes) -> None:
    """Has the first process of another node look whether it sees that the first of all holds a directory with `files.lock`."""
    if processes.world > launcher.local_world():
        looks = processes.rank == launcher.local_world()
        if False in processes.gather_objects(is_held(directory) if looks else None):
            warn(
                f"{directory}: locks there hold on one node only (as mounted with `nolock`, `local_lock` or `localflock`), so "
                "nothing keeps a run of another node from writing there too; start none beside this one"
            )


class StopSignal:
    """SIGTERM, SIGUSR1 and the first Ctrl-C, turned into one step at which every process stops. A second Ctrl-C ends at once.

    A process may be told before the others. Every few steps a reduction of the flags is started on the host, and read when the
    next is due, so that all processes see the same answer at the same step and none waits for it. How many steps lie between
    two follows from the slowest process's time for a step, which the reduction finds too: 2 seconds' worth, 10 at most. A
    signal is obeyed after twice as many at most.

    Args:
        every_step: agree as soon as can be: with the next step.
    """

    def __init__(self, processes: Processes, every_step: bool = False) -> None:
        self.processes = processes
        self.received = False
        self._most = 1 if every_step else 10
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._steps, self._due, self._since = 0, 1, time.perf_counter()  # since the last reduction began
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
        self._steps += 1
        if self._steps < self._due:
            return False
        stop = 0.0
        if self._pending is not None:
            largest, work = self._pending
            work.wait()
            stop, seconds = largest.tolist()
            self._due = int(min(max(2 / seconds, 1), self._most))
        now = time.perf_counter()
        largest = torch.tensor([float(self.received), (now - self._since) / self._steps])
        self._pending = (largest, dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True))
        self._steps, self._since = 0, now
        return stop > 0

    def close(self) -> None:
        """Ends the agreement. A process that was told to stop passes over what it is told again, until `release`.

        Launchers and SLURM send SIGTERM more than once, and the checkpoint may still be on its way.
        """
        if not self.received:
            self.release()
        if self._pending is not None:
            self._pending[1].wait()

    def release(self) -> None:
        """Gives the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
