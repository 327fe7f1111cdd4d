"""The story of a run: shards, model, resume, steps, checkpoints, validation, export."""

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.backends import configure
from engine.config.command_line import to_toml
from engine.config.options import TrainConfig
from engine.data.encode import build
from engine.data.format.index import INDEX, Index
from engine.data.format.shard import Shards
from engine.data.format.verify import verify
from engine.data.samples.loader import Batch, BatchPlan, Loader
from engine.data.samples.order import records_of
from engine.data.sources import open_source
from engine.errors import UserError
from engine.files import lock, write_text
from engine.loop import attention
from engine.loop import checkpoints as checkpoint
from engine.loop.capture import Captured, wanted
from engine.loop.metrics import Log, Metrics, forward_flops, matrix_flops_per_second
from engine.loop.optimizers import AdamW, learning_rates
from engine.loop.overlap import overlap_pays
from engine.loop.pace import Pace
from engine.loop.step import predict_and_compare
from engine.loop.validation import create_repository, export, push_to_hub, validate
from engine.loop.watchdog import Watchdog
from engine.loop.weights.ema import Ema, decay_of_step
from engine.loop.weights.flat import FlatPartition
from engine.loop.weights.partition import Partition
from engine.loop.weights.zero import ZeroPartition, check_deepspeed
from engine.models.family import Family, open_family
from engine.processes import Processes, StopSignal


def train(config: TrainConfig) -> int:
    """Runs a whole training; returns the exit code.

    Raises:
        UserError: a mistake in the options, the model or the data.
    """
    configure(config)
    processes = Processes(config.local_rank)
    try:
        return _train(config, processes)
    finally:
        processes.close()


