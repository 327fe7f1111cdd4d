"""Whatever becomes of a data set, of builds that are killed and of files that are lost: the shards hold what there is."""

import contextlib
import errno
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.claims import BUILDING, Claims
from engine.data.format.index import INDEX, SAMPLES, Index, shard_name
from engine.data.format.reader import Shards
from engine.data.format.shard import Shard
from engine.data.format.verify import verify
from engine.data.sources.interface import Refused, refusing, stamp_of, told_apart
from engine.errors import UserError
from engine.files import LOCK
from tests.data.test_refusals import Chain, build


@dataclass(frozen=True)
class Sample:
    """value: of its image; None where that cannot be read."""

    file: str
    changed: int
    value: int | None
    caption: int


class Samples(Chain):
    """Records hold their samples' values, and their numbers in the fraction."""

    def __init__(self, samples: list[Sample], captions: int = 10**9) -> None:
        super().__init__(samples=len(samples))
        self.of, self.captions_left, self.prepared = samples, captions, 0

    def name(self, index):
        return self.of[index].file

    def captions(self, index):
        return [str(self.of[index].caption)]

    def content(self, index):
        if self.of[index].value is None:
            raise Refused("no image in it")
        return str(self.of[index].value).encode()

    def decode(self, content):
        image = super().decode(content)
        image.info["value"] = int(content)
        return image

    def stamps(self):
        found = [stamp_of(sample.file, sample.changed, sample.caption) for sample in self.of]
        return told_apart(found), np.ones(len(found), np.int64)

    def prepare(self, image, record):
        self.prepared += 1
        return [{"value": torch.full((1,), image.info["value"] + record / 1000)}] * 2

    def encode_captions(self, captions):
        self.captions_left -= 1
        if self.captions_left < 0:
            raise KeyboardInterrupt
        return super().encode_captions(captions)

    def encoder(self, device):
        return contextlib.nullcontext(self)


def records_of(directory: Path) -> Counter[tuple[int, int]]:
    """How many records there are of every value and caption."""
    index = Index.read(directory)
    assert verify(directory, index, range(len(index.shards)), rows=True) == {}
    found: Counter[tuple[int, int]] = Counter()
    for number in index.shards["number"].tolist():
        shard = Shard(directory / shard_name(number), index.fields, index.identity)
        values, captions = shard.file.tensor("value"), shard.file.tensor("text")
        for record, sample in enumerate(shard.numbers["source"].tolist()):
            value = round(float(values[shard.image_rows(record).start]) - sample / 1000, 2)
            found[int(value), int(captions[shard.caption_rows(record)[0]])] += 1
    return found


class History:
    def __init__(self, seed: int, directory: Path) -> None:
        self.random, self.directory, self.time, self.samples = random.Random(seed), directory, 0, []
        self.add(self.random.randint(1, 14))

    def now(self) -> int:
        self.time += 1
        return self.time

    def any(self) -> int:
        return self.random.randrange(len(self.samples))

    def add(self, count: int | None = None) -> None:
        for _ in range(count or self.random.randint(1, 6)):
            value = self.random.choice([None, *6 * [self.now() + 10]])
            new = Sample(f"{self.now()}.png", self.time, value, self.random.choice([self.time, 7]))
            self.samples.insert(self.random.choice([len(self.samples), self.random.randint(0, len(self.samples))]), new)

    def remove(self) -> None:
        for _ in range(min(len(self.samples) - 1, self.random.randint(1, 4))):
            self.samples.pop(self.any())

    def remove_the_last(self) -> None:
        del self.samples[max(len(self.samples) - self.random.randint(1, 4), 1) :]

    def change(self, **values: object) -> None:
        place = self.any()
        self.samples[place] = replace(self.samples[place], changed=self.now(), **values)

    def rename(self) -> None:
        self.change(file=f"r{self.now()}.png")

    def describe(self) -> None:
        self.change(caption=self.now() + 5000)

    def describe_the_last(self) -> None:
        self.samples[-1] = replace(self.samples[-1], caption=self.now() + 5000)

    def mend(self) -> None:
        self.samples = [replace(of, changed=self.now(), value=of.value or self.now() + 50) for of in self.samples]

    def make_equal(self) -> None:
        other = self.samples[self.any()]
        self.change(value=other.value, caption=other.caption)

    def copy(self) -> None:
        self.samples.append(replace(self.samples[self.any()], file=f"{self.now()}.png"))

    def touch(self) -> None:
        self.samples = [replace(sample, changed=self.now()) for sample in self.samples]

    def shuffle(self) -> None:
        self.random.shuffle(self.samples)

    def kill(self) -> None:
        """Ends a build, of samples of which some may be gone again when the next one begins."""
        before = [*self.samples]
        self.add(2)
        with contextlib.suppress(KeyboardInterrupt, UserError):
            build(Samples([*self.samples], self.random.randint(0, 3)), self.directory)
        self.samples = self.random.choice([before, self.samples])

    def forget(self) -> None:
        (self.directory / self.random.choice([SAMPLES, INDEX, BUILDING])).unlink(missing_ok=True)

    def lose_a_shard(self) -> None:
        for shard in sorted(self.directory.glob("shard-*"))[:1]:
            shard.unlink()
            (self.directory / INDEX).unlink(missing_ok=True)

    def go_on(self) -> None:
        self.random.choice([
            self.add, self.remove, self.remove_the_last, self.rename, self.describe, self.describe_the_last, self.mend,
            self.make_equal, self.copy, self.touch, self.shuffle, self.kill, self.forget, self.lose_a_shard,
        ])()  # fmt: skip


