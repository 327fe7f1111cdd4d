"""What a benchmark measured is never lost: not to a row that fails, not to a limit of time, not to a missing package."""

import json
import re

import pytest

from benchmarks.tools import environment as environments
from benchmarks.tools import rows as kept_rows
from benchmarks.tools.environment import environment
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import OUT_OF_MEMORY

DOCUMENT = "Is it kept? `python -m benchmarks.nothing`\n\nMore."


def fail() -> dict:
    raise ValueError("first line\nsecond line")


def test_a_row_that_fails_costs_only_itself(tmp_path):
    file = tmp_path / "deep" / "rows.json"
    rows = Rows(file, DOCUMENT)
    assert rows.measure("one", 1, lambda: {"value": 1})["value"] == 1
    failed = rows.measure("two", 1, fail)
    assert failed["failed"] == "ValueError: first line"
    assert "in fail" in failed["trace"], "where it failed"
    assert failed["trace"].endswith("second line\n")
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["one", "two"]
    rows.measure("three", 1, lambda: {"value": 3})
    kept = json.loads(file.read_text())
    assert kept["question"].startswith("Is it kept?")
    assert [row.get("value") for row in kept["rows"]] == [1, None, 3]
    assert kept["environments"][kept["rows"][2]["environment"]]["torch"]


def test_a_later_call_goes_on_where_the_one_before_ended(tmp_path, monkeypatch):
    first = Rows(tmp_path / "rows.json", DOCUMENT)
    first.measure("one", 1, lambda: {"value": 1})
    first.measure("two", 1, fail)
    again = Rows(tmp_path / "rows.json", DOCUMENT)
    assert again.measure("one", 1, fail)["value"] == 1
    assert "failed" in again.measure("two", 1, lambda: {"value": 2})
    monkeypatch.setenv(environments.COMMIT, "a-commit-that-mends-it")
    mended = Rows(tmp_path / "rows.json", DOCUMENT)
    assert mended.measure("two", 1, lambda: {"value": 2})["value"] == 2
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["environments"][kept["rows"][1]["environment"]]["commit"] == "a-commit-that-mends-it"


def test_a_row_that_would_not_end_in_time_is_not_begun(tmp_path):
    rows = Rows(tmp_path / "rows.json", DOCUMENT, minutes=0.5)
    assert "missing" in rows.measure("long", 60, lambda: pytest.fail("begun"))
    assert "value" in rows.measure("short", 1, lambda: {"value": 1})
    assert "value" in Rows(tmp_path / "rows.json", DOCUMENT, minutes=2).measure("long", 60, lambda: {"value": 1})


def test_the_environment_is_described_without_git_and_packages(monkeypatch):
    monkeypatch.setattr(environments, "PACKAGES", ("a-package-that-nobody-has",))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(environments.COMMIT, raising=False)
    described = environment()
    assert re.fullmatch("sources [0-9a-f]{12}", described["commit"])
    monkeypatch.setattr(environments, "SOURCES", ("engine",))
    assert environment()["commit"] != described["commit"], "other code has another name"
    assert described["a-package-that-nobody-has"] is None
    assert described["device"]
    monkeypatch.setenv(environments.COMMIT, "abc")
    assert environment()["commit"] == "abc"


def test_a_row_that_killed_its_process_is_tried_once_more_and_then_left(tmp_path):
    file = tmp_path / "rows.json"
    for _ in range(kept_rows.ATTEMPTS):
        with pytest.raises(KeyboardInterrupt):
            Rows(file, DOCUMENT).measure("hangs", 1, kill)
    assert Rows(file, DOCUMENT).measure("hangs", 1, lambda: pytest.fail("begun a third time"))["failed"] == kept_rows.UNFINISHED


def kill() -> dict:
    raise KeyboardInterrupt


def test_a_lack_of_memory_is_known_from_within_other_errors():
    def wrapped() -> dict:
        try:
            raise RuntimeError("CUDA error: out of memory")
        except RuntimeError as error:
            raise ValueError("capturing failed") from error

    assert Rows(None, DOCUMENT).measure("one", 1, wrapped)["failed"] == OUT_OF_MEMORY


def test_a_broken_device_ends_the_call_and_not_the_results(tmp_path, monkeypatch):
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows = Rows(tmp_path / "rows.json", DOCUMENT)
    monkeypatch.setattr(kept_rows, "release_memory", broken)
    assert rows.measure("breaks", 1, fail, lever="captured")["lever"] == "captured"
    assert "illegal memory access" in rows.measure("after", 1, lambda: pytest.fail("begun"))["missing"]
    monkeypatch.undo()
    assert Rows(tmp_path / "rows.json", DOCUMENT).measure("after", 1, lambda: {"value": 1})["value"] == 1


def test_rows_of_another_device_stand_beside_ours(tmp_path, monkeypatch):
    Rows(tmp_path / "rows.json", DOCUMENT).measure("one", 1, lambda: {"value": 1})
    monkeypatch.setattr(kept_rows, "environment", lambda: {"device": "another card", "commit": None})
    assert Rows(tmp_path / "rows.json", DOCUMENT).measure("one", 1, lambda: {"value": 2})["value"] == 2
    kept = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["value"], row["device"] == "another card") for row in kept] == [(1, False), (2, True)]


def test_only_rows_of_the_recipe_stand_for_every_commit(tmp_path, monkeypatch):
    abouts = [{"settings": {"options": {"compile": True}}}, {"settings": {"encoders": True}}, {}]

    def measure(commit: str, value: int) -> list[int]:
        monkeypatch.setattr(kept_rows, "environment", lambda: {"device": "a card", "commit": commit})
        rows = Rows(tmp_path / "rows.json", DOCUMENT)
        named = zip(("engine", "recipe", "kernel"), abouts, strict=True)
        return [rows.measure(name, 1, lambda: {"value": value}, **about)["value"] for name, about in named]

    assert measure("one", 1) == [1, 1, 1]
    assert measure("one", 2) == [1, 1, 1]
    assert measure("two", 3) == [3, 1, 3]
