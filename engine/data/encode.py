"""Encoding a source into latent shards: by any number of processes, resumable after any interruption, and only what is new.

Every process plans the same (engine/data/plan.py), takes one shard after another by claims (engine/data/claims.py) and works
through it (engine/data/records.py); whoever finds all complete writes the index.
"""

import concurrent.futures
import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.options import CacheConfig, TrainConfig, options_of
from engine.data.claims import BUILDING, PAUSE, Claims
from engine.data.format.index import (
    ENTRY,
    INDEX,
    SAMPLES,
    UNKNOWN,
    Index,
    Refusals,
    add_refused,
    content_of,
    count_refused,
    shard_name,
    shards_in,
    sweep,
)
from engine.data.format.shard import Header, Shard, entry_of, open_shard, without_samples, write_shard
from engine.data.identity import differences, recipe_of, without_source
from engine.data.plan import (
    BLOCK,
    RUN,
    UNNUMBERED,
    Plan,
    begun_with,
    beside,
    known,
    planned,
    read_plan,
    recognised,
    without_numbers,
)
from engine.data.records import Outcome, all_refused, encode_shard, none_usable, read_sample, still_refused, strict
from engine.data.report import describe_refused, say_refused
from engine.data.sources.interface import Source
from engine.data.sources.subset import Subset
from engine.errors import UserError
from engine.files import digest_of, excludes_others, lock, share
from engine.messages import Progress, busy, say, warn
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes
from engine.tensors import read_header

_READERS = 4
_AT_ONCE = 1024  # samples whose contents are read side by side, where they must be read to be known


@dataclass(frozen=True)
class Task:
    """What is to be encoded, and how.

    recipe: all that shapes the shards but the samples.
    stamps, counts: of the source, as it was listed.
    """

    config: CacheConfig
    encoding: Encoding
    source: Source
    recipe: dict[str, Any]
    stamps: np.ndarray
    counts: np.ndarray

    @property
    def directory(self) -> Path:
        return self.config.shards_path

    @property
    def subset(self) -> dict[str, int]:
        """How samples were drawn, as an identity has it."""
        return {"samples": self.source.count, "sample_seed": self.source.seed} if isinstance(self.source, Subset) else {}

    @property
    def earlier_identity(self) -> dict[str, Any]:
        """The identity that these shards have where nobody computed what their samples hold."""
        return self.recipe | {"source": self.source.identity()}


@dataclass(frozen=True)
class Found:
    """What earlier builds left in the directory of the shards.

    index: of a build that is complete.
    blocks: of dtype `BLOCK`, whose shards should be there; planned: those that were to follow them.
    runs: of dtype `RUN`, the numbers of samples that were known.
    remembered: whether these are written down.
    made_by: the fingerprints in the headers of the shards.
    again: the numbers of samples to be tried again.
    taken: the numbers of files of shards, of the index's and of others that new ones may not replace.
    """

    index: Index | None
    blocks: np.ndarray
    planned: np.ndarray
    runs: np.ndarray
    remembered: bool
    made_by: tuple[str, ...]
    again: np.ndarray
    taken: frozenset[int]


def encode_source(
    config: CacheConfig,
    encoding: Encoding,
    source: Source,
    processes: Processes,
    check: Callable[[dict[str, Any]], None] = lambda identity: None,
) -> Index:
    """Encodes what is missing of the shards and returns the index.

    Args:
        check: is given the identity of the shards, to raise what is against it: at the end, and without what is not known yet
            before anything is encoded.

    Raises:
        UserError: the directory holds shards of something else, no sample can be used, or `--strict` met one that cannot.
    """
    with busy("Hashing the frozen models and listing the data set"):
        task = Task(config, encoding, source, recipe_of(config, encoding), *source.stamps())
        found = _look(task)
        index = _complete(task, found, read=False) or (
            None if _may_write(task.directory) else _complete(task, found, read=True)
        )
    complete = all(processes.gather_objects(index is not None))
    if index is None or not complete:
        check(task.recipe)
        _refuse_known(task)
        task.directory.mkdir(parents=True, exist_ok=True)
        with _directory(config) as held:
            index = _complete(task, _look(task), read=False) or _build(task, processes, held, check)
        processes.barrier()
        for noticed, count in sum(processes.gather_objects(source.noticed), Counter()).items():
            say(f"{count} of {len(source)} images: {noticed}")
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
def _directory(config: CacheConfig) -> Iterator[int | None]:
    """Holds the directory of the shards together with others that build there, once nobody has it alone."""
    directory, said = config.shards_path, False
    # A training holds its output directory already.
    if isinstance(config, TrainConfig) and directory.resolve() == Path(config.output_dir).resolve():
        yield None
        return
    while (held := lock(directory, shared=True)) is None:
        said = said or _say_waiting(directory)
        time.sleep(1)
    try:
        yield held
    finally:
        os.close(held)


