"""Encoding a source into latent shards: by any number of processes, resumable after any interruption, and only what is new.

Every process plans the same (engine/data/found.py), takes one shard after another by claims (engine/data/claims.py) and works
through it (engine/data/records.py); whoever finds all complete writes the index.
"""

import concurrent.futures
import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.options import CacheConfig, TrainConfig, options_of
from engine.data.claims import BUILDING, PAUSE, Claims
from engine.data.format.index import (
    ENTRY,
    SAMPLES,
    Index,
    Refusals,
    add_refused,
    content_of,
    count_refused,
    shard_name,
    shards_in,
    sweep,
)
from engine.data.format.shard import Shard, entry_of, without_samples, write_shard
from engine.data.found import (
    Found,
    Task,
    blocks_of,
    changes_of,
    complete_index,
    is_of,
    look,
    passing,
    plan_of_others,
    replanned,
)
from engine.data.handed import Handed, hand_over
from engine.data.identity import recipe_of, refuse_other_models
from engine.data.plan import Plan, read_plan
from engine.data.records import Outcome, all_refused, encode_shard, none_usable, strict
from engine.data.report import describe_refused, say_refused
from engine.data.sources import open_source
from engine.data.sources.interface import Source
from engine.errors import UserError
from engine.files import digest_of, excludes_others, held, seen, share, unseen
from engine.messages import Progress, busy, say, warn
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes, warn_of_local_locks


def encode_source(
    config: CacheConfig,
    encoding: Encoding,
    source: Source | None,
    processes: Processes,
    check: Callable[[dict[str, Any]], None] = lambda identity: None,
) -> Index:
    """Encodes what is missing of the shards and returns the index.

    Args:
        source: None in all processes but the first, which alone lists and looks, and tells the others.
        check: is given the identity of the shards, to raise what is against it: at the end, and without what is not known yet
            before anything is encoded.

    Raises:
        UserError: the directory holds shards of something else, no sample can be used, or `--strict` met one that cannot.
    """
    tasks: list[Task] = []  # the first process's

    def complete() -> Index | None:
        assert source is not None
        with busy("Hashing the frozen models and listing the data set"):
            task = Task(config, encoding, source, recipe_of(config, encoding), *source.stamps())
            tasks.append(task)
            found = look(task)
            index = complete_index(task, found, read=False) or (
                None if _may_write(task.directory) else complete_index(task, found, read=True)
            )
        if index is None:
            check(task.recipe)
            _refuse_known(task)
            task.directory.mkdir(parents=True, exist_ok=True)
        return index

    index = processes.computed_by_first(complete)
    if index is None:
        with _directory(config, processes) as ours:
            index = processes.computed_by_first(lambda: complete_index(tasks[0], look(tasks[0]), read=False))
            index = index or _build(config, encoding, tasks, processes, ours, check)
    check(index.identity)
    if config.strict and index.refused_count:
        raise UserError(f"--strict: {describe_refused(index.refused)}")
    return index


def _refuse_known(task: Task) -> None:
    """Raises `UserError` where it is known without reading them that all samples are refused; with --strict, that one is."""
    refused = ((place, task.source.refusal(place)) for place in range(len(task.source)))
    if task.config.strict:
        for place, why in refused:
            if why:
                raise strict(task.source, place, why)
    elif all(why for _, why in refused):
        raise all_refused(task.source, ((place, task.source.refusal(place)) for place in range(len(task.source))))


@contextlib.contextmanager
def _directory(config: CacheConfig, processes: Processes) -> Iterator[int | None]:
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


def _may_write(directory: Path) -> bool:
    return not directory.exists() or os.access(directory, os.W_OK)


def _place_of(index: Index, sample: int) -> int:
    return int(np.searchsorted(index.shards["first_sample"], sample, side="right")) - 1


