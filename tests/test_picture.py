"""Grids that a person can look at, whatever the captions hold."""

import pytest
from PIL import Image

from engine import picture
from engine.picture import labelled_grid

SMALL = Image.new("RGB", (16, 16), "red")
ALONE = {"inside": "a b", "line": "a\nb", "tab": "a\tb", "end": "a b\n", "separator": "a\u2028b"}


@pytest.mark.parametrize(
    ("rows", "images", "size"),
    [
        (1, 1, (64, 64)),
        (60, 1, (64, 64)),
        (1, 60, (64, 64)),
        (60, 4, (512, 512)),
        (7, 3, (64, 256)),
        (10, 10, (8, 8)),
    ],
)
def test_a_grid_is_no_strip_and_holds_every_image(rows, images, size):
    grid = labelled_grid([("a caption", [Image.new("RGB", size, "red")] * images)] * rows)
    assert max(grid.size) < 3 * min(grid.size)
    enlarged = size[0] * max(1, -(-64 // size[0])) * size[1] * max(1, -(-64 // size[0]))
    assert sum(count for count, color in grid.getcolors(2**24) if color == (255, 0, 0)) == rows * images * enlarged


@pytest.mark.parametrize("label", ALONE.values(), ids=ALONE)
def test_any_white_space_of_a_label_is_a_space(label):
    assert labelled_grid([(label, [SMALL])]).tobytes() == labelled_grid([("a b", [SMALL])]).tobytes()


@pytest.mark.parametrize("label", ["", " ", "\n", "\0", "\x1b[31m", "\udcff", "\u200d", "e\u0301", "\U0010ffff", "x" * 100_000])
def test_any_text_is_a_label(label):
    assert labelled_grid([(label, [SMALL])]).width == labelled_grid([("a", [SMALL])]).width


def written(text: str) -> str:
    return "".join(run for _, run in picture._runs(text))


def test_scripts_beyond_latin_are_drawn_and_what_no_font_has_is_escaped(monkeypatch):
    monkeypatch.setattr(picture, "_installed_fonts", list)
    picture._font_with.cache_clear()
    for text in ("Fuß, señor", "кот", "γάτα", "قطة", "חתול"):
        assert written(text) == text
    assert written("a 猫\x1b\udcff\u200d") == r"a \u732b\x1b\udcff"
    picture._font_with.cache_clear()


def test_a_font_that_is_installed_draws_what_ours_lacks(monkeypatch):
    """A font of formulas stands for it, which has a letter that DejaVu Sans lacks."""
    other = picture._DEJAVU.with_name("STIXGeneral.ttf")
    lacking = next(chr(code) for code in sorted(picture._characters(other) - picture._characters(picture._DEJAVU))
                   if chr(code).isprintable())  # fmt: skip
    monkeypatch.setattr(picture, "_installed_fonts", lambda: [picture._DEJAVU.with_name("none.ttf"), other])
    picture._font_with.cache_clear()
    assert [run for _, run in picture._runs(f"a{lacking}b")] == ["a", lacking, "b"]
    picture._font_with.cache_clear()
