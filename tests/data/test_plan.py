"""Numbers of samples and blocks of shards, as data sets change."""

import numpy as np
import pytest

from engine.data.plan import BLOCK, RUN, Plan, beside, known, place_of, planned, read_plan, recognised, without_numbers
from engine.data.sources.interface import told_apart


def runs_of(*runs: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(list(runs), RUN)


def blocks_of(*blocks: tuple[int, int, int]) -> np.ndarray:
    return np.array(list(blocks), BLOCK)


def files(*named: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    stamps, counts = zip(*named, strict=True)
    return np.array(stamps, np.uint64), np.array(counts, np.int64)


NOTHING = Plan(np.zeros(0, RUN), np.zeros(0, BLOCK))


def test_samples_are_numbered_as_the_source_has_them_and_keep_their_numbers():
    first = planned(known(NOTHING.runs, *files((7, 3), (5, 4), (9, 0))), NOTHING.blocks, 4)
    assert first.runs.tolist() == [(7, 0, 0, 3), (5, 0, 3, 4)]
    assert first.blocks.tolist() == [(0, 4, 0), (4, 3, 1)]
    grown = planned(known(first.runs, *files((1, 2), (5, 4), (3, 9))), first.blocks, 4)
    assert grown.runs.tolist() == [(1, 0, 7, 2), (5, 0, 3, 4), (3, 0, 9, 9)]
    assert grown.blocks.tolist() == [(0, 4, 0), (4, 3, 1), (7, 4, 2), (11, 4, 3), (15, 3, 4)]
    numbers, places = grown.samples(grown.blocks[0])
    assert (numbers.tolist(), places.tolist()) == ([3], [2])
    assert [place_of(number, grown.runs) for number in (0, 3, 7, 17)] == [None, 2, 0, 14]
    assert grown.counts(grown.blocks).tolist() == [1, 3, 4, 4, 3]
    less = planned(known(grown.runs, *files((1, 2))), grown.blocks, 4)
    assert less.blocks.tolist() == [(7, 4, 2)], "blocks without samples are gone"


def test_a_file_with_another_number_of_samples_is_another():
    assert known(runs_of((7, 0, 0, 3)), *files((7, 4))).tolist() == [(7, 0, -1, 4)]
    assert known(runs_of((7, 0, 5, 2), (7, 2, 0, 1)), *files((7, 3))).tolist() == [(7, 0, 5, 2), (7, 2, 0, 1)]


def test_rows_are_known_by_their_contents():
    runs = runs_of((7, 0, -1, 5), (8, 0, 20, 2), (9, 0, -1, 2))
    numbers = {b"a": [3], b"b": [4, 11], b"c": [12]}
    found = recognised(runs, iter([b"a", b"b", b"b", b"c", b"x", b"y", b"a"]), numbers)
    assert found.tolist() == [(7, 0, 3, 2), (7, 2, 11, 2), (7, 4, -1, 1), (8, 0, 20, 2), (9, 0, -1, 2)]


def test_numbers_are_taken_from_runs():
    runs = runs_of((7, 0, 3, 5), (8, 0, 20, 2), (9, 4, 10, 1))
    cut = without_numbers(runs, np.array([10, 5, 3, 21, 99]))
    assert cut.tolist() == [
        (7, 0, -1, 1), (7, 1, 4, 1), (7, 2, -1, 1), (7, 3, 6, 2), (8, 0, 20, 1), (8, 1, -1, 1), (9, 4, -1, 1)
    ]  # fmt: skip
    assert without_numbers(runs, np.zeros(0, np.int64)).tolist() == runs.tolist()


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [
        ([], [0, 1, 2]),
        ([(0, 4, 0), (8, 2, 2)], [0, 1, 2]),
        ([(0, 4, 5), (8, 2, 7)], [5, 6, 7]),
        ([(0, 4, 5), (8, 2, 6)], [5, 7, 6]),
        ([(4, 4, 0)], [1, 0, 2]),
    ],
)
def test_a_shard_that_is_missing_comes_back_where_it_was(blocks, numbers):
    plan = planned(runs_of((7, 0, 0, 10)), blocks_of(*blocks), 4)
    assert plan.blocks[["first_sample", "samples"]].tolist() == [(0, 4), (4, 4), (8, 2)]
    assert plan.blocks["number"].tolist() == numbers


def test_of_shards_that_overlap_one_is_taken():
    found = beside(blocks_of((4, 4, 1)), blocks_of((0, 4, 0), (0, 4, 9), (3, 4, 2), (7, 2, 3), (8, 2, 1), (8, 2, 4)))
    assert found.tolist() == [(0, 4, 0), (4, 4, 1), (8, 2, 4)]


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = planned(known(NOTHING.runs, *files((2**64 - 1, 3), (5, 4))), NOTHING.blocks, 4)
    assert read_plan(tmp_path, "r" * 64, None) is None
    plan.write(tmp_path, "r" * 64, None, "f" * 64)
    for index in (None, "f" * 64):
        again = read_plan(tmp_path, "r" * 64, index)
        assert (again.runs.tobytes(), again.blocks.tobytes()) == (plan.runs.tobytes(), plan.blocks.tobytes())
        assert again.is_of(*files((2**64 - 1, 3), (5, 4)))
        assert not again.is_of(*files((5, 4), (2**64 - 1, 3)))
        assert not again.is_of(*files((2**64 - 1, 3)))
    assert read_plan(tmp_path, "r" * 64, "0" * 64) is None
    assert read_plan(tmp_path, "0" * 64, "f" * 64) is None


@pytest.mark.parametrize(
    "plan",
    [
        Plan(runs_of((1, 0, 0, 3), (2, 0, 2, 3)), blocks_of((0, 5, 0))),
        Plan(runs_of((1, 0, -5, 3)), blocks_of((0, 5, 0))),
        Plan(runs_of((1, 0, 2**50, 3)), blocks_of((0, 5, 0))),
        Plan(runs_of((1, 0, 0, 0)), blocks_of((0, 5, 0))),
        Plan(runs_of((1, 0, 0, 5)), blocks_of((0, 5, 0), (4, 5, 1))),
        Plan(runs_of((1, 0, 0, 5)), blocks_of((0, 5, 1), (5, 5, 1))),
    ],
)
def test_a_plan_that_cannot_be_is_none(plan, tmp_path):
    plan.write(tmp_path, "r" * 64)
    assert read_plan(tmp_path, "r" * 64, None) is None


def test_altered_bytes_are_no_plan(tmp_path):
    plan = planned(known(NOTHING.runs, *files((1, 3), (5, 4))), NOTHING.blocks, 4)
    plan.write(tmp_path, "r" * 64)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        again = read_plan(tmp_path, "r" * 64, None)
        assert again is None or again.runs.tobytes() + again.blocks.tobytes() == plan.runs.tobytes() + plan.blocks.tobytes()
    path.write_bytes(content[:-8])
    assert read_plan(tmp_path, "r" * 64, None) is None


def test_equal_stamps_are_told_apart_by_their_order():
    found = told_apart([5, 7, 5, 5])
    assert len({*found.tolist()}) == 4
    assert found[:2].tolist() == [5, 7]
    assert told_apart([7, 5, 5]).tolist() == [7, *found[[0, 2]].tolist()]
    assert told_apart([]).tolist() == []


def test_a_hundred_million_rows_are_planned_as_one_run():
    plan = planned(known(NOTHING.runs, *files((7, 10**8))), NOTHING.blocks, 1024)
    assert (len(plan.runs), len(plan.blocks), int(plan.counts(plan.blocks).sum())) == (1, 97_657, 10**8)
    numbers, places = plan.samples(plan.blocks[-1])
    assert (numbers[0], places[-1], len(numbers)) == (99_999_744, 10**8 - 1, 256)
