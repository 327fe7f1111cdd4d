"""What a run is, once its data, its processes and its options are known."""

from dataclasses import dataclass, field
from typing import Any

from engine.data.samples.streams import Streams


@dataclass(frozen=True)
class Run:
    """The numbers that decide what is trained in which step.

    global_batch: samples per optimizer step, over all processes.
    fingerprint: of the latent shards.
    records: slots of an epoch, in which a record comes as often as it is repeated.
    steps: optimizer steps in all.
    options: those that alter the result; when the run is resumed all may change but the order.
    data: what shaped the shards of a single stream.
    streams: that the samples are of.
    begins_with_adapters: of a file, whose ranks and alphas the options do not say.
    """

    seed: int
    global_batch: int
    fingerprint: str
    records: int
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    streams: Streams = field(default_factory=Streams)
    begins_with_adapters: bool = False
