"""Optimizers that look at matrices: torch's Adafactor and Muon. They step on whole parameters, each a master."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.loop.optimizers.adamw import AdamW
from engine.loop.optimizers.groups import in_a_block
from engine.loop.optimizers.interface import Allocate, Optimizer
from engine.models.training_form import published_names


def matrices(name: str, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """How a parameter in training form is seen as matrices [number, rows, columns], or a vector [elements].

    Convolutions are matrices of their outputs; what is stacked is as many as are published. A single row or column is a vector.

    Args:
        shapes: of all parameters; the first matrices of adapters are stacked as the second ones tell.
    """
    shape = shapes[name]
    size = math.prod(shape)
    if len(shape) < 2:
        return (size,)
    second = shapes.get(re.sub(r"lora_A$", "lora_B", name), ())
    stacked = len(published_names(name)) if len(shape) == 2 else 1
    number = second[0] if len(second) == 3 else stacked
    rows = shape[1] if len(shape) == 3 else shape[0] // number
    columns = size // (number * rows)
    return (size,) if 1 in (rows, columns) else (number, rows, columns)


class OfMatrices(Optimizer):
    """What Adafactor and Muon share: masters seen as matrices, and a look at the norm by the host.

    Args:
        pieces: name and shape of each master's parameter.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], max_grad_norm: float, sum_parts: Any,
        pieces: Sequence[tuple[str, Sequence[int]]], **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(groups, max_grad_norm, sum_parts, defaults=options)
        self.pieces, self.forms = pieces, [matrices(name, dict(pieces)) for name, _ in pieces]

    def seen(self, number: int, tensor: Tensor) -> list[Tensor]:
        """A tensor laid out as master `number`, as the matrices that it is, or the vector."""
        form = self.forms[number]
        return list(tensor.detach().view(form)) if len(form) == 3 else [tensor.detach()]

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor]) -> None:
        if (clipped := self.clipped(gradients)) is None:
            return
        for number, gradient in enumerate(clipped):
            self.take(number, gradient)
        self.finish()

    def take(self, number: int, gradient: Tensor) -> None:
        """Is given the gradient of a master, fp32 and clipped."""
        raise NotImplementedError

    def finish(self) -> None:
        """Steps, once all are given."""


class Adafactor(OfMatrices):
    """torch's Adafactor (arXiv:1804.04235), which keeps the means of squared gradients over rows and columns."""

    laid_out = ()
    counters = ("step",)
    bound = ("row_var", "col_var", "variance")

    def create_state(self, masters: Sequence[Tensor], allocate: Allocate, weights: Any = None, averages: Any = None) -> None:
        super().create_state(masters, allocate)
        self.weights: list[list[Tensor]] = []
        groups = self.groups_of_masters
        options: list[dict[str, Any]] = []
        for number, master in enumerate(masters):
            form, device = self.forms[number], master.device
            state: dict[str, Any] = {"step": torch.zeros(())}
            if len(form) == 3:
                count, rows, columns = form
                state |= {"row_var": torch.zeros(count, rows, 1, device=device)}
                state |= {"col_var": torch.zeros(count, 1, columns, device=device)}
            else:
                state["variance"] = torch.zeros(1, *form, device=device)
            self.state[master] = state
            self.weights.append(self.seen(number, master))
            options.append({"params": self.weights[-1], "weight_decay": groups[number]["weight_decay"]})
        # torch squares the first: the paper's 1e-30. Its own default, of fp32, is larger than the gradients of a mean loss.
        self.steps = torch.optim.Adafactor(options, eps=(1e-15, 1e-3), foreach=False)
        for master, weights_of in zip(masters, self.weights, strict=True):
            own = self.state[master]
            for place, weight in enumerate(weights_of):
                kinds = {kind: own[kind][place] for kind in self.bound if kind in own}
                self.steps.state[weight] = {"step": own["step"] if place == 0 else own["step"].clone(), **kinds}

    def take(self, number: int, gradient: Tensor) -> None:
        for weight, part in zip(self.weights[number], self.seen(number, gradient), strict=True):
            weight.grad = part

    def finish(self) -> None:
        for group, given in zip(self.steps.param_groups, self.groups_of_masters, strict=True):
            group["lr"] = given["lr"]
        self.steps.step()
        self.steps.zero_grad()

    def resume(self, masters: Sequence[Tensor], counters: dict[str, int]) -> None:
        for master, weights in zip(masters, self.weights, strict=True):
            for weight in weights:
                self.steps.state[weight]["step"].copy_(self.state[master]["step"])


class Muon(OfMatrices):
    """torch's Muon (arXiv:2502.16982) for the matrices within blocks, in steps as large as AdamW's, and AdamW for all else."""

    laid_out = ("exp_avg",)
    counters = ("step",)
    bound = ("exp_avg_sq",)

    def create_state(self, masters: Sequence[Tensor], allocate: Allocate, weights: Any = None, averages: Any = None) -> None:
        super().create_state(masters, allocate)
        groups = self.groups_of_masters
        self.is_muons = [len(form) == 3 and in_a_block(name) for form, (name, _) in zip(self.forms, self.pieces, strict=True)]
        others = [number for number, is_muons in enumerate(self.is_muons) if not is_muons]
        self.rest = [masters[number] for number in others]
        self.adamw: AdamW | None = None
        if others:
            given = [{**groups[number], "name": str(number), "params": [masters[number]]} for number in others]
            self.adamw = AdamW(given, 0.0, None, **self.defaults)
            self.adamw.create_state(self.rest, allocate)
        self.weights: dict[int, list[Tensor]] = {}
        options: list[dict[str, Any]] = []
        step = torch.zeros((), device=masters[0].device)
        for number, master in enumerate(masters):
            if not self.is_muons[number]:
                assert self.adamw is not None
                self.state[master] = self.adamw.state[master]
                continue
            self.state[master] = {"step": step.clone(), "exp_avg": allocate(master)}
            self.weights[number] = self.seen(number, master)
            options.append({"params": self.weights[number], "weight_decay": groups[number]["weight_decay"], "number": number})
        self.muon = torch.optim.Muon(options, adjust_lr_fn="match_rms_adamw") if options else None
        for number, parts in self.weights.items():
            for weight, momentum in zip(parts, self.seen(number, self.state[masters[number]]["exp_avg"]), strict=True):
                assert self.muon is not None
                self.muon.state[weight]["momentum_buffer"] = momentum
        self.gradients: dict[int, Tensor] = {}

    def take(self, number: int, gradient: Tensor) -> None:
        if not self.is_muons[number]:
            self.gradients[number] = gradient
            return
        for weight, part in zip(self.weights[number], self.seen(number, gradient), strict=True):
            weight.grad = part

    def finish(self) -> None:
        groups = self.groups_of_masters
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = groups[int(group["name"])]["lr"]
                self.adamw.learning_rates[group["name"]].fill_(group["lr"])
            self.adamw.apply([self.gradients[number] for number in sorted(self.gradients)])
            self.gradients = {}
        if self.muon is not None:
            for group in self.muon.param_groups:
                group["lr"] = groups[group["number"]]["lr"]
            self.muon.step()
            self.muon.zero_grad()
            for group in self.param_groups:
                for master in group["params"]:
                    if "exp_avg_sq" not in self.state[master]:
                        self.state[master]["step"] += 1
