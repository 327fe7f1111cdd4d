"""What is known of each optimizer before any library is imported."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerTraits:
    """An optimizer that `--optimizer` can name.

    shown: its name to people.
    state: bytes per trained parameter beside the fp32 masters; of numbers for rows and columns none are counted.
    reads: how often the host reads the device in a step, and how often for every matrix or group of weights beside that.
    anywhere: whether it steps on any part of the weights, so that several processes and ZeRO can divide them.
    package: what must be installed for it.
    defaults: of options, where it needs others than AdamW.
    whole_parameters: whether it looks at whole parameters, so that each is a master.
    without_masters: whether it steps on bf16 weights too.
    averages_itself: whether the model is an average that is part of the method.
    """

    shown: str
    state: float
    reads: tuple[int, int]
    anywhere: bool
    package: str | None = None
    defaults: tuple[tuple[str, float], ...] = ()
    whole_parameters: bool = False
    without_masters: bool = False
    averages_itself: bool = False

    @property
    def on_device(self) -> bool:
        """Whether a step is the device's alone, so that it can be captured."""
        return self.reads == (0, 0)


OPTIMIZERS = {
    "adamw": OptimizerTraits("AdamW", 8, (0, 0), True, without_masters=True),
    "adamw8bit": OptimizerTraits("8-bit AdamW", 2, (1, 0), True, "bitsandbytes"),
    "lion": OptimizerTraits("Lion", 4, (0, 0), True, None, (("adam_beta2", 0.99),), without_masters=True),
    "adafactor": OptimizerTraits("Adafactor", 0, (1, 2), False, None, (("learning_rate", 1e-2),), whole_parameters=True),
    "muon": OptimizerTraits("Muon", 4, (1, 0), False, whole_parameters=True),
    "prodigy": OptimizerTraits("Prodigy", 16, (1, 2), False, "prodigyopt", (("learning_rate", 1.0),)),
    "schedulefree_adamw": OptimizerTraits("schedule-free AdamW", 8, (1, 0), True, "schedulefree", averages_itself=True),
}


def named(trait: Callable[[OptimizerTraits], bool]) -> str:
    """The optimizers that have a trait, in a sentence."""
    *others, last = [name for name, traits in OPTIMIZERS.items() if trait(traits)]
    return f"{', '.join(others)} or {last}"


# Names of other trainers, in small letters.
OTHER_NAMES = {
    "adam8bit": "adamw8bit", "adamw_8bit": "adamw8bit", "adamw-8bit": "adamw8bit",
    "adamwschedulefree": "schedulefree_adamw", "adamw_schedulefree": "schedulefree_adamw",
    "schedule_free_adamw": "schedulefree_adamw", "schedulefree": "schedulefree_adamw",
}  # fmt: skip
