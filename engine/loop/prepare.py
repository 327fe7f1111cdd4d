"""What comes before the first step: the division of the batch, the shards, and the numbers of the run."""

import hashlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from engine.config.checks import holds_shards
from engine.config.mixture import DataSet, data_sets_of
from engine.config.options import ALTER_THE_RESULT, CacheConfig, TrainConfig, options_of
from engine.data.format.cache import ShardsCache
from engine.data.format.index import INDEX, Index
from engine.data.format.reader import Shards
from engine.data.format.remote import CachedShards, RangedShards, ReadAhead
from engine.data.format.verify import verify
from engine.data.identity import differences
from engine.data.parts import Part, build_parts, find_parts
from engine.data.samples.batch import BatchPlan
from engine.data.samples.dropout import Dropout
from engine.data.samples.held_out import chosen, splits_of
from engine.data.samples.order import order_of, seed_of_stream
from engine.data.samples.streams import Stream, Streams
from engine.errors import UserError
from engine.files import digest_of, seen, unseen
from engine.launcher import launched, local_world
from engine.loop.checkpoints.state import State, states_of
from engine.loop.held_out import Records
from engine.loop.run import Run
from engine.messages import Progress, busy, say, warn
from engine.models.family import Family
from engine.processes import Processes
from engine.storage import Storage, is_remote

Check = Callable[[str, bool, dict[str, Any]], None]

_AT_A_TIME = 4096  # records
VALIDATION = "validation"  # in the directory of the shards: those of --validation_data_dir


