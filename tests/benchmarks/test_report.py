"""The report of a campaign says no more than its rows do."""

from benchmarks.campaign import report
from benchmarks.campaign.plan import PLAN

SD = "SD 1.5, 512 px"


def row(lever: str, speed: float, batch: int = 32, **others) -> dict:
    settings = {} if lever.startswith("recipe") else {"options": {}}
    return {"checkpoint": SD, "device": "an H200", "lever": lever, "batch": batch, "settings": settings,
            "samples_per_second": speed, "environment": 0, **others}  # fmt: skip


def test_the_fastest_row_of_a_larger_batch_hides_no_ratio():
    waterfall = [row("recipe", 50), row("recipe, cached", 80), row("captured", 120), row("compiled and captured", 150)]
    lines = report.targets([*waterfall, row("compiled and captured", 160, 64)]).splitlines()[2:]
    assert [line.split(" | ")[3:6] for line in lines] == [
        ["160", "compiled and captured", "64"], ["150", "compiled and captured", "32"],
    ]  # fmt: skip
    assert [line.split(" | ")[9:12] for line in lines] == [["", "", ""], ["3", "1.875", ""]]
    assert len(report.targets(waterfall).splitlines()) == 3
    assert len(report.targets(waterfall[:2]).splitlines()) == 2


def test_levers_of_two_commits_have_no_ratio_but_over_the_recipe():
    rows = [row("recipe, cached", 80), row("engine", 100, environment=1), row("compiled and captured", 150, environment=1),
            row("captured", 140), row("compiled, plain norms", 120, environment=1)]  # fmt: skip
    ratios = [line.split(" | ")[1::2] for line in report.predictions(rows).splitlines()]
    assert ["engine / recipe, cached", "1.25 x |"] in ratios
    assert ["compiled and captured / compiled, plain norms", "1.25 x |"] in ratios
    assert ["compiled and captured / captured", " |"] in ratios


def test_a_part_for_which_no_call_is_long_enough_says_so():
    state = {"parts": {}, "calls": [{"seconds": 510.0}, {"seconds": 300.0}]}
    lines = report.overview(state, PLAN).splitlines()
    short = [line for line in lines if "more than any call had" in line]
    assert len(short) == 1
    assert short[0].startswith("| max-autotune |")
    assert "needs --minutes 17" in short[0]
    assert "more than" not in report.overview({"parts": {}, "calls": [{"seconds": 990.0}]}, PLAN)
