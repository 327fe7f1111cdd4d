"""The loader: the batches that the plan says, in order, from any step, and no thread left behind."""

import threading

import pytest
import torch

from engine.data.format.reader import Shards, ahead
from engine.data.samples import loader as loader_module
from engine.data.samples.batch import BatchPlan
from engine.data.samples.draw import draw_rows
from engine.data.samples.loader import Loader
from engine.data.samples.order import order_of, records_of
from engine.data.samples.streams import Stream, Streams
from engine.diffusion.schedules import CosineSchedule, DiscreteSchedule, Objective
from engine.diffusion.weights import min_snr
from engine.errors import UserError

SEED = 21
PLAN = BatchPlan(micro_batch=2, accumulation=3, rank=1, world=2)
CPU = torch.device("cpu")


SCHEDULES = [DiscreteSchedule(torch.linspace(0.99, 0.01, 1000), "epsilon", Objective(min_snr(5.0))), CosineSchedule()]


def streams_of(reader: Shards, window: int | None = None) -> Streams:
    return Streams(SEED, [Stream(reader, order_of(SEED, reader.index.shards["records"], window))])


def batches(shards, first: int, last: int, schedule=SCHEDULES[0]) -> list:
    reader = Shards(shards)
    loader = Loader(streams_of(reader), PLAN, SEED, schedule, CPU, first, last)
    return list(loader)


def loader_threads() -> int:
    return sum(thread.name == "loader" for thread in threading.enumerate())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["discrete", "continuous"])
def test_batches_hold_what_their_slots_say(schedule, shards):
    reader = Shards(shards)
    expected_slots = PLAN.slots(0, 12)
    found = batches(shards, 0, 4, schedule)
    assert len(found) == 12
    for batch, slots in zip(found, expected_slots, strict=True):
        assert torch.equal(batch.slots, slots)
        assert torch.equal(batch.timesteps, schedule.draw(torch.tensor([SEED]), slots, PLAN.global_batch))
        assert torch.equal(batch.coefficients, schedule.coefficients(batch.timesteps))
        rows = draw_rows(reader, SEED, slots, records_of(SEED, slots, len(reader)))
        for name, field in reader.fields.items():
            row = torch.empty(2, *field.shape, dtype=field.dtype)
            reader.gather(name, rows, row)
            assert torch.equal(batch.record[name], row)


def test_starting_later_gives_the_same_batches(shards):
    whole, rest = batches(shards, 0, 4), batches(shards, 2, 4)
    for left, right in zip(whole[6:], rest, strict=True):
        assert torch.equal(left.slots, right.slots)
        assert all(torch.equal(left.record[name], right.record[name]) for name in left.record)


def test_an_order_by_locality_is_that_of_the_batches(shards):
    reader = Shards(shards)
    (batch, *_) = Loader(streams_of(reader, 2), PLAN, SEED, SCHEDULES[0], CPU, 1, 2)
    slots = PLAN.slots(3, 4)[0]
    drawn = draw_rows(Shards(shards), SEED, slots, order_of(SEED, reader.index.shards["records"], 2)(slots))
    row = torch.empty_like(batch.record["latent_mean"])
    Shards(shards).gather("latent_mean", drawn, row)
    assert torch.equal(batch.record["latent_mean"], row)


def test_draws_are_made_for_many_micro_batches_at_a_time(shards, monkeypatch):
    """A draw costs as much for one micro-batch as for many: the first is there soon, and none is drawn that is not needed."""
    reader, drawn = Shards(shards), []
    monkeypatch.setattr(loader_module, "draw_rows", lambda *task: drawn.append(len(task[2])) or draw_rows(*task))
    found = list(Loader(streams_of(reader), PLAN, SEED, SCHEDULES[0], CPU, 5, 1105))
    assert drawn == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 2 * 3 * 1100 - 4094]
    assert torch.equal(torch.stack([batch.slots for batch in found]), PLAN.slots(3 * 5, 3 * 1105))


def test_an_error_of_the_thread_reaches_the_consumer(shards, monkeypatch):
    reader = Shards(shards)

    def fail(*arguments):
        raise UserError("the disk is gone")

    monkeypatch.setattr(reader, "gather", fail)
    loader = Loader(streams_of(reader), PLAN, SEED, SCHEDULES[0], CPU, 0, 4)
    with pytest.raises(UserError, match="the disk is gone"):
        next(iter(loader))
    loader.close()


def test_leaving_early_ends_the_thread(shards):
    before = loader_threads()
    reader = Shards(shards)
    loader = Loader(streams_of(reader), PLAN, SEED, SCHEDULES[0], CPU, 0, 10_000)
    next(iter(loader))
    assert loader_threads() == before + 1
    loader.close()
    assert loader_threads() == before


@pytest.mark.gpu
def test_batches_on_the_device_are_those_of_the_host(shards):
    device = torch.device("cuda")
    reader = Shards(shards)
    loader = Loader(streams_of(reader), PLAN, SEED, SCHEDULES[0], device, 0, 20)
    for ours, theirs in zip(loader, batches(shards, 0, 20), strict=True):
        assert torch.equal(ours.slots.cpu(), theirs.slots)
        assert all(torch.equal(ours.record[name].cpu(), theirs.record[name]) for name in theirs.record)


def test_the_kernel_hears_of_rows_while_others_are_gathered(shards, monkeypatch):
    """But the first micro-batch waits for no other."""
    heard: list[int] = []
    monkeypatch.setattr(Shards, "advise", lambda self, rows: heard.append(int(rows["record"][0])))
    reader = Shards(shards)
    micro_batches = ((reader, dict.fromkeys(("record",), torch.full((16,), number)), number) for number in range(12))
    seen = [(number, len(heard)) for _, _, number in ahead(micro_batches)]
    assert seen == [(0, 1), *((number, min(number + 5, 12)) for number in range(1, 12))]
