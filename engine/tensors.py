"""Safetensors files, written and read in pieces: nothing but a piece is ever held beside the tensors themselves.

A file is the length of its header (8 bytes, little endian), the header in JSON, and the bytes of the tensors, one after another
as the header places them (https://github.com/huggingface/safetensors).
"""

import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import struct
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.files import open_regular, parse_json

PIECE = 64 * 2**20  # bytes; a power of two, because torch's allocator of pinned memory rounds up to one
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 10**8  # bytes, as the library has it


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The header of a safetensors file: its tensors' descriptions, the engine's metadata and where the data begin.

    What it says of the tensors is true of the file: each has a dtype and a shape that fit its bytes, and these follow one
    another from the first byte of the data to the last of the file.

    Raises:
        OSError, ValueError, RecursionError: not a whole safetensors file of ours.
    """
    with open_regular(path) as file:
        return _read_header(file)


def _read_header(file: io.BufferedReader, largest: int = LARGEST_HEADER) -> tuple[dict[str, Any], dict[str, Any], int]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > size - 8:
        raise ValueError("truncated")
    if length > largest:
        raise ValueError(f"its header is larger than {largest} bytes")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    said = header.pop("__metadata__", {})
    texts = isinstance(said, dict) and all(isinstance(value, str) for value in said.values())
    metadata = parse_json(said.get("engine", "{}")) if texts else None
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are not the engine's")
    end = 0
    for start, stop, name in sorted((*_bytes_of(name, tensor), name) for name, tensor in header.items()):
        if start != end:
            raise ValueError(f"the bytes of {name} do not begin where those before them end")
        end = stop
    data_start = 8 + length
    if size != data_start + end:
        raise ValueError("truncated" if size < data_start + end else "longer than its header says")
    return header, metadata, data_start


def _bytes_of(name: str, described: Any) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end within the data, by its entry in a header."""
    match described:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if dtype in DTYPES:
            size = math.prod(shape) * DTYPES[dtype].itemsize if all(type(n) is int and n >= 0 for n in shape) else -1
            if start >= 0 and stop - start == size:
                return start, stop
    raise ValueError(f"{name} is not described as a tensor is")


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name as a file holds them: the widest elements first, so that every one is aligned."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def header_of(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and where in it each tensor does; of the tensors only shape and dtype are looked at."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        starts[name], end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [starts[name], end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    first = 8 + len(content)
    return struct.pack("<Q", len(content)) + content, {name: first + start for name, start in starts.items()}


def bytes_of(tensor: Tensor) -> Tensor:
    """The elements of a tensor as uint8 [bytes]; a view, if it is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8, device=tensor.device)  # any strides


def pieces_of(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The bytes of tensors, end to end, in pieces on the host; each to be used before the next is asked for.

    What lies on the host is not copied. From a GPU, one piece is on its way while the one before it is in use.
    """
    tensors = list(tensors)
    if any(tensor.is_cuda for tensor in tensors):
        yield from staged(tensors, [host_buffer(), host_buffer()])
    else:
        for tensor in tensors:
            yield from bytes_of(tensor).split(PIECE)


def host_buffer() -> Tensor:
    """Memory for a piece; pinned where there is a GPU, which then fills it at the speed of the bus and beside its work."""
    return torch.empty(PIECE, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def staged(tensors: Iterable[Tensor], buffers: list[Tensor]) -> Iterator[Tensor]:
    """The bytes of contiguous tensors, end to end, copied to the host's `buffers` (uint8, of one length) in turn.

    A piece holds until as many further ones as there are buffers were asked for. Copies from a GPU run on a stream of their
    own, behind what its current stream was asked before.
    """
    tensors = list(tensors)
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    stream = torch.cuda.Stream(device) if device else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))
    underway: deque[tuple[Tensor, Any]] = deque()

    def arrived() -> Tensor:
        piece, event = underway.popleft()
        if event:
            event.synchronize()
        return piece

    for buffer, parts in zip(itertools.cycle(buffers), _grouped(tensors, buffers[0].numel())):
        if len(underway) == len(buffers):
            yield arrived()
        length = 0
        with torch.cuda.stream(stream):
            for part in parts:
                buffer[length : length + part.numel()].copy_(part, non_blocking=True)
                length += part.numel()
        underway.append((buffer[:length], stream.record_event() if stream else None))
    while underway:
        yield arrived()


