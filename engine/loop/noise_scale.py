"""The simple noise scale: how many samples a step needs until their gradient is signal as much as noise (arXiv:1812.06162).

It is tr(S) / |G|^2, with S the covariance of the gradient over samples and G its mean. The squared norm of the gradient of B
samples is |G|^2 + tr(S) / B in the mean, so that two batches of a step, a micro-batch and the whole, give both (appendix A.1).
Single steps are all noise: each of the two norms is averaged over steps, and only what is logged is a quotient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.processes import Processes

KEPT = 0.99  # of the averages by every step


class NoiseScale:
    """Averages over steps, on the device, of the squared norm of the gradient of micro-batches and of whole batches.

    squares: fp32 [2], the two averages, the same on every process; both begin at zero, which their quotients do not see.

    Raises:
        UserError: the run has no two batches to compare, or its gradients are not there to be looked at.
    """

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        accumulation, world = config.micro_batches, processes.world
        if accumulation * world == 1:
            raise UserError(
                "--gradient_noise_scale compares micro-batches with the whole batch, and here is one; give "
                "--gradient_accumulation_steps 2 or more"
            )
        self.accumulation, self.processes = accumulation, processes
        self.small, self.large = config.train_batch_size, config.train_batch_size * accumulation * world
        self.of_micro_batches = torch.zeros(1, device=processes.device)
        self.squares = torch.zeros(2, device=processes.device)

    def add(self, gradients: Sequence[Tensor], first: bool) -> None:
        """Looks at the gradients of a micro-batch; a process's own part of the step's gradient is their sum."""
        if first:
            self.of_micro_batches.zero_()
        norms = torch._foreach_norm(list(gradients), 2, torch.float32)
        # A micro-batch's own gradient is `accumulation` times its part, and one of as many.
        self.of_micro_batches += self.accumulation * torch.stack(norms).square().sum()

    def end_step(self, norm: Tensor) -> None:
        """Averages, once the norm [1] of the step's gradient is known; a step that is not finite does not count."""
        of_micro_batches = self.processes.sum_(self.of_micro_batches.clone()) / self.processes.world
        squares = torch.cat([of_micro_batches, norm.to(self.squares.device).square()])
        averages = KEPT * self.squares + (1 - KEPT) * squares
        self.squares.copy_(torch.where(squares.isfinite().all(), averages, self.squares))

    @property
    def state(self) -> dict[str, float]:
        """The averages, by the samples of a batch."""
        return dict(zip((str(self.small), str(self.large)), self.squares.tolist(), strict=True))

    def resume(self, state: dict[str, float]) -> None:
        """Goes on from averages of batches of the same sizes; else they begin anew."""
        if state.keys() == self.state.keys():
            self.squares.copy_(torch.tensor([state[str(self.small)], state[str(self.large)]]))

    def of(self, squares: Sequence[float]) -> float | None:
        """The noise scale in samples, from the averages as the host has read them; None while noise hides one of its terms."""
        of_small, of_large = squares
        signal = (self.large * of_large - self.small * of_small) / (self.large - self.small)
        noise = (of_small - of_large) / (1 / self.small - 1 / self.large)
        return noise / signal if noise > 0 and signal > 0 else None
