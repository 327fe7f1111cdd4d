"""Encoding a source into latent shards: by any number of processes, resumable after any interruption, and only what is new.

The first process of a launch plans (engine/data/found.py) and hands the plan over (engine/data/together.py); all take one shard
after another by claims (engine/data/claims.py) and work through it (engine/data/records.py); the first writes the index when
all are complete.
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

from engine.config.options import CacheConfig, options_of
from engine.data.claims import PAUSE, Claims
from engine.data.format.index import (
    ENTRY,
    SAMPLES,
    Index,
    Refusals,
    add_refused,
    content_of,
    count_refused,
    shard_name,
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
)
from engine.data.identity import recipe_of, refuse_other_models
from engine.data.plan import Plan
from engine.data.records import Outcome, all_refused, encode_shard, none_usable, strict
from engine.data.report import describe_refused, say_refused
from engine.data.sources import open_source
from engine.data.sources.interface import Source
from engine.data.together import Launch, remove_shards, shards_held, sweep_halves, together
from engine.errors import UserError
from engine.files import digest_of
from engine.messages import Progress, busy, say, warn
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes


def encode_source(
    config: CacheConfig,
    encoding: Encoding,
    processes: Processes,
    check: Callable[[dict[str, Any]], None] = lambda identity: None,
    source: Source | None = None,
    source_of_all: Callable[[Source | None], Source] | None = None,
    encoder: Callable[[Task], Encoder] | None = None,
) -> Index:
    """Encodes what is missing of the shards and returns the index. The first process alone lists and looks, and tells others.

    Args:
        check: is given the identity of the shards, to raise what is against it: at the end, and without what is not known yet
            before anything is encoded.
        source: instead of the one that the options name; of the first process.
        source_of_all: gives it to all processes, where it is not the one that the options name.
        encoder: the frozen models, where `loaded_once` has them for several calls.

    Raises:
        UserError: there is no such source, the directory holds shards of something else, no sample can be used, or `--strict`
            met one that cannot.
    """
    task: Task | None = None

    def complete() -> Index | None:
        nonlocal task
        with busy("Opening the data set"):
            opened = open_source(config, encoding.captioned) if source is None else source
        with busy("Hashing the frozen models and listing the data set"):
            task = Task(config, encoding, opened, recipe_of(config, encoding), *opened.stamps())
            found = look(task)
            index = complete_index(task, found, read=False) or (
                None if _may_write(task.directory) else complete_index(task, found, read=True)
            )
        if index is None:
            check(task.recipe)
            if not task.is_bucket:
                refuse_known(config, task.source)
            task.directory.mkdir(parents=True, exist_ok=True)
        return index

    def complete_meanwhile() -> Index | None:
        assert task is not None
        return complete_index(task, look(task), read=False)

    index = processes.computed_by_first(complete)
    if index is None:
        with shards_held(config, processes) as held:
            index = processes.computed_by_first(complete_meanwhile)
            if index is None:
                of_all = source_of_all or partial(opened_by_all, config, encoding, processes)
                with contextlib.nullcontext(encoder) if encoder else loaded_once(processes) as models:
                    index = _build(Launch(config, encoding, processes, check, task, held, of_all, models))
    check(index.identity)
    if config.strict and index.refused_count:
        raise UserError(f"--strict: {describe_refused(index.refused)}")
    return index


def opened_by_all(config: CacheConfig, encoding: Encoding, processes: Processes, mine: Source | None) -> Source:
    """The source that the options name, on every process; the first has it."""
    source = processes.first_before_others(lambda: mine or open_source(config, encoding.captioned))
    if not processes.is_first:
        source.noticed.clear()  # which the first one tells
    return source


@contextlib.contextmanager
def loaded_once(processes: Processes) -> Iterator[Callable[[Task], Encoder]]:
    """Gives what loads the frozen models of a task when they are first asked for; at the end their memory is given back."""
    with contextlib.ExitStack() as stack:
        encoders: list[Encoder] = []

        def encoder(task: Task) -> Encoder:
            if not encoders:
                if not processes.is_first:  # whose models the recipe is of
                    refuse_other_models(task.encoding, task.recipe)
                encoders.append(stack.enter_context(task.encoding.encoder(processes.device)))
            return encoders[0]

        yield encoder


def refuse_known(config: CacheConfig, source: Source) -> None:
    """Raises `UserError` where it is known without reading them that all samples are refused; with --strict, that one is."""
    refused = ((place, source.refusal(place)) for place in range(len(source)))
    if config.strict:
        for place, why in refused:
            if why:
                raise strict(source, place, why)
    elif all(why for _, why in refused):
        raise all_refused(source, ((place, source.refusal(place)) for place in range(len(source))))


def _may_write(directory: Path) -> bool:
    return not directory.exists() or os.access(directory, os.W_OK)


def _place_of(index: Index, sample: int) -> int:
    return int(np.searchsorted(index.shards["first_sample"], sample, side="right")) - 1


def _build(launch: Launch) -> Index:
    """Builds beside whoever else does; once more where others ended that build and began another meanwhile."""
    started, builds, processes = time.perf_counter(), itertools.count(), launch.processes
    while True:
        with together(launch, next(builds)) as (task, claims, found, plan):
            if claims and not is_of(found.index, plan):
                _say_changes(task, found, plan)
                _encode_missing(task, found, plan, claims, processes, launch.encoder)
            processes.wait_for_all()  # who may look at what was handed over, which then goes
            ended = partial(_end, task, plan, claims, launch.held, started)
            if index := processes.computed_by_first(ended):
                if not task.is_bucket:
                    say_noticed(task.source.noticed, len(task.source), processes)
                return index


def say_noticed(noticed: Counter[str], samples: int, processes: Processes) -> None:
    """Says what was decided about images, of which each process noticed some, and of how many samples."""
    for what, count in sum(processes.gather_objects(noticed), Counter()).items():
        say(f"{count} of {samples} images: {what}")


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
                sweep_halves(task.directory, held)
                claims.path.unlink(missing_ok=True)
        return index if is_of(index, plan) else None


def _say_changes(task: Task, found: Found, plan: Plan) -> None:
    if not found.index:
        return
    changes = changes_of(task, found.index, plan)
    if 2 * int(plan.counts(found.blocks).sum()) < found.index.records + found.index.refused_count:
        warn(f"{task.directory}: most of the data set has changed: {changes}")
    else:
        say(f"{task.directory}: the data set has changed: {changes}; only the shards that this changes are written")


def _encode_missing(
    task: Task, found: Found, plan: Plan, claims: Claims, processes: Processes, encoder: Callable[[Task], Encoder]
) -> None:
    """Has every shard of the plan complete, by this process or by others."""
    outcome = Outcome()
    counts = plan.counts(plan.blocks)
    missing = np.flatnonzero(~np.isin(plan.blocks, blocks_of(found.index))) if found.index else np.arange(len(plan.blocks))
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(int(counts[missing].sum()), "Encoding", "image", claims.done()))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(max(task.config.dataloader_num_workers, 1)))

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
                            _complete_shard(task, found, plan, claims, place, partial(encoder, task), pool, outcome, show)
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
    if not (shards["records"].any() or task.is_bucket):
        remove_shards(task.directory, {number for _, _, number in before})
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
    if not task.is_bucket:
        say_refused(len(task.source), refused, task.directory)
    return index
