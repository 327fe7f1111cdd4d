"""Safetensors files in pieces: the library reads what we write, we read what it writes, and neither holds two copies."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine import tensors
from engine.files import open_regular
from engine.tensors import TensorFile, header_of, in_file_order, pieces_of, read_header, staged, write_one_by_one, write_pieces


def examples(device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bytes": torch.randint(0, 256, (13,), generator=generator, dtype=torch.uint8).to(device),
        "weight/a.b@0": torch.randn(1000, generator=generator).to(device),
        "weight/a.c@64": torch.randn(3, 5, generator=generator).to(device, torch.bfloat16),
        "step": torch.tensor(3.0, device=device),
        "nothing": torch.empty(0, device=device),
        "count": torch.tensor([2**40], device=device),
    }


def written(path, values, pieces) -> str:
    return write_pieces(path, header_of(values)[0], pieces)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("beside", [False, True])
def test_the_library_reads_what_is_written_in_pieces(device, beside, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", 256)
    values = in_file_order(examples(device))
    pieces = pieces_of(values.values())
    if beside:
        pieces = list(staged(values.values(), [torch.empty(256, dtype=torch.uint8) for _ in range(20)]))
    digest = written(tmp_path / "file", values, pieces)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    theirs = safetensors.torch.load_file(tmp_path / "file")
    assert theirs.keys() == values.keys()
    for name, value in values.items():
        assert theirs[name].dtype == value.dtype
        assert torch.equal(theirs[name], value.cpu())


def test_two_buffers_hold_any_number_of_pieces():
    values = list(examples().values())
    expected = b"".join(tensors.bytes_of(value).numpy().tobytes() for value in values)
    buffers = [torch.empty(64, dtype=torch.uint8) for _ in range(2)]
    pieces = [piece.numpy().tobytes() for piece in staged(values, buffers)]
    assert b"".join(pieces) == expected
    assert {len(piece) for piece in pieces[:-1]} == {64}


def test_what_lies_on_the_host_is_written_from_where_it_lies():
    value = torch.zeros(4 * tensors.PIECE // 4)
    addresses = [piece.data_ptr() for piece in pieces_of([value])]
    assert addresses == [value.data_ptr() + number * tensors.PIECE for number in range(4)]


def test_any_elements_are_read(tmp_path):
    safetensors.torch.save_file(examples(), tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    for name, value in examples().items():
        assert file.elements(name) == value.numel()
        assert torch.equal(file.tensor(name), value)
    target = torch.zeros(300)
    file.read("weight/a.b@0", 500, target)
    assert torch.equal(target, examples()["weight/a.b@0"][500:800])


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    safetensors.torch.save_file(examples(), tmp_path / "file")
    opened: list[Path] = []
    monkeypatch.setattr(tensors, "open_regular", lambda path: (opened.append(path), open_regular(path))[1])
    TensorFile(tmp_path / "file").tensor("weight/a.b@0")
    assert len(opened) == 1


def test_tensors_come_one_by_one_in_any_order_and_layout(tmp_path):
    values = {"a": torch.randn(3, 4), "b": torch.randn(2, 3, 4, 5).permute(0, 3, 1, 2), "c": torch.randn(7)}
    layout = {name: torch.empty(value.shape, device="meta") for name, value in values.items()}
    write_one_by_one(tmp_path / "file", layout, reversed(values.items()), {"format": "pt"})
    theirs = safetensors.torch.load_file(tmp_path / "file")
    assert all(torch.equal(theirs[name], value) for name, value in values.items())
    with pytest.raises(ValueError, match="nothing was written for a"):
        write_one_by_one(tmp_path / "file", layout, [("b", values["b"]), ("c", values["c"])], {})
    with pytest.raises(ValueError, match=r"a is \[7\], not \[3, 4\]"):
        write_one_by_one(tmp_path / "file", layout, [("a", values["c"])], {})


def test_metadata_that_the_library_refuses_are_refused(tmp_path):
    content = json.dumps({"__metadata__": {"engine": "{}", "other": -0.5}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(ValueError, match="its metadata are not the engine's"):
        read_header(tmp_path / "file")
