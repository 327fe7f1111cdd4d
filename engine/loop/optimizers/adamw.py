"""AdamW with clipping by the global norm, the moving average and the training weights, without a single read by the host."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.kernels import adamw_ema_
from engine.loop.optimizers.interface import Allocate, Optimizer, clip_factor, global_norm


class AdamW(Optimizer):
    """AdamW over flat fp32 tensors in one pass each; clipping and the refusal of non-finite gradients happen inside it.

    Whatever changes from step to step lies on the device, and the host reads nothing, so that a step can be captured as a
    CUDA graph. A step whose gradient is not finite changes nothing, its number included.
    """

    laid_out = ("exp_avg", "exp_avg_sq")
    counters = ("step",)
    in_one_pass = True

    def __init__(self, groups: Sequence[dict[str, Any]], max_grad_norm: float, sum_parts: Any, **options: Any) -> None:
        super().__init__(groups, max_grad_norm, sum_parts, defaults=options)

    def create_state(
        self,
        masters: Sequence[Tensor],
        allocate: Allocate,
        weights: Sequence[Tensor] | None = None,
        averages: Sequence[Tensor] | None = None,
    ) -> None:
        super().create_state(masters, allocate)
        device = masters[0].device
        self.learning_rates = {name: torch.zeros(1, device=device) for name in self.peak_rates}
        self.beside: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}
        for number, master in enumerate(masters):
            self.beside[master] = (weights[number] if weights else None, averages[number] if averages else None)
            self.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": allocate(master),
                "exp_avg_sq": allocate(master),
            }

    def set_rates(self, factor: float) -> None:
        super().set_rates(factor)
        for group in self.param_groups:
            self.learning_rates[group["name"]].fill_(group["lr"])

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor]) -> None:
        self.grad_norm.copy_(global_norm(gradients, self.sum_parts))
        finite = self.grad_norm.isfinite()
        self.skipped += ~finite
        factor = torch.where(finite, clip_factor(self.grad_norm, self.max_grad_norm), 0.0)
        stepped = [(group, master) for group in self.param_groups for master in group["params"]]
        for (group, master), gradient in zip(stepped, gradients, strict=True):
            state, (weights, average) = self.state[master], self.beside[master]
            state["step"] += finite[0]
            adamw_ema_(
                master.detach(), state["exp_avg"], state["exp_avg_sq"], gradient, weights, average,
                self.learning_rates[group["name"]], factor, state["step"].view(1), self.average_weight,
                *group["betas"], group["eps"], group["weight_decay"],
            )  # fmt: skip