def _train(config: TrainConfig, processes: Processes) -> int:
    config = divide_global_batch(config, processes.world)
    family = open_family(config)
    if needs_deepspeed(config, processes.world):
        check_deepspeed(config, processes)
    repository = create_repository(config) if config.push_to_hub and processes.is_first else None
    resumed = _find_checkpoint(config)
    processes.connect()
    state = checkpoint.read_state(resumed) if resumed else None
    seed = processes.from_first(_seed(config, state))
    shards = prepare_shards(config, family, processes)
    plan = BatchPlan(config.train_batch_size, config.gradient_accumulation_steps, processes.rank, processes.world)
    steps = config.max_train_steps or -(-config.num_train_epochs * len(shards) // plan.global_batch)
    config = config.model_copy(update={"seed": seed, "max_train_steps": steps})
    run = {"seed": seed, "global_batch": plan.global_batch, "fingerprint": shards.index.fingerprint}
    if state is not None:
        _check_same_run(resumed, state["run"], run)

    # Dropout draws from torch's generator; each process its own numbers.
    torch.manual_seed(seed + processes.rank)
    output = Path(config.output_dir)
    with _only_run(output, processes):
        if processes.is_first:
            checkpoint.discard_unfinished(output)
            write_text(output / "config.toml", to_toml(config))
        training = Training(config, family, shards, plan, processes, run, steps)
        if state is not None and resumed is not None:
            training.resume(resumed, state)
        finished = _run(training)
        if finished and repository:
            push_to_hub(config, family, repository)
    if processes.is_first:
        if finished:
            print(f"Trained {steps} steps; the pipeline is in {output / family.result}")
        else:
            saved = output / f"checkpoint-{training.step}"
            print(f"Stopped after step {training.step}, saved in {saved}; continue with --resume_from_checkpoint latest")
    return 0


@contextlib.contextmanager
def _only_run(output: Path, processes: Processes) -> Iterator[None]:
    """Holds the output directory, so that no second run writes there."""
    held = None
    if processes.is_first:
        output.mkdir(parents=True, exist_ok=True)
        held = lock(output)
    try:
        if not processes.from_first(held is not None):
            raise UserError(f"{output}: another run is writing there; wait for its end, or name another --output_dir")
        yield
    finally:
        if held is not None:
            os.close(held)


def _run(training: "Training") -> bool:
    """Steps, validation and export; False when a signal asked to leave before the end."""
    config, processes = training.config, training.processes
    log = Log(config, training.step) if processes.is_first else None
    try:
        finished = training.run_steps(log)
        training.checkpoints.wait()
        processes.barrier()
        if finished:
            if config.validation_prompts:
                training.validate(log)
            export(config, training.family, training.partition, training.exported_weights, processes)
        return finished
    finally:
        if log:
            log.close()


def divide_global_batch(config: TrainConfig, world: int) -> TrainConfig:
    """The configuration with the accumulation that `--global_batch_size` takes.

    Raises:
        UserError: the processes cannot divide it evenly.
    """
    whole, part = config.global_batch_size, config.train_batch_size * world
    if whole is None:
        return config
    if whole % part:
        below, above = whole // part * part, (whole // part + 1) * part
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"--global_batch_size {whole} cannot be divided among {world} processes with --train_batch_size "
            f"{config.train_batch_size}; the nearest that can: {nearest}"
        )
    return config.model_copy(update={"gradient_accumulation_steps": whole // part})


def prepare_shards(config: TrainConfig, family: Family, processes: Processes) -> Shards:
    """Builds the shards where they are missing, verifies every one, and opens them.

    Raises:
        UserError: shards of another family or shape, or damaged ones, by name.
    """
    directory = config.shards_path
    if config.dataset_name or config.train_data_dir:
        index = build(config, family, open_source(config, family.captioned), processes)
    else:
        index = Index.read(directory)
    if index.family != config.family or index.fields != family.record_spec:
        raise UserError(
            f"{directory / INDEX}: the shards hold other records than --family {config.family} at --resolution "
            f"{config.resolution} and --mixed_precision {config.mixed_precision} reads; name another --shards_dir"
        )
    mine = index.shards[processes.rank :: processes.world]
    with tqdm(total=len(mine), desc="Verifying shards", disable=None if processes.is_first else True, leave=False) as bar:
        problems = verify(directory, mine, progress=bar.update)
    problems = {file: problem for part in processes.gather_objects(problems) for file, problem in part.items()}
    if problems:
        listed = "; ".join(f"{file}: {problem}" for file, problem in sorted(problems.items()))
        raise UserError(f"{directory}: damaged shards: {listed}; delete them and {INDEX}, and they are built again")
    return Shards(directory)


def keep_compiled_code(directory: Path) -> None:
    """Makes torch.compile and Triton keep what they compile in a directory that outlives the process."""
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ[variable] = str((directory / name).absolute())


def _find_checkpoint(config: TrainConfig) -> Path | None:
    if not config.resume_from_checkpoint:
        return None
    return checkpoint.find(Path(config.output_dir), config.resume_from_checkpoint)


def _seed(config: TrainConfig, state: dict[str, Any] | None) -> int:
    """The seed of the run: as given, else the resumed run's, else drawn."""
    if config.seed is not None:
        return config.seed
    return int(state["run"]["seed"]) if state else secrets.randbits(31)


def _check_same_run(path: Path | None, before: dict[str, Any], now: dict[str, Any]) -> None:
    remedies = {
        "seed": "leave out --seed, or give the same",
        "global_batch": "choose processes, --train_batch_size and --gradient_accumulation_steps with the same product",
        "fingerprint": "give the same data and preprocessing options",
    }
    for name, remedy in remedies.items():
        if before[name] != now[name]:
            raise UserError(f"{path}: was written with {name} {before[name]}, this run has {now[name]}; {remedy}")


def needs_deepspeed(config: TrainConfig, world: int) -> bool:
    """Whether weights are partitioned by DeepSpeed: for several processes, and for what only it does (ZeRO, offloading, its own
    options, fp16's loss scale, the flat partitions that 8-bit AdamW steps on). Else they lie in flat buffers, without it."""
    sharded = world > 1 or config.zero_stage > 0 or config.offload_optimizer != "none" or config.deepspeed_config is not None
    return sharded or config.mixed_precision == "fp16" or config.use_8bit_adam


class Training:
    """The model under training, and the steps of the run."""

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        shards: Shards,
        plan: BatchPlan,
        processes: Processes,
        run: dict[str, Any],
        total_steps: int,
    ) -> None:
        self.config, self.family, self.shards, self.plan, self.processes = config, family, shards, plan, processes
        self.run, self.total_steps = run, total_steps
        device = processes.device
        model = family.load_model()
        attention.prepare(config, family, model, device, loud=processes.is_first)
        self.metrics = Metrics(device, plan.global_batch, len(shards))
        if device.type == "cuda":
            self.metrics.flops_per_sample = forward_flops(family, model)
            self.metrics.peak_flops = matrix_flops_per_second(device, family.dtype, warm_up=0.1)  # short: a run should begin
        captures = wanted(config, device, model) and not overlap_pays(config, model, self.metrics, processes)
        if needs_deepspeed(config, processes.world):
            self.partition: Partition = ZeroPartition(model, config, processes, captures)
        else:
            self.partition = FlatPartition(model, config, processes)
        if config.compile:
            if config.compile_cache_dir:
                keep_compiled_code(Path(config.compile_cache_dir))
            model.compile(mode=config.compile_mode)
        self.ema: Ema | None = None
        if config.use_ema:
            masters = self.partition.masters
            self.ema = Ema(masters, config.offload_ema and masters[0].is_cuda, self.partition.allocate)
        optimizer = self.partition.optimizer
        self.ema_in_optimizer = self.ema is not None and not self.ema.offload and isinstance(optimizer, AdamW)
        if self.ema and self.ema_in_optimizer:
            optimizer.averages = self.ema.averages
        self.rate_of = learning_rates(config, processes, total_steps)
        self.seed = torch.tensor([run["seed"]], device=device)
        self.gradient_scale = torch.full((1,), 1 / (plan.micro_batch * plan.accumulation), device=device)
        # Whether a micro-batch begins a step, and whether it ends it.
        self.micro_batches = [(number == 0, number == plan.accumulation - 1) for number in range(plan.accumulation)]
        self.captured: Captured | None = None
        self.train_micro_batch: Callable[..., None] = self._train_micro_batch
        if captures:
            if isinstance(self.partition, FlatPartition):
                self.train_micro_batch = self.captured = Captured(self._train_micro_batch, processes, self.micro_batches)
            else:
                self.captured = Captured(self._differentiate, processes)
                self.train_micro_batch = partial(self._train_differentiated, self.captured)
        token = processes.from_first(secrets.token_hex(4))
        self.checkpoints = checkpoint.Writer(
            Path(config.output_dir), run, processes, config.checkpoints_total_limit, config.checkpoint_async, token
        )
        self.watchdog: Watchdog | None = None
        self.step = 0

    def resume(self, path: Path, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint whose state was read and checked."""
        started = time.perf_counter()
        checkpoint.load(path, state, self.partition, self.ema, self.metrics, self.processes)
        self.step = int(state["step"])
        if self.processes.is_first:
            print(f"Continuing from {path}, loaded in {time.perf_counter() - started:.2f} s", file=sys.stderr)

    @property
    def exported_weights(self) -> list[Tensor]:
        return self.ema.averages if self.ema else self.partition.masters

    def run_steps(self, log: Log | None) -> bool:
        """Trains to the last step; False when a signal asked to leave before."""
        loader = Loader(
            self.shards,
            self.plan,
            self.run["seed"],
            self.family.schedule,
            self.processes.device,
            self.step,
            self.total_steps,
        )
        batches = iter(loader)
        stop = StopSignal(self.processes)
        self.watchdog = Watchdog(self.processes, self.config.step_timeout) if self.config.step_timeout else None
        shown = None if self.processes.is_first else True
        progress = tqdm(total=self.total_steps, initial=self.step, desc="Training", unit="step", disable=shown)

        def finished(step: int) -> None:
            progress.update()
            if self.watchdog:
                self.watchdog.step = step

        self.pace = Pace(self.processes.device, finished)
        self.metrics.start()
        try:
            while self.step < self.total_steps:
                rate = self.rate_of(self.step)
                self._train_step(batches, rate)
                self.pace.given(self.step)
                leave = stop.agreed() and self.step < self.total_steps
                self._after_step(rate, progress, log, leave)
                if leave:
                    return False
            return True
        finally:
            progress.close()
            loader.close()
            stop.close()
            if self.watchdog:
                self.watchdog.close()

    def _train_step(self, batches: Iterator[Batch], rate: float) -> None:
        """One optimizer step: its micro-batches, the update, the moving average."""
        optimizer = self.partition.optimizer
        optimizer.set_learning_rate(rate)
        if self.ema_in_optimizer:
            optimizer.ema_weight.fill_(1 - decay_of_step(self.step + 1))
        if self.partition.loss_scaler:
            self.gradient_scale.fill_(self.partition.loss_scale / (self.plan.micro_batch * self.plan.accumulation))
        for first, last in self.micro_batches:
            if last and self.ema:
                self.ema.wait()
            self.train_micro_batch(next(batches), first, last)
        self.step += 1
        self.metrics.steps += 1
        if self.ema and not self.ema_in_optimizer:
            self.ema.update(self.step)

    def _train_micro_batch(self, batch: Batch, first: bool, last: bool) -> None:
        """Everything between two micro-batches; on one process a single CUDA graph."""
        partition = self.partition
        loss, prediction, gradient = predict_and_compare(
            partition.predict, self.family, batch, self.config, self.seed, self.gradient_scale
        )
        partition.backward(prediction, gradient, first)
        self.metrics.add(loss, batch.slots, self.plan.accumulation)
        partition.update(last)

    def _differentiate(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """A micro-batch's losses [B] and gradients, without DeepSpeed: the part of its step that a CUDA graph can hold."""
        partition = self.partition
        loss, prediction, gradient = predict_and_compare(
            partition.module, self.family, batch, self.config, self.seed, self.gradient_scale
        )
        return loss, list(torch.autograd.grad(prediction, partition.parameters, gradient, materialize_grads=True))

    def _train_differentiated(self, differentiate: Captured, batch: Batch, first: bool, last: bool) -> None:
        """As `_train_micro_batch`, with DeepSpeed's reductions and its step beside the CUDA graph."""
        loss, gradients = differentiate(batch)
        self.partition.receive(gradients, first)
        self.metrics.add(loss, batch.slots, self.plan.accumulation)
        self.partition.update(last)

    def _after_step(self, rate: float, progress: tqdm, log: Log | None, leave: bool) -> None:
        """Metrics, checkpoint and validation, where they are due."""
        config = self.config
        if self.step % config.log_every == 0 or self.step == self.total_steps:
            self.pace.wait()
            optimizer = self.partition.optimizer
            line = self.metrics.read(self.step, rate, optimizer.grad_norm, optimizer.skipped, self.processes)
            progress.set_postfix(loss=f"{line['loss']:.4f}", lr=f"{rate:.2e}")
            if log:
                log.write(line)
            self._stop_when_skipping(int(line["skipped_steps"] or 0))
        if leave or self.step % config.checkpointing_steps == 0:
            self._beside_training(self._save)
        if config.validation_prompts and self.step < self.total_steps and self._epoch_to_validate():
            self._beside_training(lambda: self.validate(log))

    def _beside_training(self, work: Callable[[], Any]) -> None:
        """Runs work that is not a step, on nobody's clock, once the steps before it are finished."""
        self.pace.wait()
        with self.watchdog.paused() if self.watchdog else contextlib.nullcontext():
            self.metrics.exclude(work)

    def _stop_when_skipping(self, skipped: int) -> None:
        """Gives up a run that skips steps again and again, and names the samples; slots, and so records, are known."""
        if skipped <= self.config.max_skipped_steps:
            return
        slots = self.metrics.offending_slots(self.processes)
        records = records_of(self.run["seed"], torch.tensor(slots, dtype=torch.int64), len(self.shards)).tolist()
        named = ", ".join(f"slot {slot} (record {record})" for slot, record in zip(slots, records, strict=True))
        cause = f"losses of these samples were not: {named}" if named else "every loss was, so the gradients overflowed"
        raise UserError(
            f"{skipped} steps were skipped because a loss or gradient was not finite; {cause}; no weight was touched. "
            f"Look at the data, lower --learning_rate, or raise --max_skipped_steps {self.config.max_skipped_steps}"
        )

    def _save(self) -> None:
        self.checkpoints.save(self.step, self.partition, self.ema, self.metrics)

    def _epoch_to_validate(self) -> bool:
        """Whether this step ended an epoch after which validation is due: the first, and every `--validation_epochs`."""
        batch, records, every = self.plan.global_batch, len(self.shards), self.config.validation_epochs
        before, now = (self.step - 1) * batch // records, self.step * batch // records
        return any((epoch - 1) % every == 0 for epoch in range(before + 1, now + 1))

    def validate(self, log: Log | None) -> None:
        if self.captured:
            self.captured.release()  # the pipeline's activations then have the memory of the step's
        grid = validate(
            self.config,
            self.family,
            self.partition,
            self.exported_weights,
            self.processes,
            self.run["seed"],
            self.step,
        )
        if grid is not None and log is not None:
            log.picture(grid, self.step)
