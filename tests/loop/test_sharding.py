"""How a run is divided among processes, and DeepSpeed's own options beside ours."""

import json

import pytest

from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.trainer import divide_global_batch, train
from engine.loop.weights.zero import check_deepspeed
from engine.loop.weights.zero_options import deepspeed_config
from engine.processes import Processes
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


# As the documentation of transformers has it.
LEFT_TO_OPTIONS = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "amp": {"enabled": "auto", "opt_level": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": False, "reduce_scatter": True,
        "reduce_bucket_size": 2e8, "contiguous_gradients": True,
        "offload_optimizer": {"device": "none", "pin_memory": True}, "stage3_prefetch_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000, "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    "tensorboard": {"enabled": False, "output_path": "logs"}, "flops_profiler": {"enabled": False},
}  # fmt: skip
# The same with the values of the options in the place of "auto".
REPEATED = LEFT_TO_OPTIONS | {
    "bf16": {"enabled": False}, "amp": {"enabled": False},
    "optimizer": {
        "type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-08, "weight_decay": 0.01, "adam_w_mode": True},
    },
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 500}},
    "data_types": {"grad_accum_dtype": "fp32"},
    "gradient_accumulation_steps": 1, "gradient_clipping": 1, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4,
}  # fmt: skip


@pytest.mark.parametrize("content", [LEFT_TO_OPTIONS, REPEATED], ids=["auto", "repeated"])
def test_what_is_left_to_the_options_or_repeats_them_is_accepted(content, tmp_path):
    result = merged(tmp_path, content, zero_stage=2)
    plain = deepspeed_config(options(zero_stage=2), elements=10**9, overlap=False)
    dropped = {"optimizer", "scheduler", "train_batch_size", "amp", "data_types", "tensorboard", "flops_profiler"}
    assert not dropped & result.keys()
    for name in ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert result[name] == plain[name]
    assert result["zero_optimization"]["stage"] == 2
    assert result["zero_optimization"]["contiguous_gradients"]


def test_a_stage_that_runs_on_anothers_machinery_may_be_repeated(tmp_path):
    for stage in (0, 1):
        assert merged(tmp_path, {"zero_optimization": {"stage": stage}}, zero_stage=0)["zero_optimization"]["stage"] == 1


def test_the_schedule_of_a_file_is_said_to_be_ours(model, images, shards, tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(LEFT_TO_OPTIONS))
    run = config(model, images, shards, tmp_path / "out", deepspeed_config=str(file), zero_stage=2, max_train_steps=1)
    assert train(run) == 0
    assert f"{file}: in place of its scheduler is --lr_scheduler constant\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but 2 by --zero_stage"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, but 1 by --gradient_accumulation_steps"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but false by --mixed_precision"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but 1.0 by --max_grad_norm"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", but "AdamW" by the engine\'s own optimizer'),
        (
            {"optimizer": {"params": {"lr": 3e-5}}},
            "optimizer.params.lr is 3e-05, but 0.001 by --learning_rate",
        ),
        ({"optimizer": {"params": {"max_coeff": 1}}}, "optimizer.params.max_coeff is not known to the engine's own optimizer"),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "warmup_num_steps is 5, but 500 by --lr_warmup_steps"),
        ({"scheduler": {"params": {"cycle_first_step_size": 5}}}, "cycle_first_step_size is not known to --lr_scheduler"),
        *(
            ({name: {"enabled": True, "output_path": "/x"}}, f"{name} is not taken from a file; leave it out")
            for name in ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "autotuning", "no_section")
        ),
        ({"zero_optimization": {"offload_param": {"nvme_path": "/x"}}}, "offload_param.nvme_path is not taken .* --nvme_path"),
        ({"zero_optimization": {"leaf_module": {"classes": ["os.x"]}}}, "zero_optimization.leaf_module is not taken"),
        ({"train_batch_size": 8}, "train_batch_size is 8, but 4 by --train_batch_size x accumulation x processes"),
        ({"amp": {"enabled": True}}, "amp.enabled is true, but false by --mixed_precision"),
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
    with pytest.raises(UserError, match="train_batch_size is 99, but 4 by --train_batch_size"):
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


@pytest.mark.parametrize(
    "content", [{"zero_optimization": {"reduce_bucket_size": "x"}}, {"activation_checkpointing": [1]}, {"data_types": 3}]
)
def test_options_that_deepspeed_refuses_are_a_line(content, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="deepspeed.json: DeepSpeed refuses it: .*; mend the file") as error:
        check_deepspeed(options(deepspeed_config=str(file), zero_stage=2), Processes())
    assert len(error.value.lines) == 1
