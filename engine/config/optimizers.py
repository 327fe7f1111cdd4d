"""What is known of each optimizer before any library is imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """An optimizer that `--optimizer` can name.

    shown: its name to people.
    state: bytes per trained parameter beside the fp32 masters; of numbers for rows and columns none are counted.
    reads: how often the host reads the device in a step, and how often for every matrix or group of weights beside that.
    anywhere: whether it steps on any part of the weights, so that several processes and ZeRO can divide them.
    package: what must be installed for it.
    defaults: of options, where it needs others than AdamW.
    """

    shown: str
    state: float
    reads: tuple[int, int]
    anywhere: bool
    package: str | None = None
    defaults: tuple[tuple[str, float], ...] = ()

    @property
    def on_device(self) -> bool:
        """Whether a step is the device's alone, so that it can be captured."""
        return self.reads == (0, 0)


OPTIMIZERS = {
    "adamw": Known("AdamW", 8, (0, 0), True),
    "adamw8bit": Known("8-bit AdamW", 2, (1, 0), True, "bitsandbytes"),
    "lion": Known("Lion", 4, (0, 0), True, None, (("adam_beta2", 0.99),)),
    "adafactor": Known("Adafactor", 0, (1, 2), False, None, (("learning_rate", 1e-2),)),
    "muon": Known("Muon", 4, (1, 0), False),
    "prodigy": Known("Prodigy", 16, (1, 2), False, "prodigyopt", (("learning_rate", 1.0),)),
    "schedulefree_adamw": Known("schedule-free AdamW", 8, (1, 0), True, "schedulefree"),
}

# Names of other trainers, in small letters.
OTHER_NAMES = {
    "adam8bit": "adamw8bit", "adamw_8bit": "adamw8bit", "adamw-8bit": "adamw8bit",
    "adamwschedulefree": "schedulefree_adamw", "adamw_schedulefree": "schedulefree_adamw",
    "schedule_free_adamw": "schedulefree_adamw", "schedulefree": "schedulefree_adamw",
}  # fmt: skip
