"""The story of a run: shards, model, resume, steps, checkpoints, validation, export."""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from engine import launcher, messages
from engine.backends import compile_model, configure
from engine.config.mixture import data_sets_of
from engine.config.options import TrainConfig
from engine.data.class_images import draw_class_images
from engine.data.samples.batch import Batch, BatchPlan
from engine.data.samples.dropout import Dropout
from engine.data.samples.loader import Loader
from engine.data.samples.streams import Stream, Streams, shape_of
from engine.errors import UserError, first_line, of_all
from engine.failed import begin, leave_note, leave_note_unless_held
from engine.loop import attention
from engine.loop.capture import wanted
from engine.loop.checkpoints.layout import Checkpoint
from engine.loop.checkpoints.models import write_models
from engine.loop.checkpoints.names import BEST, checkpoint_name
from engine.loop.checkpoints.snapshot import restore
from engine.loop.checkpoints.state import Best
from engine.loop.checkpoints.writer import Writer
from engine.loop.damage import SoundBatches
from engine.loop.export import create_repository, export, push_to_hub, result_of
from engine.loop.flops import count_flops
from engine.loop.held_out import HeldOutLoss, NotTaken, Records, judged
from engine.loop.log import Log, check_trackers
from engine.loop.metrics import Metrics
from engine.loop.noise_scale import NoiseScale
from engine.loop.overlap import overlap_pays
from engine.loop.pace import Pace
from engine.loop.prepare import divide_global_batch, open_dropout, open_run, prepare_held_out, prepare_shards
from engine.loop.report import advice, held_out_words, log_line, opening, warn_of_a_full_disk
from engine.loop.resume import (
    announce,
    check_same_shards,
    check_same_streams,
    check_same_weights,
    find_checkpoint,
    only_run,
    open_checkpoint,
    seed_of,
    take_over,
    unit_of,
    with_held_out,
    with_order,
)
from engine.loop.run import Run
from engine.loop.step import Step
from engine.loop.stop import StopSignal
from engine.loop.validation import seconds_at_most, validate
from engine.loop.watchdog import Watchdog
from engine.loop.weights import check_division, needs_deepspeed, open_partition
from engine.loop.weights.zero import check_deepspeed
from engine.messages import busy, say, shows_bars, warn
from engine.models.family import Family, open_family
from engine.processes import Processes

FIRST_STEP, COMPILING = 1800.0, 3600.0  # seconds for the first step, and where it compiles everything at maximum effort
BESIDE = 3600.0  # seconds for a checkpoint between two steps


def train(config: TrainConfig) -> int:
    """Runs a whole training; returns the exit code.

    Raises:
        UserError: a mistake in the options, the model or the data.
    """
    messages.begin(config.quiet)
    configure(config)
    processes = Processes(config.local_rank)
    try:
        return _train(config, processes)
    except UserError as error:
        if processes.is_first or processes.store is None:
            leave_note_unless_held(Path(config.output_dir), error, processes.step)
        processes.let_the_first_speak(error)
        raise
    finally:
        processes.close()


