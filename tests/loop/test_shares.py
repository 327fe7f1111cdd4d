"""Several processes save and resume: each opens and reads its share, and all go on from the same checkpoint or say the same."""

import json
import os
import pickle
import shutil
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.files import digest
from engine.loop.checkpoints import layout, slices, writer
from engine.loop.checkpoints.slices import RankFiles, SliceFiles, open_slices, part_of
from engine.loop.weights.partition import Slice
from engine.tensors import TensorFile
from tests.commands import Command, start_two
from tests.loop.runs import checkpoint_tensors, flip_last_byte


def run(world: int, output: Path, *words: str) -> list[Command]:
    command = [sys.executable, "-m", "tests.loop.divided", str(output), *words]
    started = start_two(command, world) if world > 1 else [Command(command)]
    for process in started:
        process.wait(60)
    return started


def said(processes: list[Command]) -> list[dict]:
    assert [process.returncode for process in processes] == [0] * len(processes), [process.errors for process in processes]
    return [json.loads(process.output) for process in processes]


def whole(resumed: list[dict], kind: str) -> dict[str, list[float]]:
    """Parameters put together from what the processes hold."""
    pieces: dict[str, dict[int, list[float]]] = {}
    for process in resumed:
        for name, values in process["state"].items():
            if name.startswith(f"{kind}/"):
                parameter, start = name.removeprefix(f"{kind}/").rsplit("@", 1)
                pieces.setdefault(parameter, {})[int(start)] = values
    return {name: [value for start in sorted(parts) for value in parts[start]] for name, parts in pieces.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of two steps that four processes wrote."""
    output = tmp_path_factory.mktemp("shares") / "out"
    processes = run(4, output, "save")
    assert [process.returncode for process in processes] == [0] * 4, [process.errors for process in processes]
    return output


@pytest.fixture
def output(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_processes_goes_on_with_the_same_bits_and_opens_its_share(world, saved):
    resumed = said(run(world, saved, "resume"))
    checkpoint = saved / "checkpoint-4"
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        expected = {name: tensor.tolist() for name, tensor in checkpoint_tensors(checkpoint, kind).items()}
        assert whole(resumed, kind) == expected
    sums = [process["loss_sum"] for process in resumed]
    each = [pytest.approx(0.4 + rank / 7) for rank in range(4)]
    assert sums == each if world == 4 else sums == [pytest.approx(0.4 + 1.5 / 7)] * world
    for rank, process in enumerate(resumed):
        opened = Counter(name for name, _ in process["read"])
        share = {f"rank-{number}.safetensors" for number in range(rank, 4, world)}
        overlap = {f"rank-{number}.safetensors" for number in range(rank * 4 // world, (rank + 1) * 4 // world)}
        first = {"rank-0.safetensors"} if world < 4 else set()  # whose counters fit any partition
        others = {"manifest.json", "state.json", "latest"} if rank == 0 else {"manifest.json"}
        assert opened.keys() == share | overlap | first | others
        assert all(opened[name] == 1 + (name in share) for name in share | overlap)
        assert opened["manifest.json"] <= 2, "the first looks for one before it opens it"


@pytest.mark.parametrize(("piece", "reads"), [(slices.PIECE, 16), (64, 60)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_file_is_read_after_another_and_at_once_what_lies_side_by_side(device, piece, reads, saved, monkeypatch):
    monkeypatch.setattr(slices, "PIECE", piece)
    checkpoint, read = saved / "checkpoint-4", []
    files = open_slices(checkpoint, 4)
    files.files = RankFiles(checkpoint, most=1)
    read_at = TensorFile.read_at

    def noted(file, position, target) -> None:
        read.append((file.path.name, position))
        read_at(file, position, target)

    monkeypatch.setattr(TensorFile, "read_at", noted)
    filled = {(kind, name): torch.empty(size, device=device) for kind in files.kinds for name, size in files.sizes.items()}
    whole = {name: Slice(name, torch.Size([size]), 0, size, 0, 0) for name, size in files.sizes.items()}
    files.fill((kind, whole[name], target) for (kind, name), target in filled.items())
    for (kind, name), target in filled.items():
        assert torch.equal(target.cpu(), checkpoint_tensors(checkpoint, kind)[name].view(-1))
    assert read == sorted(read)
    assert len(read) == reads, "of four files and kinds"
    assert len(files.files) == 1


def test_what_1024_files_hold_is_told_in_2_kb_each():
    """As many parameters as SD 1.5's has, in contiguous shares."""
    size, world = 1_253_000, 1024
    share = -(-686 * size // world)
    parts = []
    for rank in range(world):
        first, last = rank * share, min((rank + 1) * share, 686 * size)
        numbers = range(first // size, -(-last // size))
        slices = [(number, max(first - number * size, 0), min(last - number * size, size)) for number in numbers]
        header = {
            f"{kind}/down_blocks.{number}.attentions.0.transformer_blocks.0.attn1.to_q.weight@{start}": {
                "dtype": "F32", "shape": [stop - start],
            }
            for kind in ("weight", "ema", "exp_avg", "exp_avg_sq") for number, start, stop in slices
        }  # fmt: skip
        others = {name: {"dtype": "F32", "shape": []} for name in ("optimizer/step", "metrics/loss_sum", "random/cpu")}
        parts.append(part_of(SimpleNamespace(path=Path(f"rank-{rank}.safetensors"), header=header | others)))
    assert max(len(pickle.dumps(part)) for part in parts) < 2048
    files = SliceFiles(RankFiles(Path("nowhere")), parts)
    assert set(files.sizes.values()) == {size}
    assert not files.files, "none is opened for that"


def test_a_process_that_never_sees_the_same_is_named_and_none_trains(saved):
    first, second = run(2, saved, "resume", "blind")
    assert (first.returncode, second.returncode) == (2, 2)
    expected = "checkpoint-4: process 1 did not come to see it as the first process does within 1 seconds"
    assert expected in first.errors
    assert second.errors == "", "one says it for all"


@pytest.mark.parametrize("rank", [0, 3])
def test_where_the_latest_is_damaged_all_go_on_from_the_newest_that_is_whole(rank, output):
    flip_last_byte(output / "checkpoint-4" / f"rank-{rank}.safetensors")
    processes = run(2, output, "resume")
    assert {process["checkpoint"] for process in said(processes)} == {"checkpoint-2"}
    fault = f"checkpoint-4: damaged: rank-{rank}.safetensors missing or altered"
    assert f"{fault}; going on from checkpoint-2, the newest other that is whole" in processes[0].errors
    flip_last_byte(output / "checkpoint-2" / "state.json")
    processes = run(2, output, "resume")
    assert [process.returncode for process in processes] == [2, 2]
    assert f"{fault}; there is no other that is whole" in processes[0].errors


def test_where_one_process_alone_cannot_read_the_latest_all_go_on_from_another(saved):
    processes = run(2, saved, "resume", "unreadable")
    assert {process["checkpoint"] for process in said(processes)} == {"checkpoint-2"}
    expected = "checkpoint-4/rank-1.safetensors: cannot be read: Input/output error; mend what is wrong with that place"
    assert expected in processes[0].errors
    assert "going on from checkpoint-2" in processes[0].errors


def test_what_one_process_finds_in_what_it_reads_is_raised_by_all(output):
    checkpoint = output / "checkpoint-4"
    content = bytearray((checkpoint / "rank-3.safetensors").read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little") + next(
        described["data_offsets"][0] for name, described in header.items() if name.startswith("ema/")
    )  # fmt: skip
    content[start : start + 4] = b"\x00\x00\xc0\x7f"
    (checkpoint / "rank-3.safetensors").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["rank-3.safetensors"] = digest(checkpoint / "rank-3.safetensors")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    processes = run(2, output, "resume")
    assert [process.returncode for process in processes] == [2, 2], [process.errors for process in processes]
    assert "holds values that are not finite; resume from" in processes[0].errors
    assert "--resume_from_checkpoint" in processes[0].errors


@pytest.mark.parametrize("beside", [(), ("beside",)], ids=str)
def test_a_process_that_is_killed_between_its_file_and_its_digest_ends_the_run(beside, tmp_path):
    first, second = run(2, tmp_path / "out", "save", "killed", *beside)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 75, first.errors
    assert "checkpoint-4 cannot be written: process 1 ended without a word; the launcher" in first.errors
    assert [process["checkpoint"] for process in said(run(1, tmp_path / "out", "resume"))] == ["checkpoint-2"]


def test_a_digest_that_does_not_come_is_not_waited_for_without_limit(tmp_path):
    first, second = run(2, tmp_path / "out", "save", "stuck")
    assert first.returncode == 75, first.errors
    assert "checkpoint-2 cannot be written: process 1 did not write its part within 1 seconds after the first" in first.errors
    assert second.returncode == 75, second.errors
    assert "Traceback" not in second.errors
    assert not layout.complete_checkpoints(tmp_path / "out")


def test_a_part_that_comes_late_beside_the_training_is_waited_for(tmp_path):
    processes = run(2, tmp_path / "out", "save", "late", "beside", "training")
    assert [process.returncode for process in processes] == [0, 0], [process.errors for process in processes]
    assert len(layout.complete_checkpoints(tmp_path / "out")) == 2


def test_who_hears_beside_the_training_that_another_is_gone_leaves(tmp_path):
    """The main thread may stand in a collective, which it never hears of again."""
    first, second = run(2, tmp_path / "out", "save", "killed", "beside", "training")
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 75
    assert "checkpoint-4 cannot be written: process 1 ended without a word" in first.errors
    assert "Leaving with exit code 75" in first.errors


def test_what_keeps_one_process_from_copying_is_raised_by_all(tmp_path):
    processes = run(2, tmp_path / "out", "save", "memory", "beside")
    assert [process.returncode for process in processes] == [2, 2], [process.errors for process in processes]
    assert "checkpoint-2 cannot be written: process 1: CUDA error: out of memory; there is no comp" in processes[0].errors


@pytest.mark.parametrize("beside", [(), ("beside",)], ids=str)
def test_what_keeps_one_process_from_writing_is_raised_by_all(beside, tmp_path):
    processes = run(4, tmp_path / "out", "save", "full", *beside)
    assert [process.returncode for process in processes] == [2] * 4, [process.errors for process in processes]
    expected = "checkpoint-2 cannot be written: processes 1, 2, 3: No space left on device; there is no complete one. Make room"
    assert expected in processes[0].errors
    assert not any(process.errors for process in processes[1:])
    assert not list((tmp_path / "out").iterdir()), "the disk is full"


def test_the_first_process_waits_until_it_sees_what_others_wrote(output):
    file = output / "checkpoint-4" / "rank-3.safetensors"
    file.rename(output / "late")
    threading.Timer(0.3, (output / "late").rename, (file,)).start()
    assert open_slices(output / "checkpoint-4", 4).kinds == ["ema", "exp_avg", "exp_avg_sq", "weight"]


def test_a_directory_that_another_node_made_is_waited_for(tmp_path, monkeypatch):
    def exists(*unused, **options):
        raise FileExistsError(17, "File exists", "out")

    monkeypatch.setattr(Path, "mkdir", exists)
    threading.Timer(0.3, os.makedirs, (tmp_path / "out" / "checkpoint-2.partial",)).start()
    writer._make(tmp_path / "out" / "checkpoint-2.partial")
    assert (tmp_path / "out" / "checkpoint-2.partial").is_dir()
