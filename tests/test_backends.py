"""The switches of the libraries beneath torch: what the options set, and that a run works under them."""

import json
import os

import pytest
import torch

from engine.backends import configure
from engine.loop.trainer import train
from tests.loop.runs import config


@pytest.fixture(autouse=True)
def switches():
    """Puts the switches back."""
    tf32, benchmark = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        yield
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark
    torch.use_deterministic_algorithms(False)


def test_cudnn_chooses_by_timing(model, images, shards, tmp_path):
    configure(config(model, images, shards, tmp_path, allow_tf32=True, deterministic=False))
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_holds_for_every_library_before_cuda_is_used(model, images, shards, tmp_path, monkeypatch):
    seen = []

    def processes(local_rank):
        # Here CUDA is initialised.
        seen.append(os.environ["CUBLAS_WORKSPACE_CONFIG"])
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.loop.trainer.Processes", processes)
    with pytest.raises(KeyboardInterrupt):
        train(config(model, images, shards, tmp_path, deterministic=True))
    assert seen == [":4096:8"]
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch._inductor.config.deterministic


def test_a_deterministic_run_trains_to_the_same_losses(model, images, shards, tmp_path):
    def losses(name: str, **options) -> list[float]:
        assert train(config(model, images, shards, tmp_path / name, max_train_steps=3, **options)) == 0
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert losses("deterministic", deterministic=True) == losses("plain")


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_the_mode_of_compilation_reaches_torch(mode, model, images, shards, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: modes.append(options["mode"]))
    assert train(config(model, images, shards, tmp_path, max_train_steps=1, compile=True, compile_mode=mode)) == 0
    assert modes == [mode]


@pytest.mark.gpu
def test_a_deterministic_run_repeats_its_bits_on_a_gpu(model, images, shards, tmp_path):
    options = {"deterministic": True, "mixed_precision": "bf16", "shards_dir": str(tmp_path / "shards"), "max_train_steps": 8}

    def lines(name: str) -> list[tuple[float, float]]:
        assert train(config(model, images, shards, tmp_path / name).model_copy(update=options)) == 0
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in metrics]

    assert lines("first") == lines("second")
