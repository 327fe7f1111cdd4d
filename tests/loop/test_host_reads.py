"""Between two log points the host reads nothing from the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.loop import trainer
from tests.loop.runs import config

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::unique2"}


class CountReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a value of the device; in this thread, not in the loader's."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in READS:
            self.reads.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_the_counter_sees_a_read():
    with CountReads() as counter:
        torch.ones(1).item()
        bool(torch.ones(1) > 0)
        torch.ones(2).nonzero()
    assert len(counter.reads) == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"zero_stage": 1}, {"zero_stage": 2}, {"mixed_precision": "bf16"},
     {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, {"dream_training": True}],
    ids=str,
)  # fmt: skip
def test_a_step_reads_nothing(options, model, images, shards, tmp_path, monkeypatch):
    counter = CountReads()
    between: list[int] = []
    after_step = trainer.Training._after_step

    def count(self, *arguments):
        between.append(len(counter.reads))
        after_step(self, *arguments)
        counter.reads.clear()

    monkeypatch.setattr(trainer.Training, "_after_step", count)
    shards_of_precision = shards if options.get("mixed_precision", "no") == "no" else tmp_path / "shards"
    run = config(
        model, images, shards_of_precision, tmp_path / "out", noise_offset=0.1, input_perturbation=0.1, snr_gamma=5.0,
        log_every=4, **options,
    )  # fmt: skip
    original = trainer.Training.run_steps

    def counted(self, log):
        with counter:
            return original(self, log)

    monkeypatch.setattr(trainer.Training, "run_steps", counted)
    assert trainer.train(run) == 0
    assert between == [0] * 8
