"""What earlier builds left in a directory, and the plan that follows from it and from what the source has now."""

import concurrent.futures
import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.options import CacheConfig
from engine.data.claims import BUILDING
from engine.data.format.index import INDEX, UNKNOWN, Index, shard_name, shards_in
from engine.data.format.shard import Header, Shard, open_shard
from engine.data.identity import differences, without_source
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
from engine.data.records import read_sample, still_refused
from engine.data.sources.interface import Source
from engine.data.sources.subset import Bucket, Subset
from engine.errors import UserError
from engine.files import digest_of
from engine.messages import Progress
from engine.models.encoder import Encoding
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

    @functools.cached_property
    def recipe_digest(self) -> str:
        return digest_of(self.recipe)

    @property
    def is_bucket(self) -> bool:
        """Whether there are others beside it, so that it may have no record, or lose all samples that it had."""
        return isinstance(self.source, Bucket)

    @property
    def subset(self) -> dict[str, int]:
        """How samples were drawn, as an identity has it."""
        return self.source.drawn if isinstance(self.source, Subset) else {}

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

    @property
    def fingerprint(self) -> str | None:
        """That of the index."""
        return self.index.fingerprint if self.index else None


def look(task: Task) -> Found:
    """What is in the directory of the shards.

    Raises:
        UserError: a build of something else.
    """
    recipe = task.recipe_digest
    index = Index.read(task.directory) if (task.directory / INDEX).exists() else None
    plan = read_plan(task.directory, recipe, index.fingerprint if index else None)
    if not index and begun_with(task.directory) not in (None, recipe):
        _refuse_begun(task, "other options or models")
    if index:
        _refuse_other(task, index)
        blocks, made_by = blocks_of(index), index.made_by or (index.fingerprint,)
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


def blocks_of(index: Index) -> np.ndarray:
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


def complete_index(task: Task, found: Found, read: bool) -> Index | None:
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
    if not is_of(found.index, plan):
        if read:
            raise UserError(
                f"{task.directory}: the data set has changed: {changes_of(task, found.index, plan)}; the shards there cannot "
                "be written; let them be written, name another --shards_dir, or give no data options to train on these"
            )
        return None
    if not found.remembered:
        with contextlib.suppress(OSError):  # of others, who let it be read; it only saves work
            plan.write(task.directory, task.recipe_digest, found.fingerprint)
    return found.index


def keeps_any(task: Task, read: bool) -> bool:
    """Whether the shards that are there hold a sample that the source has.

    Args:
        read: samples whose files are not known.
    """
    found = look(task)
    runs = known(found.runs, task.stamps, task.counts)
    runs = _recognise(task, found, runs) if read else runs
    return bool(Plan(runs[runs["first"] >= 0], found.blocks).counts(found.blocks).any())


def is_of(index: Index | None, plan: Plan) -> bool:
    return index is not None and np.array_equal(blocks_of(index), plan.blocks)


def changes_of(task: Task, index: Index, plan: Plan) -> str:
    before = index.records + index.refused_count
    kept = int(plan.counts(blocks_of(index)).sum())
    return f"{len(task.source) - kept} samples are new, {before - kept} of {before} are gone"


def replanned(task: Task, found: Found) -> Plan:
    return _planned(
        task, found, _recognise(task, found, without_numbers(known(found.runs, task.stamps, task.counts), found.again))
    )


def plan_of_others(task: Task, found: Found) -> Plan | None:
    plan = read_plan(task.directory, task.recipe_digest, found.fingerprint)
    return plan if plan and plan.is_of(task.stamps, task.counts) else None


def _planned(task: Task, found: Found, runs: np.ndarray) -> Plan:
    """The plan of runs of which some have no number, after what was found.

    Raises:
        UserError: the shards that are there hold no sample of the source.
    """
    there = Plan(runs[runs["first"] >= 0], found.blocks)
    blocks = found.blocks.copy()
    if len(blocks) and not there.counts(blocks).any() and not task.is_bucket:
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
            refused = passing(shard)
            for number in np.setdiff1d(shard.here, there.samples(block)[0]).tolist():
                content = shard.numbers["contents"][number - shard.said.first_sample].numpy().tobytes()
                if content != UNKNOWN or number in refused:
                    numbers.setdefault(refused.get(number, content), []).append(number)
    if not numbers:
        return runs

    def told(place: int) -> bytes:
        read = read_sample(task.source, place, task.encoding.captioned, task.config.mask_column is not None)
        name = _name_of(task.source.name(place))
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


def passing(shard: Shard) -> dict[int, bytes]:
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
