"""Checkpoints: complete or absent, checked before loading, and independent of how many processes wrote them.

A directory checkpoint-N holds, per process, rank-R.safetensors with the slices it keeps in fp32: tensors named
`kind/parameter@start`, with kind `weight`, a moment of the optimizer or `ema`, flattened, `start` the first element within the
parameter (parameters are those of the training form, `models/training_form.py`). state.json holds the step and what the run
was; manifest.json the digest of every file. No pickle is written or opened.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import PARTIAL, digest, discard, publish_directory, write_json, write_text
from engine.loop.ema import Ema
from engine.loop.metrics import Metrics
from engine.loop.partition import Partition, Slice
from engine.processes import Processes

FORMAT_VERSION = 2
LATEST = "latest"


def sliced_tensors(partition: Partition, ema: Ema | None) -> dict[str, list[Tensor]]:
    """Everything that is laid out as the masters, by kind."""
    kinds: dict[str, list[Tensor]] = {"weight": partition.masters}
    state = partition.optimizer.state[partition.masters[0]]
    for kind, value in state.items():
        if torch.is_tensor(value) and value.numel() == partition.masters[0].numel() and value.dim() > 0:
            kinds[kind] = partition.moments(kind)
    if ema is not None:
        kinds["ema"] = ema.averages
    return kinds


def other_state(partition: Partition, kinds: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Optimizer state that has no place within a parameter, by the name that it is stored under.

    Counters are the same for all masters and stored once, so that they fit any other partition; 8-bit scales are not.
    """
    state: dict[str, list[Tensor]] = {}
    for number, master in enumerate(partition.masters):
        for kind, value in partition.optimizer.state[master].items():
            if torch.is_tensor(value) and kind not in kinds:
                name = f"optimizer/{kind}" if value.dim() == 0 else f"optimizer/{number}/{kind}"
                state.setdefault(name, []).append(value)
    return state


