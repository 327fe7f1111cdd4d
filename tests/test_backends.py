"""The switches of the libraries beneath torch: what the options set, and that a run works under them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cpp_ext
from engine.backends import _directory_of_the_node, configure, inductor_options
from engine.config.options import TrainConfig
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
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, options: given.append(options))
    assert train(config(model, images, shards, tmp_path, max_train_steps=1, compile=True, compile_mode=mode)) == 0
    assert given == [torch._inductor.list_mode_options(mode)]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_accepts_the_options_of_a_gpu_which_leave_layouts_to_the_training_form(mode):
    options = inductor_options(mode, on_gpu=True)
    assert options == {**torch._inductor.list_mode_options(mode), "layout_optimization": False}
    torch.compile(torch.sin, fullgraph=True, dynamic=False, options=options)  # which checks their names and types


@pytest.fixture
def several(tmp_path, monkeypatch):
    """Two nodes of four processes, with 16 processors each; returns what their variables become."""
    for name in CODE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(16))

    def variables(world: int = 8, **given: str) -> dict[str, str | None]:
        for name, value in ({"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(min(world, 4))} | given).items():
            monkeypatch.setenv(name, value)
        configure(TrainConfig.model_validate({"family": "sd", "pretrained_model_name_or_path": "unused"}))
        return {name: os.environ.get(name) for name in CODE}

    with torch._inductor.config.patch({"compile_threads": 16}):
        yield variables
    for name in CODE:
        os.environ.pop(name, None)


CODE = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_COMPILE_THREADS")


def test_several_processes_compile_on_their_node_and_each_in_its_part_of_the_threads(several, tmp_path):
    inductor, triton, extensions, threads = several().values()
    assert {os.path.dirname(path) for path in (inductor, triton, extensions)} == {  # noqa: PTH120
        str(tmp_path / f"compiled-code-{os.getuid()}")
    }
    assert threads == "4"
    assert torch._inductor.config.compile_threads == 4


def test_one_process_and_what_a_person_said_stay_as_they_are(several):
    assert set(several(world=1).values()) == {None}
    assert several(TRITON_CACHE_DIR="mine", TORCHINDUCTOR_COMPILE_THREADS="2")["TRITON_CACHE_DIR"] == "mine"
    assert torch._inductor.config.compile_threads == 16


@pytest.mark.parametrize(
    "make", [lambda path: (path.mkdir(), path.chmod(0o777)), Path.touch, lambda path: path.symlink_to("nowhere")]
)
def test_code_that_others_could_have_written_is_not_run(make, several, tmp_path):
    make(tmp_path / f"compiled-code-{os.getuid()}")
    assert not several()["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/compiled-code-{os.getuid()}/")
    taken = _directory_of_the_node()
    assert _directory_of_the_node() == taken, "all processes of the node share it"
    taken.rmdir()
    make(taken)
    assert _directory_of_the_node() != taken


def test_a_library_is_built_once_by_all_processes_that_want_it(tmp_path):
    library = cpp_ext.load("order")._name
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho once >> {tmp_path}/calls\nsleep 0.5\nfor last; do :; done\ncp {library} "$last"\n')
    compiler.chmod(0o755)
    variables = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", "import cpp_ext; assert cpp_ext.load('order')"]
    started = [subprocess.Popen(command, env=variables) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "once\n"
    assert [path.suffix for path in (tmp_path / "cache" / "diffusion-training-engine").iterdir()] == [".so"]


@pytest.mark.gpu
def test_a_deterministic_run_repeats_its_bits_on_a_gpu(model, images, shards, tmp_path):
    options = {"deterministic": True, "mixed_precision": "bf16", "shards_dir": str(tmp_path / "shards"), "max_train_steps": 8}

    def lines(name: str) -> list[tuple[float, float]]:
        assert train(config(model, images, shards, tmp_path / name).model_copy(update=options)) == 0
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in metrics]

    assert lines("first") == lines("second")
