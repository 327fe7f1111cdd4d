"""The output directory of a run: what an earlier one left there, and whether this one goes on with it."""

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.catalogue import EMBEDDING, FAMILIES, INDEX, PARTS, PEFT_CONFIG, PEFT_WEIGHTS, PIPELINES
from engine.config.checks import NEEDS_BLOCKS, check_judged_by_loss
from engine.config.command_line import CONFIG, to_toml
from engine.config.mixture import data_sets_of
from engine.config.options import SHUFFLE_WINDOW, TrainConfig
from engine.config.schema import default_of
from engine.data.identity import differences, without_source
from engine.data.samples.streams import Streams
from engine.errors import UserError
from engine.failed import mark_as_taken
from engine.files import PARTIAL, digest_of, discard, held, parse_json, read_text, reading, write_text
from engine.loop.checkpoints.layout import Checkpoint, Depth, bring_back, find, open_checked, open_newest
from engine.loop.checkpoints.names import (
    BEST,
    CHECKPOINT,
    LATEST,
    REPLACED,
    checkpoint_name,
    complete_checkpoints,
    displaced_checkpoints,
    step_of,
)
from engine.loop.checkpoints.state import Best, State, states_of
from engine.loop.export import adapter_path
from engine.loop.log import CURVES, METRICS
from engine.loop.optimizers.rates import peak_rate, rate_factors
from engine.loop.run import Run
from engine.messages import say, warn
from engine.models.training_form import sizes_by_place
from engine.processes import Processes, warn_of_local_locks

_OTHER_SHARDS = "was trained on other shards ({}); give the same data and options of the data"
_OTHER_SAMPLES = (
    "was trained on other samples, or on these in another order; give the same data, or --continue_on_grown_data to go on with "
    "what the data set holds now"
)
_OTHER_STREAMS = (
    "was trained on other data sets or buckets ({}); give the same, or --continue_on_grown_data to go on with what there is now"
)


def find_checkpoint(config: TrainConfig, again: bool = False) -> Path | None:
    """The checkpoint to go on from, if that is asked for and there is one. The first process looks, for all.

    Args:
        again: the launcher started the command anew, after it took the output directory over: it goes on from what it saved
            since, whatever it began from.

    Raises:
        UserError: an earlier run left something in the output directory, and it was not said what becomes of that.
    """
    output, resume = Path(config.output_dir), config.resume_from_checkpoint or (LATEST if again else None)
    named = dict.fromkeys(filter(None, (LATEST if again else None, resume)))
    for name in (LATEST, BEST, METRICS, CONFIG):
        if (output / name).is_dir():
            raise UserError(f"{output / name}: is a directory, where this run writes a file; move it away")
    bring_back(output)
    checkpoint = next(filter(None, (find(output, name, Depth.HEADERS) for name in named)), None)
    if resume == BEST and checkpoint is None:
        raise UserError(f"{output}: no `best` checkpoint there; a run with --best_checkpoint keeps one. Give another")
    within = checkpoint is not None and _lies_in(checkpoint, output)
    if config.overwrite and not again:
        if config.lora_weights and output.resolve() in Path(config.lora_weights, "_").resolve().parents:
            raise UserError("--overwrite would remove what --lora_weights names; name another --output_dir")
        if within:
            raise UserError(f"--overwrite would remove {checkpoint}, which --resume_from_checkpoint names; leave one out")
        removed = output.resolve(), _index_of_the_pipeline(config).parent.resolve()
        for name in PIPELINES:
            if (value := getattr(config, name)) and Path(value).resolve() in removed:
                raise UserError(f"--overwrite would remove the pipeline of --{name}; name another --output_dir")
    elif not within and (left := left_by_a_run(output)) and not (again and checkpoint):
        # A run that was killed before its first checkpoint left metrics alone, and the same command begins it again.
        if resume == LATEST and checkpoint is None:
            if any(path.exists() for path in _results(config)):
                raise UserError(
                    f"{output}: an earlier run left {left} there; --resume_from_checkpoint latest finds no checkpoint of it, "
                    "--overwrite removes what it left, or name another --output_dir"
                )
            say(f"{output}: no checkpoint there; starting from the beginning, without the {left} there")
            return None
        raise UserError(
            f"{output}: an earlier run left {left} there; --resume_from_checkpoint latest goes on with it, --overwrite removes "
            "what it left, or name another --output_dir"
        )
    return checkpoint


