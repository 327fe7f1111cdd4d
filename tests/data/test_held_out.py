"""What is held out of training: every property that docs/design.md states of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.data.samples.held_out import Split, splits_of
from engine.data.samples.order import order_of


def split(records, fraction, first=0) -> Split:
    records = np.array(records, np.int64)
    return Split(records, first + np.cumsum(np.append(0, records[:-1])), fraction)


def both(division: Split) -> tuple[list[int], list[int]]:
    trained = division.trained_records(torch.arange(int(division.trained.sum())))
    return trained.tolist(), division.held_records(torch.arange(int(division.held.sum()))).tolist()


@pytest.mark.parametrize("fraction", [1e-4, 0.01, 0.1, 1 / 3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("records", [[1], [2], [7], [1, 1, 1, 1], [0, 3, 0, 1], [1024] * 5 + [17], [3, 1000, 1, 2, 64]])
def test_every_record_is_either_trained_on_or_held_out(records, fraction):
    trained, held = both(split(records, fraction))
    assert sorted(trained + held) == list(range(sum(records)))
    assert trained == sorted(trained), "locality in shards is kept"
    assert held == sorted(held)
    if max(records) > 1:
        assert held, "at least one"
    assert trained, "and something is left to train on"


@pytest.mark.parametrize("records", [[5, 8, 8], [1, 8, 8]])
def test_growth_keeps_what_was_held_out(records):
    for fraction in (0.001, 0.2, 0.7):
        for last in range(1, len(records)):
            before, after = (both(split(some, fraction))[1] for some in (records[:last], records))
            assert [record for record in after if record < sum(records[:last])] == before


def test_as_many_are_held_out_as_asked_in_the_mean():
    records = [1000] * 400
    for fraction in (0.0123, 0.3):
        many = sum(split(records, fraction).held)
        assert abs(many - fraction * sum(records)) < 4 * (len(records) / 12) ** 0.5
    few = split([10] * 20_000, 0.01)
    assert abs(sum(few.held) - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    assert max(few.held) == 1, "0.1 in the mean is none or one"


def test_any_place_is_as_likely_to_be_held_out():
    division = split([40] * 5_000, 0.1)
    places = torch.tensor(both(division)[1]) % 40
    assert torch.bincount(places, minlength=40).float().std() < 2.5 * (5_000 * 0.1) ** 0.5 / 2
    of_classes = torch.bincount(places % 10)  # a data set that shows ten classes in turn
    assert of_classes.min() > 0.9 * of_classes.max()


@pytest.mark.parametrize("window", [None, 2])
def test_an_order_visits_what_is_trained_on_once_in_an_epoch(window):
    division = split([11, 3, 8, 1, 6], 0.25)
    trained, held = both(division)
    for seed in (0, 5):
        order = division.without_held(order_of(seed, division.trained, window))
        for epoch in range(3):
            records = order(torch.arange(len(trained)) + epoch * len(trained)).tolist()
            assert sorted(records) == trained
            assert not {*records} & {*held}


def test_of_several_parts_one_holds_some_out():
    tables = [np.zeros(1, [("records", np.int64), ("first_sample", np.int64)]) for _ in range(3)]
    for table, records in zip(tables, (1, 6, 6), strict=True):
        table["records"] = records
    indexes = [SimpleNamespace(shards=table) for table in tables]
    assert [int(split.held.sum()) for split in splits_of(indexes, 1e-6)] == [0, 1, 0]
    assert splits_of(indexes, None) == [None] * 3
