"""Files are shared as the umask says, whoever writes them."""

import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones

from engine.config.options import TrainConfig
from engine.files import publish_directory, write_atomically
from engine.loop.trainer import train
from engine.models.original_layout import write_single_file


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(directory: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in directory.rglob("*") if path.is_file()}


def test_files_follow_the_umask(umask, tmp_path):
    (tmp_path / "file.partial").touch(0o600)  # left by a run that was killed
    write_atomically(tmp_path / "file", lambda path: save_file({"ones": ones(2)}, path))
    (tmp_path / "aside").mkdir()
    save_file({"ones": ones(2)}, tmp_path / "aside" / "file")
    publish_directory(tmp_path / "aside", tmp_path / "final")
    assert modes(tmp_path) == {0o666 & ~umask}
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("umask", [0o002], indirect=True)
def test_shards_checkpoints_and_exports_follow_it(umask, model, images, tmp_path):
    values = {"family": "sd", "pretrained_model_name_or_path": str(model), "train_data_dir": str(images), "resolution": 16,
              "max_train_steps": 1, "report_to": "none", "output_dir": str(tmp_path / "out")}  # fmt: skip
    assert train(TrainConfig.model_validate(values)) == 0
    write_single_file(tmp_path / "out", tmp_path / "out" / "single.safetensors")
    assert modes(tmp_path / "out") == {0o664}