def _lies_in(checkpoint: Path, output: Path) -> bool:
    """Whether a checkpoint, or a link to one that was moved elsewhere, is an entry of the output directory."""
    return checkpoint.absolute().parent.resolve() == output.resolve()


def left_by_a_run(output: Path) -> str:
    """What a run left in its output directory, in words; empty where there was none."""
    checkpoints, metrics = complete_checkpoints(output), output / METRICS
    many = f"{len(checkpoints)} checkpoints, the last " if len(checkpoints) > 1 else ""
    left = [f"{many}{checkpoints[-1].name}"] if checkpoints else []
    if metrics.is_file() and metrics.stat().st_size:
        left.append(METRICS)
    return " and ".join(left)


def _index_of_the_pipeline(config: TrainConfig) -> Path:
    return Path(config.output_dir) / FAMILIES[config.family].result / INDEX


def _results(config: TrainConfig) -> list[Path]:
    """What a run that came to its end leaves: a pipeline, an adapter in any of the forms, or the vectors of a token."""
    output = Path(config.output_dir)
    files = (adapter_path(config.model_copy(update={"save_format": form})) for form in ("diffusers", "kohya"))
    described = (output / part / name for part in ("", *PARTS) for name in (PEFT_WEIGHTS, PEFT_CONFIG))
    return [_index_of_the_pipeline(config), output / EMBEDDING, *files, *described]


def remove_run(config: TrainConfig) -> None:
    """Removes what an earlier run left in the output directory and nothing else: shards stay, and what others put there."""
    output, index = Path(config.output_dir), _index_of_the_pipeline(config)
    left = left_by_a_run(output)
    if not left:
        return
    named: Any = []
    if index.is_file():
        with reading(index, "remove it by hand, or name another --output_dir"):
            named = list(parse_json(read_text(index)))
    parts = [name for name in map(str, named) if name == Path(name).name and name not in ("", ".", "..")]
    folders = [output / "samples", output / config.logging_dir]
    if output.resolve() not in folders[1].resolve().parents:
        folders.pop()  # others may keep theirs there
    for path in (
        *_results(config),
        *(index.parent / name for name in parts),
        *(path for folder in folders for kind in ("step-*.png", "events.out.tfevents.*") for path in folder.glob(kind)),
        *unfinished(output),
        *complete_checkpoints(output),
        *(output / name for name in ("wandb", CURVES, CONFIG, LATEST, BEST, METRICS)),
    ):
        discard(path)
    for folder in (*folders, *(output / part for part in PARTS)):
        with contextlib.suppress(OSError):  # absent, or something else is in it
            folder.rmdir()
    say(f"{output}: removed what an earlier run left: {left}")


def seed_of(config: TrainConfig, state: State | None) -> int:
    """The seed of the run: as given, else the resumed run's, else drawn."""
    if config.seed is not None:
        return config.seed
    return state.run.seed if state else secrets.randbits(31)


def with_order(config: TrainConfig, checkpoint: Path | None, state: State | None) -> TrainConfig:
    """The configuration with the order of the samples: as given, else the resumed run's, else the default.

    `shuffle_window` is None for the order of all records.

    Raises:
        UserError: an epoch that was begun in one order would go on in another.
    """
    if state is not None:
        before, of = state.options.get("shuffle", "global"), state.options.get("shuffle_window")
        if config.shuffle not in (None, before) or config.shuffle_window not in (None, of):
            said = f"--shuffle {before}" + (f" --shuffle_window {of}" if of else "")
            raise UserError(f"{checkpoint}: was written with {said}; leave both out, or give the same")
        return config.model_copy(update={"shuffle": before, "shuffle_window": of})
    shuffle = config.shuffle or ("blocks" if any(each.config.shards_address for each in data_sets_of(config)) else "global")
    if config.shuffle_window and shuffle == "global":
        raise UserError(NEEDS_BLOCKS)
    window = (config.shuffle_window or SHUFFLE_WINDOW) if shuffle == "blocks" else None
    return config.model_copy(update={"shuffle": shuffle, "shuffle_window": window})


def with_held_out(config: TrainConfig, checkpoint: Path | None, state: State | None) -> TrainConfig:
    """The configuration with the fraction that is held out: as given, else the resumed run's.

    Raises:
        UserError: records that would be held out were trained on, or there is nothing that is held out.
    """
    before = state.options.get("validation_fraction") if state else None
    if state and config.validation_fraction not in (None, before):
        said = f"with --validation_fraction {before}; leave it out, or give the same" if before else (
            "without --validation_fraction, and trained on what would be held out now; give another data set as "
            "--validation_data_dir, or train from the beginning in another --output_dir"
        )  # fmt: skip
        raise UserError(f"{checkpoint}: was written {said}")
    if before and config.validation_data_dir:
        raise UserError(f"{checkpoint}: was written with --validation_fraction {before}; leave out --validation_data_dir")
    config = config.model_copy(update={"validation_fraction": config.validation_fraction or before})
    check_judged_by_loss(config)
    return config


