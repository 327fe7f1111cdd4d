"""DreamBooth: an instance and its class in turn, each with a term of the loss; missing images of the class are drawn."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from engine.config.command_line import load
from engine.config.options import TrainConfig
from engine.data.samples.order import records_of, seed_of_stream
from engine.loop.trainer import train
from tests import objectives, reference, tiny
from tests.commands import ON_GPU
from tests.loop.runs import SLACK, checkpoint_tensors, published_order, relative_distance

STEPS, BATCH, SEED = 20, 2, 2**40 + 9
INSTANCE, CLASS = "sks dog", "a dog"


def images_of(directory: Path, count: int, size: tuple[int, int] = (16, 16)) -> Path:
    """Images and nothing else."""
    (tiny.write_images(directory, count, size) / "metadata.jsonl").unlink()
    return directory


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Three images of the instance, five of the class, and shards of both once they are built."""
    place = tmp_path_factory.mktemp("dreambooth")
    folders = {"instance_data_dir": place / "instance", "class_data_dir": place / "class"}
    for (name, folder), count in zip(folders.items(), (3, 5), strict=True):
        images_of(folder, count)
        if name == "class_data_dir":  # other pictures than those of the instance
            for path in folder.iterdir():
                Image.open(path).transpose(Image.Transpose.ROTATE_90).point(lambda value: 255 - value).save(path)
    return {name: str(folder) for name, folder in folders.items()} | {"shards_dir": str(place / "shards")}


@pytest.fixture(scope="module")
def settings(model, folders):
    """A run over both, with prior preservation."""

    def make(output: Path, **options) -> TrainConfig:
        values = {
            "family": "sd", "pretrained_model_name_or_path": str(model), "output_dir": str(output), "resolution": 16,
            "instance_prompt": INSTANCE, "with_prior_preservation": True, "class_prompt": CLASS, "num_class_images": 5,
            "train_batch_size": BATCH, "max_train_steps": 4, "seed": SEED, "learning_rate": 1e-3, "log_every": 1,
            "report_to": "none", "use_ema": True, "deterministic": ON_GPU,
        }  # fmt: skip
        return load(TrainConfig, {name: value for name, value in (values | folders | options).items() if value is not None})

    return make


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def reference_run(model, config: TrainConfig) -> tuple[dict, dict, list[tuple[float, float, float]]]:
    """Weights, averages and losses (the sum and its terms) of an independent loop, with the loss as the script computes it."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").train()
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    scheduler.register_to_config(prediction_type=config.prediction_type)
    text_encoder, tokenizer = (
        CLIPTextModel.from_pretrained(model, subfolder="text_encoder"),
        CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
    )
    data = [reference.PlainShards(Path(config.shards_dir) / name) for name in ("instance", "class")]
    with torch.no_grad():
        most = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        tokens = tokenizer([INSTANCE, CLASS], return_tensors="pt", **most)
        states = text_encoder(tokens.input_ids, return_dict=False)[0]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    rates = get_scheduler("constant", optimizer)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    losses, accumulation = [], config.gradient_accumulation_steps
    count = scheduler.config.num_train_timesteps
    for step in range(config.max_train_steps):
        summed = torch.zeros(3, dtype=torch.double)
        for part in range(accumulation):
            batches = []
            for of, shards in enumerate(data):
                turn = step * accumulation + part
                slots = list(range((2 * turn + of) * BATCH, (2 * turn + of + 1) * BATCH))
                own = torch.arange(turn * BATCH, (turn + 1) * BATCH)
                records = records_of(seed_of_stream(SEED, of), own, len(shards.images)).tolist()
                chosen = [shards.images[r][reference.choice(SEED, s, 6, len(shards.images[r]))]
                          for r, s in zip(records, slots, strict=True)]  # fmt: skip
                mean, std = (torch.stack([image[name] for image in chosen]) for name in ("latent_mean", "latent_std"))
                draw = [torch.from_numpy(reference.normals(SEED, slots, k, tuple(mean.shape[1:]))).float() for k in (0, 1)]
                timesteps = objectives.timesteps(config, SEED, slots, 2 * BATCH * accumulation, count)
                batches.append((mean + std * draw[1], draw[0], timesteps, states[of].expand(BATCH, -1, -1)))
            # As collate_fn has it: the instance's samples, then as many of the class.
            latents, noise, timesteps, conditions = (torch.cat(each) for each in zip(*batches, strict=True))
            epsilon = config.prediction_type == "epsilon"
            target = noise if epsilon else scheduler.get_velocity(latents, noise, timesteps)
            prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, conditions, return_dict=False)[0]
            (ours, prior), (wanted, wanted_prior) = prediction.chunk(2), target.chunk(2)
            prior_loss = F.mse_loss(prior, wanted_prior)
            errors = F.mse_loss(ours, wanted, reduction="none").mean([1, 2, 3])
            if config.snr_gamma is not None:
                snr = compute_snr(scheduler, timesteps.chunk(2)[0])
                errors = errors * snr.clamp(max=config.snr_gamma) / (snr if epsilon else snr + 1)
            loss = errors.mean() + config.prior_loss_weight * prior_loss
            (loss / accumulation).backward()
            summed += torch.stack([loss, errors.mean(), prior_loss]).detach().double() / accumulation
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(tuple(summed.tolist()))
    weights = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    return weights, dict(zip(weights, ema.shadow_params, strict=True)), losses


@pytest.mark.parametrize(
    "case",
    [
        {"prediction_type": "epsilon", "snr_gamma": 5.0, "gradient_accumulation_steps": 2, "prior_loss_weight": 0.5},
        {"prediction_type": "v_prediction", "snr_gamma": 5.0, "zero_stage": 2, "max_train_steps": 5},
    ],
    ids=str,
)
def test_weights_averages_and_both_terms_follow_the_script(case, settings, model, tmp_path, record_property):
    config = settings(tmp_path / "out", **({"max_train_steps": STEPS} | case))
    assert train(config) == 0
    weights, averages, losses = reference_run(model, config)
    start = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    for kind, expected in (("weight", weights), ("ema", averages)):
        ours = published_order(start, checkpoint_tensors(tmp_path / "out" / f"checkpoint-{config.max_train_steps}", kind))
        distance = relative_distance(ours, expected, dict(start.named_parameters()))
        record_property(kind, distance)
        assert distance < 1e-4 * SLACK
    logged = [[line[name] for name in ("loss", "loss/instance", "loss/class")] for line in lines(tmp_path / "out")]
    for ours, expected in zip(logged, losses, strict=True):
        assert ours == pytest.approx(expected, rel=1e-4 * SLACK)
