"""What a training says of itself: a block at the start, and in log files a line at every log point."""

import shutil
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.optimizers import OPTIMIZERS
from engine.config.options import TrainConfig
from engine.data.samples.streams import Streams
from engine.loop.capture import reason_against
from engine.loop.held_out import HeldOutLoss
from engine.loop.run import Run
from engine.loop.weights import needs_deepspeed
from engine.loop.weights.partition import Partition
from engine.loop.weights.zero_options import machinery_stage, reduction_precision
from engine.messages import duration, warn
from engine.models.family import Family
from engine.models.training_form import alphas_of
from engine.processes import Processes
from engine.storage import is_remote

_BUCKETS = 8  # that are named
UNLIKE = "in what data sets and sizes differ is noise too, for a micro-batch is of one of them"


def _shares(streams: Streams) -> str:
    """The data sets, with how many records they hold and their parts of the samples."""
    records, shares = Counter[str](), dict.fromkeys(streams.data_sets, Fraction())
    for stream in streams.streams:
        records[stream.data_set] += stream.records
        shares[stream.data_set] += stream.share
    whole = sum(shares.values())
    return ", ".join(f"{name} {records[name]:,} ({float(share / whole):.1%} of samples)" for name, share in shares.items())


def _of_records(run: Run, streams: Streams) -> str:
    """Of how many records the samples of an epoch are, where repeats make these more or fewer."""
    records = sum(stream.records for stream in streams.streams)
    return f" an epoch, of {records:,} records" if records != run.records else ""


def _buckets(streams: Streams) -> str:
    """The sizes of images, over all data sets, with how many records each has."""
    records = Counter[str]()
    for stream in streams.streams:
        records[stream.bucket or "one size"] += stream.records
    named = [f"{bucket} ({count:,})" for bucket, count in records.most_common(_BUCKETS)]
    return ", ".join(named) + (f" and {len(records) - len(named)} more" if len(records) > len(named) else "")


def _refused(streams: Streams) -> str:
    """How many samples were refused, and what lists them, for each data set that is on this machine."""
    refusing = [stream for stream in streams.streams if stream.shards.index.refused_count]
    if not refusing:
        return "none refused"
    places = {stream.shards.place if stream.bucket is None else str(Path(stream.shards.place).parent) for stream in refusing
              if not is_remote(stream.shards.place)}  # fmt: skip
    commands = " and ".join(f"`python -m engine.shards info {place} --refused`" for place in sorted(places))
    listed = f"; {commands} {'list' if len(places) > 1 else 'lists'} them" if places else ""
    return f"{sum(stream.shards.index.refused_count for stream in refusing):,} refused{listed}"


def opening(
    config: TrainConfig, run: Run, family: Family, partition: Partition, streams: Streams, captures: bool, done: int,
    text_encoder: nn.Module | None = None, held_out: HeldOutLoss | None = None,
) -> list[str]:  # fmt: skip
    """What is trained, on what, and how, in lines.

    Args:
        captures: whether the step is captured as CUDA graphs.
        done: the step that the run goes on from.
        text_encoder: that runs in the step.
        held_out: the loss over what is held out, if one is taken.
    """
    processes = partition.processes
    trained = sum(shape.numel() for shape in partition.shapes.values())
    reading = list(text_encoder.parameters()) if text_encoder is not None else []
    read = f"the text encoder's {count(sum(map(Tensor.numel, reading)))} read the captions"
    encoders = read if reading else "the encoders are not loaded"
    state = state_bytes(config, trained, processes.world) + sum(weight.nbytes for weight in reading) + partition.frozen_bytes
    size, number = checkpoint_bytes(config, trained), checkpoints_to_come(config, run, done)
    kept = "all" if config.checkpoints_total_limit is None else f"the last {config.checkpoints_total_limit}"
    least = "at least " if OPTIMIZERS[config.optimizer].whole_parameters else ""  # more for what is no matrix
    every = f"every {config.checkpointing_steps:,} steps and at the end"
    rows = {
        "family": f"{config.family}, from {family.base_model}",
        "output": config.output_dir,
        "parameters": f"{count(trained)} trained, {count(partition.frozen_size)} frozen; {encoders}",
        **({"adapters": adapters(config, partition.module)} if config.lora_rank else {}),
        "samples": f"{run.records:,}{_of_records(run, streams)} ({_refused(streams)})",
        **({"data sets": _shares(streams)} if len(streams.data_sets) > 1 else {}),
        **({"held out": held_out.words} if held_out else {}),
        "resolution": f"{config.resolution} px",
        **({"buckets": _buckets(streams)} if any(stream.bucket for stream in streams.streams) else {}),
        "global batch": f"{run.global_batch:,} = {config.train_batch_size} per micro-batch x "
        f"{config.micro_batches} accumulated x {processes.world} process{'es' if processes.world > 1 else ''}",
        "steps": f"{run.steps:,}, {run.steps * run.global_batch / run.records:.1f} epochs"
        + (f"; going on after step {done:,}" if done else ""),
        "optimizer": optimizer(config),
        **({"noise scale": UNLIKE} if config.gradient_noise_scale and len(streams.streams) > 1 else {}),
        "precision": precision(config, processes.world),
        "device": f"{device_name(processes)}, ZeRO stage {config.zero_stage}",
        "step runs": how_steps_run(config, partition.module, processes.device, captures, len(streams.shapes), held_out),
        "memory": f"{least}{gigabytes(state)} a process, by estimate, for weights, gradients, optimizer and average; "
        "activations come on top",
        "checkpoints": f"{every}, {least}{gigabytes(size)} each, {kept} kept: {least}{gigabytes(number * size)} in the end",
    }
    width = max(map(len, rows))
    return ["Training", *(f"  {name:{width}}  {value}" for name, value in rows.items())]