def _say_waiting(directory: Path) -> bool:
    say(f"{directory}: another run is building these shards; waiting for its end")
    return True


def _look(task: Task) -> Found:
    """What is in the directory of the shards.

    Raises:
        UserError: a build of something else.
    """
    recipe = digest_of(task.recipe)
    index = Index.read(task.directory) if (task.directory / INDEX).exists() else None
    plan = read_plan(task.directory, recipe, index.fingerprint if index else None)
    if not index and begun_with(task.directory) not in (None, recipe):
        _refuse_begun(task, "other options or models")
    if index:
        _refuse_other(task, index)
        blocks, made_by = _blocks_of(index), index.made_by or (index.fingerprint,)
        taken = frozenset([*blocks["number"].tolist(), *shards_in(task.directory)])
    else:
        blocks, made_by = _shards_left(task, recipe)
        blocks, taken = beside(plan.blocks if plan else blocks[:0], blocks), frozenset(blocks["number"].tolist())
    runs, again = (plan.runs, plan.again) if plan else (np.zeros(0, RUN), np.zeros(0, np.int64))
    if not plan and made_by != (recipe,) and made_by and digest_of(task.earlier_identity) in made_by:
        runs = np.zeros(len(task.stamps), RUN)
        runs["stamp"], runs["count"] = task.stamps, task.counts
        runs["first"] = np.cumsum(task.counts) - task.counts
        runs = runs[task.counts > 0]
    return Found(index, blocks, plan.blocks if plan else blocks[:0], runs, plan is not None, made_by, again, taken)


def _refuse_other(task: Task, index: Index) -> None:
    """Raises `UserError` where the shards of an index were built otherwise, but for what the data set holds."""
    before = {name: index.identity.get("source", {}).get(name) for name in ("samples", "sample_seed")}
    now = before | task.subset if task.subset else dict.fromkeys(before)
    if task.config.max_train_samples == index.config.get("max_train_samples") and not (task.subset and before["samples"]):
        now = before  # which of them is all there is depends on the data set alone
    changed = differences(without_source(index.identity) | before, task.recipe | now)
    if changed:
        raise _built_otherwise(task, changed)


def _built_otherwise(task: Task, changed: str) -> UserError:
    return UserError(
        f"{task.directory}: the shards there were built otherwise ({changed}); give the same options, name another "
        f"--shards_dir, give no data options to train on these, or delete {task.directory / INDEX} to build them again"
    )


def _refuse_begun(task: Task, what: str) -> None:
    """Raises `UserError` where a build of something else did not come to its end."""
    building = task.directory / BUILDING
    if building.exists() and building.stat().st_size:
        raise UserError(
            f"{task.directory}: a build there, of {what}, is not complete; end it as it was begun, name another --shards_dir, "
            f"or delete {building} to build these instead"
        )


def _blocks_of(index: Index) -> np.ndarray:
    blocks = np.zeros(len(index.shards), BLOCK)
    for name in BLOCK.names or ():
        blocks[name] = index.shards[name]
    return blocks


