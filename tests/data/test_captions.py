"""What captions become before they are encoded: tags in other orders, templates, a prefix; and which of it are mistakes."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from engine.config.command_line import load
from engine.config.options import CAPTION_VARIANTS, CacheConfig
from engine.data.captions import texts_of
from engine.data.describe import open_shard
from engine.data.format.index import Index
from engine.errors import UserError
from tests.data.test_shards import build, contents, write_captions

TAGS = "cat, red hat, outdoors, night, 4k"


def texts(caption: str = TAGS, **options) -> list[str]:
    return texts_of(load(CacheConfig, {"family": "sd", "pretrained_model_name_or_path": "a/b", **options}), caption)


def test_a_caption_stays_as_it_is_where_nothing_is_asked_for():
    assert texts("a,  b ,") == ["a,  b ,"]


def test_tags_are_shuffled_behind_those_that_stay():
    found = texts(shuffle_tags=True, keep_tokens=2, caption_variants=8)
    assert len(found) == 8
    assert len(set(found)) > 2
    for text in found:
        assert text.startswith("cat, red hat, ")
        assert sorted(text.split(", ")) == sorted(TAGS.split(", "))
    assert found == texts(shuffle_tags=True, keep_tokens=2, caption_variants=8)
    assert found[:3] == texts(shuffle_tags=True, keep_tokens=2, caption_variants=3)
    assert len(texts(shuffle_tags=True, cache_text="tokens")) == CAPTION_VARIANTS


@pytest.mark.parametrize("caption", ["", "one tag", " a ,, b"])
def test_captions_of_few_tags_are_shuffled_too(caption):
    found = texts(caption, shuffle_tags=True, keep_tokens=1, caption_variants=2)
    assert found == [", ".join(tag.strip() for tag in caption.split(",") if tag.strip())] * 2


def test_every_order_comes_as_often():
    found = texts("a, b, c", shuffle_tags=True, caption_variants=600)
    assert all(70 < found.count(text) < 130 for text in set(found))
    assert len(set(found)) == 6


def test_templates_are_taken_in_turn_and_a_prefix_stands_before_all():
    assert texts("a cat", caption_template="a photo of {caption}") == ["a photo of a cat"]
    templates = ["a photo of {caption}", "{caption}, a drawing", "{caption} {caption}"]
    found = texts("a cat", caption_template=templates, caption_variants=6, caption_prefix="sks")
    expected = ["sks a photo of a cat", "sks a cat, a drawing", "sks a cat a cat"]
    assert sorted(found) == sorted(expected * 2)
    assert all(left != right for left, right in pairwise(found))
    assert texts("a cat", caption_prefix="sks, ") == ["sks, a cat"]
    assert texts("", caption_prefix="sks") == ["sks"]
    [text] = set(texts("b, a", shuffle_tags=True, caption_variants=1, caption_prefix="c, d"))
    assert text in ("c, d a, b", "c, d b, a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"caption_template": ["a photo"]},
            "--caption_template 'a photo': does not say where the caption stands",
        ),
        ({"caption_template": ["{caption}", "a {caption}"]}, "--caption_template with several texts needs --cache_text tokens"),
        ({"shuffle_tags": True}, "--shuffle_tags needs --cache_text tokens, or --caption_variants"),
        ({"keep_tokens": 1}, "--keep_tokens needs --shuffle_tags"),
        ({"caption_variants": 2}, "--caption_variants needs --shuffle_tags or several texts of --caption_template"),
        ({"shuffle_tags": True, "caption_variants": 0}, "--caption_variants 0: input should be greater than or equal to 1"),
        (
            {"family": "kandinsky-decoder", "shuffle_tags": True},
            "--shuffle_tags is not used by kandinsky-decoder",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(options, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        texts(**options)
    assert len(error.value.lines) == 1


def stored(directory: Path) -> list[list[str]]:
    """The texts of every record."""
    index = Index.read(directory)
    shards = [open_shard(directory, index, number) for number in range(len(index.shards))]
    return [
        [shard.text("caption_texts", row) for row in shard.caption_rows(record)]
        for shard in shards
        for record in range(shard.said.records)
    ]


@pytest.mark.parametrize("way", ["states", "tokens"])
def test_variants_are_stored_and_a_data_set_grows_with_the_same(way, model, tmp_path):
    data = write_captions(tmp_path / "images", ["a, b, c", ["a, b, c", "d, e"]] * 3)
    options = {"shuffle_tags": True, "caption_variants": 4, "cache_text": way, "caption_prefix": "x"}
    arguments = ["--shuffle_tags", "--caption_variants", "4", "--cache_text", way, "--caption_prefix", "x"]
    build(model, data, tmp_path / "shards", *arguments)
    expected = [texts("a, b, c", **options), texts("a, b, c", **options) + texts("d, e", **options)]
    assert stored(tmp_path / "shards") == expected * 3
    before = contents(tmp_path / "shards")
    shutil.copytree(data, tmp_path / "grown")
    write_captions(tmp_path / "more", ["a, b, c"] * 7)
    shutil.copy(tmp_path / "more" / "6.png", tmp_path / "grown")
    with (tmp_path / "grown" / "metadata.jsonl").open("a") as metadata:
        metadata.write('\n{"file_name": "6.png", "text": "d, e"}')
    build(model, tmp_path / "grown", tmp_path / "shards", *arguments)
    assert stored(tmp_path / "shards") == [*expected * 3, texts("d, e", **options)]
    assert contents(tmp_path / "shards")["shard-00000.safetensors"] == before["shard-00000.safetensors"]


def test_other_captions_are_another_build(model, tmp_path):
    data = write_captions(tmp_path / "images", ["a, b"])
    build(model, data, tmp_path / "shards", "--caption_prefix", "x")
    before = contents(tmp_path / "shards")
    with pytest.raises(UserError, match=re.escape("--caption_prefix x, now y")):
        build(model, data, tmp_path / "shards", "--caption_prefix", "y")
    build(model, data, tmp_path / "shards", "--caption_prefix", "x")
    assert contents(tmp_path / "shards") == before
