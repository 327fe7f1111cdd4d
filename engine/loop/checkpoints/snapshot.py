"""What a checkpoint holds of a process: taken from the training, and brought back to it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.loop.checkpoints.layout import FOUND, Checkpoint, or_another
from engine.loop.checkpoints.names import STATE
from engine.loop.checkpoints.slices import Damaged, SliceFiles, damage, generator_state
from engine.loop.checkpoints.state import Best, Identity, State, adapted_of, states_of
from engine.loop.metrics import Metrics
from engine.loop.run import Run
from engine.loop.weights.partition import Partition
from engine.models.training_form import adapters_of
from engine.tensors import DTYPES, TensorFile, header_of, in_file_order


def sliced_tensors(partition: Partition) -> dict[str, list[Tensor]]:
    """Everything that is laid out as the masters, by kind."""
    states = [partition.optimizer.state_of(master) for master in partition.masters]
    kinds = {"weight": partition.masters}
    kinds |= {kind: [state[kind] for state in states] for kind in partition.optimizer.laid_out}
    if partition.ema is not None:
        kinds["ema"] = partition.ema.averages
    return kinds


def other_state(partition: Partition) -> dict[str, list[Tensor]]:
    """Optimizer state that has no place within a parameter, by the name that it is stored under.

    Counters are the same for all masters and stored once, so that they fit any other partition, and so are the numbers of each
    group; what is bound to these masters is stored for each. All processes have the same names, with nothing where one has no
    master of a group.
    """
    optimizer, several = partition.optimizer, partition.processes.world > 1
    numbers = optimizer.state_of(partition.masters[0])
    stored: dict[str, list[Tensor]] = {}
    for number, (key, group) in enumerate(zip(partition.keys, optimizer.param_groups, strict=True)):
        state = optimizer.state_of(group["params"][0]) if group["params"] else {}
        for kind in optimizer.counters:
            if torch.is_tensor(value := state.get(kind)):
                stored.setdefault(f"optimizer/{kind}", []).append(value)
        bound = (kind for kind in optimizer.bound if several or kind in state)
        stored |= {f"optimizer/{key}/{kind}": [state.get(kind, torch.empty(0))] for kind in bound}
        stored |= {f"optimizer/{key}/{kind}": [numbers[kind][number : number + 1]] for kind in optimizer.numbers}
    return stored


def host_counters(partition: Partition) -> dict[str, int]:
    """Counters that an optimizer (bitsandbytes') keeps as plain numbers."""
    state = partition.optimizer.state_of(partition.masters[0])
    return {kind: state[kind] for kind in partition.optimizer.counters if not torch.is_tensor(state[kind])}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's own generators, which draw a model's dropout."""
    state = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device)
    return state


@dataclass
class Snapshot:
    """What a checkpoint holds of this process.

    header: of its file.
    tensors: what follows there, from where the state lies.
    state: what state.json will hold.
    """

    step: int
    header: bytes
    tensors: list[Tensor]
    state: State


def take(
    step: int, run: Run, partition: Partition, metrics: Metrics, best: Best | None = None, as_best_alone: bool = False
) -> Snapshot:
    """The state after a step, not copied: it must not change while the snapshot is in use."""
    processes, kinds = partition.processes, sliced_tensors(partition)
    tensors = {
        f"{kind}/{piece.name}@{piece.start}": partition.view(piece, holders)
        for piece in partition.slices for kind, holders in kinds.items()
    }  # fmt: skip
    tensors |= {name: values[0].detach().cpu() for name, values in other_state(partition).items()}
    tensors |= {"metrics/loss_sum": metrics.loss_sum.cpu().view(1), **random_state(processes.device)}
    if metrics.data_sets:
        tensors["metrics/of_data_sets"] = metrics.of_data_sets.cpu()
    tensors = in_file_order(tensors)
    header, _ = header_of(tensors)
    scaler = partition.loss_scaler
    several = states_of(run.streams)
    state = State(
        step=step,
        world=processes.world,
        run=Identity(seed=run.seed, global_batch=run.global_batch, fingerprint=run.fingerprint),
        options=run.options,
        data=run.data,
        unit=run.streams.unit if several else None,
        streams=several,
        in_turn=run.streams.in_turn,
        adapters=adapted_of(adapters_of(partition.module)) if run.begins_with_adapters else [],
        optimizer_counters=host_counters(partition),
        loss_steps=metrics.steps,
        loss_scaler={k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))} if scaler else None,
        gradient_squares=metrics.noise_scale.state if metrics.noise_scale else {},
        best=best,
        as_best_alone=as_best_alone,
    )
    return Snapshot(step, header, list(tensors.values()), state)


def restore(checkpoint: Checkpoint, partition: Partition, metrics: Metrics) -> None:
    """Brings weights, optimizer, averages, loss scale and generators back. Every process must call it.

    Raises:
        UserError: the checkpoint does not hold what this training needs, or values that are not finite; by all processes.
    """
    processes, files, state = partition.processes, checkpoint.files, checkpoint.state
    with or_another(checkpoint.path, processes), torch.no_grad():
        sums = processes.all_or_none(lambda: _restore(files, state, partition, metrics), FOUND)
    by_rank = [sums[rank % processes.world][rank // processes.world] for rank in range(state.world)]
    own = state.world == processes.world
    # Of a loss that is a mean over processes each goes on from the mean, and of sums over all with its part.
    loss = by_rank[processes.rank][0] if own else torch.stack([loss for loss, _ in by_rank]).mean()
    of = by_rank[processes.rank][1] if own else torch.stack([of for _, of in by_rank]).sum(0) / processes.world
    metrics.resume(loss, state.loss_steps, of)
    if metrics.noise_scale:
        metrics.noise_scale.resume(state.gradient_squares)
    partition.refresh_weights()


def _restore(files: SliceFiles, state: State, partition: Partition, metrics: Metrics) -> list[tuple[Tensor, Tensor]]:
    """Brings back what this process has; opens the files that hold some of it, and those of its share.

    Returns:
        The sums of the metrics of the processes whose files are its share.
    """
    processes = partition.processes
    files.check_model(partition.shapes)
    kinds, others = sliced_tensors(partition), other_state(partition)
    _check_groups(files, state, partition, others)
    files.check_state(kinds, others)
    files.fill((kind, piece, partition.view(piece, holders)) for piece in partition.slices for kind, holders in kinds.items())
    same_world = state.world == processes.world
    own = files.files[processes.rank if same_world else 0]
    if host_counters(partition).keys() != state.optimizer_counters.keys():
        raise Damaged(f"holds no {', '.join(host_counters(partition))} for this optimizer")
    for name, values in others.items():
        stored = _stored(own, name, values[0])
        if name.removeprefix("optimizer/") in partition.optimizer.counters and not (
            0 <= float(stored) <= state.step and float(stored).is_integer()
        ):
            raise Damaged(f"{own.path.name}: {name} is {float(stored)}, after {state.step} steps")
        for value in values:
            value.copy_(stored)
    partition.optimizer.resume(partition.masters, state.optimizer_counters)
    if same_world:
        torch.set_rng_state(generator_state(own))
        if "random/cuda" in own.header and processes.device.type == "cuda":
            with damage(own.path):
                torch.cuda.set_rng_state(own.tensor("random/cuda"), processes.device)
    if partition.loss_scaler and state.loss_scaler:
        _set_loss_scaler(vars(partition.loss_scaler), state.loss_scaler)
    share = range(processes.rank, state.world, processes.world)
    known = metrics.data_sets and metrics.data_sets == list(dict.fromkeys(stream.data_set for stream in state.streams))
    nothing = torch.zeros(metrics.of_data_sets.shape)  # of data sets that are others now
    return [
        (
            _stored(files.files[rank], "metrics/loss_sum", torch.empty(1))[0],
            _stored(files.files[rank], "metrics/of_data_sets", nothing) if known else nothing,
        )
        for rank in share
    ]


def _check_groups(files: SliceFiles, state: State, partition: Partition, others: Collection[str]) -> None:
    """Refuses sound state of an optimizer that is of other groups of weights, or of other pieces of them.

    Raises:
        UserError: what to give.
    """
    place, optimizer = files.files.checkpoint, f"--optimizer {partition.config.optimizer}"
    theirs, ours = ({name for name in names if name.count("/") > 1} for names in (files.others, others))
    kinds = [{name.rpartition("/")[2] for name in names} for names in (theirs, ours)]
    if theirs != ours and kinds[0] == kinds[1]:
        options = {f"--{name}": state.options.get(name) for name in ("lr_of", "text_encoder_lr", "layer_lr_decay")}
        given = " ".join(
            f"{name} {' '.join(value) if isinstance(value, list) else value}"
            for name, value in options.items() if value not in (None, [], 1.0)
        )  # fmt: skip
        remedy = f"give {given}" if given else f"leave out {', '.join(options)}"
        raise UserError(f"{place}: {optimizer} keeps state for each group of weights, and they were others there; {remedy}")
    if partition.optimizer.bound and state.world == partition.processes.world:
        own = files.files[partition.processes.rank].header
        pieces = {f"weight/{piece.name}@{piece.start}": [piece.length] for piece in partition.slices}
        if pieces != {name: described["shape"] for name, described in own.items() if name.startswith("weight/")}:
            raise UserError(f"{place}: {optimizer} keeps state that fits the pieces of one --zero_stage only; give the same")
    elif partition.optimizer.bound:
        raise UserError(f"{place}: {optimizer} keeps state that fits {state.world} processes only; start as many")


def _stored(file: TensorFile, name: str, like: Tensor) -> Tensor:
    """A small tensor of a file, which must be as another is, and finite."""
    described = file.header.get(name)
    if described is None or described["shape"] != list(like.shape) or DTYPES[described["dtype"]] != like.dtype:
        raise Damaged(f"{file.path.name}: holds no {name} for this optimizer and number of processes")
    with damage(file.path):
        stored = file.tensor(name)
    if not stored.isfinite().all():
        raise Damaged(f"{file.path.name}: {name} is not finite")
    return stored


def _set_loss_scaler(scaler: dict[str, Any], stored: dict[str, Any]) -> None:
    """Changes the numbers of a loss scaler to the stored ones."""
    for name, value in stored.items():
        if not isinstance(value, type(scaler.get(name))) and not {type(value), type(scaler.get(name))} <= {int, float}:
            raise Damaged(f"{STATE}: loss_scaler.{name} is {value!r}")
    scaler.update(stored)