def divide_global_batch(config: TrainConfig, world: int) -> TrainConfig:
    """The configuration with the accumulation that `--global_batch_size` takes.

    Raises:
        UserError: the processes cannot divide it evenly.
    """
    of_both = 2 if config.with_prior_preservation else 1  # as many of the class as of the instance
    whole, part = config.global_batch_size, config.train_batch_size * of_both * world
    if whole is None:
        return config
    if whole % part:
        below, above = whole // part * part, (whole // part + 1) * part
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"--global_batch_size {whole} cannot be divided among {world} processes with --train_batch_size "
            f"{config.train_batch_size}{' of the instance and of the class' * (of_both - 1)}; the nearest that can: {nearest}",
            passing=launched(),  # which may start another number of them
        )
    return config.model_copy(update={"gradient_accumulation_steps": whole // part})


def prepare_shards(
    config: TrainConfig, family: Family, processes: Processes, check: Check, seed: int, unit: int
) -> tuple[Streams, list[Part]]:
    """Builds the shards where they are missing, verifies them as far as asked, and opens them: the streams, and their parts.

    Args:
        check: is given the name of a data set, whether it has buckets, and the identity of shards before anything is encoded,
            to raise what is against it.
        seed: of the run.
        unit: slots that are of one stream.

    Raises:
        UserError: shards of another family or shape, or damaged ones, by name.
    """
    data_sets = data_sets_of(config)
    parts = [part for data_set in data_sets for part in _parts_of(data_set, family, processes, check)]
    _check(config, parts, processes)
    by_name = {data_set.name: data_set for data_set in data_sets}
    judged = [part for part in parts if not by_name[part.data_set].prior]
    held = dict(zip(map(id, judged), splits_of((part.index for part in judged), config.validation_fraction), strict=True))
    streams, splits = [], [held.get(id(part)) for part in parts]
    opened = _open(config, parts, processes, len(parts))
    if config.placeholder_token:
        taught = [shards for part, shards in zip(parts, opened, strict=True) if not by_name[part.data_set].prior]
        processes.computed_by_first(lambda: _look_for_new_tokens(taught, family))
    for number, (part, shards, split) in enumerate(zip(parts, opened, splits, strict=True)):
        records = shards.index.shards["records"] if split is None else split.trained
        order = order_of(seed_of_stream(seed, number), records, config.shuffle_window)
        order = order if split is None else split.without_held(order)
        of, turns = by_name[part.data_set], len(data_sets) if config.with_prior_preservation else 1
        weight = of.loss_weight * turns  # in turn the losses of each data set are a mean of their own
        streams.append(Stream(shards, order, 1, part.data_set, part.bucket, split, weight, of.prior))
    in_turn = config.with_prior_preservation
    return Streams(seed, _in_turn(streams) if in_turn else _with_shares(streams, data_sets), unit, in_turn), parts


def _look_for_new_tokens(taught: list[Shards], family: Family) -> None:
    """Raises `UserError` where no record's first caption holds a token of `--placeholder_token`; says how many lack it."""
    encoding: Any = family.encoding
    field, lacking = encoding.record_spec["tokens"], 0
    for shards in taught:
        for records in torch.arange(len(shards)).split(min(_AT_A_TIME, shards.found_together)):
            tokens = torch.empty(len(records), *field.shape, dtype=field.dtype)
            shards.gather("tokens", shards.rows_of(shards.find(records)), tokens)
            lacking += int((tokens.int() < encoding.first_new_token).all(dim=1).sum())
    token, whole = f"--placeholder_token {family.config.placeholder_token}", sum(map(len, taught))
    if lacking == whole:
        raise UserError(
            f"{token}: no caption holds it, so that nothing would be learned; write it into the captions, or give it in "
            "--caption_prefix, --caption_template or --instance_prompt, and another --shards_dir"
        )
    if lacking:
        warn(f"{token}: {lacking:,} of {whole:,} records have captions without it, which teach it nothing")


def _parts_of(data_set: DataSet, family: Family, processes: Processes, check: Check) -> list[Part]:
    """The parts of a data set: built where it is at hand, else those that its shards are."""
    config: Any = data_set.config
    encoding = family.encoding.of_data_set(config)
    if config.source:
        parts = build_parts(config, encoding, processes, partial(check, data_set.name, bool(config.buckets)))
    else:
        parts = find_parts(config, encoding, processes)
        for part in parts:
            check(data_set.name, part.bucket is not None, part.index.identity)
        if not config.trust_shards:
            processes.computed_by_first(lambda: _refuse_other_models(parts, family))
    return [replace(part, data_set=data_set.name) for part in parts]


def _with_shares(streams: list[Stream], data_sets: list[DataSet]) -> list[Stream]:
    """Streams with the slots that they take of an epoch: each record as often as it is repeated, or, of all records, what the
    weights give to each data set."""
    by_name = {data_set.name: data_set for data_set in data_sets}
    records = Counter[str]()
    for stream in streams:
        records[stream.data_set] += stream.records
    weights = sum(data_set.weight or 0 for data_set in data_sets)

    def share(stream: Stream) -> Fraction:
        data_set = by_name[stream.data_set]
        if data_set.weight is None:
            return data_set.repeats * stream.records
        return data_set.weight / weights * records.total() * stream.records / records[stream.data_set]

    return [replace(stream, share=share(stream)) for stream in streams]


def _in_turn(streams: list[Stream]) -> list[Stream]:
    """Streams of data sets that each take as many slots of an epoch as the largest has records."""
    records = Counter[str]()
    for stream in streams:
        records[stream.data_set] += stream.records
    most = max(records.values())
    return [replace(stream, share=Fraction(most * stream.records, records[stream.data_set])) for stream in streams]


def prepare_held_out(
    config: TrainConfig, family: Family, processes: Processes, streams: Streams, parts: list[Part]
) -> list[Records]:
    """The records that the held-out loss is taken over, with readers of their own; empty where it is not taken.

    Args:
        parts: of the streams.

    Raises:
        UserError: as of `prepare_shards`.
    """
    if config.validation_data_dir:
        parts = _validation_parts(config, family, processes, parts)
        _check(config, parts, processes)
        numbers = chosen([part.index.records for part in parts], config.max_validation_samples)
        found = [(part, which, 1.0) for part, which in zip(parts, numbers, strict=True)]
    else:
        splits = [
            (part, stream.split, stream.loss_weight / (2 if streams.in_turn else 1))
            for part, stream in zip(parts, streams.streams, strict=True)
            if stream.split is not None
        ]
        numbers = chosen([int(split.held.sum()) for _, split, _ in splits], config.max_validation_samples)
        found = [
            (part, split.held_records(which), weight) for (part, split, weight), which in zip(splits, numbers, strict=True)
        ]
    found = [each for each in found if len(each[1])]
    if config.validation_fraction and not found:
        raise UserError(
            f"--validation_fraction {config.validation_fraction}: nothing is held out, for no shard has two records; give more "
            "data, or another data set as --validation_data_dir, or leave it out"
        )
    # The loader's readers have their part of what may be open, too.
    opened = _open(config, [part for part, *_ in found], processes, 2 * len(found))
    return [Records(shards, which, weight) for shards, (_, which, weight) in zip(opened, found, strict=True)]


def _validation_parts(config: TrainConfig, family: Family, processes: Processes, trained: list[Part]) -> list[Part]:
    """The parts of `--validation_data_dir`: a data set, encoded as that of the training is, or shards of the same models."""
    given = config.validation_data_dir
    assert given is not None
    no_data = dict.fromkeys(("dataset_name", "dataset_config_name", "train_data_dir", "max_train_samples", "data_sets"))
    if is_remote(given) or processes.computed_by_first(lambda: holds_shards(Path(given))):
        parts = find_parts(config.model_copy(update=no_data | {"shards_dir": given}), family.encoding, processes)
        if not config.trust_shards:
            models = trained[0].index.identity.get("models", {})
            processes.computed_by_first(lambda: _refuse_other_models(parts, family, models))
        return parts
    beside = not config.shards_address and processes.computed_by_first(lambda: _has_room_for_validation(config.shards_path))
    place = config.shards_path if beside else Path(config.output_dir) / "shards"
    own = no_data | {"train_data_dir": given, "shards_dir": str(place / VALIDATION)}
    return build_parts(config.model_copy(update=own), family.encoding, processes, lambda identity: None)


def _has_room_for_validation(directory: Path) -> bool:
    """Whether the shards of held-out data are beside those of the training, or may be written there."""
    return holds_shards(directory / VALIDATION) or not directory.exists() or os.access(directory, os.W_OK)


def _check(config: TrainConfig, parts: list[Part], processes: Processes) -> None:
    """Raises `UserError` where parts hold other records than the run reads, or are damaged."""
    for part in parts:
        _refuse_other_records(part)
    local = [part for part in parts if not part.config.shards_address]
    for part in local:
        directory = part.config.shards_path
        if not (processes.is_first or seen(directory / INDEX, partial(_is_the_same, part.index, directory))):
            raise unseen(directory / INDEX)
    if config.verify_shards != "none":
        _verify(config, local, processes)


def _refuse_other_records(part: Part) -> None:
    config, index = part.config, part.index
    if index.family != config.family or index.fields != part.encoding.record_spec:
        built = {name: index.config.get(name) for name in ("family", "resolution", "mixed_precision", "mask_column")}
        built["cache_text"] = index.config.get("cache_text") or "states"  # of what was built before there was a choice
        changed = differences(built, {name: getattr(config, name) for name in built}) or "other models"
        raise UserError(
            f"{config.shards_place}/{INDEX}: the shards hold other records than this run reads ({changed}); give the options "
            "that they were built with, or name another --shards_dir"
        )


def _verify(config: TrainConfig, parts: list[Part], processes: Processes) -> None:
    """Has each process look at as many of the shards of all parts together."""
    every = [(part, number) for part in range(len(parts)) for number in range(len(parts[part].index.shards))]
    mine, problems = every[processes.rank :: processes.world], dict[int, dict[str, str]]()
    with Progress(len(mine), "Verifying shards", "shard") as bar:
        for place, of_part in itertools.groupby(mine, key=itemgetter(0)):
            directory, index, contents = parts[place].config.shards_path, parts[place].index, config.verify_shards == "all"
            problems[place] = verify(directory, index, [number for _, number in of_part], contents, progress=bar.update)
    found = processes.gather_patiently(problems)
    of_parts = [{file: said for each in found for file, said in each.get(place, {}).items()} for place in range(len(parts))]
    if lines := [_damaged(part.config, of_it) for part, of_it in zip(parts, of_parts, strict=True) if of_it]:
        raise UserError(*lines)


def _open(config: TrainConfig, parts: list[Part], processes: Processes, readers: int) -> list[Shards]:
    """A reader of each part, of which all processes see the same.

    Args:
        readers: among which what may be open is divided.
    """
    check_rows, window, depth = config.verify_shards != "none", config.shuffle_window, ReadAhead()
    cache = ShardsCache(Path(config.shards_cache), config.cache_bytes) if config.shards_cache else None

    def open_part(part: Part) -> Shards:
        address = part.config.shards_address
        if not address:
            return Shards(part.config.shards_path, check_rows, readers)
        if cache is None:
            return RangedShards(Storage(address), check_rows, window, part.index, readers, depth)
        return CachedShards(Storage(address), cache, local_world(), check_rows, part.index, readers)

    opened = [open_part(part) for part in parts]
    mine = [{_told_apart(part.index), _told_apart(shards.index)} for part, shards in zip(parts, opened, strict=True)]
    for part, *seen_by_all in zip(parts, *processes.gather_objects(mine), strict=True):
        if len(set().union(*seen_by_all)) > 1:
            place = f"{part.config.shards_place}/{INDEX}"
            raise UserError(f"{place}: replaced while the processes opened it; start the same again", passing=True)
    return opened


def open_dropout(config: TrainConfig, family: Family, processes: Processes) -> Dropout | None:
    """What samples are trained with in place of their condition, computed by the first process; None where none is.

    Raises:
        UserError: the model that makes it is not there, or makes no numbers of it.
    """
    if not config.proportion_unconditional:
        return None

    def compute() -> bytes:  # in which pickle cannot hold tokens
        rows = family.encoding.unconditional(processes.device)
        if not all(row.isfinite().all() for row in rows.values()):
            raise UserError(
                f"--mixed_precision {config.mixed_precision}: what samples are trained with in place of their condition "
                "encodes to values that are not finite; try bf16"
            )
        return safetensors.torch.save(rows)

    with busy("Encoding what stands in place of conditions"):
        rows = safetensors.torch.load(processes.computed_by_first(compute))
    return Dropout(config.proportion_unconditional, rows)


def _told_apart(index: Index) -> tuple[str, bytes]:
    """What tells an index from others, whenever and by whomever it was written."""
    return index.fingerprint, hashlib.sha256(index.shards.tobytes()).digest()


def _is_the_same(index: Index, directory: Path) -> bool:
    return _told_apart(Index.read(directory)) == _told_apart(index)


def _warn_of_a_small_cache(config: TrainConfig, tables: list[np.ndarray], resumed: bool) -> None:
    """Says where the shards of all parts, by their tables, that are read at a time do not fit."""
    counts = [len(table) for table in tables]
    reads = [min(config.shuffle_window or count, count) for count in counts]
    largest = max(int(table["bytes"].max()) for table in tables)
    # Those of the next window are fetched while those of one are read.
    read, needed = sum(reads), sum(min(2 * read, count) for read, count in zip(reads, counts, strict=True))
    if config.cache_bytes is not None and (room := config.cache_bytes // largest) < needed:
        fewer = room // (2 * len(counts))
        other = "" if resumed else f", or --shuffle blocks --shuffle_window {fewer}"  # the order stays what it was
        warn(
            f"--shards_cache_limit {config.shards_cache_limit} holds {room} shards, and {read} are read at a time (--shuffle "
            f"{config.shuffle}), so they may be fetched again and again; give {needed * largest} bytes{other}"
        )


def _say_small_streams(streams: Streams) -> None:
    """Names the streams that are smaller than a unit, whose records come together with themselves."""
    small = [stream for stream in streams.streams if stream.records < streams.unit]
    if len(streams.streams) > 1 and small:
        named = ", ".join(f"{stream.name} ({stream.records})" for stream in small)
        say(f"Fewer records than a micro-batch of {streams.unit} has, so that they come more than once in it: {named}")


def _damaged(config: CacheConfig, problems: dict[str, str]) -> str:
    listed = "; ".join(f"{file}: {problem}" for file, problem in sorted(problems.items()))
    remedy = f"delete them and {INDEX}, and they are built again" if config.source else "copy or build them again"
    return f"{config.shards_path}: damaged shards: {listed}; {remedy}"


def _refuse_other_models(parts: list[Part], family: Family, models: dict[str, str] | None = None) -> None:
    """Raises `UserError` where frozen models that are at hand did not build the shards.

    Args:
        models: digests of others, which are not at hand.
    """
    of_family = [part for part in parts if part.index.family == family.config.family]
    if not of_family:
        return
    with busy("Comparing the frozen models with those that built the shards"):
        now = (models or {}) | family.encoding.encoder_identity(at_hand=True)
    for part in of_family:
        before = part.index.identity.get("models", {})
        if other := differences({name: before.get(name) for name in now}, now):
            raise UserError(
                f"{part.config.shards_place}: the shards were built with other models than this run is given ({other}); "
                "give those, or train on them all the same with --trust_shards"
            )


def open_run(config: TrainConfig, seed: int, streams: Streams, plan: BatchPlan, state: State | None) -> Run:
    """The run over these streams; epochs give its number of steps, where that is not given.

    Args:
        state: of the checkpoint to go on from. One beyond the last step is trained for one more, as by the scripts.
    """
    records = math.ceil(sum(stream.share for stream in streams.streams))
    steps = config.max_train_steps or -(-config.num_train_epochs * records // plan.global_batch)
    done = state.step if state else 0
    if done > steps:
        say(f"The checkpoint is of step {done}, beyond the {steps} asked for: training one step more")
        steps = done + 1
    options = {name: value for name, value in options_of(config).items() if name in ALTER_THE_RESULT}
    options["max_train_steps"] = steps
    _warn_of_a_small_cache(config, [stream.shards.index.shards for stream in streams.streams], resumed=state is not None)
    _say_small_streams(streams)
    several, index = states_of(streams), streams.streams[0].shards.index
    told_apart = [each.model_dump(exclude={"loss_weight"}) for each in several]
    fingerprint = digest_of(told_apart) if several else index.fingerprint
    data, from_file = None if several else index.identity, bool(state.adapters if state else config.lora_weights)
    return Run(seed, plan.global_batch, fingerprint, records, steps, options, data, streams, from_file)
