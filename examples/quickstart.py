"""From nothing to a trained text-to-image model in a few minutes on two CPU cores, with nothing downloaded.

The 1,797 handwritten digits of scikit-learn become an image folder with captions. A small but real Stable Diffusion pipeline
is built from configurations; its VAE is trained on the digits first, its text encoder stays as initialised. Then
`python -m engine.run` trains the UNet exactly as a user would, and plain diffusers draws ten images of each digit with
guidance, which a nearest-neighbour classifier that knows only the real digits has to recognise. With `--compare` it also trains
for as many steps without dropped captions, and draws more images of both models, with guidance and without.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.tools.rows import write_result
from engine.files import digest_of, write_json
from engine.picture import labelled_grid, save_png
from engine.quiet import quiet_libraries

ROOT = Path("build/quickstart")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
RESOLUTION = 32
STEPS = 700
BATCH = 64
VAE_STEPS = 300
VAE_BATCH = 32
IMAGES_PER_DIGIT = 10
COMPARED = 50  # images per digit of a comparison
EMPTY_PROMPTS = 0.1  # share of captions that are dropped in training, so that there is something to guide against
GUIDANCE = 3.0
SAMPLING_STEPS = 25  # of two passes each, one without guidance
RESULTS = Path("benchmarks/results/cpu/quickstart.json")
COMPARISON = "What do dropped captions and guidance do to the quickstart's digits? `python examples/quickstart.py --compare`"


def caption(digit: int) -> str:
    return f"a handwritten {WORDS[digit]}"


def write_images(directory: Path) -> None:
    """The digits as 32 px PNG files with a metadata.jsonl, the layout that `datasets` calls an image folder."""
    directory.mkdir(parents=True)
    digits = load_digits()
    with (directory / "metadata.jsonl").open("w") as metadata:
        for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
            small = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
            name = f"{number:04d}.png"
            small.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).save(directory / name)
            metadata.write(json.dumps({"file_name": name, "text": caption(digit)}) + "\n")


def build_tokenizer(directory: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs merge into exactly the words of the captions."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in ["a", "handwritten", *WORDS]:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            if merge not in merges:
                merges.append(merge)
                vocabulary.append("".join(merge))
            pieces[:2] = ["".join(merge)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=16)


def train_vae(images: Path) -> AutoencoderKL:
    """A VAE with 4 x 8 x 8 latents, trained on the digits; its scaling factor gives the latents unit variance."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32), norm_num_groups=4, latent_channels=4, sample_size=RESOLUTION, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    files = sorted(images.glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    data = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=VAE_STEPS)
    for _ in tqdm(range(VAE_STEPS), desc="VAE", disable=None):
        batch = data[torch.randint(len(data), (VAE_BATCH,))]
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().mean()
        loss = error + 1e-4 * posterior.kl().mean() / math.prod(posterior.mean.shape[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.sample() for part in data.split(256)])
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    return vae.eval()


def build_pipeline(directory: Path, images: Path) -> None:
    """Saves a Stable Diffusion pipeline: a trained VAE, and a text encoder and a UNet with random weights."""
    tokenizer = build_tokenizer(directory.with_name("tokenizer"))
    end = len(tokenizer) - 1
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, bos_token_id=end - 1, eos_token_id=end,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4, in_channels=4, out_channels=4, block_out_channels=(32, 64, 128), layers_per_block=1,
        norm_num_groups=16, cross_attention_dim=64, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    StableDiffusionPipeline(
        vae=train_vae(images), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(directory)  # fmt: skip


def train(model: Path, images: Path, output: Path, empty_prompts: float) -> None:
    """What a user runs."""
    command = [
        sys.executable, "-m", "engine.run", "--family", "sd",
        "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--output_dir", str(output),
        "--resolution", str(RESOLUTION), "--center_crop", "--encode_batch_size", "64",
        "--train_batch_size", str(BATCH), "--max_train_steps", str(STEPS), "--learning_rate", "2e-3",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", "50", "--snr_gamma", "5.0", "--use_ema", "--seed", "0",
        "--proportion_empty_prompts", str(empty_prompts),
        "--validation_prompts", caption(3), caption(7), "--num_validation_images", "4", "--validation_epochs", "10",
        "--checkpointing_steps", "350", "--checkpoints_total_limit", "1",
    ]  # fmt: skip
    run(command)


def run(command: list[str]) -> None:
    """Shows a command and runs it."""
    print("$", " ".join(f'"{word}"' if " " in word else word for word in ["python", *command[1:]]), flush=True)
    subprocess.run(command, check=True)


def draw(output: Path, guidance: float, count: int, adapter: Path | None = None) -> list[list[Image.Image]]:
    """So many images of each digit, by plain diffusers, with a LoRA where one is given."""
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    pipeline.set_progress_bar_config(desc="Sampling", disable=None)
    prompts = [caption(digit) for digit in range(10) for _ in range(count)]
    steps = SAMPLING_STEPS if guidance > 1 else 2 * SAMPLING_STEPS  # as many passes
    generator = torch.Generator().manual_seed(0)
    images = pipeline(prompts, guidance_scale=guidance, num_inference_steps=steps, generator=generator).images
    return [images[start : start + count] for start in range(0, len(images), count)]


def recognised(drawn: list[list[Image.Image]]) -> float:
    """The share of images that 3 nearest neighbours among the real digits take for the digit asked for."""
    digits = load_digits()
    classifier = KNeighborsClassifier(3).fit(digits.data, digits.target)
    shrunk = [
        np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float).ravel() * 16 / 255
        for images in drawn
        for image in images
    ]
    asked = np.repeat(np.arange(10), [len(images) for images in drawn])
    return float((classifier.predict(np.stack(shrunk)) == asked).mean())