def _build(
    config: CacheConfig,
    encoding: Encoding,
    tasks: list[Task],
    processes: Processes,
    held: int | None,
    check: Callable[[dict[str, Any]], None],
) -> Index:
    """Builds beside whoever else does; once more where others ended that build and began another meanwhile.

    Args:
        tasks: the first process's.
    """
    started, builds = time.perf_counter(), itertools.count()
    while True:
        with _together(config, encoding, tasks, processes, held, check, next(builds)) as (task, claims, found, plan):
            if claims and not is_of(found.index, plan):
                _say_changes(task, found, plan)
                _encode_missing(task, found, plan, claims, processes)
            processes.wait_for_all()  # who may look at what was handed over, which then goes
            ended = partial(_end, task, plan, claims, held, started)
            if index := processes.computed_by_first(ended):
                for noticed, count in sum(processes.gather_objects(task.source.noticed), Counter()).items():
                    say(f"{count} of {len(task.source)} images: {noticed}")
                return index


def _end(task: Task, plan: Plan, claims: Claims | None, held: int | None, started: float) -> Index | None:
    """Writes the index, unless another launch did; None where there is none of this plan after all."""
    assert claims is not None  # the first process's
    with claims.index():
        found = look(task)
        index = found.index  # of another launch; or files were but touched
        if claims.is_there():
            if index is None or not is_of(index, plan):
                index = _write_index(task, found, plan, claims, time.perf_counter() - started)
            if index:
                _sweep_halves(task.directory, held)
                claims.path.unlink(missing_ok=True)
        return index if is_of(index, plan) else None


@contextlib.contextmanager
def _together(
    config: CacheConfig,
    encoding: Encoding,
    tasks: list[Task],
    processes: Processes,
    held: int | None,
    check: Callable[[dict[str, Any]], None],
    build: int,
) -> Iterator[tuple[Task, Claims | None, Found, Plan]]:
    """What a launch builds: its first process agrees with other launches, and hands the others what it listed, found and
    planned. There are no claims where other launches have ended that build meanwhile."""
    with contextlib.ExitStack() as stack:
        mine: list[tuple[Task, Claims | None, Found, Plan]] = []

        def agree() -> tuple[Handed, int, bool] | None:
            claims, found, plan = stack.enter_context(_agreed(tasks[0], held, check, processes, build))
            mine.append((tasks[0], claims, found, plan))
            return _hand_over(tasks[0], claims, found, plan) if processes.world > 1 else None

        if (told := processes.computed_by_first(agree)) is None:
            yield mine[0]
            return
        handed, building, portable = told
        if not mine:
            source, recipe, stamps, counts, found, plan = handed.take(config.shards_path)
            joined = stack.enter_context(_joined(config.shards_path, processes, build, building, plan))
            mine.append((Task(config, encoding, source, recipe, stamps, counts), joined, found, plan))
        task, claims, found, plan = mine[0]
        if not portable:
            source = processes.first_before_others(lambda: task.source or open_source(config, encoding.captioned))
            task = replace(task, source=source)
        if not processes.is_first:
            task.source.noticed.clear()  # which the first one tells
        yield task, claims, found, plan
        if processes.is_first:
            (task.directory / handed.name).unlink(missing_ok=True)


def _hand_over(task: Task, claims: Claims, found: Found, plan: Plan) -> tuple[Handed, int, bool]:
    """What the other processes take, which `building` is theirs too, and whether they have the source from here."""
    plan.counts(plan.blocks)  # what the plan keeps of it goes along
    source = task.source if task.source.portable else None
    values = (source, task.recipe, task.stamps, task.counts, replace(found, runs=found.runs[:0]), plan)
    return hand_over(values, task.directory), os.fstat(claims.descriptor).st_ino, task.source.portable


@contextlib.contextmanager
def _joined(directory: Path, processes: Processes, build: int, building: int, plan: Plan) -> Iterator[Claims | None]:
    """The claims that the first process of a launch agreed on; None where they are over before this one sees them.

    Raises:
        UserError: this process comes to see neither.
    """
    joined: list[Claims] = []

    def joins() -> bool:
        with contextlib.suppress(FileNotFoundError):
            claims = Claims(directory, processes, build, create=False)
            if os.fstat(claims.descriptor).st_ino == building and claims.share():
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
def _agreed(
    task: Task, held: int | None, check: Callable[[dict[str, Any]], None], processes: Processes, build: int
) -> Iterator[tuple[Claims, Found, Plan]]:
    """The plan that all launches follow, and their claims: whoever comes first makes it, others read it.

    Args:
        held: the directory, held with others.
        check: raises what is against records that are not those of the index that is there.
    """
    said = False
    while True:
        claims = Claims(task.directory, processes, build)
        try:
            alone = claims.alone() and claims.is_there()
            if alone or (claims.share() and claims.is_there()):
                found = look(task)
                plan = replanned(task, found) if alone else plan_of_others(task, found)
                if plan:
                    if found.index and not is_of(found.index, plan):
                        check(task.recipe | {"source": {}})
                    if alone:
                        _sweep_halves(task.directory, held)
                        _begin(task, found, plan, claims)
                    if claims.share():
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
        _sweep(task.directory, {*plan.blocks["number"].tolist(), *of_index})
        claims.begin(plan)


