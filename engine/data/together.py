"""How the processes of a launch, and launches beside each other, come to build by one plan.

The first process of a launch agrees with other launches on a plan, by whoever plans first, and hands it to the other processes
(engine/data/handed.py).
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from engine.config.options import CacheConfig, TrainConfig
from engine.data.claims import BUILDING, PAUSE, Claims
from engine.data.format.index import Index, shard_name, shards_in, sweep
from engine.data.found import Found, Task, is_of, look, plan_of_others, replanned
from engine.data.handed import Handed, hand_over
from engine.data.plan import Plan, read_plan
from engine.data.sources.interface import Source
from engine.files import excludes_others, held, seen, share, unseen
from engine.messages import say
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes, warn_of_local_locks

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """The processes that build together, and what.

    check: is given the identity of shards, to raise what is against it.
    task: the first process's, which hands others theirs.
    held: the directory of the shards, held with others, by the first process; None where a training holds it.
    source_of_all: called by all processes, gives each the source that the first has, where it cannot be handed with the plan.
    encoder: gives the frozen models for a task, loaded when they are first asked for.
    """

    config: CacheConfig
    encoding: Encoding
    processes: Processes
    check: Callable[[dict[str, Any]], None]
    task: Task | None
    held: int | None
    source_of_all: Callable[[Source | None], Source]
    encoder: Callable[[Task], Encoder]


@contextlib.contextmanager
def shards_held(config: CacheConfig, processes: Processes) -> Iterator[int | None]:
    """Holds the directory of the shards together with others that build there, once nobody has it alone; for a launch its first
    process does."""
    directory, said = config.shards_path, False
    # A training holds its output directory already.
    if isinstance(config, TrainConfig) and directory.resolve() == Path(config.output_dir).resolve():
        yield None
        return

    def wait() -> None:
        nonlocal said
        said = said or _say_waiting(directory)
        time.sleep(1)

    with contextlib.ExitStack() as stack:
        ours = processes.computed_by_first(lambda: stack.enter_context(held(directory, shared=True, wait=wait)))
        warn_of_local_locks(directory, processes)
        yield ours if processes.is_first else None


def _say_waiting(directory: Path) -> bool:
    say(f"{directory}: another run is building these shards; waiting for its end")
    return True


@contextlib.contextmanager
def together(launch: Launch, build: int) -> Iterator[tuple[Task, Claims | None, Found, Plan]]:
    """What a launch builds: its first process agrees with other launches, and hands the others what it listed, found and
    planned. There are no claims where other launches have ended that build meanwhile.

    Args:
        build: which one of this launch it is.
    """
    config, processes, directory = launch.config, launch.processes, launch.config.shards_path
    with contextlib.ExitStack() as stack:
        mine: tuple[Task, Claims | None, Found, Plan] | None = None

        def agree() -> tuple[Handed, bytes, bool] | None:
            nonlocal mine
            task = launch.task
            assert task is not None
            claims, found, plan = stack.enter_context(_begun(launch, task, build))
            mine = task, claims, found, plan
            return _hand_over(task, claims, found, plan) if processes.world > 1 else None

        if (told := processes.computed_by_first(agree)) is None:
            assert mine is not None
            yield mine
            return
        handed, building, portable = told
        if processes.is_first:
            stack.callback((directory / handed.name).unlink, missing_ok=True)
        if mine is None:
            source, recipe, stamps, counts, found, plan = handed.take(directory)
            joined = stack.enter_context(_joined(directory, processes, build, building, plan))
            mine = Task(config, launch.encoding, source, recipe, stamps, counts), joined, found, plan
        task, claims, found, plan = mine
        if not portable:
            task = replace(task, source=launch.source_of_all(task.source))
        elif not processes.is_first:
            task.source.noticed.clear()  # which the first one tells
        yield task, claims, found, plan


def _hand_over(task: Task, claims: Claims, found: Found, plan: Plan) -> tuple[Handed, bytes, bool]:
    """What the other processes take, which `building` is theirs too, and whether they have the source from here."""
    plan.by_number  # noqa: B018 (which is computed once, and goes along)
    source = task.source if task.source.portable else None
    values = (source, task.recipe, task.stamps, task.counts, replace(found, runs=found.runs[:0]), plan)
    return hand_over(values, task.directory), claims.token, task.source.portable


@contextlib.contextmanager
def _joined(directory: Path, processes: Processes, build: int, building: bytes, plan: Plan) -> Iterator[Claims | None]:
    """The claims that the first process of a launch agreed on; None where they are over before this one sees them.

    Raises:
        UserError: this process comes to see neither.
    """
    joined: list[Claims] = []

    def joins() -> bool:
        with contextlib.suppress(FileNotFoundError):
            claims = Claims(directory, processes, build, create=False)
            if claims.token == building and claims.join():
                joined.append(claims)
                return True
            claims.leave()
        return is_of(Index.read(directory), plan)

    if not seen(directory / BUILDING, joins):
        raise unseen(directory / BUILDING)
    try:
        yield joined[0] if joined else None
    finally:
        for claims in joined:
            claims.leave()


@contextlib.contextmanager
def _begun(launch: Launch, task: Task, build: int) -> Iterator[tuple[Claims, Found, Plan]]:
    """The plan that all launches follow, and their claims: whoever comes first makes it, others read it."""
    said = False
    while True:
        claims = Claims(task.directory, launch.processes, build)
        try:
            alone = claims.alone() and claims.is_there()
            if alone or (claims.join() and claims.is_there()):
                found = look(task)
                plan = replanned(task, found) if alone else plan_of_others(task, found)
                if plan:
                    if found.index and not is_of(found.index, plan):
                        launch.check(task.recipe | {"source": {}})
                    if alone:
                        sweep_halves(task.directory, launch.held)
                        _begin(task, found, plan, claims)
                    if claims.join():
                        yield claims, found, plan
                        return
                else:
                    said = said or _say_waiting(task.directory)
        finally:
            claims.leave()
        time.sleep(PAUSE)


def _begin(task: Task, found: Found, plan: Plan, claims: Claims) -> None:
    """Leaves the plan to the others, in a directory that holds nothing but its shards and those of the index that is there.

    What the last build replaced goes now: until now a training may have read it.
    """
    if not plan.equals(read_plan(task.directory, task.recipe_digest, found.fingerprint)):
        plan.write(task.directory, task.recipe_digest, found.fingerprint)
    if not is_of(found.index, plan):
        of_index = found.index.shards["number"].tolist() if found.index else ()
        remove_shards(task.directory, {*plan.blocks["number"].tolist(), *of_index})
        claims.begin(plan)


def handed_to_all(value: T | None, directory: Path, processes: Processes) -> T:
    """What the first process has, on every process: its arrays map from a file of a directory, which goes at the end."""
    if processes.world == 1:
        assert value is not None
        return value
    handed = processes.computed_by_first(lambda: hand_over(value, directory))
    try:
        taken: Any = value if processes.is_first else handed.take(directory)
        processes.wait_for_all()
    finally:
        if processes.is_first:
            (directory / handed.name).unlink(missing_ok=True)
    return taken


def sweep_halves(directory: Path, held: int | None) -> None:
    """Removes what processes that were killed left half written, and old arrays, where it is sure that no other one writes."""
    if held is not None:
        if excludes_others(held, directory):
            sweep(directory)
        share(held, directory)  # to have asked may have lost it


def remove_shards(directory: Path, kept: set[int]) -> None:
    """Removes the shards of other numbers than those to be kept."""
    for number in list(shards_in(directory)):
        if number not in kept:
            (directory / shard_name(number)).unlink()
