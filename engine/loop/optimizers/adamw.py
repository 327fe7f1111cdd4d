"""AdamW and Lion with clipping by the global norm, the moving average and the training weights, without a single read by the
host."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.kernels import adamw_ema_, lion_ema_
from engine.loop.optimizers.interface import Allocate, Optimizer, clip_factor, global_norm


class AdamW(Optimizer):
    """AdamW over flat tensors in one pass each; clipping and the refusal of non-finite gradients happen inside it.

    Whatever changes from step to step lies on the device, and the host reads nothing, so that a step can be captured as a
    CUDA graph. A step whose gradient is not finite changes nothing, its number included. Masters in bf16, and their moments,
    are rounded stochastically.

    seed: of that rounding.
    """

    laid_out: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counters = ("step",)
    in_one_pass = True

    def __init__(
        self, groups: Sequence[dict[str, Any]], max_grad_norm: float, sum_parts: Any, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(groups, max_grad_norm, sum_parts, defaults=options)
        self.seed = seed

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
        self.rounding: dict[Tensor, Tensor] = {}
        for number, master in enumerate(masters):
            self.beside[master] = (weights[number] if weights else None, averages[number] if averages else None)
            if master.dtype == torch.bfloat16:
                self.rounding[master] = torch.tensor([self.seed, number], device=device)
            self.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{kind: allocate(master) for kind in self.laid_out},
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
            scalars = self.learning_rates[group["name"]], factor, state["step"].view(1), self.average_weight
            moments = [state[kind] for kind in self.laid_out]
            self.take(group, (master.detach(), *moments, gradient, weights, average, *scalars), self.rounding.get(master))

    def take(self, group: dict[str, Any], tensors: tuple[Tensor | None, ...], rounding: Tensor | None) -> None:
        """One pass over one master."""
        adamw_ema_(*tensors, *group["betas"], group["eps"], group["weight_decay"], rounding)


class Lion(AdamW):
    """Lion (arXiv:2302.06675): the sign of an average of gradients, for which one moment is kept."""

    laid_out = ("exp_avg",)

    def take(self, group: dict[str, Any], tensors: tuple[Tensor | None, ...], rounding: Tensor | None) -> None:
        lion_ema_(*tensors, *group["betas"], group["weight_decay"], rounding)