def _train(config: TrainConfig, processes: Processes) -> int:
    config = divide_global_batch(config, processes.world)
    check_division(config, processes.world)
    with busy("Waiting for the other processes"):
        processes.connect()
    output = Path(config.output_dir)
    launches = set(filter(None, processes.gather_objects(launcher.launch())))
    again = processes.computed_by_first(partial(begin, output, launches))
    checkpoint = processes.computed_by_first(lambda: find_checkpoint(config, again))
    with busy("Opening the models, downloads included"):
        family = processes.first_before_others(partial(open_family, config))
    with busy("Checking the files of the models"):
        family.check_files()
    if needs_deepspeed(config, processes.world):
        with busy("Importing DeepSpeed"):
            check_deepspeed(config, processes)
    config = config.model_copy(update={"report_to": processes.computed_by_first(lambda: check_trackers(config).report_to)})
    repository = processes.computed_by_first(lambda: create_repository(config)) if config.push_to_hub else None
    with only_run(output, processes), _noting_mistakes(output, processes):
        with busy(f"Comparing {checkpoint} with its digests"):
            opened = open_checkpoint(checkpoint, config, processes, again) if checkpoint else None
        checkpoint, state = (opened.path, opened.state) if opened else (None, None)
        family.adapters = state.layers if state else {}
        processes.computed_by_first(family.check_adapters)
        seed = processes.from_first(seed_of(config, state))
        config = with_held_out(with_order(config, checkpoint, state), checkpoint, state)
        if config.validation_fraction or config.validation_data_dir:
            family.schedule.draw.grid(config.validation_timesteps)  # which refuses what it cannot be, before shards are built
        draw_class_images(config, family.encoding, processes, checkpoint)
        same = partial(check_same_shards, checkpoint, state, config)
        streams, parts = prepare_shards(config, family, processes, same, seed, unit_of(config, checkpoint, state))
        check_same_streams(checkpoint, state, config.continue_on_grown_data, streams)
        held_out = prepare_held_out(config, family, processes, streams, parts)
        plan = BatchPlan(config.train_batch_size, config.micro_batches, processes.rank, processes.world)
        run = open_run(config, seed, streams, plan, state)
        subset = any(data_set.config.max_train_samples for data_set in data_sets_of(config))
        subset_seed = config.sample_seed if subset else None
        config = config.model_copy(update={"seed": run.seed, "max_train_steps": run.steps, "subset_seed": subset_seed})
        if opened and processes.is_first:
            announce(opened, config, run, processes.world)

        dropout = open_dropout(config, family, processes)
        # The model's dropout draws from torch's generator; each process its own numbers.
        torch.manual_seed(seed + processes.rank)
        with busy("Loading the model"):
            model = family.load_model(seed=seed)
        with busy("Laying out weights and optimizer"):
            training = Training(config, run, family, model, processes, held_out)
        if opened:
            training.resume(opened)
        processes.computed_by_first(partial(take_over, config, checkpoint, again, launches, state.best if state else None))
        del opened  # a file that is held open keeps its room when rotation removes it
        text_encoder, captures = training.text_encoder, training.captures
        done, held = training.step, training.held_out
        say(*opening(config, run, family, training.partition, streams, captures, done, text_encoder, held))
        for advised in advice(config):
            warn(advised)
        warn_of_a_full_disk(config, run, training.partition, training.step)
        finished = _run(training, streams, plan, dropout)
        if finished and repository and processes.is_first:
            with busy(f"Uploading to {repository}"):
                push_to_hub(config, family, repository)
    if processes.is_first and not config.quiet:
        print(_ending(training, finished))
    return 0


def _ending(training: "Training", finished: bool) -> str:
    """What a run did, and where that is."""
    config, step = training.config, training.step
    if not finished:
        saved = Path(config.output_dir) / checkpoint_name(step)
        return f"Stopped after step {step}, saved in {saved}; continue with --resume_from_checkpoint latest"
    ended = f" of {training.run.steps}: {training.why_early}" if training.ends_early else ""
    result, place = result_of(config, training.family)
    return f"Trained {step} steps{ended}; the {result} is in {place}{training.where_best}"


@contextlib.contextmanager
def _noting_mistakes(output: Path, processes: Processes) -> Iterator[None]:
    """Leaves a note of a mistake that another than the first process meets alone, which holds the directory."""
    try:
        yield
    except UserError as error:
        if not error.shared and not processes.is_first and processes.first_to("note"):
            leave_note(output, error, processes.step)
        raise


