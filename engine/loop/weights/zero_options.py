"""The options that DeepSpeed is given: the engine's own, and those of the user's file where they do not contradict."""

import json
from pathlib import Path
from typing import Any

import torch

from engine import launcher
from engine.config.options import TrainConfig
from engine.errors import UserError, first_line
from engine.files import parse_json, read_text

_BUCKET = 200_000_000  # elements that a collective moves at once
# Where reductions overlap the backward pass the last bucket cannot: many, but each as large as any parameter, because DeepSpeed
# frees a larger one's gradient while it is still being reduced.
OVERLAPPED_BUCKET = 50_000_000
# Processes from which gradients add up in fp32, which doubles their bytes. Around a ring bf16 loses 1 % of a gradient over 128
# processes, 2 % over 192 and 4 % over 256, 46 % over 1,024, where the noise of each is half of what all have in common.
FP32_REDUCTION = 256


def machinery_stage(config: TrainConfig) -> int:
    """The ZeRO stage that DeepSpeed is given.

    `--zero_stage 0` asks for no sharding, yet runs on the partitioned optimizers too: they give the same numbers with less
    traffic, and DeepSpeed's stage 0 in bf16 takes a dummy first step that shifts Adam's bias correction. Stage 1 leaves the
    backward pass alone; stage 2 accumulates low-precision micro-batches in fp32.
    """
    if config.zero_stage:
        return config.zero_stage
    return 2 if config.micro_batches > 1 and config.mixed_precision != "no" else 1


def reduction_precision(config: TrainConfig, world: int) -> str:
    """In what gradients add up over so many processes, as DeepSpeed names it: what the user's file says, or as the weights, and
    in fp32 from `FP32_REDUCTION` processes on."""
    theirs = read_file(config).get("communication_data_type")
    if theirs not in (None, "auto"):
        return str(theirs).lower()
    return "fp32" if world >= FP32_REDUCTION else config.weights_precision


