"""How a run is divided among processes, and DeepSpeed's own options beside ours."""

import json

import pytest

from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.trainer import divide_global_batch, train
from engine.loop.weights.zero_options import deepspeed_config
from tests.loop.runs import SLACK, config


def options(**values) -> TrainConfig:
    return config("model", "images", "shards", "out", **values)


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 4, 3), (2, 2, 3), (3, 4, 1), (4, 3, 1), (1, 12, 1)])
def test_the_global_batch_decides_the_accumulation(world, micro, accumulation):
    divided = divide_global_batch(options(global_batch_size=12, train_batch_size=micro), world)
    assert divided.gradient_accumulation_steps == accumulation


@pytest.mark.parametrize(("world", "wanted", "nearest"), [(3, 16, "12 or 24"), (4, 10, "16"), (2, 30, "24 or 32")])
def test_a_global_batch_that_does_not_divide_is_refused_with_the_nearest(world, wanted, nearest):
    with pytest.raises(UserError, match=rf"{wanted} cannot be divided among {world} processes .* that can: {nearest}$"):
        divide_global_batch(options(global_batch_size=wanted, train_batch_size=4), world)


def test_splits_of_a_global_batch_train_alike(model, images, shards, tmp_path):
    losses = []
    for micro in (4, 2, 1):
        output = tmp_path / str(micro)
        assert train(config(model, images, shards, output, global_batch_size=4, train_batch_size=micro)) == 0
        losses.append([json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 * SLACK)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4 * SLACK)


def merged(tmp_path, content, **values) -> dict:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_config(options(deepspeed_config=str(file), **values), elements=10**9, overlap=False)


def test_a_file_adds_to_the_engines_options(tmp_path):
    content = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000, "round_robin_gradients": True},
        "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.0, "communication_data_type": "fp32",
    }  # fmt: skip
    result = merged(tmp_path, content, zero_stage=2)
    assert result["zero_optimization"]["reduce_bucket_size"] == 5_000_000
    assert result["zero_optimization"]["round_robin_gradients"]
    assert result["zero_optimization"]["contiguous_gradients"]
    assert result["communication_data_type"] == "fp32"
    assert result["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but 2 by --zero_stage"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, but 1 by --gradient_accumulation_steps"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but false by --mixed_precision"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but 0.0 by --max_grad_norm"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is given by --learning_rate"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 'offload_optimizer.device is "cpu", but "none"'),
        ("[]", "a JSON object is needed"),
        ("{", "Expecting property name"),
    ],
    ids=str,
)
def test_contradictions_are_named(content, named, tmp_path):
    with pytest.raises(UserError, match=named):
        merged(tmp_path, content, zero_stage=2)


def test_a_contradiction_stops_before_anything_is_written(model, images, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 99}')
    with pytest.raises(UserError, match="train_batch_size is given by --train_batch_size"):
        train(config(model, images, tmp_path / "out" / "shards", tmp_path / "out", deepspeed_config=str(file)))
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_file_trains(model, images, shards, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    assert train(config(model, images, shards, tmp_path / "out", deepspeed_config=str(file), zero_stage=2)) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--offload_optimizer", "nvme"], "--offload_optimizer nvme and --nvme_path need each other"),
        (["--nvme_path", "somewhere"], "--offload_optimizer nvme and --nvme_path need each other"),
        (["--offload_parameters"], "--offload_parameters needs --zero_stage 3"),
        (["--compile", "--zero_stage", "3"], "--compile with --zero_stage 3"),
        (["--global_batch_size", "8", "--gradient_accumulation_steps", "2"], "exclude each other"),
        (["--gradient_accumulation_dtype", "bf16"], "in fp32 or in the precision of the weights"),
        (["--zero_stage", "1", "--mixed_precision", "bf16", "--gradient_accumulation_dtype", "fp32"], "use --zero_stage 2"),
        (["--deepspeed_config", "nowhere.json"], "nowhere.json: no such file"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(arguments, named, model, images):
    given = ["--family", "sd", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), *arguments]
    with pytest.raises(UserError, match=named):
        parse(TrainConfig, "engine.run", "", given)