def _run(training: "Training", streams: Streams, plan: BatchPlan, dropout: Dropout | None) -> bool:
    """Steps, the last checkpoint, export, and then pictures; False when a signal asked to leave before the end."""
    config, run, processes = training.config, training.run, training.processes
    logs: list[Log] = []  # of the first process
    processes.computed_by_first(lambda: logs.append(Log(config, training.step, training.measured)))
    log = logs[0] if logs else None
    try:
        family, device = training.family, processes.device
        span, limits = (training.step, run.steps), family.encoding.limits
        loader = Loader(streams, plan, run.seed, family.schedule, device, *span, limits, dropout)
        with contextlib.closing(loader), contextlib.closing(streams):  # these first, for which the loader may wait
            finished = training.run_steps(iter(loader), log)
        training.save_to_the_end()
        processes.barrier()
        if finished:
            with busy(f"Writing the {result_of(config, family)[0]}"):
                export(config, training.family, training.partition)
            if config.draws_images:
                training.validate(log)
        training.checkpoints.close()
        return finished
    except Exception:
        training.checkpoints.close()
        raise
    finally:
        if log:
            log.close()
        if training.held_out:
            training.held_out.close()
        if training.stop:
            training.stop.release()


def cause_of_skips(slots: list[int], records: list[int], streams: list[Stream] | None = None) -> str:
    """What made losses or gradients other than finite, and what to do about it.

    Args:
        slots: the latest whose losses were not finite, in order; `records` are those that they read.
        streams: that these records are of, where there are several.
    """
    if not slots:
        return "every loss was, so the gradients overflowed: lower --learning_rate"
    names = [f" of {stream.name}" for stream in streams] if streams else [""] * len(slots)
    if len({*zip(records, names, strict=True)}) > 1 and slots == list(range(slots[0], slots[-1] + 1)):
        return (
            f"no loss was in the last {len(slots)} samples, whatever they hold: the weights have diverged. Go on from an "
            "earlier checkpoint, with a lower --learning_rate"
        )
    named = ", ".join(f"slot {slot} (record {record}{of})" for slot, record, of in zip(slots, records, names, strict=True))
    directory = streams[-1].shards.place if streams else "DIR"
    return (
        f"losses of these samples were not, and those of others were: {named}. `python -m engine.shards info {directory} "
        f"--record {records[-1]}` with the data set (--train_data_dir or --dataset_name) says which image that is; look at it"
    )