def deepspeed_config(config: TrainConfig, elements: int, overlap: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of `elements` parameters, with the user's own options merged in.

    Args:
        overlap: reduce gradients while the backward pass makes further ones.
    """
    stage, whole = machinery_stage(config), elements + elements % 2
    low_precision = config.mixed_precision != "no"
    bucket = min(OVERLAPPED_BUCKET if overlap else _BUCKET, whole)
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": bucket}
    if stage < 3:
        # Stage 1 installs hooks for either of the first two, and needs none without them. Gradients that are not copied to a
        # contiguous bucket do not overlap: DeepSpeed then synchronizes the device before every reduction.
        zero |= {"contiguous_gradients": overlap or stage == 2, "allgather_bucket_size": min(_BUCKET, whole)}
    if stage < 3 and config.offload_optimizer == "none":
        # The norm is the optimizer's affair, on the device.
        zero["compute_grad_norm"] = False
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_accumulation_steps": config.micro_batches,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    if config.mixed_precision == "bf16":
        ours["bf16"] = {"enabled": True, "check_grad_overflow": False}
    elif config.mixed_precision == "fp16":
        ours["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000}
    if low_precision and stage > 1:
        ours["data_types"] = {"grad_accum_dtype": config.accumulation_precision}
    merged = _merge(ours, read_file(config), config, "")
    merged["communication_data_type"] = reduction_precision(config, launcher.world())
    if stage == 3:
        # One partition, so that one norm and one step see all of it; a file may ask for smaller ones to save memory in a step.
        merged["zero_optimization"]["sub_group_size"] = whole
    return merged


def _decided(config: TrainConfig) -> dict[str, tuple[str, Any]]:
    """What the options decide of DeepSpeed's: dotted name -> option, and its value. The user's file may repeat it."""
    whole = config.train_batch_size * config.micro_batches * launcher.world()
    ours, precision, rate = "the engine's own optimizer", "--mixed_precision", config.learning_rate
    return {
        "train_batch_size": ("--train_batch_size x accumulation x processes", whole),
        "train_micro_batch_size_per_gpu": ("--train_batch_size", config.train_batch_size),
        "gradient_accumulation_steps": ("--gradient_accumulation_steps", config.micro_batches),
        "gradient_clipping": ("--max_grad_norm", config.max_grad_norm),
        "bf16.enabled": (precision, config.mixed_precision == "bf16"),
        "fp16.enabled": (precision, config.mixed_precision == "fp16"),
        "amp.enabled": (precision, False),
        "data_types.grad_accum_dtype": ("--gradient_accumulation_dtype", config.accumulation_precision),
        "zero_optimization.stage": ("--zero_stage", config.zero_stage),
        "zero_optimization.offload_optimizer.device": ("--offload_optimizer", config.offload_optimizer),
        "zero_optimization.offload_param.device": ("--offload_parameters", "cpu" if config.offload_parameters else "none"),
        "zero_optimization.compute_grad_norm": ("the engine's own norm", False),
        "zero_allow_untested_optimizer": (ours, True),
        "zero_force_ds_cpu_optimizer": (ours, False),
        "optimizer.type": (ours, "AdamW"),
        "optimizer.params.adam_w_mode": (ours, True),
        "optimizer.params.lr": ("--learning_rate", rate),
        "optimizer.params.betas": ("--adam_beta1 and --adam_beta2", [config.adam_beta1, config.adam_beta2]),
        "optimizer.params.eps": ("--adam_epsilon", config.adam_epsilon),
        "optimizer.params.weight_decay": ("--adam_weight_decay", config.adam_weight_decay),
        "scheduler.params.warmup_min_lr": ("--lr_scheduler", 0),
        "scheduler.params.warmup_max_lr": ("--learning_rate", rate),
        "scheduler.params.warmup_num_steps": ("--lr_warmup_steps", config.lr_warmup_steps),
        "scheduler.params.total_num_steps": ("--max_train_steps", config.max_train_steps),
    }


# What a file may hold. Other sections write reports and measurements where they say, or do the engine's part in another way.
_SECTIONS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "fp16",
    "amp", "data_types", "optimizer", "scheduler", "zero_optimization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "disable_allgather", "activation_checkpointing", "aio", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "comms_logger", "timers", "log_level",
}  # fmt: skip
# Options of its sections that name places or code.
_REFUSED = {"nvme_path": "use --offload_optimizer nvme with --nvme_path", "leaf_module": "", "zenflow": ""}
# Sections that DeepSpeed is not given -> what stands in their place.
_NOT_GIVEN = {"optimizer": "the engine's own optimizer", "scheduler": "--lr_scheduler"}


def read_file(config: TrainConfig) -> dict[str, Any]:
    """The user's own options of DeepSpeed."""
    path = config.deepspeed_config
    if path is None:
        return {}
    try:
        content = parse_json(read_text(Path(path)))
    except Exception as error:  # of what is no JSON, anything
        raise UserError(f"--deepspeed_config {path}: {first_line(error)}; give a JSON file of DeepSpeed's options") from None
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {path}: a JSON object is needed")
    return content


def _merge(ours: dict[str, Any], theirs: dict[str, Any], config: TrainConfig, path: str) -> dict[str, Any]:
    """`ours` with what `theirs` adds or changes, dictionaries within dictionaries; `auto` stands for ours.

    Raises:
        UserError: `theirs` contradicts an option.
    """
    merged, decided, file = dict(ours), _decided(config), f"--deepspeed_config {config.deepspeed_config}"
    for key, value in theirs.items():
        name = f"{path}{key}"
        if (not path and key not in _SECTIONS) or key in _REFUSED:
            if value is None or value is False or (isinstance(value, dict) and value.get("enabled") is False):
                continue  # as templates have it
            raise UserError(f"{file}: {name} is not taken from a file; {_REFUSED.get(key) or 'leave it out'}")
        section = name.split(".")[0]
        if isinstance(value, dict):
            known = ours.get(key, {})
            if not isinstance(known, dict) or name in decided:
                raise UserError(f"{file}: {name} is one value, and no section; write it as DeepSpeed's documentation has it")
            inner = _merge(known, value, config, f"{name}.")
            if inner and section not in _NOT_GIVEN:
                merged[key] = inner
        elif value == "auto" or name == "scheduler.type" or (name, value) == ("optimizer.type", "Adam"):
            continue  # DeepSpeed's Adam is AdamW, unless its adam_w_mode is false
        elif name in decided:
            option, wanted = decided[name]
            # What DeepSpeed is given may be another value, where the engine does its part; that too may be repeated.
            if value not in (wanted, ours.get(key, wanted)):
                raise UserError(
                    f"{file}: {name} is {json.dumps(value)}, but {json.dumps(wanted)} by {option}; "
                    "leave it out of the file, or change the option"
                )
        elif section in _NOT_GIVEN:
            raise UserError(f'{file}: {name} is not known to {_NOT_GIVEN[section]}; leave it out, or make it "auto"')
        else:
            merged[key] = value
    return merged
