"""Files of weights: which there are, and what they hold; of a pickle nothing is run."""

import contextlib
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError, blame_the_machine, first_line
from engine.files import open_regular
from engine.models.index import read_json, refuse_pointer, require_inside
from engine.tensors import DTYPES

_VARIANT = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
# By the class that reads them, the first names of files with weights.
_NAMES = {
    diffusers.ModelMixin: {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
    transformers.PreTrainedModel: {"safetensors": "model", "bin": "pytorch_model"},
}
_PIECE = re.compile(r"[\w.-]{1,200}\.(?:safetensors|bin)")
# What pickles of tensors are made with, as module and name.
_TENSORS = re.compile(
    r"collections OrderedDict|_codecs encode|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
    r"|torch (Size|device|(B?Float|Half|Double|Byte|Char|Short|Int|Long|Bool)\w*Storage)"
    r"|torch (b?float\w*|u?int\d+|bool|half|double|long)|torch\.serialization _get_layout"
)
_LEGACY_PICKLES = 5  # one after another: what wrote it, three of them, the tensors, and the keys of their values
_LEVELS = 3  # within each other, that training programs keep tensors in


class NotFinite(UserError):
    """A model is there, and holds values that are no numbers."""


def is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pt", ".ckpt")


def present_variant(folder: Path, variant: str | None) -> str | None:
    """The variant to read a part with, as diffusers chooses in a folder where not every part has it."""
    return variant if variant in variants(folder) else None


def variants(folder: Path) -> list[str]:
    """The variants of a part's weights, such as fp16."""
    return sorted({match[1] for file in folder.glob("*") if (match := _VARIANT.fullmatch(file.name))})


def require_finite(where: Path, tensors: Mapping[str, Any]) -> None:
    """Looks at every value of a model, in some 0.1 s per GB.

    Raises:
        NotFinite: of which tensor one is no number.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            least, most = torch.aminmax(tensor.detach().float() if tensor.itemsize == 1 else tensor.detach())
            if not (math.isfinite(least) and math.isfinite(most)):
                raise NotFinite(f"{where}: {name} holds values that are not finite; download it again")


def weight_files(folder: Path, model: Any, variant: str | None) -> list[Path]:
    """The files that a part's weights are read from, all pieces of divided ones; none where there are none.

    Raises:
        UserError: a piece is missing.
    """
    first_names = next(names for base, names in _NAMES.items() if issubclass(model, base))
    middle = f".{variant}" if variant else ""
    for kind, first in first_names.items():
        for index in (f"{first}.{kind}.index{middle}.json", f"{first}.{kind}{middle}.index.json"):
            if (folder / index).is_file():
                require_inside(folder / index, folder)
                pieces = _pieces(folder / index)
                if missing := [piece.name for piece in pieces if not piece.is_file()]:
                    raise UserError(f"{folder / index}: names {', '.join(missing)}, not there; the download is incomplete")
                return pieces
        if (file := folder / f"{first}{middle}.{kind}").is_file():
            return [file]
    return []


def _pieces(index: Path) -> list[Path]:
    """The files that an index of divided weights names, all beside it."""
    pieces = read_json(index).get("weight_map")
    named = set(map(str, pieces.values())) if isinstance(pieces, dict) else set()
    if other := sorted(name for name in named if not _PIECE.fullmatch(name)) or ([] if named else ["nothing"]):
        raise UserError(f"{index}: its weight_map names {other[0]}, not a file of weights beside it; download it again")
    return sorted(index.parent / name for name in named)


def stored_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, on the meta device.

    Raises:
        UserError: it is not the weights, or not all of them.
    """
    if file.suffix != ".safetensors":
        return read_tensors(file, "meta")
    with _opened(file), safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype()), device="meta")
            for name, part in slices.items()
        }


def read_tensors(file: Path, device: str = "cpu") -> dict[str, Any]:
    """The tensors of a file of weights by name; of a pickle nothing is run, and it may hold others by name, and numbers.

    Raises:
        UserError: it is not the weights, or not all of them.
    """
    with _opened(file):
        if file.suffix == ".safetensors":
            return load_file(file, device)
        mapped = _require_tensors(file)
        stored = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
        _require_named(stored, file.stat().st_size)
        return stored


def _require_tensors(file: Path) -> bool:
    """Refuses pickles that make anything but tensors, of what torch allows them: memory by any number, for a start.

    Returns:
        whether they are in an archive, as torch writes them since 1.6.
    """
    with open_regular(file) as opened:
        archive = opened.read(4) == b"PK\3\4"  # torch's own look
        opened.seek(0)
        if archive:
            with zipfile.ZipFile(file) as zipped:
                if any(entry.file_size > entry.compress_size for entry in zipped.infolist()):
                    raise ValueError("it is compressed")
            pickles: Any = io.BytesIO(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl"))
        else:
            pickles = opened
        for _ in range(1 if archive else _LEGACY_PICKLES):
            for code, argument, _ in pickletools.genops(pickles):
                if code.name == "GLOBAL" and not _TENSORS.fullmatch(str(argument)):
                    raise pickle.UnpicklingError(f"Weights only load failed: {argument}")
    return archive


def _require_named(stored: Any, size: int) -> None:
    """Refuses what is no tensors by name, and tensors that are larger than the file of `size` bytes that they come from."""
    levels = 0
    while isinstance(stored, Mapping):
        if not all(isinstance(name, str) for name in stored):
            raise ValueError("no tensors by name")
        if any(isinstance(value, Tensor) and value.numel() * value.itemsize > size for value in stored.values()):
            raise ValueError("a tensor is larger than the file")
        if not isinstance(inner := stored.get("state_dict"), Mapping):
            return
        stored, levels = inner, levels + 1
        if levels > _LEVELS:
            raise ValueError("nested too deeply")
    raise ValueError(f"a {type(stored).__name__}, no tensors by name")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[None]:
    """The boundary around the reading of a file of weights."""
    refuse_pointer(file)
    try:
        yield
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error) or "Unsupported operand" in str(error):
            raise UserError(f"{file}: truncated or damaged, download it again: {first_line(error)}") from None
        raise UserError(f"{file}: holds programs beside tensors, and is not run; give it as .safetensors") from None
    except Exception as error:  # whatever a damaged file makes the two readers raise
        blame_the_machine(file, error)
        raise UserError(f"{file}: truncated or damaged, download it again: {first_line(error)}") from None
