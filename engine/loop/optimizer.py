"""AdamW with clipping by the global norm and without a single read by the host; and the schedules of the learning rate."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from engine.config import TrainConfig
from engine.errors import UserError
from engine.processes import Processes


def global_norm(gradients: list[Tensor], sum_parts: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The L2 norm over all gradients, an fp32 scalar on the device; `sum_parts` adds the squares of the other partitions."""
    square = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()
    return (sum_parts(square) if sum_parts else square).sqrt()


class ClippedAdamW(torch.optim.AdamW):
    """torch's fused AdamW; clipping and the refusal of non-finite gradients happen inside its one pass.

    The fused kernel divides gradients by `grad_scale` and leaves everything untouched when `found_inf` is set; both are
    device tensors, so nothing waits for the norm.

    Args:
        max_grad_norm: clip to this norm, 0 for no clipping.
        sum_parts: adds a scalar over processes, when each holds a part of the gradients.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        max_grad_norm: float,
        sum_parts: Callable[[Tensor], Tensor] | None,
        **arguments: Any,
    ) -> None:
        super().__init__(parameters, fused=True, **arguments)
        self.max_grad_norm, self.sum_parts = max_grad_norm, sum_parts
        self.grad_norm = torch.zeros(())

    def create_state(self) -> None:
        """Creates the moments and step counters that torch would create in the first step, so that they can be loaded."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = global_norm(gradients, self.sum_parts)
        self.found_inf = (~self.grad_norm.isfinite()).float()
        if self.max_grad_norm > 0:
            self.grad_scale = ((self.grad_norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        super().step()


def _clipped_adamw_8bit() -> type:
    """bitsandbytes' AdamW8bit with the same clipping; its kernel takes no scale, so the gradients are scaled beforehand."""
    import bitsandbytes

    class ClippedAdamW8bit(bitsandbytes.optim.AdamW8bit):
        def __init__(
            self,
            parameters: Iterable[Tensor],
            max_grad_norm: float,
            sum_parts: Callable[[Tensor], Tensor] | None,
            **arguments: Any,
        ) -> None:
            super().__init__(parameters, **arguments)
            self.max_grad_norm, self.sum_parts = max_grad_norm, sum_parts
            self.grad_norm = torch.zeros(())

        def create_state(self) -> None:
            self.check_overrides()
            self.to_gpu()
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    self.init_state(group, parameter, group_index, index)
            self.initialized = True

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            self.grad_norm = global_norm(gradients, self.sum_parts)
            factor = torch.ones_like(self.grad_norm)
            if self.max_grad_norm > 0:
                factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)
            super().step()

    return ClippedAdamW8bit


def create_optimizer(parameters: Iterable[Tensor], config: TrainConfig, sum_parts: Callable[[Tensor], Tensor] | None) -> Any:
    """AdamW with clipping, in 32 or 8 bits: an optimizer with `grad_norm` and `create_state`."""
    kind = _clipped_adamw_8bit() if config.use_8bit_adam else ClippedAdamW
    return kind(
        parameters,
        config.max_grad_norm,
        sum_parts,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def learning_rates(config: TrainConfig, processes: Processes, total_steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step k, counted from 0: diffusers' schedules as pure functions."""
    base = config.learning_rate
    if config.scale_lr:
        base *= config.gradient_accumulation_steps * config.train_batch_size * processes.world
    # The schedules come attached to an optimizer; this one only carries the base rate.
    carrier = torch.optim.SGD([torch.zeros(1)], lr=base)
    try:
        scheduler = get_scheduler(
            config.lr_scheduler, carrier, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total_steps
        )
    except ValueError as error:
        raise UserError(f"--lr_scheduler {config.lr_scheduler} with --learning_rate {base}: {error}") from None
    factor = scheduler.lr_lambdas[0]
    return lambda step: base * factor(step)
