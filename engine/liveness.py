"""What the processes of a run tell each other through a store: that they live, for as long as one waits for another."""

import contextlib
import datetime
import hashlib
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from engine import launcher
from engine.errors import TRY_AGAIN, LostProcess, UserError, first_line, leaving

JOIN_LIMIT = 900.0  # seconds for all processes to come: imports from a cold shared disk, and nodes that start late
BEAT = 10.0  # seconds between two signs of life
SILENCE = 300.0  # seconds without one that mean death; C code may hold Python's lock for a minute or two
LAST_LOOK = 10.0  # seconds for asking the store about the others before leaving
FIRST_WORD = 5.0  # seconds that the first process may take to say for all what is wrong
GRACE = 30.0  # seconds between the loss of the store or of a process and leaving, in which the main thread may say more
LAG = 90.0  # seconds in which a node should see what another one did; NFS asks again after 60 at most
NAMED = 16  # processes in a line


def named(ranks: list[int]) -> str:
    """Processes for a line: the first of them, and how many more there are."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks[:NAMED]))}{more}"


def _ended(ranks: list[int]) -> str:
    return f"{named(ranks)} ended without a word; the launcher's message or the system's log says why"


class Liveness:
    """The store that processes share, the signs of life that each gives in it, and waiting for others while they give theirs.

    torchrun or the first process keeps the store: a dictionary for a few bytes each. Every process has two connections to it,
    and one more for each `own_store`. Each tells it every `BEAT` seconds that it lives, so that whoever waits knows for whom;
    for 1,024 processes the store does 205 operations a second for that, and 1,024 while all wait. Calls of the store have no
    deadline: when its host falls silent, and closes no connection, a thread that never calls it ends the process. Each process
    also watches the next one of its node, whose end the system tells at once, and says so in the store for it.
    """

    store: dist.Store | None = None  # of this attempt, once several processes are connected; for the main thread

    def __init__(self, rank: int, world: int, local_rank: int) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.step = -1  # told to the others with each sign of life
        self._waits = 0  # how often all waited for each other so far, which tells the store's keys apart
        self._seen: dict[int, tuple[bytes, float]] = {}  # the last sign of life of a process, and when it was first seen
        self._neighbour: tuple[int, int] | None = None  # the next of this node's processes, and a descriptor that knows its end
        self._thread: threading.Thread | None = None
        self._guarding: threading.Thread | None = None
        self._given_back: dict[tuple[str, str], float] = {}  # what by whom, and when this process first saw that
        self._answers = 0  # of the store, to signs of life
        self._due, self._closed, self._ended = threading.Event(), threading.Event(), threading.Event()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Gives signs of life from now on, and waits for those of all.

        Raises:
            LostProcess: some process did not come.
        """
        self._guarding = threading.Thread(target=self._guard, name="guard", daemon=True)
        self._guarding.start()
        store = open_store(self.world, serves=self.is_first and not launcher.hosts_the_store())
        self._beats = store.clone()  # type: ignore[attr-defined]
        self.beat()
        self.store = store
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._thread.start()
        self.store.set(f"place/{self.rank}", _place())
        self.store.append("came", f"{self.rank} ")  # type: ignore[attr-defined]
        self.arrive("all came")
        started = time.monotonic()
        while not self.store.check(["all came"]):
            if time.monotonic() - started > JOIN_LIMIT:
                missing = set(range(self.world)) - set(map(int, self.store.get("came").split()))
                raise LostProcess(f"{named(sorted(missing))} did not come within {JOIN_LIMIT:g} seconds; look at the node")
            _sleep(started)
        self._neighbour = self._open_neighbour()

    def part(self) -> None:
        """Gives no more signs of life; who still waits for this process learns of it."""
        self._closed.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join(LAST_LOOK)
            if not self._thread.is_alive():  # else the store does not answer
                with contextlib.suppress(RuntimeError):  # the store is gone
                    self._beats.set(f"alive/{self.rank}", f"left {self.step}")

    def end_guard(self) -> None:
        """To be called when nothing is left that could wait for the store."""
        self._ended.set()
        if self._guarding is not None:
            self._guarding.join()

    def own_store(self) -> dist.Store:
        """Another client of the store: whoever waits blocks all that share its client. It costs the store's host a descriptor.

        Only where several processes are connected.
        """
        assert self.store is not None
        return self.store.clone()  # type: ignore[attr-defined]

    def beat(self) -> bool:
        """Tells the others that this process lives, and at which step, once the store has answered; any thread may.

        Returns:
            Whether some process is known to have ended without a word.

        Only where several processes are connected.

        Raises:
            dist.DistNetworkError: the store is gone.
        """
        self._beats.set(f"alive/{self.rank}", f"{time.monotonic_ns()} {self.step}")
        ended = self._beats.check(["ended"])  # `set` waits for no answer
        self._answers += 1
        return ended

    def beat_soon(self) -> None:
        """Has the thread of the signs of life give one now, without waiting for it."""
        self._due.set()

    def _live(self) -> None:
        """Gives signs of life, and ends the process when there is nobody to give them to, or one that all need has ended.

        The main thread has `GRACE` to meet that itself. In a collective of NCCL it might not for an hour.
        """
        try:
            while not self._closed.is_set():
                self._due.wait(BEAT)
                self._due.clear()
                self._look_at_neighbour()
                if self.beat() and not self._closed.wait(GRACE):
                    self.leave("another process is gone:", self._ended_ones)
        except RuntimeError:
            if not self._closed.wait(GRACE):
                self._leave_alone()

    def _ended_ones(self) -> str:
        ranks = sorted(set(map(int, self._beats.get("ended").split())))
        return _ended(ranks)

    def _guard(self) -> None:
        """Ends the process when the store has not answered for `SILENCE`, whatever threads wait for it, at the start too.

        It counts its own looks: of minutes in which this process was stopped, or C code held Python's lock, it knows nothing.
        """
        looks = answers = 0
        while not self._ended.wait(BEAT):
            looks = looks + 1 if answers == self._answers else 0
            answers = self._answers
            if looks * BEAT > (SILENCE if answers else JOIN_LIMIT + GRACE):
                self._leave_alone()

    def _leave_alone(self) -> NoReturn:
        self.leave("this process can tell no other that it lives;", lambda: f"it is at step {self.steps()[self.rank]}")

    def _open_neighbour(self) -> tuple[int, int] | None:
        """The next of this node's processes, around to the first, where the system shows it."""
        assert self.store is not None
        rank = self.rank - self.local_rank + (self.local_rank + 1) % launcher.local_world()
        if rank == self.rank or rank >= self.world:
            return None
        place, _, process = self.store.get(f"place/{rank}").decode().rpartition(" ")
        with contextlib.suppress(OSError):  # an old kernel
            if _place().startswith(f"{place} "):
                return rank, os.pidfd_open(int(process))
        return None

    def _look_at_neighbour(self) -> None:
        """Says of a process of this node that ended without saying so that it did."""
        if self._neighbour is None:
            return
        rank, descriptor = self._neighbour
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if poll.poll(0):
            self._neighbour = None
            os.close(descriptor)
            sign, _, step = self._beats.get(f"alive/{rank}").decode().partition(" ")
            if sign != "left":
                self._beats.set(f"alive/{rank}", f"ended {step}")
                self._beats.append("ended", f"{rank} ")

    def leave(self, line: str, look: Callable[[], str]) -> NoReturn:
        """Ends the process from any thread, whatever the others are blocked in, with exit code `TRY_AGAIN`.

        One process of each node says the line. Where the store is gone two of each do, of which the first may be gone too. The
        first process, which may keep the store, stays until the others have looked.

        Args:
            look: what is known of the others, for the end of the line; the store, which it asks, has `LAST_LOOK` seconds.
        """
        heard: list[tuple[str, bool]] = []

        def ask() -> None:
            if self.store is None and self.world > 1:
                return  # which does not answer yet
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

    def let_the_first_speak(self, error: UserError) -> None:
        """Before leaving for a mistake that all meet, waits a few seconds for the first process, which says it, to leave.

        A launcher ends all processes when one has left. What the first does not meet, one of those that do says.
        """
        self._wait_for_the_first(error)
        if self.store is not None and not error.shared:
            with contextlib.suppress(RuntimeError):
                error.said = self._beats.add(f"said/{hashlib.sha256(str(error).encode()).hexdigest()}", 1) > 1

    def _wait_for_the_first(self, error: UserError) -> None:
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

    def is_mine(self, what: str) -> bool:
        """Whether this process may do what one alone should: the first that asks, and when that is gone the next.

        What was given back is done; who still asks for it after `LAG` does not see that, and may do it again.
        """
        if self.store is None:
            return True
        mine, now = str(self.rank), time.monotonic()
        holder = self.store.compare_set(what, "", mine).decode()
        if holder.isdigit():
            free = holder != mine and any(self._gone([int(holder)]))
        else:
            free = now - self._given_back.setdefault((what, holder), now) > LAG
        if free:
            holder = self.store.compare_set(what, holder, mine).decode()
        return bool(holder == mine)

    def give_back(self, what: str) -> None:
        """Gives back what `is_mine`, once it is done."""
        if self.store is not None:
            self.store.compare_set(what, str(self.rank), f"done by {self.rank}")

    def arrive(self, key: str, store: dist.Store | None = None) -> None:
        """Says that this process has come to where all wait for the key of the store; whoever comes last sets it.

        Args:
            store: a thread's own client, where it is not the main one that comes.
        """
        store = store or self.store
        assert store is not None
        if store.add(f"{key}/count", 1) == self.world:
            store.set(key, "")

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

    def _look(self) -> None:
        """Raises `LostProcess` where one that is waited for is gone: the first looks at all, the others at the first."""
        left, ended, silent = self._gone(list(range(self.world) if self.is_first else [0]))
        if ended:
            raise LostProcess(_ended(ended))
        if left:
            raise LostProcess(f"{named(left)} left; the message of that one, or the launcher's, says why")
        if silent:
            raise LostProcess(f"{named(silent)} gave no sign of life for {SILENCE:g} seconds")

    def _gone(self, ranks: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Which of the processes left, which ended without saying so, and which give no sign of life any more."""
        now, left, ended, silent = time.monotonic(), [], [], []
        for rank, sign in zip(ranks, self._beats.multi_get([f"alive/{rank}" for rank in ranks]), strict=True):
            if self._seen.get(rank, (b"", 0.0))[0] != sign:
                self._seen[rank] = sign, now
            if sign.startswith(b"left"):
                left.append(rank)
            elif sign.startswith(b"ended"):
                ended.append(rank)
            elif now - self._seen[rank][1] > SILENCE:
                silent.append(rank)
        return left, ended, silent


def open_store(world: int, serves: bool) -> dist.Store:
    """The launcher's store; what a killed attempt left in it is out of sight.

    torchrun on one node keeps its store over restarts, with the addresses of processes that are gone. On several nodes the
    count of restarts may differ, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun start a new store instead.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"WORLD_SIZE is {world}, but MASTER_ADDR and MASTER_PORT do not say where the processes meet; start them "
            "with torchrun or deepspeed"
        )
    try:
        store = dist.TCPStore(
            host, int(port), world, serves, datetime.timedelta(seconds=JOIN_LIMIT),
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


def _place() -> str:
    """What tells this process from all others that the system shows to it: machine, space of process numbers, and number."""
    machine = "?"
    with contextlib.suppress(OSError):
        machine = f"{launcher.boot()} {Path('/proc/self/ns/pid').stat().st_ino}"
    return f"{machine} {os.getpid()}"


def _sleep(started: float) -> None:
    """Between two looks at what is waited for since `started`: a tenth of the time so far, a second at most."""
    time.sleep(min(1.0, 0.01 + (time.monotonic() - started) / 10))