def _sweep_halves(directory: Path, held: int | None) -> None:
    """Removes what processes that were killed left half written, and old arrays, where it is sure that no other one writes."""
    if held is not None:
        if excludes_others(held, directory):
            sweep(directory)
        share(held, directory)  # to have asked may have lost it


def _say_changes(task: Task, found: Found, plan: Plan) -> None:
    if not found.index:
        return
    changes = changes_of(task, found.index, plan)
    if 2 * int(plan.counts(found.blocks).sum()) < found.index.records + found.index.refused_count:
        warn(f"{task.directory}: most of the data set has changed: {changes}")
    else:
        say(f"{task.directory}: the data set has changed: {changes}; only the shards that this changes are written")


def _encode_missing(task: Task, found: Found, plan: Plan, claims: Claims, processes: Processes) -> None:
    """Has every shard of the plan complete, by this process or by others."""
    outcome = Outcome()
    counts = plan.counts(plan.blocks)
    missing = np.flatnonzero(~np.isin(plan.blocks, blocks_of(found.index))) if found.index else np.arange(len(plan.blocks))
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(int(counts[missing].sum()), "Encoding", "image", claims.done()))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(max(task.config.dataloader_num_workers, 1)))
        encoders: list[Encoder] = []  # loaded when something is to be encoded

        def encoder() -> Encoder:
            if not encoders:
                if not processes.is_first:  # whose models the recipe is of
                    refuse_other_models(task.encoding, task.recipe, processes.rank)
                encoders.append(stack.enter_context(task.encoding.encoder(processes.device)))
            return encoders[0]

        def show() -> None:
            if processes.is_first:
                progress.update(max(claims.done() - progress.done, 0))

        # Each process begins elsewhere, and meets others only in the end.
        waiting = np.roll(missing, -len(missing) * processes.rank // processes.world).tolist()
        while waiting and claims.is_there():
            others = []
            for place in waiting:
                if _entry(task, plan, claims, place) is None:
                    with claims.shard(place) as mine:
                        if not mine:
                            others.append(place)
                        elif _entry(task, plan, claims, place) is None:
                            _complete_shard(task, found, plan, claims, place, encoder, pool, outcome, show)
            if waiting == others:  # all are in the hands of other processes, of which any may end before its shard is done
                time.sleep(PAUSE * max(1, processes.world // 16))  # who has nothing to do must not keep the others from it
                show()
            waiting = others


def _entry(task: Task, plan: Plan, claims: Claims, place: int) -> np.void | None:
    """What the index says of the shard of a block, if that is complete."""
    block = plan.blocks[place]
    entry = claims.entry(place, block, plan.samples(block)[0])
    path = task.directory / shard_name(block["number"])
    return entry if entry is not None and path.exists() and path.stat().st_size == entry["bytes"] else None


def _complete_shard(
    task: Task,
    found: Found,
    plan: Plan,
    claims: Claims,
    place: int,
    encoder: Callable[[], Encoder],
    pool: concurrent.futures.ThreadPoolExecutor,
    outcome: Outcome,
    show: Callable[[], None],
) -> None:
    """Has the shard of a block complete: as it is, without samples that are gone, or encoded."""
    block = plan.blocks[place]
    numbers, places = plan.samples(block)
    path = task.directory / shard_name(block["number"])
    done, said = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, said
        done += 1
        if time.monotonic() > said + 1:  # which other nodes must be told each time
            said = time.monotonic()
            claims.advance(place, done)
            show()

    claims.advance(place, 0)
    covers = range(int(block["first_sample"]), int(block["first_sample"] + block["samples"]))
    shard = _shard_with(task, found, covers, path, numbers)
    if shard is None or shard.path != path or not np.array_equal(shard.here, numbers):
        if shard:
            rows, contents = without_samples(shard, numbers)
            fingerprint = shard.said.fingerprint
        else:
            samples = dict(zip(numbers.tolist(), places.tolist(), strict=True))
            rows, contents = encode_shard(
                task.config, task.encoding, encoder(), task.source, covers, samples, pool, outcome, advance
            )
            fingerprint = _fingerprint(task, found)
        write_shard(path, rows, contents, fingerprint)
        shard = Shard(path, task.encoding.record_spec, task.recipe)
    claims.complete(place, numbers, entry_of(shard, int(block["number"])))


def _fingerprint(task: Task, found: Found) -> str:
    """That of shards that are encoded: as those beside them that were built before contents had digests."""
    return found.made_by[0] if not found.index and len(found.made_by) == 1 else task.recipe_digest


def _shard_with(task: Task, found: Found, covers: range, path: Path, numbers: np.ndarray) -> Shard | None:
    """A whole shard of this range that an earlier build left, at `path` or in the index, and that holds these samples."""
    paths = [path]
    if found.index and len(found.index.shards):
        paths.append(task.directory / shard_name(found.index.shards["number"][_place_of(found.index, covers.start)]))
    made_by = {*found.made_by, task.recipe_digest}
    for candidate in dict.fromkeys(paths):
        with contextlib.suppress(UserError):
            shard = Shard(candidate, task.encoding.record_spec, task.recipe)
            known = shard.covers == covers and shard.said.fingerprint in made_by and not shard.damage()
            if known and not len(np.setdiff1d(numbers, shard.here)):
                return shard
    return None


def _write_index(task: Task, found: Found, plan: Plan, claims: Claims, seconds: float) -> Index | None:
    """Writes the index of the shards; None where one is not complete after all.

    Raises:
        UserError: no sample became a record; then only shards of the index that is there are left.
    """
    before = dict(zip(blocks_of(found.index).tolist(), found.index.shards, strict=True)) if found.index else {}
    entries = [
        before[block.item()] if block.item() in before else _entry(task, plan, claims, place)
        for place, block in enumerate(plan.blocks)
    ]
    if any(entry is None for entry in entries):
        return None
    shards = np.array(entries, ENTRY)
    refusing = np.flatnonzero(shards["records"] < plan.counts(plan.blocks))
    refused_of: list[dict[str, Refusals]] = []
    again: list[int] = []
    for number in shards["number"][refusing].tolist():
        shard = Shard(task.directory / shard_name(number), task.encoding.record_spec, task.recipe)
        refused_of.append(count_refused(shard.refused))
        again += passing(shard) if shard.said.fingerprint == task.recipe_digest else ()
    refused, plan = add_refused(refused_of), replace(plan, again=np.array(again, np.int64))
    if not shards["records"].any():
        _sweep(task.directory, {number for _, _, number in before})
        claims.path.unlink(missing_ok=True)
        if not before:
            (task.directory / SAMPLES).unlink(missing_ok=True)
        raise UserError(none_usable(refused))
    made_by = tuple(dict.fromkeys([*found.made_by, _fingerprint(task, found)]))
    identity = task.recipe | {"source": {"content": content_of(shards), **task.subset}}
    if not found.index and made_by == (digest_of(task.earlier_identity),):
        identity = task.earlier_identity  # what was built before contents had digests, and is now complete again
    index = Index(
        family=task.config.family,
        fingerprint=digest_of(identity),
        identity=identity,
        config={name: value for name, value in options_of(task.config).items() if name in CacheConfig.model_fields},
        fields=task.encoding.record_spec,
        shards=shards,
        refused=refused,
        encode_seconds=seconds,
        made_by=made_by if made_by != (digest_of(identity),) else (),
    )
    index.check()
    plan.write(task.directory, task.recipe_digest, found.fingerprint, index.fingerprint)
    index.write(task.directory)
    say_refused(len(task.source), refused, task.directory)
    return index


def _sweep(directory: Path, numbers: set[int]) -> None:
    """Removes the shards of other numbers."""
    for number in list(shards_in(directory)):
        if number not in numbers:
            (directory / shard_name(number)).unlink()
