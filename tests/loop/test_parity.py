"""Training parity: 20 fp32 steps of the engine against a loop of diffusers' own parts and torch's AdamW."""

import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_dream_and_update_latents, compute_snr

from engine.config.options import TrainConfig
from engine.data.samples.order import records_of
from engine.loop.trainer import train
from tests import objectives, reference
from tests.loop.adapters import trained_parameters
from tests.loop.runs import SLACK, checkpoint_tensors, config, published_order, relative_distance

STEPS, BATCH, SEED = 20, 4, 2**40 + 7
OPTIONS = {
    "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 3, "max_grad_norm": 0.2, "adam_weight_decay": 0.02,
}  # fmt: skip


def reference_run(model, shards, config: TrainConfig) -> tuple[dict, dict, list[float], list[float]]:
    """Weights, averages, losses and gradient norms of the independent loop."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").train()
    rescaled = {"rescale_betas_zero_snr": True} if config.rescale_betas_zero_snr else {}
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler", **rescaled)
    scheduler.register_to_config(prediction_type=config.prediction_type)
    data = reference.PlainShards(shards)
    parameters = trained_parameters(unet, config)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.adam_weight_decay, eps=1e-8
    )
    rates = get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=STEPS)
    ema = EMAModel(parameters.values(), model_cls=UNet2DConditionModel, model_config=unet.config)
    losses, norms = [], []
    accumulation = config.gradient_accumulation_steps
    for step in range(STEPS):
        step_loss = 0.0
        for part in range(accumulation):
            first = (step * accumulation + part) * BATCH
            slots = list(range(first, first + BATCH))
            records = records_of(SEED, torch.tensor(slots), len(data.images)).tolist()
            latents, noise, states = reference.batch(data, records, slots, SEED)
            shape = latents.shape[1:]

            def draw(stream, shape, slots=slots):
                return torch.from_numpy(reference.normals(SEED, slots, stream, tuple(shape))).float()

            noise = noise + config.noise_offset * draw(3, (shape[0], 1, 1))
            noise = objectives.with_pyramid(config, noise, SEED, slots)
            count = scheduler.config.num_train_timesteps
            timesteps = objectives.timesteps(config, SEED, slots, BATCH * accumulation, count)
            noisy = scheduler.add_noise(latents, noise + config.input_perturbation * draw(4, shape), timesteps)
            if config.prediction_type == "epsilon":
                target = noise
            elif config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents, noise, timesteps)
            else:
                target = latents
            if config.dream_training:
                noisy, target = compute_dream_and_update_latents(
                    unet, scheduler, timesteps, noise, noisy, target, states, config.dream_detail_preservation
                )
            prediction = unet(noisy, timesteps, states, return_dict=False)[0]
            snr = compute_snr(scheduler, timesteps).double()
            loss = objectives.losses(config, prediction - target, snr, timesteps / count, config.prediction_type)
            (loss.mean() / accumulation).backward()
            step_loss += loss.mean().item() / accumulation
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)))
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(parameters.values())
        losses.append(step_loss)
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return weights, dict(zip(weights, ema.shadow_params, strict=True)), losses, norms


CASES = [
    {"prediction_type": prediction, "snr_gamma": gamma, "gradient_accumulation_steps": accumulation}
    for prediction, gamma, accumulation in itertools.product(["epsilon", "v_prediction"], [None, 5.0], [1, 3])
] + [
    {"prediction_type": "sample", "snr_gamma": 5.0, "gradient_accumulation_steps": 1},
    {"prediction_type": "epsilon", "snr_gamma": 5.0, "dream_training": True, "gradient_accumulation_steps": 1},
    {"prediction_type": "epsilon", "snr_gamma": None, "gradient_accumulation_steps": 3, "zero_stage": 1},
    {"prediction_type": "v_prediction", "snr_gamma": 5.0, "gradient_accumulation_steps": 3, "zero_stage": 2},
    {"prediction_type": "v_prediction", "snr_gamma": 5.0, "gradient_accumulation_steps": 3, "zero_stage": 3},
    {"prediction_type": "epsilon", "snr_gamma": None, "gradient_accumulation_steps": 1, "offload_optimizer": "cpu"},
    {"prediction_type": "epsilon", "snr_gamma": 5.0, "gradient_accumulation_steps": 1, "zero_stage": 2,
     "offload_optimizer": "nvme"},
    {"prediction_type": "epsilon", "snr_gamma": 5.0, "gradient_accumulation_steps": 1, "zero_stage": 3,
     "offload_optimizer": "cpu", "offload_parameters": True},
    # Objectives, several at a time; each by itself is compared with its formula in tests/diffusion.
    {"prediction_type": "v_prediction", "snr_gamma": 5.0, "gradient_accumulation_steps": 1, "rescale_betas_zero_snr": True,
     "min_loss_weight": 0.2, "loss_type": "huber", "timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0},
    {"prediction_type": "epsilon", "gradient_accumulation_steps": 1, "loss_weighting": "debiased", "loss_type": "smooth_l1",
     "huber_schedule": "exponential", "timestep_sampling": "logit_normal", "logit_mean": 0.5, "dream_training": True,
     "pyramid_noise_discount": 0.5},
    {"prediction_type": "sample", "gradient_accumulation_steps": 1, "loss_weighting": "p2", "loss_type": "huber",
     "huber_schedule": "exponential", "rescale_betas_zero_snr": True, "timestep_sampling": "mode",
     "timestep_bias_strategy": "range", "timestep_bias_begin": 100, "timestep_bias_end": 300, "timestep_bias_multiplier": 0.2},
    {"prediction_type": "epsilon", "gradient_accumulation_steps": 3, "loss_weighting": "edm", "loss_type": "huber",
     "huber_schedule": "constant", "huber_c": 0.3, "timestep_sampling": "stratified", "min_timestep": 200, "max_timestep": 900,
     "timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 2.0},
    {"prediction_type": "v_prediction", "gradient_accumulation_steps": 1, "loss_weighting": "soft_min_snr",
     "loss_type": "smooth_l1", "timestep_sampling": "cosmap", "pyramid_noise_discount": 0.9, "pyramid_noise_iterations": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def reference_of(model, shards):
    """The independent loop's results for options; what only says where our weights lie does not concern it."""
    known = {}

    def results(config: TrainConfig) -> tuple[dict, dict, list[float], list[float]]:
        weights = {"zero_stage", "offload_optimizer", "offload_parameters", "nvme_path", "output_dir"}
        key = str(config.model_dump(exclude=weights))
        if key not in known:
            known[key] = reference_run(model, shards, config)
        return known[key]

    return results


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_weights_and_averages_follow_the_reference(case, reference_of, model, images, shards, tmp_path, record_property):
    if case.get("offload_optimizer") == "nvme":
        case = case | {"nvme_path": str(tmp_path / "nvme")}
    options = config(
        model, images, shards, tmp_path / "out", seed=SEED, max_train_steps=STEPS, checkpointing_steps=STEPS,
        noise_offset=0.1, input_perturbation=0.1, **OPTIONS, **case,
    )  # fmt: skip
    assert train(options) == 0
    published = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    start = dict(published.named_parameters())
    weights, averages, losses, norms = reference_of(options)
    assert max(norms) > options.max_grad_norm, "clipping must be active"

    output = tmp_path / "out"
    checkpoint = output / f"checkpoint-{STEPS}"
    for kind, expected in (("weight", weights), ("ema", averages)):
        distance = relative_distance(published_order(published, checkpoint_tensors(checkpoint, kind)), expected, start)
        record_property(kind, distance)
        assert distance < 1e-4 * SLACK
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-4 * SLACK)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=1e-3 * SLACK)
    exported = UNet2DConditionModel.from_pretrained(output, subfolder="unet")
    assert relative_distance(dict(exported.named_parameters()), averages, start) < 1e-4 * SLACK
