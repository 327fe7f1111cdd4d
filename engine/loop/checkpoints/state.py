"""What state.json holds."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_serializer

from engine.config.checks import LARGEST
from engine.config.options import ALTER_THE_RESULT, TrainConfig
from engine.data.samples.streams import Streams
from engine.errors import UserError

FORMAT_VERSION = 2

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Number = bool | int | float


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Identity(_Strict):
    """What must be the same when a run is resumed.

    global_batch: samples per optimizer step, over all processes.
    fingerprint: of the latent shards.
    """

    seed: int = Field(ge=0, lt=2**63)
    global_batch: int = Field(ge=1)
    fingerprint: str


class StreamState(_Strict):
    """A stream of several.

    share: of the units, a fraction in words.
    data: what shaped its shards.
    loss_weight: what its losses are multiplied by.
    """

    data_set: str
    bucket: str | None
    records: Count
    share: str
    data: dict[str, Any]
    loss_weight: float = Field(default=1.0, ge=0)

    @model_serializer(mode="wrap")
    def _in_few_words(self, serialize: Callable[["StreamState"], dict[str, Any]]) -> dict[str, Any]:
        values = serialize(self)
        return {name: value for name, value in values.items() if (name, value) != ("loss_weight", 1.0)}

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.data_set, self.bucket)))


class Adapted(_Strict):
    """Layers that have adapters of one rank and alpha, by their paths in the model."""

    rank: int = Field(ge=1, le=LARGEST)
    alpha: float = Field(gt=0)
    layers: list[str]


class Best(_Strict):
    """The lowest held-out loss so far.

    loss: None where none was a number yet.
    step: that it is of.
    last: the step of the last round.
    rounds: since the lowest.
    of: what it was taken over, as a digest.
    """

    loss: float | None
    step: Count
    last: Count
    rounds: Count
    of: str


class State(_Strict):
    """What a run was after a step.

    world: how many processes there were, and so files of slices.
    options: those that alter the result; `data`: what shaped the shards. Earlier versions wrote neither.
    unit, streams: how many slots that follow each other are of one stream, where there are several; then without `data`.
    in_turn: units are of one data set after another.
    adapters: of a run that began with those of a file, which need not be there when it is resumed.
    optimizer_counters: what an optimizer keeps as plain numbers.
    loss_steps: how many steps the sum of losses holds.
    loss_scaler: the numbers of DeepSpeed's, under fp16.
    gradient_squares: averages of the squared norm of the gradient, by the number of samples that it is of.
    best: of the held-out loss, where one is taken.
    as_best_alone: the checkpoint was written for its held-out loss alone, and may go when that is no longer the lowest.
    """

    format_version: Literal[2] = 2
    step: Count
    world: int = Field(ge=1, le=LARGEST)
    run: Identity
    options: dict[str, str | Number | list[str] | None] = {}
    data: dict[str, Any] | None = None
    unit: int | None = Field(default=None, ge=1, le=LARGEST)
    streams: list[StreamState] = []
    in_turn: bool = False
    adapters: list[Adapted] = []
    optimizer_counters: dict[str, Count] = {}
    loss_steps: Count
    loss_scaler: dict[str, Number] | None = None
    gradient_squares: dict[str, Annotated[float, Field(ge=0)]] = {}
    best: Best | None = None
    as_best_alone: bool = False

    @property
    def layers(self) -> dict[str, tuple[int, float]]:
        """Path of each layer of `adapters` -> rank and alpha."""
        return {name: (each.rank, each.alpha) for each in self.adapters for name in each.layers}

    @field_validator("options")
    @classmethod
    def _as_they_are_known(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Those that this version knows, each with a value that it can have."""
        known = {name: value for name, value in options.items() if name in ALTER_THE_RESULT}
        for name, value in known.items():
            field = TrainConfig.model_fields[name]
            kind: Any = Annotated[field.annotation, field]
            try:
                TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=True)
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg']}") from None
        return known

    @field_validator("loss_scaler")
    @classmethod
    def _scales(cls, scaler: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in ("cur_scale", "scale_factor", "scale_window", "min_scale"):
            if scaler and name in scaler and not scaler[name] > 0:
                raise ValueError(f"{name}: not positive")
        return scaler


def adapted_of(adapters: Mapping[str, tuple[int, float]]) -> list[Adapted]:
    """What is recorded of adapters, given as path of the layer -> rank and alpha."""
    kinds = dict.fromkeys(adapters.values())
    return [
        Adapted(rank=rank, alpha=alpha, layers=[name for name, kind in adapters.items() if kind == (rank, alpha)])
        for rank, alpha in kinds
    ]


def states_of(streams: Streams) -> list[StreamState]:
    """What is recorded of streams: nothing of a single one, which its shards tell."""
    if len(streams.streams) < 2:
        return []
    return [
        StreamState(
            data_set=stream.data_set, bucket=stream.bucket, records=stream.records, share=str(stream.share),
            data=stream.shards.index.identity, loss_weight=stream.loss_weight,
        )
        for stream in streams.streams
    ]  # fmt: skip


def parse_state(value: Any, path: Path) -> State:
    """What was read from a state.json, judged.

    Raises:
        UserError: it is of another version.
        ValueError: it is none.
    """
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        remedy = "go on with the version of the engine that wrote it, or give another by --resume_from_checkpoint"
        raise UserError(f"{path}: format version {version}, this engine reads {FORMAT_VERSION}; {remedy}")
    try:
        return State.model_validate(value)
    except ValidationError as error:
        mistakes = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()[:3]
        ]
        raise ValueError("; ".join(mistakes)) from None
