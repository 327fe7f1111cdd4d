"""The order of the samples: a permutation per epoch, in constant memory, split among processes without gaps."""

import numpy as np
import pytest
import torch

import cpp_ext
from engine import permutation
from engine.data.samples.order import order_of, records_of, slots_of_micro_batches
from engine.permutation import permuted


@pytest.fixture(params=["cpp", "numpy"])
def side(request, monkeypatch):
    """Both ways to compute the order."""
    if request.param == "numpy":
        monkeypatch.setattr(cpp_ext, "load", lambda name: None)
    elif cpp_ext.load("order") is None:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 100, 1000, 4096, 4097])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_epoch_visits_every_record_once(side, count, seed):
    for epoch in (0, 1, 2**33):
        visited = permuted(seed, torch.full((count,), epoch), torch.arange(count), count)
        assert visited.sort().values.tolist() == list(range(count))


# Seed, number of records and first slot; and the records of six slots, across the end of an epoch where it is near.
KNOWN = [
    (7, 4096, 4090, [3982, 2615, 1272, 3275, 1310, 2373]),
    (-1, 65_537, 65_534, [57072, 11787, 14258, 27957, 15469, 45048]),
    (2**63 - 1, 70_000, 2**33 * 70_000 - 3, [49011, 39538, 34169, 46077, 63467, 58070]),
    (5, 10**9, 10**9 - 3, [817109871, 635133405, 284409302, 298651427, 754809117, 132695842]),
    (5, 10**12, 2**40 * 10**6, [504938252395, 230559287011, 74404259487, 962051103117, 573005482735, 738002776570]),
]


@pytest.mark.parametrize(("seed", "count", "first", "records"), KNOWN)
def test_the_order_never_changes(side, seed, count, first, records):
    """A run that was begun by an older version continues at the same samples."""
    assert records_of(seed, torch.arange(first, first + 6), count).tolist() == records
    assert [int(records_of(seed, torch.tensor([first + number]), count)) for number in range(6)] == records


@pytest.mark.parametrize("count", [4096, 4097, 65_537, 70_000, 2**20 + 1])
def test_only_indices_that_are_outside_walk_on(count, monkeypatch):
    """So an index costs 4 evaluations of the network at most on average, however unlucky the number of records is."""
    evaluated = []
    evaluate = permutation._feistel
    monkeypatch.setattr(permutation, "_feistel", lambda *task: evaluated.append(task[2].size) or evaluate(*task))
    half_bits = -(-(count - 1).bit_length() // 2)
    found = permutation.permuted_in_numpy(3, np.zeros(4096, np.int64), np.arange(4096), count, half_bits)
    assert sum(evaluated) == pytest.approx(4096 * 4**half_bits / count, rel=0.1)
    assert found.tolist() == records_of(3, torch.arange(4096), count).tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(permuted(seed, torch.full((100,), epoch), torch.arange(100), 100).tolist())
        for seed in (0, 1, 2**32)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 9


def test_positions_are_uniform():
    """Where record 0 lands over many epochs: chi-squared over ten cells, nine degrees of freedom, p < 1e-4."""
    epochs = torch.arange(20_000)
    landed = permuted(7, epochs, torch.zeros_like(epochs), 10)
    counts = torch.bincount(landed, minlength=10).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 35


def test_a_trillion_records_need_no_list():
    count = 10**12
    indices = torch.tensor([0, 1, 2, count // 2, count - 1])
    visited = permuted(3, torch.zeros_like(indices), indices, count)
    assert len(set(visited.tolist())) == 5
    assert bool(((visited >= 0) & (visited < count)).all())


def test_slots_cross_an_epoch_without_a_seam():
    slots = torch.arange(8, 16)
    records = records_of(5, slots, 12)
    assert sorted(records_of(5, torch.arange(12), 12).tolist()) == list(range(12))
    assert records[:4].tolist() == records_of(5, torch.arange(12), 12)[8:].tolist()
    assert records[4:].tolist() == records_of(5, torch.arange(12, 24), 12)[:4].tolist()


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(12, 1, 1), (4, 3, 1), (4, 1, 3), (2, 3, 2), (1, 2, 6)])
def test_processes_and_micro_batches_share_a_global_batch_exactly(micro, accumulation, world):
    for step in (0, 5):
        first = step * accumulation
        parts = [slots_of_micro_batches(first, first + accumulation, micro, rank, world) for rank in range(world)]
        assert torch.stack(parts, 1).flatten().tolist() == list(range(step * 12, step * 12 + 12))


KNOWN_BLOCKS = [44, 42, 43, 11, 27, 30, 31, 8, 28, 9, 7, 32]
SHARDS = np.array([7, 0, 5, 12, 1, 0, 9, 8, 3, 0])
FIRST = np.cumsum(np.append(0, SHARDS))


@pytest.mark.parametrize("window", [1, 3, 4, 10, 1000])
def test_an_order_by_locality_visits_every_record_once_within_windows_of_shards(side, window):
    order, count = order_of(5, SHARDS, window), int(SHARDS.sum())
    for epoch in (0, 1, 2**30):
        visited = order(torch.arange(epoch * count, (epoch + 1) * count)).numpy()
        assert sorted(visited) == list(range(count))
        shards = np.searchsorted(FIRST, visited, side="right") - 1
        positions = order._shards_of(epoch)[0].tolist()
        windows = np.array([positions.index(shard) // min(window, len(SHARDS)) for shard in shards])
        assert (np.diff(windows) >= 0).all()


def test_an_order_by_locality_is_a_function_of_seed_and_slot(side):
    order, slots = order_of(5, SHARDS, 3), torch.arange(200)
    whole = order(slots)
    backwards = torch.cat([order_of(5, SHARDS, 3)(slots[[number]]) for number in range(199, -1, -1)]).flip(0)
    assert torch.equal(whole, backwards)
    assert len({tuple(whole[start : start + 45].tolist()) for start in (0, 45, 90, 135)}) == 4
    assert not torch.equal(whole, order_of(6, SHARDS, 3)(slots))
    # A run that was begun by an older version continues at the same samples.
    assert whole[:12].tolist() == KNOWN_BLOCKS


def test_an_order_by_locality_keeps_nothing_per_record():
    records = np.full(1000, 10**9)
    order = order_of(3, records, 64)
    visited = order(torch.arange(10**12 - 4096, 10**12))
    assert len(visited.unique()) == 4096
    assert len((visited // 10**9).unique()) <= 64
    assert order._shards_of(0)[0].nbytes == records.nbytes


def test_the_order_of_all_records_is_what_it_was():
    slots = torch.arange(100)
    assert torch.equal(order_of(7, SHARDS, None)(slots), records_of(7, slots, 45))
