"""Between two log points the host reads nothing from the device, sends it nothing that it would wait for, and never waits."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config.options import TrainConfig
from engine.data.samples.batch import Batch
from engine.loop import capture, trainer
from engine.loop.run import Run
from engine.loop.step import Step
from engine.models.family import open_family
from engine.processes import Processes
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
     {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, {"dream_training": True},
     {"mixed_precision": "bf16", "cache_text": "tokens"}],
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

    def counted(self, *arguments):
        with counter:
            return original(self, *arguments)

    monkeypatch.setattr(trainer.Training, "run_steps", counted)
    assert trainer.train(run) == 0
    assert between == [0] * 8


class CountCrossings(TorchDispatchMode):
    """Notes the operations whose tensors lie on more than one device."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if torch.is_tensor(value)]
        if len({tensor.device for tensor in tensors}) > 1:
            self.crossings.append(function._schema.name)
        return result


class CountFactories(TorchFunctionMode):
    """Notes what makes a tensor of the device from the host's numbers: no operator shows the copy inside it."""

    def __init__(self, crossings: list[str]) -> None:
        super().__init__()
        self.crossings = crossings

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and result.device.type != "cpu":
            self.crossings.append(function.__name__)
        return result


def test_the_counter_sees_a_crossing():
    with CountCrossings() as counter, CountFactories(counter.crossings):
        there = torch.zeros(2, device="meta")
        there.copy_(torch.zeros(2))
        torch.zeros(2).to("meta")
        torch.where(there > 0, there, torch.zeros(()))
        torch.tensor([1.0, 2.0], device="meta")
        torch.where(there > 0, there, 0.0).fill_(2.0)  # these take a number along with the launch
    assert counter.crossings == ["aten::copy_", "aten::_to_copy", "aten::where", "tensor"]


@pytest.mark.parametrize(
    ("family_name", "options"),
    [
        ("sd", {"noise_offset": 0.1, "input_perturbation": 0.1, "snr_gamma": 5.0}),
        ("sd", {"dream_training": True, "mixed_precision": "bf16", "gradient_accumulation_steps": 3}),
        ("sd", {"gradient_checkpointing": True, "cache_text": "tokens"}),
        ("sd", {"gradient_checkpointing": True, "train_text_encoder": True}),
        ("kandinsky-prior", {"snr_gamma": 5.0}),
        ("kandinsky-prior", {"cache_text": "tokens"}),
        ("wuerstchen", {"cache_text": "tokens"}),
        ("kandinsky-decoder", {"mixed_precision": "bf16"}),
        ("wuerstchen", {}),
    ],
    ids=str,
)
def test_a_step_sends_nothing_to_the_device(family_name, options, published, tmp_path):
    """The meta device stands in for a GPU: a copy from pageable memory would make the host wait, and break a capture."""
    own = {"family": family_name, "train_data_dir": str(tmp_path), "output_dir": str(tmp_path), "seed": 1, "use_ema": True}
    own |= {"openable_checkpoints": False}  # which keep the frozen numbers on the host
    run = TrainConfig.model_validate({**own, **published(family_name), "train_batch_size": 2, **options})
    processes = Processes(device=torch.device("meta"))
    family = open_family(run)
    accumulation = run.gradient_accumulation_steps
    numbers = Run(seed=1, global_batch=2 * accumulation, fingerprint="", records=12, steps=4)
    training = trainer.Training(run, numbers, family, family.load_model().to("meta"), processes)
    slots = torch.arange(2)
    timesteps = family.schedule.draw(torch.tensor([1]), slots, 2 * accumulation)
    fields = family.encoding.record_spec.items()
    record = {name: torch.empty(2, *field.shape, dtype=field.dtype, device="meta") for name, field in fields}
    drawn = slots, timesteps, family.schedule.coefficients(timesteps), torch.zeros(1, dtype=torch.int64)
    batch = Batch(record, *(tensor.to("meta") for tensor in drawn))
    with CountCrossings() as counter, CountFactories(counter.crossings):
        training.train_step(iter([batch] * accumulation), 1)
    assert counter.crossings == []


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize(
    "options",
    [{}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, {"zero_stage": 1},
     {"zero_stage": 2, "mixed_precision": "bf16"}, {"offload_ema": True}, {"cache_text": "tokens", "mixed_precision": "bf16"}],
    ids=str,
)  # fmt: skip
def test_a_gpu_never_waits_for_the_host_between_two_log_points(
    options, graphs, model, images, tmp_path, monkeypatch, restored_sync_debug_mode
):
    """torch itself raises where it would wait, in this thread, autograd's and the loader's.

    It knows of copies from and to pageable memory, `item`, `nonzero` and the like, and `Stream.synchronize`. It does not see
    `torch.cuda.synchronize` and `Event.synchronize` (the loader's and the pace's, which are meant to wait), the allocators' own
    (cudaMalloc, cudaFree, cudaHostAlloc), nor what NCCL, Triton or other libraries do.
    """
    first = capture.WARM_UP + 1  # the steps before it may: libraries choose algorithms, and graphs are captured
    train_step, after_step = Step.__call__, trainer.Training._after_step
    strict: list[int] = []

    def begin(self, batches, number):
        if number > first:
            torch.cuda.set_sync_debug_mode("error")
            strict.append(number - 1)
        train_step(self, batches, number)

    def end(self, *arguments):
        if self.step % self.config.log_every == 0:
            torch.cuda.set_sync_debug_mode("default")
        after_step(self, *arguments)

    monkeypatch.setattr(Step, "__call__", begin)
    monkeypatch.setattr(trainer.Training, "_after_step", end)
    run = {"max_train_steps": 12, "log_every": 12, "noise_offset": 0.1, "snr_gamma": 5.0, "cuda_graphs": graphs, **options}
    run["deterministic"] = False  # as users run
    assert trainer.train(config(model, images, tmp_path / "shards", tmp_path / "out", **run)) == 0
    assert strict == list(range(first, 12))


@pytest.fixture
def restored_sync_debug_mode():
    yield
    torch.cuda.set_sync_debug_mode("default")
