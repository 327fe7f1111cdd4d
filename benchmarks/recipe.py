"""What does a user gain over the diffusers recipe? Both train the same model on the same images, in turns, in one run.

    python -m benchmarks.recipe [--model DIR] [--images DIR] [--batch 64] [--steps 60] [--rounds 3]

The recipe is the plain loop of the text-to-image script: images decoded and resized by a DataLoader, VAE and text encoder in
every step, noise drawn and stored, EMA and AdamW by diffusers and torch, and the loss read back after every step; on a GPU
under autocast to bf16, with TF32, channels last and loading in worker processes. The engine's side is `python -m engine.run` on
the same options, on a GPU with `--compile`, with the encoding of its shards counted apart. Rates are over all steps but the
first ten of each turn. Defaults are what `make quickstart` leaves behind; `benchmarks.step` compares at full size.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, write_result

WARM_UP = 10
LEARNING_RATE, GAMMA = 2e-3, 5.0


def recipe_rate(model: Path, images: Path, resolution: int, batch: int, steps: int) -> float:
    """Samples per second of the plain loop; in fp32 on a CPU, as the engine's side."""
    import datasets
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel, compute_snr
    from transformers import CLIPTextModel, CLIPTokenizer

    from engine.data.transforms import RESAMPLING, crop_centre, resize_short_side, to_tensor

    datasets.disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    gpu = device.type == "cuda"
    frozen_dtype = torch.bfloat16 if gpu else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = True
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device, frozen_dtype).requires_grad_(False)
    text_encoder: torch.nn.Module = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    text_encoder.to(device, frozen_dtype).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").to(device).train()
    if gpu:
        unet.to(memory_format=torch.channels_last)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = get_scheduler("constant", optimizer)
    dataset = datasets.load_dataset("imagefolder", data_files={"train": str(images / "**")}, cache_dir=images.parent / "cache")

    def prepare(examples):
        pixels = [
            to_tensor(crop_centre(resize_short_side(image.convert("RGB"), resolution, RESAMPLING["lanczos"]), resolution))
            for image in examples["image"]
        ]
        tokens = tokenizer(examples["text"], max_length=tokenizer.model_max_length, padding="max_length", truncation=True)
        return {"pixels": pixels, "tokens": [torch.tensor(ids) for ids in tokens.input_ids]}

    loader = torch.utils.data.DataLoader(
        dataset["train"].with_transform(prepare), batch_size=batch, shuffle=True, drop_last=True, num_workers=8 if gpu else 0
    )
    step, started = 0, time.perf_counter()
    while True:
        for examples in loader:
            latents = vae.encode(examples["pixels"].to(device, frozen_dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), device=device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            states = text_encoder(examples["tokens"].to(device), return_dict=False)[0]
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                prediction = unet(noisy, timesteps, states, return_dict=False)[0]
            snr = compute_snr(scheduler, timesteps)
            weights = torch.stack([snr, GAMMA * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
            loss = torch.nn.functional.mse_loss(prediction.float(), noise.float(), reduction="none")
            loss = (loss.mean(dim=(1, 2, 3)) * weights).mean()
            loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            step += 1
            if step == WARM_UP:
                started = time.perf_counter()
            if step == WARM_UP + steps:
                return steps * batch / (time.perf_counter() - started)


def engine_rate(model: Path, images: Path, shards: Path, resolution: int, batch: int, steps: int) -> tuple[float, float]:
    """Samples per second of the engine, and the seconds that encoding took (0 where the shards exist)."""
    on_gpu = ["--mixed_precision", "bf16", "--compile", "--allow_tf32"] if torch.cuda.is_available() else []
    with tempfile.TemporaryDirectory() as output:
        subprocess.run(
            [
                sys.executable, "-m", "engine.run", "--family", "sd", "--pretrained_model_name_or_path", str(model),
                "--train_data_dir", str(images), "--shards_dir", str(shards), "--output_dir", output,
                "--resolution", str(resolution), "--center_crop", "--train_batch_size", str(batch),
                "--max_train_steps", str(WARM_UP + steps), "--learning_rate", str(LEARNING_RATE), "--snr_gamma", str(GAMMA),
                "--use_ema", "--seed", "0", "--log_every", str(WARM_UP), "--report_to", "none",
                "--checkpointing_steps", "1000000", *on_gpu,
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()][1:]
        encode_seconds = json.loads((shards / "index.json").read_text())["encode_seconds"]
    return len(lines) * batch / sum(line["step_seconds"] for line in lines), encode_seconds


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.recipe", description=__doc__.splitlines()[0])
    quickstart = Path("build/quickstart")
    parser.add_argument("--model", type=Path, default=quickstart / "model")
    parser.add_argument("--images", type=Path, default=quickstart / "images")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="measured steps per turn, a multiple of 10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "recipe-cpu.json")
    parser.add_argument("--side", choices=["recipe"], help="run one turn of the recipe and print its rate")
    options = parser.parse_args()
    if options.side:
        print(recipe_rate(options.model, options.images, options.resolution, options.batch, options.steps))
        return 0

    shards = Path(tempfile.mkdtemp()) / "shards"
    ours, theirs, encode_seconds = [], [], 0.0
    for _ in range(options.rounds):
        turn = subprocess.run([sys.executable, "-m", "benchmarks.recipe", "--side", "recipe", *sys.argv[1:]],
                              check=True, stdout=subprocess.PIPE, text=True)  # fmt: skip
        theirs.append(float(turn.stdout.split()[-1]))
        rate, encode_seconds = engine_rate(
            options.model, options.images, shards, options.resolution, options.batch, options.steps
        )
        ours.append(rate)
        print(f"recipe {theirs[-1]:8.1f} samples/s   engine {ours[-1]:8.1f} samples/s   ratio {ours[-1] / theirs[-1]:.2f}")
    shutil.rmtree(shards.parent)
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    write_result(
        options.output, __doc__, batch=options.batch, resolution=options.resolution, measured_steps=options.steps,
        recipe_samples_per_second=theirs, engine_samples_per_second=ours, encode_seconds=encode_seconds,
        median_ratio=statistics.median(ratios), ratios=ratios,
    )  # fmt: skip
    print(f"median ratio {statistics.median(ratios):.2f}, written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