@pytest.mark.parametrize("first", range(0, 24, 6))
def test_whatever_becomes_of_a_data_set_its_shards_hold_it(first, tmp_path):
    for seed in range(first, first + 6):
        history = History(seed, tmp_path / str(seed))
        for _ in range(8):
            history.go_on()
            try:
                index = build(Samples(history.samples), history.directory)
            except UserError as error:
                if not re.search("can be used|built otherwise", str(error)):
                    raise
                break
            held = Counter((of.value, of.caption) for of in history.samples if of.value is not None)
            assert records_of(history.directory) == held
            assert index.refused_count == sum(of.value is None for of in history.samples)
            again = Samples(history.samples)
            assert build(again, history.directory).fingerprint == index.fingerprint
            assert again.prepared == 0
            assert not (history.directory / BUILDING).exists()


def ten(*changed: tuple[int, Sample]) -> Samples:
    samples = {number: Sample(f"{number}.png", 1, number + 10, number) for number in range(10)} | dict(changed)
    return Samples(list(samples.values()))


@pytest.mark.parametrize("last", [1, 2, 3])
def test_what_changes_in_the_last_shard_is_encoded(last, tmp_path):
    build(ten(), tmp_path)
    changed = [(number, Sample(f"{number}.png", 2, 70 + number, number)) for number in range(10 - last, 10)]
    source = ten(*changed)
    build(source, tmp_path)
    assert source.prepared == last
    assert records_of(tmp_path) == Counter({(number + (70 if number >= 10 - last else 10), number): 1 for number in range(10)})