def warn_of_a_full_disk(config: TrainConfig, run: Run, partition: Partition, done: int) -> None:
    """Warns where the checkpoints of the run will not find room; the first process looks."""
    if not partition.processes.is_first:
        return
    size = checkpoint_bytes(config, sum(shape.numel() for shape in partition.shapes.values()))
    needed, free = size * checkpoints_to_come(config, run, done), shutil.disk_usage(Path(config.output_dir)).free
    if needed > free:
        warn(
            f"{config.output_dir}: the checkpoints of this run take {gigabytes(needed)}, of which {gigabytes(free)} are free; "
            "--checkpoints_total_limit keeps fewer, --checkpointing_steps writes fewer"
        )


def log_line(line: Mapping[str, float | None], run: Run) -> str:
    """A line of metrics for a person."""
    step, rate = int(line["step"] or 0), line["samples_per_second"] or 0.0
    parts = [f"step {step:,}/{run.steps:,}", f"loss {line['loss']:.4f}", f"lr {line['lr']:.2e}", f"{rate:.4g} samples/s"]
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line.get("memory_gib") is not None:
        parts.append(f"{line['memory_gib']:.1f} GiB")
    if line.get("gradient_noise_scale") is not None:
        parts.append(f"noise scale {line['gradient_noise_scale']:.4g}")
    if line["skipped_steps"]:
        parts.append(f"{line['skipped_steps']} skipped")
    return "  ".join([*parts, f"{duration((run.steps - step) * run.global_batch / rate)} left"])


def held_out_words(line: Mapping[str, Any]) -> str:
    """The held-out loss of a line of metrics, and that of the average."""
    losses = [line[name] for name in ("validation_loss", "validation_loss_ema") if name in line]
    said = ["no number" if loss is None else f"{loss:.4f}" for loss in losses]
    return said[0] + "".join(f" (average {each})" for each in said[1:])


def optimizer(config: TrainConfig) -> str:
    schedule = config.lr_scheduler.replace("_", " ")
    warm_up = f", warm-up {config.lr_warmup_steps:,} steps" if config.lr_scheduler != "constant" else ""
    name = OPTIMIZERS[config.optimizer].shown
    other = "" if config.text_encoder_lr is None else f", the text encoder's {config.text_encoder_lr:g}"
    average = ", moving average" if config.use_ema else ""
    return f"{name}, learning rate {config.learning_rate:g} {schedule}{warm_up}{other}{average}"


def adapters(config: TrainConfig, module: nn.Module) -> str:
    alphas = alphas_of(module)
    said = " or ".join(f"{alpha:g}" for alpha in sorted(set(alphas.values())))
    start = f", from {config.lora_weights}" if config.lora_weights else ""
    kind = "DoRA" if config.use_dora else "LoRA"
    base = f"; frozen linear layers in {config.base_precision}" if config.base_precision else ""
    return f"{kind} of rank {config.lora_rank}, alpha {said}, on {len(alphas)} layers{start}{base}"