class Training:
    """The model under training, and the steps of the run.

    Args:
        model: freshly loaded; it is changed in place.
        held_out: the records that the held-out loss is taken over.
    """

    def __init__(
        self, config: TrainConfig, run: Run, family: Family, model: nn.Module, processes: Processes,
        held_out: Sequence[Records] = (),
    ) -> None:  # fmt: skip
        self.config, self.run, self.family, self.processes = config, run, family, processes
        device = processes.device
        attention.prepare(config, family, model, device, loud=processes.is_first)
        flops = count_flops(family, model, device, run.streams)
        noise_scale = NoiseScale(config, processes) if config.gradient_noise_scale else None
        self.metrics = Metrics(run, processes, flops, noise_scale)
        self.captures = captures = wanted(config, device, model) and not overlap_pays(config, model, flops, processes)
        self.partition = open_partition(model, config, processes, captures)
        if config.compile:
            shapes = {(config.train_batch_size, shape) for shape in run.streams.shapes}
            shapes |= {(run.streams.unit, shape_of(of.shards)) for of in held_out}
            compile_model(model, config, len(shapes))
        self.text_encoder = family.encoding.load_text_encoder(device) if family.reads_tokens else None
        self.train_step = Step(config, run, family, self.partition, self.metrics, captures, self.text_encoder)
        self.held_out: HeldOutLoss | None = None
        if held_out:
            unit, captured = run.streams.unit, self.train_step.captured
            self.held_out = HeldOutLoss(config, family, self.partition, held_out, unit, captured, self.text_encoder)
        self.best: Best | None = None  # of the held-out loss
        token = processes.from_first(secrets.token_hex(4))
        limit, beside = config.checkpoints_total_limit, config.checkpoint_async
        models = self._writes_models() if config.openable_checkpoints and processes.is_first else None
        self.checkpoints = Writer(Path(config.output_dir), run, processes, limit, beside, token, models, config.best_checkpoint)
        self.watchdog: Watchdog | None = None
        self.stop: StopSignal | None = None
        self.log: Log | None = None
        self.shown: dict[str, str] = {}  # beside the progress
        self.step = self.saved = 0  # the last step, and the one whose checkpoint was loaded or saved last

    def _writes_models(self) -> Callable[[Path], list[Path]]:
        """What writes the models of a checkpoint, for others to open, once all slices of it are there."""
        partition = self.partition
        return partial(
            write_models, family=self.family, module=partition.module, shapes=partition.shapes, beside=partition.beside(),
            world=self.processes.world,
        )  # fmt: skip

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint that was checked."""
        started = time.perf_counter()
        check_same_weights(checkpoint, self.config, self.partition.shapes)
        restore(checkpoint, self.partition, self.metrics)
        self.step = self.saved = checkpoint.state.step
        if self.held_out and checkpoint.state.best and checkpoint.state.best.of == self.held_out.of:
            self.best = checkpoint.state.best
        elif self.held_out and checkpoint.state.best:
            say("The held-out loss is taken over other records or timesteps than before: what was the lowest does not count")
        say(f"Continuing from {checkpoint.path}, loaded in {time.perf_counter() - started:.2f} s")

    def run_steps(self, given: Iterator[Batch], log: Log | None) -> bool:
        """Trains to the last step; False when a signal asked to leave before.

        Raises:
            UserError: the shards are damaged; the steps before are saved.
        """
        self.started, self.batches = self.step, SoundBatches(given)
        # Under fp16 every step that is skipped halves the loss scale.
        self.stop = stop = StopSignal(self.processes, every_step=self.config.mixed_precision == "fp16")
        self.watchdog = self._watchdog()
        bar = {"desc": "Training", "unit": "step", "disable": not shows_bars()}
        self.progress = progress = tqdm(total=self.run.steps, initial=self.step, **bar)
        self.log = log

        def finished(step: int) -> None:
            progress.update()
            if self.watchdog:
                self.watchdog.finished(step)

        self.pace = Pace(self.processes.device, finished)
        self.metrics.start()
        compiles = ", which compiles the model" if self.config.compile else ""
        first: contextlib.AbstractContextManager[None] = busy(f"The first step{compiles}")
        try:
            self._measure_where_due()  # where the run left, or was killed, at a step that has a round
            if self.ends_early:
                say(f"The training has ended: {self.why_early}; a higher one, or none, goes on")
            while self.step < self.run.steps and not self.ends_early:
                with first:
                    self.train_step(self.batches, self.step + 1)
                first = contextlib.nullcontext()
                self.step += 1
                self.pace.given(self.step)
                stop.received |= self.batches.damage is not None
                leave, saves = stop.agreed(), self.step % self.config.checkpointing_steps == 0
                if leave or saves or self._held_out_is_due() or self.step == self.run.steps:
                    self._leave_damaged()
                leave &= self.step < self.run.steps
                self._after_step(leave, saves)
                if leave:
                    stop.received = True  # in all processes, of which some may be told only now
                    return False
            return True
        finally:
            progress.close()
            try:
                stop.close()
            finally:
                if self.watchdog:
                    self.watchdog.close()

    def _watchdog(self) -> Watchdog | None:
        """What gives up steps that do not end, where that is asked for or others would wait for this process."""
        config = self.config
        if self.processes.world == 1 and config.step_timeout is None and config.first_step_timeout is None:
            return None
        first = config.first_step_timeout or max(COMPILING if config.compile else FIRST_STEP, config.step_timeout or 0.0)
        return Watchdog(self.processes, first, config.step_timeout, self.step)

    def _after_step(self, leave: bool, save: bool) -> None:
        """Metrics, held-out loss, checkpoint and validation images, where they are due.

        Args:
            leave: not to go on, with what can be done after a resume left out.
        """
        config = self.config
        logs = self.step % config.log_every == 0 or self.step == self.run.steps
        if logs:
            self._log_metrics()
        if save or leave:  # before what needs memory of its own
            self._beside_training(self.save)
        if not leave:
            self._measure_where_due()
        if self.ends_early and not logs:
            self._log_metrics()
        last = self.step == self.run.steps or self.ends_early
        if config.draws_images and not last and self._pictures_are_due():
            self._beside_training(lambda: self.validate(self.log), seconds_at_most(config, self.processes.world))

    def _log_metrics(self) -> None:
        self.pace.wait()
        optimizer = self.partition.optimizer
        line = self.metrics.read(self.step, self.partition.rate, optimizer.norm_and_skips())
        self.shown |= {"loss": f"{line['loss']:.4f}", "lr": f"{line['lr']:.2e}"}
        self.progress.set_postfix(self.shown)
        if self.progress.disable:
            say(log_line(line, self.run))
        if self.log:
            self.log.write(line)
        self._stop_when_skipping(int(line["skipped_steps"] or 0))

    def _leave_damaged(self) -> None:
        """Saves what was trained before any process met damage, and says what that is; to be called by all."""
        batches = self.batches
        whole = self.started + batches.given // self.config.micro_batches  # those of which all micro-batches came
        met = self.processes.gather_objects((whole, batches.damage) if batches.damage else None)
        if not (found := [damage for damage in met if damage]):
            return
        before = min(step for step, _ in found)
        self.metrics.take_back(self.step - before)
        self.step = before  # those since were skipped by all
        if before:
            self._beside_training(self.save_to_the_end)
        raise self._with_what_is_saved(of_all([damage for _, damage in found]))

    def _with_what_is_saved(self, error: UserError) -> UserError:
        """What all processes met, and the checkpoint of this step."""
        saved, step = Path(self.config.output_dir) / checkpoint_name(self.step), self.step
        kept = f"; step {step} is saved in {saved}, from where --resume_from_checkpoint latest goes on" if step else ""
        return UserError(*(line + kept for line in error.lines), alone=error.alone, shared=error.shared, passing=error.passing)

    def _held_out_is_due(self) -> bool:
        """Whether this step has a round of the held-out loss that was not taken."""
        if self.held_out is None or not self.step or (self.best and self.best.last == self.step):
            return False
        return self.step % self.config.validation_steps == 0 or self.step == self.run.steps

    @property
    def measured(self) -> int:
        """The last step whose held-out loss will not be taken again."""
        return self.step - self._held_out_is_due()

    def _measure_where_due(self) -> None:
        """Takes the held-out loss; that is the lowest so far, the step's checkpoint becomes the best."""
        if not self._held_out_is_due():
            return
        assert self.held_out is not None
        self._beside_training(self._measure, self.held_out.seconds_at_most)
        if self.config.best_checkpoint and self.best and self.best.step == self.step:
            self._beside_training(self._keep_as_best)

    def _keep_as_best(self) -> None:
        """Names this step's checkpoint, and where there is none, as of a run that began from another's, saves it."""
        assert self.best is not None
        if self.step != self.saved or not self.checkpoints.name_best(self.best):
            self.save(as_best_alone=self.step < self.run.steps)

    def _measure(self) -> None:
        assert self.held_out is not None
        try:
            with busy("Taking the held-out loss"):
                line = self.held_out.measure(self.step)
        except NotTaken as failed:
            try:
                self.save_to_the_end()
            except Exception as error:  # after what went wrong a device may not give the weights
                warn(f"step {self.step} cannot be saved: {first_line(error)}")
                raise failed.error from None
            if isinstance(failed.error, UserError):
                raise self._with_what_is_saved(failed.error) from None
            say(f"Step {self.step} is saved in {Path(self.config.output_dir) / checkpoint_name(self.step)}")
            raise failed.error from None
        self.best = judged(self.best, self.held_out.of, line)
        if self.log:
            self.log.write(line)
        self.shown["held_out"] = held_out_words(line)
        self.progress.set_postfix(self.shown)
        if self.progress.disable:
            say(f"step {self.step:,}/{self.run.steps:,}  held-out loss {self.shown['held_out']}")

    @property
    def ends_early(self) -> bool:
        """Whether the held-out loss has not been lower for as many rounds as `--patience` allows."""
        patience, best = self.config.patience, self.best
        return patience is not None and best is not None and best.rounds >= patience

    @property
    def why_early(self) -> str:
        assert self.best is not None
        kept = f", kept as {checkpoint_name(self.best.step)}" if self.config.best_checkpoint else ""
        lowest = "a number" if self.best.loss is None else f"below the {self.best.loss:.6g} of step {self.best.step}{kept}"
        return f"the held-out loss has not been {lowest}, in {self.best.rounds} rounds (--patience {self.config.patience})"

    @property
    def where_best(self) -> str:
        """Where the weights of the lowest held-out loss are, unless they are the last."""
        best = Path(self.config.output_dir) / BEST
        if not self.config.best_checkpoint or self.best is None or self.best.step == self.step or not best.is_file():
            return ""
        export = f"python -m engine.checkpoint export {best} --output_dir DIR"
        return f", with the last weights; of step {self.best.step}, whose held-out loss is the lowest, `{export}` writes one"

    def save(self, as_best_alone: bool = False) -> None:
        self.checkpoints.save(self.step, self.partition, self.metrics, self.best, as_best_alone)
        self.saved = self.step

    def save_to_the_end(self) -> None:
        """Until there is a complete checkpoint of this step."""
        if self.step != self.saved:
            self.save()
        self.checkpoints.wait()

    def _beside_training(self, work: Callable[[], Any], limit: float = BESIDE) -> None:
        """Runs work that is not a step, on nobody's clock, once the steps before it are finished.

        Args:
            limit: seconds after which it is given up for hung.
        """
        self.pace.wait()
        with self.watchdog.paused(limit) if self.watchdog else contextlib.nullcontext():
            self.metrics.exclude(work)

    def _stop_when_skipping(self, skipped: int) -> None:
        """Gives up a run that skips steps again and again, and says what is to blame."""
        if skipped <= self.config.max_skipped_steps:
            return
        self._leave_damaged()
        slots = self.metrics.offending_slots()
        found, records = (each.tolist() for each in self.run.streams.find(torch.tensor(slots, dtype=torch.int64)))
        streams = self.run.streams.streams
        of = [streams[number] for number in found] if len(streams) > 1 else None
        cause = cause_of_skips(slots, records, of)
        raise UserError(
            f"{skipped} steps were skipped because a loss or gradient was not finite; {cause}; these "
            f"steps touched no weight. Or raise --max_skipped_steps {self.config.max_skipped_steps}"
        )

    def _pictures_are_due(self) -> bool:
        """Whether this step ended an epoch after which they are, the first and every `--validation_epochs`; or without that
        every `--validation_steps`."""
        batch, records, every = self.run.global_batch, self.run.records, self.config.validation_epochs
        if every is None:
            return self.step % self.config.validation_steps == 0
        before, now = (self.step - 1) * batch // records, self.step * batch // records
        return any((epoch - 1) % every == 0 for epoch in range(before + 1, now + 1))

    def validate(self, log: Log | None) -> None:
        self.train_step.release()  # the pipeline's activations then have the memory of the graphs
        with busy("Drawing the validation images"):
            grid = validate(self.config, self.family, self.partition, self.run.seed, self.step)
        if grid is not None and log is not None:
            log.picture(grid, self.step)
