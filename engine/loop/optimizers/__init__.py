"""AdamW with clipping by the global norm and without a single read by the host; and the schedules of the learning rate."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.kernels import adamw_ema_, square_sum
from engine.processes import Processes


def global_norm(gradients: Sequence[Tensor], sum_parts: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The L2 norm over all gradients, fp32 [1] on the device; `sum_parts` adds the squares of the other partitions."""
    square = torch.stack([square_sum(gradient) for gradient in gradients]).sum(0)
    return (sum_parts(square) if sum_parts else square).sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by; without a limit (0) by one."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)


class AdamW(torch.optim.Optimizer):
    """AdamW over flat fp32 tensors in one pass each; clipping and the refusal of non-finite gradients happen inside it.

    Whatever changes from step to step lies on the device, and the host reads nothing, so that a step can be captured as a
    CUDA graph. A step whose gradient is not finite changes nothing, its number included.

    grad_norm, skipped: of the last step, and how many steps were skipped; fp32 [1].
    weights: for each parameter the same weights in the training precision, to be written beside it, or None.
    averages: for each parameter its moving average, or None; `ema_weight` is what the new weights count for in it.

    Args:
        max_grad_norm: clip to this norm, 0 for no clipping.
        sum_parts: adds a tensor over processes, when each holds a part of the gradients.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        max_grad_norm: float,
        sum_parts: Callable[[Tensor], Tensor] | None,
        **arguments: Any,
    ) -> None:
        super().__init__(parameters, arguments)
        self.max_grad_norm, self.sum_parts = max_grad_norm, sum_parts
        self.weights: list[Tensor | None] | None = None
        self.averages: list[Tensor | None] | None = None

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def set_learning_rate(self, rate: float) -> None:
        self.learning_rate.fill_(rate)

    def create_state(self, masters: list[Tensor], allocate: Callable[[Tensor], Tensor]) -> None:
        """Creates the moments (by `allocate`) and step counters of what will be stepped on, beside it."""
        device = masters[0].device
        self.grad_norm, self.skipped, self.learning_rate, self.ema_weight = (torch.zeros(1, device=device) for _ in range(4))
        for master in masters:
            self.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": allocate(master),
                "exp_avg_sq": allocate(master),
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.apply([parameter.grad for parameter in self.parameters])  # type: ignore[misc]

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor]) -> None:
        """One step on the given gradients, flat and in any precision."""
        self.grad_norm.copy_(global_norm(gradients, self.sum_parts))
        finite = self.grad_norm.isfinite()
        self.skipped += ~finite
        factor = torch.where(finite, clip_factor(self.grad_norm, self.max_grad_norm), 0.0)
        parameters, options = self.parameters, self.param_groups[0]
        nothing = [None] * len(parameters)
        for parameter, gradient, weights, average in zip(
            parameters, gradients, self.weights or nothing, self.averages or nothing, strict=True
        ):
            state = self.state[parameter]
            state["step"] += finite[0]
            adamw_ema_(
                parameter.detach(), state["exp_avg"], state["exp_avg_sq"], gradient, weights, average,
                self.learning_rate, factor, state["step"].view(1), self.ema_weight,
                *options["betas"], options["eps"], options["weight_decay"],
            )  # fmt: skip


def _clipped_adamw_8bit() -> type:
    """bitsandbytes' AdamW8bit with the same clipping; its kernel takes no scale, so the gradients are scaled beforehand."""
    import bitsandbytes

    class ClippedAdamW8bit(bitsandbytes.optim.AdamW8bit):
        def __init__(
            self,
            parameters: Sequence[Tensor],
            max_grad_norm: float,
            sum_parts: Callable[[Tensor], Tensor] | None,
            **arguments: Any,
        ) -> None:
            super().__init__(parameters, **arguments)
            self.max_grad_norm, self.sum_parts = max_grad_norm, sum_parts
            self.grad_norm, self.skipped = torch.zeros(1), torch.zeros(1)

        def set_learning_rate(self, rate: float) -> None:
            for group in self.param_groups:
                group["lr"] = rate

        def create_state(self, masters: list[Tensor], allocate: Callable[[Tensor], Tensor]) -> None:
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
            if not bool(self.grad_norm.isfinite()):
                # Its kernel knows no way to leave the weights alone, so that here the host must look.
                self.skipped += 1
                return
            torch._foreach_mul_(gradients, clip_factor(self.grad_norm, self.max_grad_norm).view(()))
            super().step()

    return ClippedAdamW8bit


def create_optimizer(parameters: Sequence[Tensor], config: TrainConfig, sum_parts: Callable[[Tensor], Tensor] | None) -> Any:
    """AdamW with clipping, in 32 or 8 bits: with `grad_norm`, `skipped`, `set_learning_rate`, `create_state`."""
    kind = _clipped_adamw_8bit() if config.use_8bit_adam else AdamW
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