def host_counters(partition: Partition) -> dict[str, int]:
    """Counters that an optimizer (bitsandbytes') keeps as plain numbers, the same for all masters."""
    state = partition.optimizer.state[partition.masters[0]]
    return {kind: value for kind, value in state.items() if isinstance(value, int)}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's own generators, which draw a model's dropout."""
    state = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device)
    return state


def save(
    directory: Path,
    step: int,
    run: dict[str, Any],
    partition: Partition,
    ema: Ema | None,
    metrics: Metrics,
    processes: Processes,
    total_limit: int | None,
) -> Path:
    """Writes checkpoint-N under `directory`; every process must call it. Older ones go only once this one is complete.

    Args:
        run: what must be the same when the run is resumed (seed, global batch, shards' fingerprint).
    """
    final = directory / f"checkpoint-{step}"
    aside = directory / f"checkpoint-{step}{PARTIAL}"
    if processes.is_first:
        discard(aside)
        aside.mkdir(parents=True)
    processes.barrier()

    kinds = sliced_tensors(partition, ema)
    tensors: dict[str, Tensor] = {}
    for piece in partition.slices:
        for kind, holders in kinds.items():
            tensors[f"{kind}/{piece.name}@{piece.start}"] = partition.view(piece, holders)
    tensors |= {name: values[0] for name, values in other_state(partition, kinds).items()}
    tensors |= random_state(processes.device)
    file = aside / f"rank-{processes.rank}.safetensors"
    # Slices are views of one storage, which the format refuses; each is stored as its own copy.
    safetensors.torch.save_file({name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, file)
    digests = dict(processes.gather_objects((file.name, digest(file))))
    loss_sums = processes.gather_objects(float(metrics.loss_sum))

    if processes.is_first:
        scaler = partition.loss_scaler
        state = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world": processes.world,
            "run": run,
            "optimizer_counters": host_counters(partition),
            "loss_sums": loss_sums,
            "loss_steps": metrics.steps,
            "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))} if scaler else None,
        }
        write_json(aside / "state.json", state)
        digests["state.json"] = digest(aside / "state.json")
        write_json(aside / "manifest.json", digests)
        replaced = directory / f"checkpoint-{step}.replaced"
        discard(replaced)
        if final.exists():
            final.rename(replaced)
        publish_directory(aside, final)
        write_text(directory / LATEST, final.name + "\n")
        discard(replaced)
        if total_limit is not None:
            for old in [path for path in complete_checkpoints(directory) if path != final][: -total_limit + 1 or None]:
                discard(old)
    processes.barrier()
    return final


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find(directory: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None when `latest` finds none.

    A path as the scripts take it: a directory, or the name of one in the output directory.
    """
    if resume != LATEST:
        path = Path(resume)
        return path if path.is_dir() else directory / path.name
    pointer = directory / LATEST
    if pointer.is_file() and (directory / pointer.read_text().strip()).is_dir():
        return directory / pointer.read_text().strip()
    # A crash between renaming the checkpoint and moving the pointer leaves a complete one unnamed.
    complete = complete_checkpoints(directory)
    return complete[-1] if complete else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Checks every digest and returns state.json.

    Raises:
        UserError: a file is missing or altered, or the format is another.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        damaged = [
            name for name, expected in manifest.items()
            if not (checkpoint / name).is_file() or digest(checkpoint / name) != expected
        ]  # fmt: skip
        state = json.loads((checkpoint / "state.json").read_text()) if not damaged else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: not a complete checkpoint ({error}); {_others(checkpoint)}") from None
    if damaged:
        raise UserError(f"{checkpoint}: damaged: {', '.join(damaged)} missing or altered; {_others(checkpoint)}")
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(f"{checkpoint}: format version {state['format_version']}, this engine reads {FORMAT_VERSION}")
    return state


def _others(checkpoint: Path) -> str:
    others = [path for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
    return f"resume from {others[-1]} instead" if others else "there is no other; start again in an empty directory"


class _SliceFiles:
    """The slices of a checkpoint's files, found by kind and parameter."""

    def __init__(self, checkpoint: Path) -> None:
        self.files = [safetensors.safe_open(path, "pt") for path in sorted(checkpoint.glob("rank-*.safetensors"))]
        self.places: dict[str, list[tuple[int, int, str]]] = {}
        for number, file in enumerate(self.files):
            for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                if "@" in name:
                    whole, start = name.rsplit("@", 1)
                    self.places.setdefault(whole, []).append((int(start), number, name))

    def fill(self, kind: str, piece: Slice, target: Tensor) -> None:
        """Copies the elements of a slice from whichever files hold them."""
        filled = 0
        for start, number, name in self.places.get(f"{kind}/{piece.name}", []):
            stored = self.files[number].get_slice(name)
            first = max(start, piece.start)
            last = min(start + stored.get_shape()[0], piece.start + piece.length)
            if first < last:
                target[first - piece.start : last - piece.start] = stored[first - start : last - start]
                filled += last - first
        if filled != piece.length:
            raise UserError(f"the checkpoint holds {filled} of {piece.length} elements of {kind}/{piece.name}; was it trained "
                            "with the same model and options?")  # fmt: skip


def load(
    checkpoint: Path, state: dict[str, Any], partition: Partition, ema: Ema | None, metrics: Metrics, processes: Processes
) -> None:
    """Brings weights, optimizer, averages, loss scale and generators back; `state` as `read_state` returned it."""
    kinds = sliced_tensors(partition, ema)
    files = _SliceFiles(checkpoint)
    with torch.no_grad():
        for piece in partition.slices:
            for kind, holders in kinds.items():
                files.fill(kind, piece, partition.view(piece, holders))
    same_world = state["world"] == processes.world
    own = safetensors.torch.load_file(checkpoint / f"rank-{processes.rank if same_world else 0}.safetensors")
    for name, values in other_state(partition, kinds).items():
        if name not in own or own[name].shape != values[0].shape:
            raise UserError(f"{checkpoint}: holds no {name} for this optimizer and number of processes")
        for value in values:
            value.copy_(own[name])
    for master in partition.masters:
        partition.optimizer.state[master].update(state["optimizer_counters"])
    if same_world:
        torch.set_rng_state(own["random/cpu"])
        if "random/cuda" in own and processes.device.type == "cuda":
            torch.cuda.set_rng_state(own["random/cuda"], processes.device)
    if partition.loss_scaler and state["loss_scaler"]:
        vars(partition.loss_scaler).update(state["loss_scaler"])
    if same_world:
        metrics.loss_sum.fill_(state["loss_sums"][processes.rank])
    else:
        metrics.loss_sum.fill_(sum(state["loss_sums"]) / len(state["loss_sums"]))
    metrics.steps = state["loss_steps"]
    partition.refresh_weights()
