"""Files are shared as the umask says, whoever writes them."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones

from engine import files, messages
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.files import (
    LOCK,
    excludes_others,
    is_held,
    lock,
    open_regular,
    parse_json,
    publish_directory,
    read_bytes,
    read_text,
    reading,
    seen,
    unlock,
    unseen,
    write_atomically,
    write_text,
)
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
    "text",
    ['{"a": NaN}', "[Infinity]", "[-1e999]", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 100_000, "", "1" * 10_000, "\xff"],
)
def test_what_is_no_json_is_one_line(text, tmp_path):
    remedy = "write it again"
    with (
        pytest.raises(UserError, match=rf"state.json: cannot be read: .*; {remedy}$") as raised,
        reading(tmp_path / "state.json", remedy),
    ):
        parse_json(text)
    assert len(raised.value.lines) == 1


@pytest.mark.parametrize("read", [read_bytes, read_text])
def test_what_the_system_makes_up_is_not_read(read, tmp_path):
    (tmp_path / "link").symlink_to("/proc/self/maps")
    with pytest.raises(OSError, match="not a regular file of a known size"):
        read(tmp_path / "link")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EACCES])
def test_a_disk_that_fails_is_not_the_fault_of_a_file(number, tmp_path):
    file, words = tmp_path / "state.json", os.strerror(number)
    for error in (OSError(number, words), OSError(number, words, "/elsewhere"), RuntimeError(f"{words} (os error {number})")):
        with (
            pytest.raises(UserError, match=rf"state.json: cannot be read: {words}; mend what is wrong with that place \(room"),
            reading(file, "download it again"),
        ):
            raise error


def test_a_lack_of_memory_is_not_the_fault_of_a_file(tmp_path):
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("can't allocate memory: you")):
        with pytest.raises(type(error)), reading(tmp_path / "file", "download it again"):
            raise error
    with (
        pytest.raises(UserError, match="No such file or directory: .*; download it again"),
        reading(tmp_path, "download it again"),
    ):
        open_regular(tmp_path / "absent")


def test_a_file_is_read_with_waiting_and_written_without_a_probe(tmp_path, monkeypatch):
    made = []
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path, *given, **named: (made.append(path.name), touch(path, *given, **named)))
    write_text(tmp_path / "file", "content")
    assert len(made) == 1, "the file itself"
    with open_regular(tmp_path / "file") as file:
        assert os.get_blocking(file.fileno())


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


def test_what_a_library_says_of_a_full_disk_gets_the_files_name(tmp_path):
    def write(temporary: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as raised:
        write_atomically(tmp_path / "file", write)
    assert raised.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("shared", [False, True])
def test_a_directory_is_held_until_it_is_let_go_or_its_process_ends(shared, tmp_path):
    held = lock(tmp_path, shared)
    assert lock(tmp_path) is None
    again = lock(tmp_path, shared=True)
    assert (again is not None) == shared
    open_regular(tmp_path / LOCK).close()  # which ends the locks of `lockf`
    assert is_held(tmp_path)
    other = subprocess.run([sys.executable, "-c", HELD, str(tmp_path)], capture_output=True, text=True, check=True)
    assert other.stdout == "True None\n"
    for descriptor in filter(None, (again, held)):
        unlock(descriptor, tmp_path)
    assert not list(tmp_path.iterdir())
    os.close(lock(tmp_path))  # as one that is killed
    assert is_held(tmp_path) is False
    unlock(lock(tmp_path), tmp_path)


HELD = """
import sys
from pathlib import Path
from engine.files import is_held, lock
print(is_held(Path(sys.argv[1])), lock(Path(sys.argv[1])))
"""


def test_who_waits_for_a_file_that_is_removed_holds_the_next(tmp_path, monkeypatch):
    held, opened = lock(tmp_path), os.open

    def removed_meanwhile(path, *arguments):
        descriptor = opened(path, *arguments)
        if os.path.lexists(tmp_path / LOCK) and not removed:
            removed.append(path)
            unlock(held, tmp_path)
        return descriptor

    removed: list[Path] = []
    monkeypatch.setattr(os, "open", removed_meanwhile)
    mine = lock(tmp_path)
    assert removed
    assert os.path.samestat(os.fstat(mine), (tmp_path / LOCK).stat())
    assert lock(tmp_path) is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_once(number, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.fcntl", fails)
    messages.begin(quiet=True)
    held = lock(tmp_path)
    assert held is not None
    assert lock(tmp_path, shared=True) is not None
    assert not excludes_others(held, tmp_path)
    assert is_held(tmp_path) is None
    unlock(held, tmp_path)
    said = capsys.readouterr().err
    assert said.count(f"{tmp_path}: locks are not supported there ({os.strerror(number)})") == said.count("\n") == 1


def test_a_failing_disk_is_not_taken_for_one_without_locks(tmp_path, monkeypatch, capsys):
    answers, asks = [errno.ESTALE, errno.EIO], fcntl.fcntl

    def fails(*arguments):
        if answers:
            raise OSError(answers[0], os.strerror(answers.pop(0)))
        return asks(*arguments)

    monkeypatch.setattr("fcntl.fcntl", fails)
    moved = iter([False])
    monkeypatch.setattr(files, "is_at", lambda *arguments, whole=files.is_at: next(moved, True) and whole(*arguments))
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
        lock(tmp_path)
    held = lock(tmp_path)
    assert excludes_others(held, tmp_path)
    unlock(held, tmp_path)
    assert not capsys.readouterr().err


def test_a_lock_is_no_way_out_of_its_directory(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        lock(tmp_path / "inside")
    assert not (tmp_path / "elsewhere").exists()


def test_what_another_node_wrote_is_waited_for(tmp_path, monkeypatch):
    asked: list[int] = []
    assert seen(tmp_path / "file", lambda: bool(asked.append(1) or len(asked) == 3))
    assert not seen(tmp_path / "file", seconds=0.1)
    assert not seen(tmp_path / "nowhere" / "file", lambda: read_text(tmp_path / "file") == "", seconds=0)
    monkeypatch.setattr(files, "SEEN_WITHIN", 0.1)
    assert not seen(tmp_path / "file")
    mine, ours = unseen(tmp_path / "file"), unseen(tmp_path / "file", "processes 1, 2")
    assert (mine.alone, mine.passing, ours.shared, ours.passing) == (True, True, True, True)
    assert "file: processes 1, 2 did not come to see it as the first process does within 0.1 seconds" in str(ours)
