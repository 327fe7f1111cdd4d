"""A training speaks in log files: a block, a line at every log point, and the result; or not at all."""

import json
import re
from types import SimpleNamespace

import pytest

from engine.loop import report
from engine.loop.run import Run
from engine.loop.trainer import train
from tests.loop.runs import checkpoint_tensors, config


def lines(text: str) -> list[str]:
    return [re.sub(r"  +", " ", line) for line in text.splitlines()]


def test_a_run_says_what_it_does_in_a_log_file(model, images, shards, tmp_path, capsys):
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "log_every": 3, "checkpointing_steps": 5}
    assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    said = capsys.readouterr()
    assert said.out == f"Trained 8 steps; the pipeline is in {tmp_path / 'out'}\n"
    block, rest = lines(said.err.split("\nstep ")[0]), lines(said.err)
    for expected in (
        "Training",
        f" family sd, from {model}",
        " samples 12 (none refused)",
        " resolution 16 px",
        " global batch 4 = 2 per micro-batch x 2 accumulated x 1 process",
        " steps 8, 2.7 epochs",
        " optimizer AdamW, learning rate 0.001 constant, moving average",
        " precision fp32",
    ):
        assert expected in block
    assert any(re.fullmatch(r" parameters [\d.]+ k trained, 0 frozen; the encoders are not loaded", line) for line in block)
    assert any(re.search(r"memory .* by estimate, for weights, gradients, optimizer and average", line) for line in block)
    assert any(re.match(r" device .*, ZeRO stage 0", line) for line in block)
    steps = [line for line in rest if line.startswith("step ")]
    assert [line.split(" ")[1] for line in steps] == ["3/8", "6/8", "8/8"]
    pattern = r"step \d/8 loss \d\.\d{4} lr 1\.00e-03 \S+ samples/s( MFU .*%)?( [\d.]+ GiB)? \d+ s left"
    assert all(re.fullmatch(pattern, line) for line in steps)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line.split(" ")[3] for line in steps] == [f"{loss:.4f}" for loss in losses]


def stream_of(directory: str, refused: int, bucket: str | None = None) -> SimpleNamespace:
    index = SimpleNamespace(refused_count=refused)
    return SimpleNamespace(shards=SimpleNamespace(place=directory, index=index), bucket=bucket)


def test_what_was_refused_is_counted_and_listed_over_all_data_sets():
    def said(*streams) -> str:
        return report._refused(SimpleNamespace(streams=streams)).replace("python -m engine.shards ", "")

    assert said(stream_of("a", 0), stream_of("b", 0)) == "none refused"
    buckets = [stream_of("a/16x16", 0, "16x16"), stream_of("a/32x16", 2, "32x16"), stream_of("a/64x16", 1, "64x16")]
    assert said(*buckets) == "3 refused; `info a --refused` lists them"
    assert said(*buckets, stream_of("b", 1)) == "4 refused; `info a --refused` and `info b --refused` list them"
    assert said(stream_of("https://h/a", 1)) == "1 refused"


def test_a_quiet_run_says_nothing(model, images, shards, tmp_path, capsys):
    options = {"quiet": True, "checkpointing_steps": 1, "validation_prompts": ["a red square"]}
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=2, **options)) == 0
    assert train(config(model, images, shards, tmp_path / "out", resume_from_checkpoint="latest", **options)) == 0
    assert capsys.readouterr() == ("", "")


def test_a_disk_too_small_for_the_checkpoints_is_a_warning(model, images, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    options = {"checkpointing_steps": 1, "quiet": True}
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=2, **options)) == 0
    expected = r"warning: .*out: the checkpoints of this run take [\d.]+ MB, of which 1.0 MB are free;"
    assert re.match(expected, capsys.readouterr().err)


SD = 859_520_964  # parameters of Stable Diffusion 1.5's UNet


@pytest.mark.parametrize(
    ("options", "world", "expected"),
    [
        # The table of docs/families.md.
        ({"mixed_precision": "bf16", "use_ema": False}, 1, 15.5),
        ({"mixed_precision": "bf16"}, 1, 18.9),
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "use_ema": False}, 1, 17.2),
        ({"mixed_precision": "bf16", "zero_stage": 3}, 8, 0.86 * ((4 + 8 + 4 + 2 + 2) / 8 + 2)),
    ],
)
def test_memory_by_the_counts_of_the_documentation(options, world, expected):
    run = config("model", "images", "shards", "out", **options)
    assert report.state_bytes(run, SD, world) / 1e9 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("options", "done", "steps", "expected"),
    [({}, 0, 8, 1), ({"checkpointing_steps": 3}, 0, 8, 3), ({"checkpointing_steps": 4}, 0, 8, 2),
     ({"checkpointing_steps": 3}, 6, 8, 1), ({"checkpointing_steps": 1, "checkpoints_total_limit": 2}, 0, 8, 2), ({}, 8, 8, 0)],
)  # fmt: skip
def test_how_many_checkpoints_come(options, done, steps, expected):
    run = Run(seed=0, global_batch=4, fingerprint="", records=12, steps=steps)
    assert report.checkpoints_to_come(config("model", "images", "shards", "out", **options), run, done) == expected


def test_checkpoints_take_what_is_said(model, images, shards, tmp_path):
    output = tmp_path / "out"
    run = config(model, images, shards, output, max_train_steps=1)
    assert train(run) == 0
    size = sum(path.stat().st_size for path in (output / "checkpoint-1").rglob("*") if path.is_file())
    trained = sum(tensor.numel() for tensor in checkpoint_tensors(output / "checkpoint-1", "weight").values())
    assert report.checkpoint_bytes(run, trained) == pytest.approx(size, rel=0.1)
