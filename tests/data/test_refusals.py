"""One bad sample never ends a build and never passes unseen, whatever goes wrong and wherever it does."""

import errno
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config.options import CacheConfig
from engine.data import encode
from engine.data.format.index import Field, Index
from engine.data.format.reader import Shards
from engine.data.sources.interface import Refused
from engine.errors import UserError
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes

PanicException = type("PanicException", (BaseException,), {})
EXCEPTIONS = [
    OSError(errno.EIO, "input/output error"), FileNotFoundError("gone"), PermissionError("no"), TimeoutError(), EOFError(),
    ValueError("bad value"), TypeError("an integer is required"), KeyError("tag"), IndexError(), AttributeError("none"),
    OverflowError(), ZeroDivisionError(), AssertionError(), NotImplementedError(), RuntimeError("shape [3]\nlines"),
    SyntaxError(), MemoryError(), RecursionError(), StopIteration(), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"),
    struct.error(),
    zlib.error(), Image.DecompressionBombError("bomb"), LookupError(), ArithmeticError(), BufferError(), Exception("x"),
    PanicException("called unwrap"), Refused("not wanted"),
]  # fmt: skip
NOT_A_SAMPLES = [
    KeyboardInterrupt(), SystemExit(1), OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), UserError("mistake")
]  # fmt: skip
PLACES = ["captions", "image", "prepare", "encode_images", "encode_captions"]
BAD = 3


class Chain(Encoding, Encoder):
    """A source, an encoding and an encoder in one: records hold their sample's number. Sample BAD fails at one place."""

    mean, captioned, image_fields = "value", True, {}
    record_spec = {"value": Field((1,), torch.float32, "image"), "text": Field((1,), torch.float32, "caption")}  # noqa: RUF012

    def __init__(self, place: str = "", error: BaseException | None = None, samples: int = 9) -> None:
        self.place, self.error, self.samples, self.noticed = place, error, samples, Counter()
        self._identity = {}

    def meet(self, place: str, samples: list[int]) -> None:
        if place == self.place and BAD in samples:
            raise self.error

    def __len__(self) -> int:
        return self.samples

    def name(self, index: int) -> str:
        return f"{index}.png"

    def refusal(self, index: int) -> Refused | None:
        return None

    def captions(self, index: int) -> list[str]:
        self.meet("captions", [index])
        return [str(index)]

    def content(self, index: int) -> bytes:
        self.meet("image", [index])
        return str(index).encode()

    def decode(self, content: bytes) -> Image.Image:
        return Image.new("RGB", (1, 1))

    def stamps(self):
        return np.arange(len(self), dtype=np.uint64), np.ones(len(self), np.int64)

    def prepare(self, image, record):
        self.meet("prepare", [record])
        return [{"value": torch.full((1,), float(record))}] * 2

    def encode_images(self, batch):
        self.meet("encode_images", batch["value"][:, 0].tolist())
        return batch

    def encode_captions(self, captions):
        self.meet("encode_captions", list(map(int, captions)))
        return {"text": torch.tensor([[float(caption)] for caption in captions])}

    def identity(self):
        return {}

    size = 1, 1
    encoder_digests = preprocessing_identity = identity

    def load_encoder(self, device):
        return Chain(self.place, self.error)


def build(chain: Chain, directory, check=lambda identity: None, **options) -> Index:
    values = {"shard_records": 4, "encode_batch_size": 4} | options
    config = CacheConfig(
        family="sd", pretrained_model_name_or_path="unused", train_data_dir="unused", shards_dir=str(directory), **values
    )
    return encode.encode_source(config, chain, Processes(), check, chain)


def listed(index: Index) -> list[dict[str, str]]:
    return [item for refusals in index.refused.values() for item in refusals.first]