def test_what_ends_without_a_record_leaves_the_shards_that_were_there(tmp_path):
    unreadable = Sample("9.png", 1, None, 9)
    index = build(ten((9, unreadable)), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("[!s]*")} | {
        path.name: path.read_bytes() for path in tmp_path.glob("shard-*")
    }
    with pytest.raises(UserError, match="not one of 1 samples can be used"):
        build(Samples([unreadable]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == before
    source = ten((9, unreadable))
    assert build(source, tmp_path).fingerprint == index.fingerprint
    assert source.prepared == 0


def killed(source: Samples, directory: Path, **options: object) -> None:
    source.captions_left = 1
    with pytest.raises(KeyboardInterrupt):
        build(source, directory, **options)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_build_of_something_else_that_is_not_complete_is_kept(tmp_path):
    killed(ten(), tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"other options or models, is not complete; .*/building to build these instead"):
        build(ten(), tmp_path, background="white")
    with pytest.raises(UserError, match="other files or rows of data, is not complete"):
        build(Samples([Sample("a.png", 1, 1, 1)]), tmp_path)
    assert files_of(tmp_path) == before
    (tmp_path / BUILDING).unlink()
    other = ten()
    build(other, tmp_path, background="white")
    assert other.prepared == 10


def test_a_run_that_may_not_go_on_leaves_no_trace(tmp_path):
    build(ten(), tmp_path)
    before = files_of(tmp_path)

    def refuse(identity):
        if "source" in identity:
            raise UserError("other records")

    with pytest.raises(UserError, match="other records"):
        build(ten((10, Sample("10.png", 1, 20, 10))), tmp_path, check=refuse)
    assert files_of(tmp_path) == before


def test_shards_that_may_not_be_written_say_that_the_data_set_has_changed(tmp_path, monkeypatch):
    build(ten(), tmp_path)
    monkeypatch.setattr("engine.data.encode._may_write", lambda directory: False)
    changed = ten((10, Sample("10.png", 1, 20, 10)), (3, Sample("3.png", 2, 99, 3)))
    with pytest.raises(
        UserError, match=r"has changed: 2 samples are new, 1 of 10 are gone; the shards there cannot be written"
    ):
        build(changed, tmp_path)


def test_strict_does_not_pass_over_what_an_earlier_build_refused(tmp_path):
    source = ten((9, Sample("9.png", 1, None, 9)))
    build(source, tmp_path)
    with pytest.raises(UserError, match=r"--strict: 1 no image in it \(9.png\)"):
        build(source, tmp_path, strict=True)


def test_shards_that_lost_samples_are_not_opened_at_every_start(tmp_path, monkeypatch):
    build(ten(), tmp_path)
    less = Samples(ten().of[1:])
    index = build(less, tmp_path)
    monkeypatch.setattr("engine.data.found.open_shard", lambda *arguments: pytest.fail("opened"))
    assert build(less, tmp_path).fingerprint == index.fingerprint
    again = Samples(less.of[1:])
    assert build(again, tmp_path).records == 8
    assert again.prepared == 0


def test_a_training_reads_on_when_its_shards_are_replaced_once_and_is_told_when_twice(tmp_path):
    build(ten(), tmp_path)
    reader = Shards(tmp_path)
    build(Samples(ten().of[1:]), tmp_path)
    wanted = reader.rows_of(reader.find(torch.arange(4)))
    value = torch.empty(4, 1)
    reader.gather("value", wanted, value)
    assert value[:, 0].int().tolist() == [10, 11, 12, 13]
    late = Shards(tmp_path)
    build(Samples(ten().of[2:]), tmp_path)
    build(Samples(ten().of[3:]), tmp_path)
    with pytest.raises(UserError, match=r"the shards were built again .* --continue_on_grown_data"):
        late.gather("value", late.rows_of(late.find(torch.arange(3))), value[:3])


def test_what_was_refused_for_what_is_over_is_tried_again(tmp_path, monkeypatch):
    class Failing(Samples):
        error: Exception | None = None
        failing = "content"

        def content(self, index):
            if index == 2 and self.error and self.failing == "content":
                with refusing("unreadable image"):
                    raise self.error
            return super().content(index)

        def decode(self, content):
            if content == b"12" and self.error:
                with refusing("unreadable image"):
                    raise self.error
            return super().decode(content)

    def build_with(error: Exception | None, directory: Path) -> tuple[Index, int]:
        source = Failing(ten().of)
        source.error, source.failing = error, failing
        return build(source, directory), source.prepared

    for failing in ("content", "decode"):
        for error in (OSError(errno.EIO, "broken"), PermissionError(errno.EACCES, "no"), MemoryError()):
            directory = tmp_path / failing / type(error).__name__
            index, _ = build_with(error, directory)
            assert (index.records, index.refused_count) == (9, 1)
            before = files_of(directory)
            assert build_with(error, directory)[0].fingerprint == index.fingerprint
            assert files_of(directory) == before
            with monkeypatch.context() as patch:
                patch.setattr("engine.data.encode._may_write", lambda directory: False)
                assert build_with(None, directory)[0].fingerprint == index.fingerprint
            index, prepared = build_with(None, directory)
            assert (index.records, index.refused_count, prepared) == (10, 0, 1)
            assert records_of(directory) == Counter({(number + 10, number): 1 for number in range(10)})
            assert build_with(None, directory)[1] == 0
    index, _ = build_with(ValueError("bad"), tmp_path / "other")
    assert build_with(None, tmp_path / "other")[0].refused_count == 1, "that is the sample's own"


def test_who_comes_late_to_the_index_leaves_the_next_build_alone(tmp_path, monkeypatch):
    wait, came, grown = (
        Claims.index,
        [],
        ten(*((number, Sample(f"{number}.png", 1, number + 10, number)) for number in range(10, 18))),
    )

    @contextlib.contextmanager
    def index(claims):
        if not came:
            came.append(claims)
            build(ten(), tmp_path)  # another process, which writes the index
            grown.captions_left = 1
            with contextlib.suppress(KeyboardInterrupt):
                build(grown, tmp_path)  # and begins to build what the data set has become
            came.extend(sorted({path.name for path in tmp_path.iterdir()} - {LOCK}))
        with wait(claims):
            yield

    monkeypatch.setattr(Claims, "index", index)
    build(ten(), tmp_path)
    assert came[1:] == sorted(path.name for path in tmp_path.iterdir())
    assert {BUILDING, shard_name(3)} < {*came[1:]}
    again = Samples(grown.of)
    build(again, tmp_path)
    assert again.prepared == 4
    assert records_of(tmp_path) == Counter({(number + 10, number): 1 for number in range(18)})
