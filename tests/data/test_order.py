"""The order of the samples: a permutation per epoch, in constant memory, split among processes without gaps."""

import pytest
import torch

from engine.data.order import permuted, records_of, slots_of_micro_batch


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 100, 1000, 4096, 4097])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_epoch_visits_every_record_once(count, seed):
    for epoch in (0, 1, 2**33):
        order = permuted(seed, torch.full((count,), epoch), torch.arange(count), count)
        assert order.sort().values.tolist() == list(range(count))


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
    order = permuted(3, torch.zeros_like(indices), indices, count)
    assert len(set(order.tolist())) == 5
    assert bool(((order >= 0) & (order < count)).all())


def test_slots_cross_an_epoch_without_a_seam():
    slots = torch.arange(8, 16)
    records = records_of(5, slots, 12)
    assert sorted(records_of(5, torch.arange(12), 12).tolist()) == list(range(12))
    assert records[:4].tolist() == records_of(5, torch.arange(12), 12)[8:].tolist()
    assert records[4:].tolist() == records_of(5, torch.arange(12, 24), 12)[:4].tolist()


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(12, 1, 1), (4, 3, 1), (4, 1, 3), (2, 3, 2), (1, 2, 6)])
def test_processes_and_micro_batches_share_a_global_batch_exactly(micro, accumulation, world):
    for step in (0, 5):
        slots = [
            slot
            for part in range(accumulation)
            for rank in range(world)
            for slot in slots_of_micro_batch(step, 12, micro, part, rank, world).tolist()
        ]
        assert sorted(slots) == list(range(step * 12, step * 12 + 12))
