"""What training needs of an optimizer, and what all of them share: the global norm, and clipping by it."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.kernels import square_sum

Allocate = Callable[[Tensor], Tensor]


def global_norm(gradients: Sequence[Tensor], sum_parts: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The L2 norm over all gradients, fp32 [1] on the device; `sum_parts` adds the squares of the other partitions."""
    square = torch.stack([square_sum(gradient) for gradient in gradients]).sum(0)
    return (sum_parts(square) if sum_parts else square).sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by; without a limit (0) by one."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)


class Optimizer(torch.optim.Optimizer):
    """An optimizer of flat fp32 tensors, the masters, that clips by the global norm and skips steps that are not finite.

    Each group of parameters has a `name` and options of its own, by which it is stepped. What a checkpoint keeps of the state
    is declared, and by that it is cut and put together again for another partition:

    laid_out: names of the state with a number for every weight.
    counters: names of the state that is one number, the same for all masters, on the device or in Python.
    bound: names of the state that fits these very masters only, as the scales of blocks do.
    numbers: names of the state that is real numbers, fp64, one for each group of the run.

    in_one_pass: whether a step also writes the weights in the training precision and keeps their moving average.
    max_grad_norm: clip to this norm, 0 for no clipping.
    sum_parts: adds a tensor over processes, where each holds a part of the gradients.
    """

    laid_out: ClassVar[tuple[str, ...]]
    counters: ClassVar[tuple[str, ...]]
    bound: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[tuple[str, ...]] = ()
    in_one_pass: ClassVar[bool] = False

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        max_grad_norm: float,
        sum_parts: Callable[[Tensor], Tensor] | None,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.max_grad_norm, self.sum_parts = max_grad_norm, sum_parts
        self.peak_rates = {group["name"]: group["lr"] for group in self.param_groups}

    def create_state(
        self,
        masters: Sequence[Tensor],
        allocate: Allocate,
        weights: Sequence[Tensor] | None = None,
        averages: Sequence[Tensor] | None = None,
    ) -> None:
        """To be called once, before the first step, when it is known what will be stepped on.

        Args:
            allocate: gives zeros laid out as a master, where such state is kept.
            weights, averages: for each master its copy in the training precision and its moving average, where these exist
                and the optimizer is to keep them `in_one_pass`.
        """
        self.grad_norm, self.skipped, self.average_weight = (torch.zeros(1, device=masters[0].device) for _ in range(3))

    def set_rates(self, factor: float) -> None:
        """Makes every group's learning rate its highest one times a factor."""
        for group in self.param_groups:
            group["lr"] = self.peak_rates[group["name"]] * factor

    def set_average_weight(self, weight: float) -> None:
        """Says what the new weights count for in the moving average, where it is kept `in_one_pass`."""
        self.average_weight.fill_(weight)

    def write_average(self, master: Tensor, average: Tensor) -> None:
        """Writes what the model is after a step, where the method averages itself."""
        raise NotImplementedError

    @property
    def groups_of_masters(self) -> list[dict[str, Any]]:
        """The group of each master, in their order."""
        return [group for group in self.param_groups for _ in group["params"]]

    def norm_and_skips(self) -> Tensor:
        """The gradient norm of the last step, before clipping, and how many steps were skipped so far: fp32 [2]."""
        return torch.cat([self.grad_norm, self.skipped])

    def note_skip(self) -> None:
        """To be called where a step was left out, by someone who looked at the norm, because it was not finite."""
        self.skipped += 1
        self.grad_norm.fill_(float("inf"))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the gradients that lie beside the parameters, as DeepSpeed leaves them."""
        self.apply([parameter.grad for group in self.param_groups for parameter in group["params"]])

    def clipped(self, gradients: Sequence[Tensor]) -> list[Tensor] | None:
        """The gradients in fp32, clipped, in place where they have that precision; None where a step is to be left out.

        Here the host looks at the norm: for those that know no other way to leave the weights alone.
        """
        self.grad_norm.copy_(global_norm(gradients, self.sum_parts))
        if not bool(self.grad_norm.isfinite()):
            self.skipped += 1
            return None
        scaled = [gradient.float() for gradient in gradients]
        torch._foreach_mul_(scaled, clip_factor(self.grad_norm, self.max_grad_norm).view(()))
        return scaled

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """One step on the given gradients, flat and in any precision, in the order of the groups' parameters."""
        raise NotImplementedError

    def resume(self, masters: Sequence[Tensor], counters: dict[str, int]) -> None:
        """Goes on from counters in Python as a checkpoint holds them."""
        for master in masters:
            self.state[master].update(counters)

    def state_of(self, master: Tensor) -> dict[str, Any]:
        """What there is of a master's state.

        Raises:
            TypeError: something in it was not declared, so that nobody knows how to keep it.
        """
        state = self.state[master]
        if unknown := set(state) - {*self.laid_out, *self.counters, *self.bound, *self.numbers}:
            raise TypeError(f"{type(self).__name__} does not say how to keep {', '.join(sorted(unknown))}")
        return state