def open_checkpoint(checkpoint: Path, config: TrainConfig, processes: Processes, again: bool = False) -> Checkpoint:
    """A checkpoint, once all of it was checked that can be before there are shards and a model; every process must call it.

    Where the latest is damaged, the newest other that is whole takes its place; one that is given by name is refused.

    Raises:
        UserError: it is damaged, or was written by another run or with other state.
    """
    latest = _lies_in(checkpoint, Path(config.output_dir)) and (again or config.resume_from_checkpoint == LATEST)
    opened = open_newest(checkpoint, processes) if latest else open_checked(checkpoint, processes=processes)
    checkpoint = opened.path
    before, batch = opened.state.run, config.train_batch_size * config.micro_batches * processes.world
    if config.seed not in (None, before.seed):
        seeds = f"seed {before.seed}, this run has {config.seed}"
        raise UserError(f"{checkpoint}: was written with {seeds}; leave out --seed, or give the same")
    if opened.state.in_turn != config.with_prior_preservation:
        one, other = ("with", "give it") if opened.state.in_turn else ("without", "leave it out")
        raise UserError(f"{checkpoint}: was written {one} --with_prior_preservation; {other}")
    if before.global_batch != batch:
        raise UserError(
            f"{checkpoint}: was written with global_batch {before.global_batch}, this run has {batch}; choose processes, "
            "--train_batch_size and --gradient_accumulation_steps with the same product"
        )
    _refuse_other_adapters(opened, config)
    kinds = opened.files.kinds
    if config.use_ema and "ema" not in kinds:
        raise UserError(
            f"{checkpoint}: was written without --use_ema, so there is no moving average to go on with; leave the option out, "
            "or train from the beginning in another --output_dir"
        )
    options = opened.state.options
    optimizer = options.get("optimizer") or ("adamw" if "exp_avg" in kinds else "adamw8bit")  # which older versions do not name
    if config.optimizer != optimizer:
        if {config.optimizer, optimizer} == {"adamw", "adamw8bit"}:
            one, other = ("without", "leave it out") if config.use_8bit_adam else ("with", "give it")
            raise UserError(f"{checkpoint}: was written {one} --use_8bit_adam; {other}")
        raise UserError(f"{checkpoint}: was written with --optimizer {optimizer}; give the same")
    if config.masters != (masters := options.get("masters") or "fp32"):
        raise UserError(f"{checkpoint}: was written with --masters {masters}; give the same")
    return opened


def _refuse_other_adapters(opened: Checkpoint, config: TrainConfig) -> None:
    """Raises `UserError` where adapters would be others than those of a checkpoint, or of other layers."""
    state, name = opened.state, opened.path
    before = state.options
    for option in ("lora_rank", "use_dora"):
        value = before.get(option)
        if (value or None) != (getattr(config, option) or None):
            said = (
                f"with --{option}{'' if value is True else f' {value}'}; give the same"
                if value
                else f"without --{option}; leave it out"
            )
            raise UserError(f"{name}: was written {said}")
    if not config.lora_rank:
        return
    if bool(before.get("lora_dropout")) != bool(config.lora_dropout):
        one, other = ("with", "give some") if before.get("lora_dropout") else ("without", "leave it out")
        raise UserError(f"{name}: was written {one} --lora_dropout; {other}")
    if config.lora_weights and not state.adapters:
        raise UserError(f"{name}: was written without --lora_weights; leave it out")
    if state.adapters and config.lora_alpha is not None:
        raise UserError(f"{name}: began with --lora_weights, which says --lora_alpha itself; leave it out")
    targets: Any = before.get("lora_targets") or default_of(TrainConfig, "lora_targets", config.family, config.recipe)
    if sorted(targets) != sorted(config.lora_targets):
        raise UserError(f"{name}: was written with --lora_targets {' '.join(targets)}; give the same")


