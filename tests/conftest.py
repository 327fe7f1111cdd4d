"""Without a GPU, Triton kernels run in its interpreter; that must be decided before the kernels are imported. With one, cuBLAS
and cuDNN read what they may do when they are first used."""

import os

import torch

if torch.cuda.is_available():
    # Results are compared with the CPU's in fp32, and the bits of one run with those of another.
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
else:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import engine.quiet  # noqa: F401

# isort: split
import functools
import gc
from pathlib import Path

import pytest

from engine.loop import log
from engine.quiet import quiet_libraries
from examples import tiny_models
from examples.photographs import write_images
from tests import commands, tiny

quiet_libraries()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("two_processes") and torch.cuda.device_count() == 1:
            item.add_marker(pytest.mark.skip(reason="two processes need two CUDA devices, or none"))


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """One process group for all tests of this process: DeepSpeed cannot follow it through a second initialisation."""
    from engine.processes import Processes

    processes = Processes().connect()
    yield
    processes.close()


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """Spares short runs a third of their time: the search for garbage in what the libraries keep, and the drawing of curves."""
    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "curves", commands.undrawn)
        gc.freeze()
        yield


@pytest.fixture(autouse=True)
def linear_of_torch(monkeypatch):
    """ZeRO 3 leaves a function of DeepSpeed's in its place for the whole process, of which torch 2.11 compiles wrong gradients.

    No run meets it: one with ZeRO 3 is not compiled.
    """
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The tiny Stable Diffusion pipeline."""
    return tiny.write_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An image folder with captions."""
    return tiny.write_images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """An image folder of real photographs with captions."""
    return write_images(tmp_path_factory.mktemp("photographs") / "train", longest=200)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """family -> the options that name its tiny pipelines, saved once for each set of arguments."""

    @functools.cache
    def write(writer, **arguments):
        return writer(tmp_path_factory.mktemp("published"), **arguments)

    def options(family: str, **arguments) -> dict[str, str]:
        writer = tiny_models.WRITERS[family]
        known = arguments if family == "wuerstchen" else {}
        return write(writer, **known)

    return options


@pytest.fixture(scope="session")
def shards(tmp_path_factory, model, images) -> Path:
    """Latent shards of the image folder, several files, with flips."""
    from engine.shards import build_command

    directory = tmp_path_factory.mktemp("shards") / "shards"
    arguments = [
        "--family", "sd", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images),
        "--resolution", "16", "--random_flip", "--shard_records", "5", "--shards_dir", str(directory),
    ]  # fmt: skip
    assert build_command(arguments) == 0
    return directory