def _shards_left(task: Task, recipe: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The blocks of shards that are there without an index, under any number, and the fingerprints in their headers."""
    blocks, made_by, accepted = [], set(), {recipe}
    for number in sorted(shards_in(task.directory)) if task.directory.is_dir() else ():
        try:
            said = Header.model_validate(read_header(task.directory / shard_name(number))[1])
        except (OSError, ValueError, RecursionError):
            continue
        if said.fingerprint not in accepted and len(accepted) == 1:
            accepted.add(digest_of(task.earlier_identity))
        if said.fingerprint in accepted and said.samples:
            blocks.append((said.first_sample, said.samples, number))
            made_by.add(said.fingerprint)
    return np.array(blocks, BLOCK), tuple(sorted(made_by))


def _complete(task: Task, found: Found, read: bool) -> Index | None:
    """The index that is there, if it is one of the samples that the source has.

    Args:
        read: samples whose files are not known; without that, they count as others. Nor does it count then where a build was
            not done with its files.

    Raises:
        UserError: with `read`, it is of others.
    """
    runs = known(found.runs, task.stamps, task.counts)
    unknown, unfinished = (runs["first"] < 0).any() or len(found.again) > 0, (task.directory / BUILDING).exists()
    if found.index is None or ((unknown or unfinished) and not read):
        return None
    plan = _planned(task, found, _recognise(task, found, runs) if read else runs)
    if not _is_of(found.index, plan):
        if read:
            raise UserError(
                f"{task.directory}: the data set has changed: {_changes(task, found.index, plan)}; the shards there cannot be "
                "written; let them be written, name another --shards_dir, or give no data options to train on these"
            )
        return None
    if not found.remembered:
        with contextlib.suppress(OSError):  # of others, who let it be read; it only saves work
            plan.write(task.directory, digest_of(task.recipe), found.index.fingerprint)
    return found.index


def _may_write(directory: Path) -> bool:
    return not directory.exists() or os.access(directory, os.W_OK)


def _is_of(index: Index | None, plan: Plan) -> bool:
    return index is not None and np.array_equal(_blocks_of(index), plan.blocks)


def _planned(task: Task, found: Found, runs: np.ndarray) -> Plan:
    """The plan of runs of which some have no number, after what was found.

    Raises:
        UserError: the shards that are there hold no sample of the source.
    """
    there = Plan(runs[runs["first"] >= 0], found.blocks)
    blocks = found.blocks.copy()
    if len(blocks) and not there.counts(blocks).any():
        if found.index:
            converted = "content" not in found.index.identity.get("source", {})
            once = "; converted shards know of files only what a first build on the data set as it was wrote down"
            raise _built_otherwise(task, f"other files or rows of data{once if converted else ''}")
        _refuse_begun(task, "other files or rows of data")
        blocks = blocks[:0]
    if found.index:  # whose shards stay what they are: those that lose samples are written anew, under other numbers
        begun = {(first, samples): number for first, samples, number in found.planned[~np.isin(found.planned, blocks)].tolist()}
        for place in _shrunk(task, found, found.index, there):
            blocks["number"][place] = begun.get((*blocks[place].item()[:2],), UNNUMBERED)
    plan = planned(runs, beside(blocks, found.planned), task.config.shard_records, found.taken)
    return replace(plan, again=found.again)


def _shrunk(task: Task, found: Found, index: Index, there: Plan) -> list[int]:
    """The places of the blocks of an index of whose samples some are gone, but not all."""
    blocks, counts = found.blocks, there.counts(found.blocks)
    less = (counts > 0) & (counts < blocks["samples"])
    remembered = np.isin(blocks, found.planned)  # with the samples that their shards know
    before = Plan(found.runs, found.planned).counts(blocks)
    shrunk = np.flatnonzero(less & remembered & (counts < before)).tolist()
    for place in np.flatnonzero(less & ~remembered).tolist():
        if len(np.setdiff1d(open_shard(task.directory, index, place).here, there.samples(blocks[place])[0])):
            shrunk.append(place)
    return shrunk


def _place_of(index: Index, block: np.void) -> int:
    return int(np.searchsorted(index.shards["first_sample"], block["first_sample"], side="right")) - 1


def _recognise(task: Task, found: Found, runs: np.ndarray) -> np.ndarray:
    """Runs in which samples whose files were not known have their number by what they hold, where there are shards of that."""
    unknown = int(runs["count"][runs["first"] < 0].sum())
    if not unknown:
        return runs
    there = Plan(runs[runs["first"] >= 0], found.blocks)
    numbers: dict[bytes, list[int]] = {}
    for block in found.blocks[there.counts(found.blocks) < found.blocks["samples"]]:
        with contextlib.suppress(UserError):  # a damaged one is built again
            shard = Shard(task.directory / shard_name(block["number"]), task.encoding.record_spec, task.recipe)
            refused = _passing(shard)
            for number in np.setdiff1d(shard.here, there.samples(block)[0]).tolist():
                content = shard.numbers["contents"][number - shard.said.first_sample].numpy().tobytes()
                if content != UNKNOWN or number in refused:
                    numbers.setdefault(refused.get(number, content), []).append(number)
    if not numbers:
        return runs

    def told(place: int) -> bytes:
        read, name = read_sample(task.source, place, task.encoding.captioned), _name_of(task.source.name(place))
        return name if name in numbers and still_refused(task.source, read) else read.content

    def contents() -> Iterator[bytes]:
        starts = np.cumsum(runs["count"]) - runs["count"]
        places = itertools.chain.from_iterable(
            range(start, start + count)
            for start, count, first in zip(starts.tolist(), runs["count"].tolist(), runs["first"].tolist(), strict=True)
            if first < 0
        )
        with (
            concurrent.futures.ThreadPoolExecutor(max(task.config.dataloader_num_workers, _READERS)) as pool,
            Progress(unknown, "Reading files that changed", "image") as progress,
        ):
            while some := list(itertools.islice(places, _AT_ONCE)):
                for digest in pool.map(told, some):
                    progress.update()
                    yield digest

    return recognised(runs, contents(), numbers)


def _build(task: Task, processes: Processes, held: int | None, check: Callable[[dict[str, Any]], None]) -> Index:
    """Builds beside whoever else does; once more where others ended that build and began another meanwhile."""
    started = time.perf_counter()
    while True:
        with _agreed(task, held, check) as (claims, found, plan):
            if not _is_of(found.index, plan):
                _say_changes(task, found, plan)
                _encode_missing(task, found, plan, claims, processes)
            with claims.index():
                found = _look(task)
                index = found.index  # of another process; or files were but touched
                if claims.is_there():
                    if index is None or not _is_of(index, plan):
                        index = _write_index(task, found, plan, claims, time.perf_counter() - started)
                    if index:
                        _sweep_halves(task.directory, held)
                        claims.path.unlink()
                if index and _is_of(index, plan):
                    return index


@contextlib.contextmanager
def _agreed(task: Task, held: int | None, check: Callable[[dict[str, Any]], None]) -> Iterator[tuple[Claims, Found, Plan]]:
    """The plan that all processes follow, and their claims: whoever comes first makes it, others read it.

    Args:
        held: the directory, held with others.
        check: raises what is against records that are not those of the index that is there.
    """
    said = False
    while True:
        claims = Claims(task.directory)
        try:
            alone = claims.alone() and claims.is_there()
            if alone or (claims.share() and claims.is_there()):
                found = _look(task)
                plan = _replanned(task, found) if alone else _plan_of_others(task, found)
                if plan:
                    if found.index and not _is_of(found.index, plan):
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


def _passing(shard: Shard) -> dict[int, bytes]:
    """The numbers of samples that were refused for what may be over, with what tells them by their names."""
    refused = np.setdiff1d(shard.here, shard.numbers["source"].numpy())
    unknown = (shard.numbers["contents"].numpy() == np.frombuffer(UNKNOWN, np.uint8)).all(1)[refused - shard.covers.start]
    if not unknown.any():
        return {}
    return {
        number: _name_of(item["source"])
        for number, item, is_it in zip(refused.tolist(), shard.refused, unknown, strict=True)
        if is_it
    }


def _name_of(name: str) -> bytes:
    return b"name " + name.encode(errors="backslashreplace")


def _replanned(task: Task, found: Found) -> Plan:
    return _planned(
        task, found, _recognise(task, found, without_numbers(known(found.runs, task.stamps, task.counts), found.again))
    )


def _plan_of_others(task: Task, found: Found) -> Plan | None:
    plan = read_plan(task.directory, digest_of(task.recipe), found.index.fingerprint if found.index else None)
    return plan if plan and plan.is_of(task.stamps, task.counts) else None


def _begin(task: Task, found: Found, plan: Plan, claims: Claims) -> None:
    """Leaves the plan to the others, in a directory that holds nothing but its shards and those of the index that is there.

    What the last build replaced goes now: until now a training may have read it.
    """
    recipe, index = digest_of(task.recipe), found.index.fingerprint if found.index else None
    changed = not _is_of(found.index, plan)
    if changed or claims.begun:
        of_index = found.index.shards["number"].tolist() if found.index else ()
        _sweep(task.directory, {*plan.blocks["number"].tolist(), *of_index})
    if not plan.equals(read_plan(task.directory, recipe, index)):
        plan.write(task.directory, recipe, index)
    if changed:
        claims.begin(plan)


def _sweep_halves(directory: Path, held: int | None) -> None:
    """Removes what processes that were killed left half written, and old arrays, where it is sure that no other one writes."""
    if held is not None:
        if excludes_others(held):
            sweep(directory)
        share(held)  # to have asked may have lost it


def _changes(task: Task, index: Index, plan: Plan) -> str:
    before = index.records + index.refused_count
    kept = int(plan.counts(_blocks_of(index)).sum())
    return f"{len(task.source) - kept} samples are new, {before - kept} of {before} are gone"


def _say_changes(task: Task, found: Found, plan: Plan) -> None:
    if not found.index:
        return
    changes = _changes(task, found.index, plan)
    if 2 * int(plan.counts(found.blocks).sum()) < found.index.records + found.index.refused_count:
        warn(f"{task.directory}: most of the data set has changed: {changes}")
    else:
        say(f"{task.directory}: the data set has changed: {changes}; only the shards that this changes are written")


def _encode_missing(task: Task, found: Found, plan: Plan, claims: Claims, processes: Processes) -> None:
    """Has every shard of the plan complete, by this process or by others."""
    outcome, started = Outcome(), [time.monotonic()]
    counts = plan.counts(plan.blocks)
    missing = np.flatnonzero(~np.isin(plan.blocks, _blocks_of(found.index))) if found.index else np.arange(len(plan.blocks))
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(int(counts[missing].sum()), "Encoding", "image", claims.done()))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(max(task.config.dataloader_num_workers, 1)))
        encoders: list[Encoder] = []  # loaded when something is to be encoded

        def encoder() -> Encoder:
            if not encoders:
                encoders.append(stack.enter_context(task.encoding.encoder(processes.device)))
            return encoders[0]

        def show() -> None:
            if time.monotonic() >= started[0] + 1:
                started[0] = time.monotonic()
                progress.update(max(claims.done() - progress.done, 0))

        waiting = missing.tolist()
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
                time.sleep(PAUSE)
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
    done = itertools.count(1)

    def advance() -> None:
        claims.advance(place, next(done))
        show()

    claims.advance(place, 0)
    if not _is_whole(task, found, block, path, numbers):
        old = _shard_with(task, found, block, path, numbers)
        if old:
            rows, contents = without_samples(old, numbers)
            fingerprint = old.said.fingerprint
        else:
            covers = range(int(block["first_sample"]), int(block["first_sample"] + block["samples"]))
            samples = dict(zip(numbers.tolist(), places.tolist(), strict=True))
            rows, contents = encode_shard(
                task.config, task.encoding, encoder(), task.source, covers, samples, pool, outcome, advance
            )
            fingerprint = _fingerprint(task, found)
        write_shard(path, rows, contents, fingerprint)
    claims.complete(place, numbers, entry_of(Shard(path, task.encoding.record_spec, task.recipe), int(block["number"])))


def _fingerprint(task: Task, found: Found) -> str:
    """That of shards that are encoded: as those beside them that were built before contents had digests."""
    recipe = digest_of(task.recipe)
    return found.made_by[0] if not found.index and len(found.made_by) == 1 else recipe


def _opened(task: Task, block: np.void, path: Path, made_by: Iterable[str]) -> Shard | None:
    """The shard of a block, if it is there and of these makers."""
    try:
        shard = Shard(path, task.encoding.record_spec, task.recipe)
    except UserError:
        return None
    covers = range(int(block["first_sample"]), int(block["first_sample"] + block["samples"]))
    return shard if shard.covers == covers and shard.said.fingerprint in made_by and not shard.damage() else None


def _is_whole(task: Task, found: Found, block: np.void, path: Path, numbers: np.ndarray) -> bool:
    """Whether an earlier build left the shard of a block, with these samples and no others."""
    shard = _opened(task, block, path, {*found.made_by, digest_of(task.recipe)})
    return shard is not None and np.array_equal(shard.here, numbers)


def _shard_with(task: Task, found: Found, block: np.void, path: Path, numbers: np.ndarray) -> Shard | None:
    """A shard that holds these samples and others that are gone."""
    paths = [path]
    if found.index and len(found.index.shards):
        paths.append(task.directory / shard_name(found.index.shards["number"][_place_of(found.index, block)]))
    shards = (_opened(task, block, path, {*found.made_by, digest_of(task.recipe)}) for path in paths)
    return next((shard for shard in shards if shard and not len(np.setdiff1d(numbers, shard.here))), None)


def _write_index(task: Task, found: Found, plan: Plan, claims: Claims, seconds: float) -> Index | None:
    """Writes the index of the shards; None where one is not complete after all.

    Raises:
        UserError: no sample became a record; then only shards of the index that is there are left.
    """
    before = dict(zip(_blocks_of(found.index).tolist(), found.index.shards, strict=True)) if found.index else {}
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
        again += _passing(shard) if shard.said.fingerprint == digest_of(task.recipe) else ()
    refused, plan = add_refused(refused_of), replace(plan, again=np.array(again, np.int64))
    if not shards["records"].any():
        _sweep(task.directory, {number for _, _, number in before})
        claims.path.unlink()
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
    plan.write(task.directory, digest_of(task.recipe), found.index.fingerprint if found.index else None, index.fingerprint)
    index.write(task.directory)
    say_refused(len(task.source), refused, task.directory)
    return index


def _sweep(directory: Path, numbers: set[int]) -> None:
    """Removes the shards of other numbers."""
    for number in list(shards_in(directory)):
        if number not in numbers:
            (directory / shard_name(number)).unlink()
