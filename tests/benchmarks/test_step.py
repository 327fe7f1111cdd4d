"""The waterfall of levers: no row is lost, both sides of a ratio have one batch, and a step that does nothing has no rate."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.steps import step
from benchmarks.tools import checkpoints, cost, levers, published, rows, settings, sides, waterfall
from benchmarks.tools.compiling import compiling_cheaply
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import OUT_OF_MEMORY
from engine.errors import TRY_AGAIN
from engine.loop import attention
from engine.models.training_form import ChannelsLastConv2d

CPU = torch.device("cpu")
PRIOR = "kandinsky-prior"


@pytest.fixture
def prior(tmp_path):
    return checkpoints.open_checkpoint(PRIOR, tmp_path, CPU)


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, int]]:
    """What was measured, by name and batch, with rates that need no training."""
    calls = []

    def measure_lever(checkpoint, lever, size, window_seconds):
        calls.append((lever.name, size))
        return {"samples_per_second": 1.0 + len(calls), "low": 1.0, "high": 2.0 + len(calls)}

    monkeypatch.setattr(step, "measure_lever", measure_lever)
    monkeypatch.setattr(step, "matrix_flops_per_second", lambda device, dtype: 1e12)
    monkeypatch.setattr(rows, "release_memory", lambda: None)
    return calls


def names(rows: list[dict]) -> list[str]:
    return [row["lever"] for row in rows]


@pytest.mark.parametrize("lever", [levers.LEVERS[1], levers.LEVERS[2], levers.SHIPPED], ids=lambda lever: lever.name)
def test_a_lever_trains_and_leaves_torch_as_it_was(prior, lever, monkeypatch):
    monkeypatch.setattr(step, "WINDOWS", 2)
    settings = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    with compiling_cheaply():
        row = step.measure_lever(prior, lever, 2, 0.0)
    assert row["low"] <= row["samples_per_second"] <= row["high"]
    assert row["moved"] > 0.9
    assert row["loss"] > 0
    assert row["graphs"] == 0
    assert settings == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark)


def test_the_recipe_finds_torchs_own_order_of_attention_kernels():
    before = torch._C._get_sdp_priority_order(), torch._C._get_cudnn_sdp_enabled(), torch.compiler.config.cache_key_tag
    with settings.settings_kept():
        attention.set_order(["efficient", "math"])
        assert torch._C._get_sdp_priority_order() != before[0]
    after = torch._C._get_sdp_priority_order(), torch._C._get_cudnn_sdp_enabled(), torch.compiler.config.cache_key_tag
    assert after == before


def test_the_recipe_trains_the_published_form(tmp_path):
    family = published.open_tiny("sd", tmp_path, output_dir=str(tmp_path / "out"))
    assert not any(isinstance(module, ChannelsLastConv2d) for module in family.load_model(form=None).modules())
    assert any(isinstance(module, ChannelsLastConv2d) for module in family.load_model().modules())


def test_a_levers_options_shape_its_model_too(tmp_path):
    checkpoint = checkpoints.open_checkpoint("sd", tmp_path, CPU)
    side = sides.open_side(checkpoint, levers.Lever("checkpointing", {"gradient_checkpointing": True}), 2)
    assert side.training.config.gradient_checkpointing
    assert side.training.partition.module.is_gradient_checkpointing
    assert not checkpoint.load_model().is_gradient_checkpointing


def test_a_step_that_is_skipped_or_moves_nothing_has_no_rate(prior, monkeypatch):
    monkeypatch.setattr(sides, "LEARNING_RATE", 0.0)
    side = sides.open_side(prior, levers.EAGER, 2)
    before = sides.sample(side.weights)
    side.step()
    with pytest.raises(RuntimeError, match="0% of the weights moved"):
        sides.check(side, before)
    next(side.batches).record[prior.family.encoding.mean].fill_(float("nan"))
    side.step()
    with pytest.raises(RuntimeError, match="1 steps were skipped"):
        sides.check(side, before)


def test_a_missing_graph_fails_the_row(prior):
    side = sides.open_side(prior, levers.SHIPPED, 2)
    assert side.graphs() == 0
    side.captures = True
    with pytest.raises(RuntimeError, match="0 graphs"):
        side.graphs()
    side.training.train_step.whole = SimpleNamespace(graphs=1)
    assert side.graphs() == 1


def test_a_lever_that_fails_costs_its_own_row(tmp_path, monkeypatch, measured):
    works = step.measure_lever

    def fail(checkpoint, lever, *rest):
        if lever.name == "compiled":
            raise RuntimeError("Triton Error: misaligned address")
        return works(checkpoint, lever, *rest)

    monkeypatch.setattr(step, "measure_lever", fail)
    rows = step.measure_all(Rows(tmp_path / "rows.json", step.__doc__), [PRIOR], CPU)
    assert [row["lever"] for row in rows if "failed" in row] == ["compiled"]
    assert names(rows) == [lever.name for lever in levers.LEVERS if lever.fits(PRIOR)]
    kept = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert kept[f"{PRIOR}: compiled, batch 4"]["settings"] == {"options": {"compile": True, "cuda_graphs": "off"}}
    assert "misaligned address" in waterfall.table(rows)


def test_a_further_call_measures_what_is_missing(tmp_path, monkeypatch, measured, capsys):
    file = tmp_path / "rows.json"
    command = ["step", "--tiny", "--checkpoints", PRIOR, "--json", str(file)]
    monkeypatch.setattr("sys.argv", [*command, "--minutes", "0"])
    assert step.main() == TRY_AGAIN
    assert measured == []
    assert "no time left" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--levers", "recipe", "compiled"])
    assert step.main() == 0
    monkeypatch.setattr("sys.argv", command)
    assert step.main() == 0
    assert [name for name, _ in measured[:2]] == ["recipe", "compiled"]
    assert len(measured) == len(set(measured)) == len([lever for lever in levers.LEVERS if lever.fits(PRIOR)])


def test_caches_are_warm_for_what_this_process_compiled(tmp_path, monkeypatch, measured):
    warm = []
    monkeypatch.setattr(step, "expected_seconds", lambda lever, cost, size, cached_code: warm.append(cached_code) or 1.0)
    both = [lever for lever in levers.LEVERS if lever.name in ("compiled", "compiled and captured")]
    config = SimpleNamespace(family=PRIOR, mixed_precision="no")
    checkpoint = SimpleNamespace(name="prior", family=SimpleNamespace(config=config), cost=cost.Cost(1e9, 1e9, 1e9), tiny=False)

    def waterfall(file, wanted):
        warm.clear()
        rows = Rows(file, step.__doc__)
        step.Waterfall(checkpoint, {}, rows).measure_all(wanted, 2)
        return list(warm)

    assert waterfall(None, both) == [False, True]
    assert waterfall(tmp_path / "rows.json", both[:1]) == [False]
    assert waterfall(tmp_path / "rows.json", both) == [False, False], "the kept row may be another machine's"


def test_a_recipe_that_needs_too_much_memory_halves_the_batch_of_every_lever(monkeypatch, measured, tmp_path):
    works = step.measure_lever

    def needs_memory(checkpoint, lever, size, *rest):
        if lever.options is None and lever.best and size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return works(checkpoint, lever, size, *rest)

    monkeypatch.setattr(step, "measure_lever", needs_memory)
    rows = step.measure_all(Rows(None, step.__doc__), [PRIOR], CPU)
    assert [row["batch"] for row in rows[:3]] == [4, 4, 2]
    assert rows[1]["failed"] == OUT_OF_MEMORY
    assert {row["batch"] for row in rows[2:]} == {2}
    assert names(rows[2:]) == [lever.name for lever in levers.LEVERS if lever.fits(PRIOR)]
    assert "does not fit batch 4; every lever took half" in waterfall.table(rows)
    assert waterfall.batch_of_waterfall(rows) == 2
    waterfall.chart(rows, tmp_path / "waterfall.png")


def test_batches_follow_the_memory_of_the_card():
    wuerstchen = cost.Cost(3.461e12, 9031 * 2**20, 993_600_000)  # Wuerstchen's prior, by benchmarks.steps.sizes
    h100, h200 = 79 * 2**30, 140 * 2**30
    assert [checkpoints.largest_batch(32, wuerstchen, memory) for memory in (24 * 2**30, h100, h200, float("inf"))] == [
        1,
        8,
        16,
        32,
    ]
    # A row has a time before it begins: more for a compiled one, and for cold caches.
    seconds = [
        step.expected_seconds(lever, wuerstchen, 8, cached) for lever, cached in ((levers.EAGER, False), (levers.SHIPPED, True))
    ]
    assert seconds[0] < seconds[1] < step.expected_seconds(levers.SHIPPED, wuerstchen, 8, False)


def test_levers_whose_option_this_engine_lacks_are_left_out():
    unknown = levers.Lever("from another engine", {"an_option_that_is_not_there": "fast"})
    assert not unknown.fits("sd")
    assert levers.SHIPPED.fits("sd")
    assert not levers.Lever("other", {"cuda_graphs": "sometimes"}).fits("sd")
    assert {lever.name for lever in levers.LEVERS if not lever.fits(PRIOR)} >= {"cuDNN's search", "compiled, plain norms"}
    plain = next(lever for lever in levers.LEVERS if lever.name == "compiled, plain activations")
    assert [family for family in levers.CONVOLUTIONAL if plain.fits(family)] == ["sd", "wuerstchen"]
    compiled = next(lever for lever in levers.LEVERS if lever.name == "compiled")
    assert plain.training_form == replace(compiled.training_form, activations_when_compiled=False)
    assert plain.form != compiled.form