def check_same_weights(checkpoint: Checkpoint, config: TrainConfig, shapes: Mapping[str, torch.Size]) -> None:
    """Compares what is trained with what a checkpoint holds, where options tell why they differ.

    Args:
        shapes: of the trained parameters, in training form.

    Raises:
        UserError: other weights are trained, or they are stacked otherwise.
    """
    now, before = {name: shape.numel() for name, shape in shapes.items()}, checkpoint.files.sizes
    if now.keys() == before.keys():
        return
    for option in ("train_text_encoder", "freeze"):
        value: Any = checkpoint.state.options.get(option)
        if (value or None) != (getattr(config, option) or None):
            given = " ".join([f"--{option}", *(value if isinstance(value, list) else [])])
            raise UserError(
                f"{checkpoint.path}: was written {'with' if value else 'without'} {given}, and other weights are trained now; "
                f"{'give the same' if value else 'leave it out'}"
            )
    if sizes_by_place(now) == sizes_by_place(before):
        raise UserError(
            f"{checkpoint.path}: queries, keys and values lie otherwise there, in one matrix or apart, which --lora_dropout, "
            "--lr_of and --attention xformers decide on; give them as that run had them"
        )


def check_same_shards(
    checkpoint: Path | None, state: State | None, config: TrainConfig, data_set: str, bucketed: bool, identity: dict[str, Any]
) -> None:
    """Compares the shards of a checkpoint, if there is one, with those of this run, by what shapes them.

    Args:
        data_set: the name of that which the shards are of.
        bucketed: whether they are of one bucket of several, of which some may be new.
        identity: without `source` where the samples are not known yet.

    Raises:
        UserError: they differ.
    """
    grown = config.continue_on_grown_data
    if state is None or state.run.fingerprint == digest_of(identity):
        return
    several = len(data_sets_of(config)) > 1
    before = [stream.data for stream in state.streams if stream.data_set == data_set] if state.streams else [state.data]
    if not before or (several and not state.streams):
        if not grown:
            raise UserError(f"{checkpoint}: {_OTHER_STREAMS.format((data_set or 'a single data set') + ' is new')}")
        return
    alike = _without_size if bucketed else without_source
    changed = [differences(alike(each), alike(identity)) if each else "data, preprocessing or encoders" for each in before]
    if all(changed):
        raise UserError(f"{checkpoint}: {_OTHER_SHARDS.format(changed[0])}")
    # What is new among several is told when all are known.
    same_size = [without_source(each) == without_source(identity) for each in before if each]
    if not state.streams and same_size == [True] and "source" in identity and not grown:
        raise UserError(f"{checkpoint}: {_OTHER_SAMPLES}")


def _without_size(identity: dict[str, Any]) -> dict[str, Any]:
    """What the shards of all buckets of a data set have in common."""
    of_all = {name: value for name, value in identity.get("preprocessing", {}).items() if name not in ("resolution", "size")}
    return without_source(identity) | {"preprocessing": of_all}


def check_same_streams(checkpoint: Path | None, state: State | None, grown: bool, streams: Streams) -> None:
    """The same where there are several streams, or were: by their names, shares and all of their shards.

    Raises:
        UserError: they differ.
    """
    now = states_of(streams)
    if state is None or not (now or state.streams):
        return
    before, after = ({stream.name: stream for stream in each} for each in (state.streams, now))
    both = before.keys() & after.keys()
    for name in sorted(both):
        if changed := differences(without_source(before[name].data), without_source(after[name].data)):
            raise UserError(f"{checkpoint}: {_OTHER_SHARDS.format(f'{name}: {changed}')}")
    alike = [[stream.model_copy(update={"loss_weight": 1.0}) for stream in each] for each in (state.streams, now)]
    if grown or alike[0] == alike[1]:
        return
    changes = [
        *(f"{name or 'a single data set'} is new" for name in after.keys() - before.keys() if after[name].data != state.data),
        *(f"{name or 'the single data set'} is gone" for name in before.keys() - after.keys()),
        *(f"{name} is weighed otherwise" for name in both if before[name].share != after[name].share),
    ]
    if any(before[name].data != after[name].data for name in both) or not changes:
        raise UserError(f"{checkpoint}: {_OTHER_SAMPLES}")
    raise UserError(f"{checkpoint}: {_OTHER_STREAMS.format(', '.join(sorted(changes)))}")


def unit_of(config: TrainConfig, checkpoint: Path | None, state: State | None) -> int:
    """How many slots that follow each other are of one stream: those of a micro-batch when the run began.

    Raises:
        UserError: a micro-batch would be of several streams.
    """
    unit, batch = (state.unit if state else None) or config.train_batch_size, config.train_batch_size
    if unit % batch:
        smaller = " or ".join(str(each) for each in range(1, unit + 1) if unit % each == 0)
        raise UserError(
            f"{checkpoint}: began with --train_batch_size {unit}, so {unit} samples that follow each other are of one data set "
            f"and size, and micro-batches of {batch} would mix them; give --train_batch_size {smaller}, and as much more "
            "--gradient_accumulation_steps"
        )
    return unit