def advice(config: TrainConfig) -> list[str]:
    """What those who made an optimizer recommend, where the options are otherwise."""
    name, said = config.optimizer, []
    decays = config.lr_scheduler not in ("constant", "constant_with_warmup")
    if name == "prodigy" and config.learning_rate < 0.1:
        said.append("it finds the learning rate, of which --learning_rate is a factor; 1 is recommended")
    if name == "schedulefree_adamw" and decays:
        said.append("no schedule that decays is recommended; constant_with_warmup warms up")
    if name == "lion" and config.learning_rate > 5e-5 and not config.lora_rank:
        said.append("its steps are larger than AdamW's; a learning rate of a third to a tenth of AdamW's is recommended")
    return [f"--optimizer {name}: {each}" for each in said]


def precision(config: TrainConfig, world: int) -> str:
    masters = "" if config.weights_precision == "fp32" else " with fp32 masters"
    if config.masters == "none":
        masters = " without masters, rounded stochastically"
    products = f", {config.matrix_precision} products" if config.matrix_precision else ""
    reduced = reduction_precision(config, world) if needs_deepspeed(config, world) else config.weights_precision
    sums = f"; gradients add up over processes in {reduced}" if reduced != config.weights_precision else ""
    return f"{config.weights_precision}{masters}{products}{sums}"


def device_name(processes: Processes) -> str:
    gpu = processes.device.type == "cuda"
    name = torch.cuda.get_device_name(processes.device) if gpu else f"CPU ({torch.get_num_threads()} of its threads)"
    return f"{processes.world} x {name}" if processes.world > 1 else name


def how_steps_run(
    config: TrainConfig, model: nn.Module, device: torch.device, captures: bool, shapes: int = 1,
    held_out: HeldOutLoss | None = None,
) -> str:  # fmt: skip
    """Whether steps are captured and compiled, and if not, why."""
    each = f", once for each of {shapes} shapes" if shapes > 1 else ""
    if held_out:
        each += f", and {held_out.shapes} without gradients for the held-out loss"
    compiled = f"compiled ({config.compile_mode}{each})" if config.compile else "not compiled (no --compile)"
    if captures:
        known = OPTIMIZERS[config.optimizer]
        apart = "" if known.on_device else f" but for the optimizer, since {known.shown} steps from the host"
        return f"captured as CUDA graphs{apart}, {compiled}"
    asked = "--cuda_graphs off" if config.cuda_graphs == "off" else None
    why = asked or reason_against(config, device, model) or "reductions overlap the backward pass instead"
    return f"not captured ({why}), {compiled}"


def state_bytes(config: TrainConfig, trained: int, world: int) -> float:
    """Bytes that a process keeps beside activations, by the counts of docs/families.md."""
    weight = 4 if config.weights_precision == "fp32" else 2
    sharded = needs_deepspeed(config, world)
    stage = machinery_stage(config) if sharded else 0
    gradient = 4 if config.micro_batches > 1 and config.accumulation_precision == "fp32" else weight
    masters = 4 if sharded or (weight == 2 and config.masters == "fp32") else 0
    state = masters + moment_bytes(config) + (4 if config.keeps_average else 0)
    kept = state / (world if sharded else 1) + gradient / (world if stage >= 2 else 1) + weight / (world if stage == 3 else 1)
    return trained * (kept + weight)  # and the gradients as the backward pass leaves them


def moment_bytes(config: TrainConfig) -> float:
    """Bytes per parameter of the optimizer's state."""
    return OPTIMIZERS[config.optimizer].state / (1 if config.masters == "fp32" else 2)


def checkpoint_bytes(config: TrainConfig, trained: int) -> int:
    weight, average = (4 if config.weights_precision == "fp32" else 2), 4 if config.keeps_average else 0
    opened = weight * (2 if config.use_ema else 1) if config.openable_checkpoints else 0
    kept = average + (4 if config.masters == "fp32" else 2)
    return trained * int(kept + moment_bytes(config) + opened)


def checkpoints_to_come(config: TrainConfig, run: Run, done: int) -> int:
    """How many this run leaves."""
    every = config.checkpointing_steps
    number = run.steps // every - done // every + (run.steps % every != 0 and run.steps > done)
    return min(number, config.checkpoints_total_limit or number)


def count(number: float) -> str:
    """A number of parameters for a person."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
