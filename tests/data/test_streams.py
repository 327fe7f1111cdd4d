"""Streams: units of slots by exact shares, and every stream's own endless sequence, however a run is divided."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import cpp_ext
from engine.data.samples.batch import BatchPlan
from engine.data.samples.order import Units, order_of, seed_of_stream
from engine.data.samples.streams import Stream, Streams

SHARES = [[1, 1], [5, 3, 2], [1, 10**9], [10**9, 1, 7], [3] * 7, random.Random(4).sample(range(1, 10**9), 100)]
KNOWN = [  # streams, and their units before
    [2, 2, 2, 0, 0, 0, 0, 2, 0, 0, 1, 0],
    [2 * 10**11 + at for at in (0, 1, 2)] + [5 * 10**11 + at for at in range(4)] + [2 * 10**11 + 3]
    + [5 * 10**11 + 4, 5 * 10**11 + 5, 3 * 10**11, 5 * 10**11 + 6],
]  # fmt: skip
KNOWN_SEED = 8677519186778566284
FAR = 10**12


def streams_of(counts: list[int], shares: list[int] | None = None, unit: int = 4, seed: int = 9) -> Streams:
    """Streams of so many records, without shards."""
    shares = shares or counts
    orders = [order_of(seed_of_stream(seed, number), np.array([count]), None) for number, count in enumerate(counts)]
    return Streams(seed, [Stream(None, order, share) for order, share in zip(orders, shares, strict=True)], unit)


@pytest.mark.parametrize("shares", SHARES, ids=lambda shares: f"{len(shares)}-{max(shares)}")
def test_every_stream_has_its_exact_share_after_every_round(shares):
    units, total = Units(3, shares), sum(shares)
    streams, _ = units.find(np.arange(20 * units.round))
    end = 0
    for number in range(1, 20):
        wanted = [number * units.round * share // total for share in shares]
        first, end = end, sum(wanted)
        assert np.bincount(streams[:end], minlength=len(shares)).tolist() == wanted
        assert abs(end - first - units.round) < len(shares)


@pytest.mark.parametrize("shares", SHARES, ids=lambda shares: f"{len(shares)}-{max(shares)}")
@pytest.mark.parametrize("first", [0, FAR])
def test_units_of_a_stream_are_counted_without_gaps_from_anywhere(shares, first):
    units, asked = Units(3, shares), np.arange(first, first + 3000)
    streams, numbers = units.find(asked)
    for stream in np.unique(streams).tolist():
        of_it = numbers[streams == stream]
        assert of_it.tolist() == list(range(of_it[0], of_it[0] + len(of_it)))
        assert abs(of_it[0] - first * shares[stream] // sum(shares)) <= units.round + len(shares)
    shuffled = np.random.default_rng(0).permutation(len(asked))
    again = [units.find(asked[part]) for part in np.array_split(shuffled, 7)]
    assert np.concatenate([found for found, _ in again]).tolist() == streams[shuffled].tolist()
    assert np.concatenate([found for _, found in again]).tolist() == numbers[shuffled].tolist()


def test_rounds_differ_in_their_order_and_so_do_seeds():
    def of_rounds(seed: int) -> list[tuple[int, ...]]:
        streams, _ = Units(seed, [1, 1]).find(np.arange(5 * 64))
        return list(map(tuple, streams.reshape(5, 64).tolist()))

    rounds = of_rounds(1) + of_rounds(2)
    assert len(set(rounds)) == 10
    assert all(sum(each) == 32 for each in rounds)


@pytest.mark.parametrize("side", ["cpp", "numpy"])
def test_the_streams_of_units_never_change(side, monkeypatch):
    """A run that was begun by an older version continues at the same samples."""
    if side == "numpy":
        monkeypatch.setattr(cpp_ext, "load", lambda name: None)
    found = Units(7, [5, 3, 2]).find(np.arange(FAR, FAR + 12))
    assert [each.tolist() for each in found] == KNOWN
    assert seed_of_stream(7, 0) == 7
    assert seed_of_stream(7, 1) == KNOWN_SEED


@pytest.mark.parametrize(
    ("counts", "shares"), [([12, 7, 3], None), ([9, 1], [1, 1]), ([2, 3], [1000, 1]), ([5, 5, 1], [1, 2, 3])]
)
def test_every_record_comes_once_per_epoch_of_its_stream(counts, shares):
    """Of streams smaller than a unit too."""
    streams = streams_of(counts, shares)
    found, records = streams.find(torch.arange(4 * 64 * 40))
    for number, count in enumerate(counts):
        visited = records[found == number]
        epochs = visited[: len(visited) // count * count].view(-1, count)
        assert len(epochs)
        assert torch.equal(epochs.sort().values, torch.arange(count).expand_as(epochs))


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(4, 1, 1), (2, 2, 3), (1, 4, 2), (4, 3, 5), (2, 1, 1)])
def test_slots_read_the_same_however_a_run_is_divided(micro, accumulation, world):
    streams = streams_of([12, 7, 3])
    expected = torch.stack(streams.find(torch.arange(720)))
    last = 720 // (micro * world)
    for rank in range(world):
        slots = BatchPlan(micro, accumulation, rank, world).slots(0, last)
        for first in (0, last // 2):  # from the beginning, and as after an interruption
            flat = slots[first:].flatten()
            found = torch.stack(streams.find(flat))
            assert torch.equal(found, expected[:, flat])
            of = found[0].view(-1, micro)
            assert torch.equal(of, of[:, :1].expand_as(of)), "a micro-batch has one shape"


def test_a_single_stream_has_the_order_that_it_always_had():
    slots = torch.arange(100)
    for unit in (1, 4, 7):
        found, records = streams_of([45], unit=unit).find(slots)
        assert torch.equal(records, order_of(9, np.array([45]), None)(slots))
        assert not found.any()


def test_streams_of_the_same_size_have_orders_of_their_own():
    streams = streams_of([8, 8])
    found, records = streams.find(torch.arange(512))
    assert not torch.equal(records[found == 0][:8], records[found == 1][:8])


@pytest.mark.parametrize("first", [0, FAR])
def test_data_sets_in_turn_have_every_second_unit_each_and_share_it_among_their_buckets(first):
    streams = streams_of([6, 2, 5], unit=3)
    names = [("instance", "8x8"), ("instance", "16x8"), ("class", None)]
    turns = [replace(stream, data_set=name, bucket=of) for stream, (name, of) in zip(streams.streams, names, strict=True)]
    in_turn = replace(streams, streams=turns, in_turn=True)
    slots = torch.arange(first * 12, first * 12 + 12 * 400)
    found, records = in_turn.find(slots)
    of_units = found.view(-1, 3)
    assert bool((of_units == of_units[:, :1]).all()), "of one stream each"
    assert of_units[1::2].unique().tolist() == [2]
    assert np.bincount(of_units[::2, 0], minlength=2).tolist() == pytest.approx([600, 200], abs=2)
    for number, count in enumerate((6, 2, 5)):  # every record comes as often
        often = np.bincount(records[found == number], minlength=count)
        assert often.max() - often.min() <= 2
    parts = [in_turn.find(slots[part]) for part in (slice(0, 100), slice(100, None))]
    assert torch.cat([streams for streams, _ in parts]).equal(found)
    assert torch.cat([records for _, records in parts]).equal(records)
