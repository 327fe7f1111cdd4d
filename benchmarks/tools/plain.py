"""The diffusers recipe for any family: what the published scripts do between two batches, with their fastest flags or at best.

With their fastest flags: fp32 weights under autocast to bf16, TF32, channels last, cuDNN's search for algorithms, torch's
scaled dot product attention, AdamW and the moving average of diffusers in passes of their own (`foreach`), noise drawn and
stored, and the loss read back in every step. At its best, what no script does: the model under torch.compile, AdamW in one
fused kernel, and, where there are images to load, pinned memory and workers that persist.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from engine.kernels.add_noise import per_sample
from engine.models.encoder import Encoder
from engine.models.family import Family


class PlainTraining:
    """A training in the manner of the scripts.

    loss: of the last step.

    Args:
        family: open, in bf16 for autocast or fp32 without.
        model: as `Family.load_model` gives it without a form, on the device.
        best: what no script does.
    """

    def __init__(self, family: Family, model: Any, device: torch.device, best: bool, learning_rate: float) -> None:
        self.family, self.model, self.device, self.best = family, model, device, best
        self.model.to(memory_format=torch.channels_last)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        if best:
            self.model.compile()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=1e-2, fused=best or None)
        self.ema = EMAModel(self.parameters, foreach=True)
        self.loss = 0.0

    def encode(self, encoder: Encoder, images: dict[str, Tensor], captions: Sequence[str]) -> dict[str, Tensor]:
        """The record of a batch of inputs of `Encoding.prepare`, stacked, and of their captions."""
        record = encoder.encode_images({name: self.to_device(tensor) for name, tensor in images.items()})
        if self.family.encoding.captioned:
            record |= encoder.encode_captions(list(captions))
        # What inference mode gives cannot take part in a backward pass.
        return {name: self.to_device(tensor).clone() for name, tensor in record.items()}

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=self.best)

    def check(self) -> None:
        """Raises RuntimeError where the loss or a weight is not finite."""
        if not math.isfinite(self.loss) or not all(bool(weight.isfinite().all()) for weight in self.parameters):
            raise RuntimeError(f"the loss is {self.loss}, or weights are not finite")

    def step(self, record: dict[str, Tensor], timesteps: Tensor, coefficients: Tensor) -> None:
        """One optimizer step on records [B, ...], with their timesteps [B] and coefficients [5, B] of the schedule."""
        family, encoding = self.family, self.family.encoding
        clean = record[encoding.mean].float()
        if encoding.std:
            clean = clean + record[encoding.std].float() * torch.randn_like(clean)
        noise = torch.randn_like(clean)
        alpha, sigma, c_x, c_e, weight = (per_sample(values, clean) for values in coefficients)
        noisy = (alpha * clean + sigma * noise).to(encoding.dtype)
        target = c_x * clean + c_e * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=encoding.dtype == torch.bfloat16):
            prediction = family.predict(self.model, noisy, timesteps, record)
        error = nn.functional.mse_loss(prediction[:, : target.shape[1]].float(), target, reduction="none")
        loss = (error * weight).mean()
        self.loss = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