def timings(output: Path) -> dict[str, float]:
    """What the training left behind about its speed."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first_steps = [0, *(line["step"] for line in lines)]
    seconds = sum(line["step_seconds"] * (line["step"] - first) for line, first in zip(lines, first_steps, strict=False))
    return {
        "train_seconds": seconds,
        "encode_seconds": json.loads((output / "shards" / "index.json").read_text())["encode_seconds"],
        "samples_per_second": STEPS * BATCH / seconds,
    }


def compare(model: Path, images: Path, output: Path) -> None:
    """Trains without dropped captions too, draws with guidance and without, and keeps what is recognised of each."""
    plain = ROOT / "trained-without-dropout"
    shutil.rmtree(plain, ignore_errors=True)
    train(model, images, plain, 0.0)
    rows = []
    for empty_prompts, of in ((0.0, plain), (EMPTY_PROMPTS, output)):
        for guidance in (1.0, GUIDANCE):
            accuracy = recognised(draw(of, guidance, COMPARED))
            rows.append({"proportion_empty_prompts": empty_prompts, "guidance_scale": guidance, "accuracy": accuracy})
            print(f"{empty_prompts:.0%} of captions dropped, guidance {guidance}: {accuracy:.1%} recognised")
    write_result(RESULTS, COMPARISON, images=10 * COMPARED, steps=STEPS, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="From nothing to a trained text-to-image model, on the CPU.")
    parser.add_argument("--compare", action="store_true", help=f"compare with a training without dropout; writes {RESULTS}")
    comparing = parser.parse_args().compare
    quiet_libraries()
    started = time.perf_counter()
    torch.manual_seed(0)
    images, model, output = ROOT / "images", ROOT / "model", ROOT / "trained"
    recipe = digest_of(Path(__file__).read_text())
    if not (ROOT / "recipe").is_file() or (ROOT / "recipe").read_text() != recipe:
        shutil.rmtree(ROOT, ignore_errors=True)
        write_images(images)
        build_pipeline(model, images)
        (ROOT / "recipe").write_text(recipe)
    shutil.rmtree(output, ignore_errors=True)
    train(model, images, output, EMPTY_PROMPTS)
    drawn = draw(output, GUIDANCE, IMAGES_PER_DIGIT)
    grid = ROOT / "grid.png"
    save_png(labelled_grid([(caption(digit), row) for digit, row in enumerate(drawn)]), grid)
    accuracy = recognised(drawn)
    timing = timings(output)
    write_json(
        ROOT / "report.json",
        {"accuracy": accuracy, **timing, "total_seconds": time.perf_counter() - started,
         "pipeline": str(output), "grid": str(grid)},
    )  # fmt: skip
    print(f"""
{accuracy:.0%} of {10 * IMAGES_PER_DIGIT} drawn digits are recognised as the digit asked for
{timing["samples_per_second"]:.0f} samples per second for {timing["train_seconds"]:.0f} s of training
after {timing["encode_seconds"]:.0f} s of encoding
pipeline  {output}
grid      {grid}
samples   {output / "samples"}
curves    {output / "curves.png"}, tensorboard --logdir {output / "logs"}
metrics   {output / "metrics.jsonl"}
report    {ROOT / "report.json"}""")
    if comparing:
        compare(model, images, output)


if __name__ == "__main__":
    main()
