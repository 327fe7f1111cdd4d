"""The diffusers recipe for any family: what the published scripts do between two batches, with their fastest flags.

fp32 weights under autocast to bf16, TF32, channels last, torch's scaled dot product attention, AdamW and the moving average of
diffusers in passes of their own, noise drawn and stored, and the loss read back in every step.
"""

from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from engine.data.loader import Batch
from engine.kernels.add_noise import per_sample
from engine.models.family import Family
from examples.photographs import photographs


class PlainTraining:
    """A training in the manner of the scripts.

    Args:
        family: open, in bf16 for autocast or fp32 without.
        model: what is trained, in fp32 and as published, on the device.
        batch: a batch of records. With `encoders` only its size counts: every step encodes as many photographs and captions,
            prepared beforehand as the workers of a DataLoader would.
    """

    def __init__(self, family: Family, model: Any, batch: Batch, encoders: bool, device: torch.device) -> None:
        self.family, self.batch, self.device = family, batch, device
        self.model = model
        self.model.to(memory_format=torch.channels_last)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=1e-2)
        self.ema = EMAModel(self.parameters, foreach=True)
        self.images: dict[str, Tensor] = {}
        if encoders:
            family.load_encoders(device)
            pictures = list(photographs().items())
            size = len(batch.slots)
            chosen = [pictures[number % len(pictures)] for number in range(size)]
            distinct = {caption: family.prepare(image, 0)[0] for caption, image in pictures[:size]}
            prepared = [distinct[caption] for caption, _ in chosen]
            self.images = {name: torch.stack([item[name] for item in prepared]) for name in prepared[0]}
            self.captions = [caption for caption, _ in chosen]

    def _record(self) -> dict[str, Tensor]:
        if not self.images:
            return self.batch.record
        record = self.family.encode_images({name: tensor.to(self.device) for name, tensor in self.images.items()})
        if self.family.captioned:
            record |= self.family.encode_captions(self.captions)
        # What inference mode gives cannot take part in a backward pass.
        return {name: tensor.clone() for name, tensor in record.items()}

    def step(self) -> None:
        family, batch = self.family, self.batch
        record = self._record()
        clean = record[family.mean].float()
        if family.std:
            clean = clean + record[family.std].float() * torch.randn_like(clean)
        noise = torch.randn_like(clean)
        alpha, sigma, c_x, c_e, weight = (per_sample(values, clean) for values in batch.coefficients)
        noisy = (alpha * clean + sigma * noise).to(family.dtype)
        target = c_x * clean + c_e * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=family.dtype == torch.bfloat16):
            prediction = family.predict(self.model, noisy, batch.timesteps, record)
        error = nn.functional.mse_loss(prediction[:, : target.shape[1]].float(), target, reduction="none")
        loss = (error * weight).mean()
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