def _grouped(tensors: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Views of the bytes of tensors, in groups that fill `size` bytes; the last may hold fewer."""
    group: list[Tensor] = []
    room = size
    for tensor in tensors:
        rest = bytes_of(tensor)
        while rest.numel():
            part, rest = rest[:room], rest[room:]
            group.append(part)
            room -= part.numel()
            if room == 0:
                yield group
                group, room = [], size
    if group:
        yield group


def write_pieces(path: Path, header: bytes, pieces: Iterable[Tensor]) -> str:
    """Writes and syncs a file; returns its SHA-256, computed on the way, each piece while it is written."""
    total = hashlib.sha256(header)
    with path.open("wb") as file, concurrent.futures.ThreadPoolExecutor(1) as hasher:
        file.write(header)
        for piece in pieces:
            content = piece.numpy().data
            hashed = hasher.submit(total.update, content)
            file.write(content)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return total.hexdigest()


def write_one_by_one(
    path: Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]
) -> None:
    """Writes tensors that come one by one, in any order and on any device, and need not be contiguous.

    Args:
        layout: their shapes and dtypes by name; on the meta device, say.
    """
    with writing(path, layout, metadata) as write:
        for name, tensor in tensors:
            write(name, tensor)


@contextlib.contextmanager
def writing(path: Path, layout: Mapping[str, Tensor], metadata: dict[str, str]) -> Iterator[Callable[[str, Tensor], None]]:
    """What writes a tensor of a file, as `write_one_by_one` does; all must have been written at the end."""
    header, starts = header_of(in_file_order(layout), metadata)
    with path.open("wb") as file:
        file.write(header)

        def write(name: str, tensor: Tensor) -> None:
            if tensor.shape != layout[name].shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(layout[name].shape)}")
            file.seek(starts.pop(name))
            file.write(bytes_of(tensor.to("cpu", layout[name].dtype)).numpy().data)

        yield write
    if starts:
        raise ValueError(f"{path}: nothing was written for {', '.join(starts)}")


class TensorFile:
    """Reads from a safetensors file, without mapping it into memory: pages of a map would count as the process's own.

    Args:
        largest_header: bytes; what says that it has more is refused.
    """

    def __init__(self, path: Path, largest_header: int = LARGEST_HEADER) -> None:
        self.path = path
        with open_regular(path) as file:
            self.header, self.metadata, self.data_start = _read_header(file, largest_header)
            self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)

    @property
    def size(self) -> int:
        """Bytes of the file, as its header has them."""
        return self.data_start + max((described["data_offsets"][1] for described in self.header.values()), default=0)

    def elements(self, name: str) -> int:
        return torch.Size(self.header[name]["shape"]).numel()

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the host."""
        described = self.header[name]
        whole = torch.empty(described["shape"], dtype=DTYPES[described["dtype"]])
        self.read(name, 0, whole.view(-1))
        return whole

    def position(self, name: str, first: int) -> int:
        """Where in the file element number `first` of a tensor begins."""
        described = self.header[name]
        return int(self.data_start + described["data_offsets"][0] + first * DTYPES[described["dtype"]].itemsize)

    def read(self, name: str, first: int, target: Tensor) -> None:
        """Copies the elements of a tensor from number `first` on into `target` [n], of its dtype, contiguous, on the host."""
        self.read_at(self.position(name, first), target)

    def read_at(self, position: int, target: Tensor) -> None:
        """Copies the bytes from a position on into `target`, contiguous and on the host."""
        content = bytes_of(target).numpy().data
        while content:
            count = os.preadv(self.descriptor, [content], position)
            if count == 0:
                raise OSError(f"{self.path}: ended early")
            content, position = content[count:], position + count
