"""Files are shared as the umask says, whoever writes them."""

import errno
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones

from engine import files
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.files import open_regular, parse_json, publish_directory, read_bytes, reading, write_atomically
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


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', "[Infinity]", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 100_000, "", "1" * 10_000, "\xff"]
)
def test_what_is_no_json_is_one_line(text, tmp_path):
    remedy = "write it again"
    with (
        pytest.raises(UserError, match=rf"state.json: cannot be read: .*; {remedy}$") as raised,
        reading(tmp_path / "state.json", remedy),
    ):
        parse_json(text)
    assert len(raised.value.lines) == 1


def test_a_file_that_cannot_be_written_leaves_no_half(tmp_path):
    (tmp_path / "file").write_text("before")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "file", write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    ("failures", "number", "read"), [(2, errno.ESTALE, True), (3, errno.EIO, False), (1, errno.EACCES, False)]
)
def test_a_file_system_that_fails_for_a_moment_costs_no_sample(failures, number, read, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    answers = [OSError(number, os.strerror(number))] * failures

    def open_in_vain(path):
        if answers:
            raise answers.pop()
        return open_regular(path)

    monkeypatch.setattr(files, "open_regular", open_in_vain)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    if read:
        assert read_bytes(tmp_path / "file") == b"content"
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            read_bytes(tmp_path / "file")
