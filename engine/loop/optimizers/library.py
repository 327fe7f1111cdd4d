"""Optimizers of libraries, with the clipping and the refusal of steps that are not finite that `interface.py` asks for.

Their steps take numbers from the host, so that they are not captured; the forward and backward passes are. A library is
imported for those who ask for it only.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.loop.optimizers.interface import Allocate, Optimizer


class FromLibrary(Optimizer):
    """A library's optimizer of masters; its state is created here, as far as it has to be known to checkpoints.

    library: its class, which this one inherits from too.
    in_groups: names of counters and numbers that the library keeps in its groups of parameters.
    """

    library: ClassVar[type]
    in_groups: ClassVar[tuple[str, ...]] = ()

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor]) -> None:
        if (scaled := self.clipped(gradients)) is None:
            return
        masters = [master for group in self.param_groups for master in group["params"]]
        for master, gradient in zip(masters, scaled, strict=True):
            master.grad = gradient
        self.library.step(self)  # type: ignore[attr-defined]
        for master, gradient, given in zip(masters, scaled, gradients, strict=True):
            if gradient is not given:
                master.grad = None

    def state_of(self, master: Tensor) -> dict[str, Any]:
        group = self.param_groups[0]
        own = {name: group[name] for name in self.in_groups if name in self.counters}
        for name in self.numbers:
            held = self.held.setdefault(name, torch.zeros(len(self.param_groups), dtype=torch.float64))
            held.copy_(torch.tensor([float(group[name]) for group in self.param_groups], dtype=torch.float64))
        return super().state_of(master) | own | self.held

    def create_state(self, masters: Sequence[Tensor], allocate: Allocate, weights: Any = None, averages: Any = None) -> None:
        super().create_state(masters, allocate)
        self.held: dict[str, Tensor] = {}

    def resume(self, masters: Sequence[Tensor], counters: dict[str, int]) -> None:
        super().resume(masters, {name: value for name, value in counters.items() if name not in self.in_groups})
        for number, group in enumerate(self.param_groups):
            group |= {name: value for name, value in counters.items() if name in self.in_groups}
            group |= {name: float(self.held[name][number]) for name in self.numbers}


def adamw_8bit() -> type[Optimizer]:
    """bitsandbytes' AdamW, whose moments have eight bits."""
    import bitsandbytes

    class AdamW8bit(FromLibrary, bitsandbytes.optim.AdamW8bit):
        library = bitsandbytes.optim.AdamW8bit
        laid_out = ("state1", "state2")
        counters = ("step",)
        bound = ("absmax1", "absmax2", "qmap1", "qmap2")

        def create_state(
            self, masters: Sequence[Tensor], allocate: Allocate, weights: Any = None, averages: Any = None
        ) -> None:
            super().create_state(masters, allocate)
            self.check_overrides()
            self.to_gpu()
            for number, group in enumerate(self.param_groups):
                for place, master in enumerate(group["params"]):
                    self.init_state(group, master, number, place)
            self.initialized = True

    return AdamW8bit


def prodigy() -> type[Optimizer]:
    """Prodigy (arXiv:2306.06101), which finds the rate by itself: that of the options is a factor of it."""
    import prodigyopt

    class Prodigy(FromLibrary, prodigyopt.Prodigy):
        library = prodigyopt.Prodigy
        laid_out = ("s", "p0", "exp_avg", "exp_avg_sq")
        counters = ("step", "k")
        numbers = ("d", "d_max", "d_numerator")
        in_groups = ("k",)

        def create_state(
            self, masters: Sequence[Tensor], allocate: Allocate, weights: Any = None, averages: Any = None
        ) -> None:
            super().create_state(masters, allocate)
            for master in masters:
                zeros = {kind: allocate(master) for kind in ("s", "exp_avg", "exp_avg_sq")}
                self.state[master] = {"step": 0, "p0": allocate(master).copy_(master), **zeros}

    return Prodigy


def schedule_free() -> type[Optimizer]:
    """Schedule-free AdamW (arXiv:2405.15682): gradients are taken at a mixture of the weights z that it steps and of their
    average, which is what the model is."""
    import schedulefree

    class ScheduleFreeAdamW(FromLibrary, schedulefree.AdamWScheduleFree):
        library = schedulefree.AdamWScheduleFree
        laid_out = ("z", "exp_avg_sq")
        counters = ("k",)
        numbers = ("weight_sum", "lr_max")
        in_groups = ("k",)

        def create_state(
            self, masters: Sequence[Tensor], allocate: Allocate, weights: Any = None, averages: Any = None
        ) -> None:
            super().create_state(masters, allocate)
            for group in self.param_groups:
                group["train_mode"] = True
            for master in masters:
                self.state[master] = {"z": allocate(master).copy_(master), "exp_avg_sq": allocate(master)}

        def write_average(self, master: Tensor, average: Tensor) -> None:
            beta = self.param_groups[0]["betas"][0]
            torch.lerp(master, self.state[master]["z"], 1 - 1 / beta, out=average)

    return ScheduleFreeAdamW
