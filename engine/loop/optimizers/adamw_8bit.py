"""bitsandbytes' AdamW, whose moments have eight bits, with the clipping and the refusal that `interface.py` asks for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.loop.optimizers.interface import Allocate, Optimizer, clip_factor, global_norm


def adamw_8bit() -> type[Optimizer]:
    """The optimizer's class; bitsandbytes is imported for those who ask for it only."""
    import bitsandbytes

    class AdamW8bit(Optimizer, bitsandbytes.optim.AdamW8bit):
        """Its kernel takes no scale, so the gradients are scaled beforehand."""

        laid_out = ("state1", "state2")
        counters = ("step",)
        bound = ("absmax1", "absmax2", "qmap1", "qmap2")

        def create_state(
            self, masters: Sequence[Tensor], allocate: Allocate, weights: Any = None, averages: Any = None
        ) -> None:
            super().create_state(masters, allocate)
            self.check_overrides()
            self.to_gpu()
            for number, master in enumerate(masters):
                # Not by the groups, which stage 3 fills in its steps only; they have the same options.
                self.init_state(self.param_groups[0], master, 0, number)
            self.initialized = True

        @torch.no_grad()
        def apply(self, gradients: list[Tensor]) -> None:  # type: ignore[override]
            self.grad_norm.copy_(global_norm(gradients, self.sum_parts))
            if not bool(self.grad_norm.isfinite()):
                # Its kernel knows no way to leave the weights alone, so that here the host must look.
                self.skipped += 1
                return
            torch._foreach_mul_(gradients, clip_factor(self.grad_norm, self.max_grad_norm).view(()))
            bitsandbytes.optim.AdamW8bit.step(self)  # on the gradients beside the parameters, which are these

    return AdamW8bit