def values_of(directory) -> list[tuple[float, float]]:
    """The number that every record's image holds, and its caption."""
    shards = Shards(directory)
    rows = shards.rows_of(shards.find(torch.arange(len(shards))), variants=1)
    gathered = {name: torch.empty(len(shards), 1) for name in shards.fields}
    for name in shards.fields:
        shards.gather(name, rows, gathered[name])
    return list(zip(gathered["value"][:, 0].tolist(), gathered["text"][:, 0].tolist(), strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_whatever_a_sample_raises_refuses_that_sample(place, tmp_path, capsys):
    for number, error in enumerate(EXCEPTIONS):
        directory = tmp_path / str(number)
        index = build(Chain(place, error), directory, dataloader_num_workers=number % 2)
        (refused,) = listed(index)
        assert refused["source"] == "3.png", error
        assert refused["reason"] == "not wanted" or type(error).__name__ in refused["detail"]
        assert values_of(directory) == [(float(n), float(n)) for n in range(9) if n != BAD]
        said = capsys.readouterr().err
        assert f"refused 1 of 9 samples: 1 {refused['reason']} (3.png" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_a_samples_fault_ends_the_build(place, tmp_path):
    for error in NOT_A_SAMPLES:
        with pytest.raises(type(error)):
            build(Chain(place, error), tmp_path / "shards")
        with pytest.raises(UserError, match="--strict: "):
            build(Chain(place, ValueError("bad")), tmp_path / "strict", strict=True)


def test_a_device_without_memory_is_not_a_samples_fault(tmp_path):
    with pytest.raises(UserError, match="--encode_batch_size 4: does not fit the device"):
        build(Chain("encode_images", torch.OutOfMemoryError()), tmp_path / "shards")


class Unfit(Chain):
    """Gives values that are not finite for some samples, alone or within a batch."""

    def __init__(self, unfit, samples=9):
        super().__init__(samples=samples)
        self.unfit = unfit

    def load_encoder(self, device):
        return Unfit(self.unfit)

    def encode_images(self, batch):
        return {"value": torch.where(torch.isin(batch["value"], self.unfit), torch.nan, batch["value"])}


def test_values_that_are_not_finite_name_their_image(tmp_path):
    index = build(Unfit(torch.tensor([2.0, 5.0])), tmp_path)
    assert [item["source"] for item in listed(index)] == ["2.png", "5.png"]
    assert {*index.refused} == {"image encodes to values that are not finite"}
    assert [value for value, _ in values_of(tmp_path)] == [0, 1, 3, 4, 6, 7, 8]


def test_an_encoder_that_fails_for_all_is_found_early(tmp_path):
    with pytest.raises(UserError, match=r"not one of 100 samples.*not finite \(0.png, 1.png, 2.png, ..."):
        build(Unfit(torch.arange(1000.0), samples=1000), tmp_path, shard_records=50)


class Shared(Chain):
    """Records of every shard have the same captions."""

    def captions(self, index: int) -> list[str]:
        return [["3", "1"], ["3"], ["2"]][index % 3]


@pytest.mark.parametrize("again", [False, True])
def test_a_caption_that_cannot_be_encoded_is_taken_from_every_shard(again, tmp_path):
    index = build(Shared("encode_captions", ValueError("token")), tmp_path)
    if again:
        (tmp_path / "index.json").unlink()
        again = build(Shared("encode_captions", ValueError("token")), tmp_path)
        assert again.shards.tobytes() == index.shards.tobytes()
    assert [item["source"] for item in listed(index)] == ["1.png", "4.png", "7.png"]
    assert [*index.refused] == ["caption cannot be encoded"]
    assert "token" in listed(index)[0]["detail"]
    assert [(image, text) for image, text in values_of(tmp_path)] == [(0, 1), (2, 2), (3, 1), (5, 2), (6, 1), (8, 2)]


class Half(Chain):
    def captions(self, index: int) -> list[str]:
        if index < self.place:
            raise Refused("no caption")
        return [str(index)]


@pytest.mark.parametrize(
    ("count", "said"), [(5, "warning: more than half"), (3, "refused 3 of 9 samples: 3 no caption (0.png, 1")]
)
def test_more_than_half_refused_asks_for_attention(count, said, tmp_path, capsys):
    build(Half(count), tmp_path)
    line = capsys.readouterr().err
    assert said in line
    assert f"`python -m engine.shards info {tmp_path} --refused` lists them" in line


class Lost(Chain):
    """What cannot be used is known without reading it."""

    def refusal(self, index: int) -> Refused | None:
        return Refused("no such file \udce9")

    def load_encoder(self, device):
        raise AssertionError("nothing is encoded")


def test_what_is_known_before_is_found_before_encoding(tmp_path):
    with pytest.raises(UserError, match="not one of 9 samples can be used: 9 no such file"):
        build(Lost(), tmp_path / "all")
    with pytest.raises(UserError, match="--strict: 0.png: no such file"):
        build(Lost(), tmp_path / "strict", strict=True)


class Strange(Chain):
    """Names and messages that are no text."""

    def name(self, index: int) -> str:
        return f"\udce9{index}"


def test_names_that_are_no_text_reach_the_index(tmp_path):
    build(Strange("image", ValueError("\udce9")), tmp_path)
    (refused,) = listed(Index.read(tmp_path))
    assert refused == {"source": "\\udce93", "reason": "unreadable image", "detail": "ValueError: \\udce9"}


def test_all_refused_is_an_error_with_the_reasons_and_leaves_no_shards(tmp_path):
    with pytest.raises(UserError, match=r"not one of 9 samples can be used: 9 no caption \(0.png, 1.png, 2.png, ...\)"):
        build(Half(9), tmp_path / "captions")
    with pytest.raises(UserError, match="not one of 4 samples can be used: 4 image encodes to values"):
        build(Unfit(torch.arange(9.0), samples=4), tmp_path / "images")
    assert not list(tmp_path.rglob("*.safetensors"))