def announce(checkpoint: Checkpoint, config: TrainConfig, run: Run, world: int) -> None:
    """Says what will be different from here on from what the run was when the checkpoint was written."""
    name, before, step = checkpoint.path.name, checkpoint.state.options, checkpoint.state.step
    # An option that came after the version that wrote the checkpoint was as it is by default.
    defaults = {option: default_of(TrainConfig, option, config.family, config.recipe) for option in run.options}
    defaults |= {"shuffle": "global", "optimizer": config.optimizer}
    changed = [
        f"--{option} {value} (was {was})" for option, value in run.options.items()
        if (was := before.get(option, defaults[option])) != value
    ]  # fmt: skip
    if before and changed:
        say(f"Changed since {name}: {', '.join(changed)}")
        rates = [_rate(config.model_copy(update=options), world, step) for options in (before, run.options)]
        if rates[0] != rates[1]:
            say(f"The learning rate after step {step} is {rates[1]:.3g}; as {name} was trained, {rates[0]:.3g}")
    weights, before_it = run.streams.loss_weights, {stream.data_set: stream.loss_weight for stream in checkpoint.state.streams}
    for data_set in weights if not run.streams.in_turn else ():  # else an option says it
        now, was = weights[data_set], before_it.get(data_set, weights[data_set])
        if now != was:
            say(f"Changed since {name}: loss_weight {now:g} of {data_set} (was {was:g})")
    if not config.keeps_average and "ema" in checkpoint.files.kinds:
        say(f"The moving average of {name} ends here: --use_ema is not given")
    if config.validation_fraction and checkpoint.state.run.fingerprint != run.fingerprint:
        warn(
            f"--continue_on_grown_data: shards that lost samples since {name} hold out other records than before, some of "
            "which were trained on, so the held-out loss may be too low"
        )
    output = Path(config.output_dir)
    later = [path.name for path in complete_checkpoints(output) if step_of(path) > step]
    if later:
        say(f"{output}: {', '.join(later)} of later steps stay there until this run writes its own")


def _rate(config: TrainConfig, world: int, step: int) -> float:
    """The learning rate of the step after `step`."""
    peak = peak_rate(config, world)
    return peak * rate_factors(config, peak, config.max_train_steps or 1)(step)


def unfinished(output: Path) -> list[Path]:
    """What runs that were killed while they wrote have left half done in their output directory."""
    written = rf"{CHECKPOINT}\d+(-[0-9a-f]{{8}})?|pipeline|latest|best|config\.toml|.+\.[0-9a-f]{{8}}"
    half = [
        path for folder in (output, output / "samples", output / "wandb") for path in folder.glob(f"*{PARTIAL}")
        if re.fullmatch(written, path.name.removesuffix(PARTIAL))
    ]  # fmt: skip
    replaced = [path for path in output.glob(f"{CHECKPOINT}*{REPLACED}") if step_of(path.with_suffix("")) >= 0]
    return half + [path for path in replaced if path not in displaced_checkpoints(output)]


def take_over(config: TrainConfig, checkpoint: Path | None, again: bool, launches: set[str], best: Best | None = None) -> None:
    """Makes the output directory this run's: without another's remains, and with `latest` where this one goes on."""
    output = Path(config.output_dir)
    if config.overwrite and not again:
        remove_run(config)
    for path in unfinished(output):
        discard(path)
    if checkpoint and _lies_in(checkpoint, output) and step_of(checkpoint) >= 0:
        write_text(output / LATEST, checkpoint.name + "\n")
        if config.best_checkpoint and best is not None and (named := output / checkpoint_name(best.step)).is_dir():
            write_text(output / BEST, named.name + "\n")  # a later one may have been, or a crash kept this from being named
    write_text(output / CONFIG, to_toml(config))
    mark_as_taken(output, launches)


@contextlib.contextmanager
def only_run(output: Path, processes: Processes) -> Iterator[None]:
    """Holds the output directory, so that no second run writes there."""
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            output.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(held(output)) is None:
                raise UserError(f"{output}: another run is writing there; wait for its end, or name another --output_dir")

        processes.computed_by_first(hold)
        warn_of_local_locks(output, processes)
        yield
