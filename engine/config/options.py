"""Every option of a run: its name, type, default and meaning.

The names, defaults and meanings are those of the diffusers training scripts; options that only this engine has are added
beside them. One pydantic model is the single source for the command line, the TOML file, `--help` and `config.toml`.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from engine.catalogue import DECODER, FAMILIES, IMAGE_ENCODER, MODEL, PRIOR, FamilyName
from engine.config.optimizers import OPTIMIZERS, OTHER_NAMES
from engine.config.schema import REQUIRED, defaults_of, only, option, options_lacking, published, sd_differs
from engine.storage import is_remote, shown

KANDINSKY = ("kandinsky-prior", "kandinsky-decoder")
CAPTIONED = [family for family, entry in FAMILIES.items() if entry.captioned]
SPATIAL = [family for family in FAMILIES if family != "kandinsky-prior"]  # whose samples are images, or latents of them
CAPTION_VARIANTS = 16  # texts stored of a caption: 2.5 KB of tokens
SHUFFLE_WINDOW = 64  # shards; of 1,024 records each as many as they take to mix like all of a data set of 65,536
OFFSET = 0.1  # of the noise, that the DreamBooth script adds by --offset_noise
XFORMERS = [family for family, entry in FAMILIES.items() if entry.xformers]


def recipe_in(values: Mapping[str, Any]) -> str:
    """Which script's defaults options by name have: one of `RECIPES`, or "" for those of text to image."""
    dreambooth = values.get("instance_data_dir") or values.get("with_prior_preservation")
    return "_".join(["dreambooth"] * bool(dreambooth) + ["lora"] * bool(values.get("lora_rank")))


def _of_several_folders(values: dict[str, Any]) -> dict[str, Any]:
    """Values in which several folders of `--train_data_dir` are a data set each."""
    folders = values.get("train_data_dir")
    if not isinstance(folders, list) or not folders:
        return values
    if len(folders) == 1:
        return values | {"train_data_dir": folders[0]}
    named = {name: values[name] for name in ("dataset_name", "dataset_config_name") if values.get(name)}
    tables = [{"train_data_dir": folder, **named} for folder in folders]
    return values | dict.fromkeys(["train_data_dir", *named]) | {"data_sets": tables}


def _of_the_optimizer(values: dict[str, Any]) -> dict[str, Any]:
    """Values with the optimizer by its name here, and both names of 8-bit AdamW where one stands."""
    if isinstance(given := values.get("optimizer"), str):
        values = values | {"optimizer": OTHER_NAMES.get(name := given.strip().lower(), name)}
    if values.get("use_8bit_adam") is True and values.get("optimizer") is None:
        return values | {"optimizer": "adamw8bit"}
    return {"use_8bit_adam": True} | values if values.get("optimizer") == "adamw8bit" else values


class CacheConfig(BaseModel):
    """What shapes the content of the latent shards."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    # Of DreamBooth's class, whose images are drawn without any, whatever the instance has.
    _masks_may_lack: bool = PrivateAttr(default=False)

    family: FamilyName = option(
        ...,
        "Which model to train: sd (Stable Diffusion's UNet), kandinsky-prior or kandinsky-decoder (Kandinsky 2.2), "
        "wuerstchen (stage C).",
        "model",
    )
    pretrained_model_name_or_path: str = option(
        published(MODEL),
        "Directory of a diffusers pipeline, its name on the Hugging Face hub, or a single file (.safetensors, .ckpt) of Stable "
        "Diffusion 1.x or 2.x.",
        "model",
    )
    pretrained_prior_model_name_or_path: str = option(
        published(PRIOR),
        "Directory of the prior pipeline, or its name on the hub.",
        "model",
    )
    pretrained_decoder_model_name_or_path: str = option(
        published(DECODER),
        "Directory of the decoder pipeline, or its name on the hub. The priors need it only to draw images.",
        "model",
    )
    pretrained_image_encoder_name_or_path: str = option(
        published(IMAGE_ENCODER),
        "The EfficientNet-V2-S image encoder: a .safetensors or .pt file, or a repository on the hub that holds "
        "model_v2_stage_b.pt.",
        "model",
    )
    revision: str | None = option(only(("sd",), None), "Revision of the pretrained model on the hub.", "model")
    variant: str | None = option(
        None,
        "Variant of the pretrained models' files, for example fp16; parts that have none of it are read as they are.",
        "model",
    )
    original_config: str | None = option(
        only(("sd",), None),
        "For a single file: the YAML of the original training program. Default: recognised from the file as SD 1.x or 2.x.",
        "model",
    )
    tokenizer_name: str | None = option(
        only(("sd",), None),
        "For a single file, which holds no tokenizer: its directory, or its name on the hub. Default: CLIP's, from the hub.",
        "model",
    )
    cache_dir: str | None = option(None, "Where downloaded models and data sets are kept.", "model")

    dataset_name: str | None = option(
        None, "Data set on the hub, or a local folder or file: as --train_data_dir, or parquet, or a table of images.", "data"
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set, if it has several.", "data")
    train_data_dir: str | None = option(
        None,
        "Folder of images with `metadata.jsonl` or `metadata.csv` (columns `file_name` and the caption column), or with a .txt "
        "file beside each image; archives (.zip, .tar) of the same. With --dataset_name: its data directory.",
        "data",
    )
    instance_data_dir: str | None = option(
        None,
        "Folder of the images of what DreamBooth (arXiv:2208.12242) teaches, in the place of --train_data_dir.",
        "DreamBooth",
    )
    instance_prompt: str | None = option(
        only(CAPTIONED, None), "Caption of all of them, whatever lies beside them: a rare word and the class.", "DreamBooth"
    )
    with_prior_preservation: bool = option(
        False,
        "Train on as many images of the class, too: --train_batch_size of each at a time, and the loss is the sum of both "
        "means. Without data directories on the shards `instance` and `class` in --shards_dir.",
        "DreamBooth",
    )
    class_data_dir: str | None = option(
        None, "Folder of the images of the class; those that are missing are drawn with the pipeline first.", "DreamBooth"
    )
    class_prompt: str | None = option(
        None, "What they are drawn of, and the caption of all of them where captions are trained on.", "DreamBooth"
    )
    num_class_images: int = option(
        100,
        "How many of them are trained on, at the most, and how many there are once the missing are drawn.",
        "DreamBooth",
        ge=1,
    )
    sample_batch_size: int = option(4, "Images of the class that a process draws at a time.", "DreamBooth", ge=1)
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "Precision in which they are drawn. Default: fp16 on a GPU, else fp32; `no` is the default, too.", "DreamBooth"
    )
    prompt: str | None = option(only(CAPTIONED, None), "Caption of every image of a data set, whatever lies beside it.", "data")
    image_column: str = option("image", "Column that holds the image.", "data")
    mask_column: str | None = option(
        only(SPATIAL, None),
        "Column that holds a mask of each image; for folders without a table the end of the names of masks beside the images "
        "(IMAGE-mask.png for mask). White is trained, black is not, grey a little; images without a mask are trained whole.",
        "data",
    )
    caption_column: str = option(only(CAPTIONED, "text"), "Column that holds a caption or a list of captions.", "data")
    keep_empty_captions: bool = option(
        only(CAPTIONED, False),
        "Train without a caption on images whose caption is empty, or missing in their row of a table; else they are refused.",
        "data",
    )
    caption_prefix: str | None = option(
        only(CAPTIONED, None), "Text put before every caption, with a space between where it ends with none.", "data"
    )
    caption_template: list[str] | None = option(
        only(CAPTIONED, None),
        "Text that every caption is put into, where it holds {caption}; several are taken in turn (--caption_variants).",
        "data",
    )
    shuffle_tags: bool = option(
        only(CAPTIONED, False),
        "Store captions with their tags, which commas separate, in several random orders; see --caption_variants.",
        "data",
    )
    keep_tokens: int = option(
        only(CAPTIONED, 0), "With --shuffle_tags, how many tags stay first, as they are (kohya's name).", "data", ge=0
    )
    caption_variants: int | None = option(
        only(CAPTIONED, None),
        "How many texts are stored of each caption with --shuffle_tags or several templates; each is drawn as often. "
        f"Default: {CAPTION_VARIANTS} with --cache_text tokens; with states, which take much more room, it must be given.",
        "data",
        ge=1,
        le=1024,
    )
    max_train_samples: int | None = option(
        None, "Train on this many samples of each data set, drawn by --subset_seed, instead of all.", "data", ge=1
    )
    subset_seed: int | None = option(
        None, "Seed by which --max_train_samples draws. Default: --seed, 0 where that is not given.", "data", ge=0, lt=2**63
    )
    resolution: int = option(
        512,
        "Images are resized and cropped to this many pixels on both sides (kandinsky-prior: the image encoder decides, and "
        "only validation images have this size).",
        "data",
        ge=8,
    )
    center_crop: bool = option(only(("sd",), False), "Crop the centre of each image instead of random places.", "data")
    random_flip: bool = option(only(("sd",), False), "Show each image mirrored half of the time.", "data")
    random_crops: int = option(
        only(("sd",), 4),
        "Random crops stored per image without --center_crop (an image that is already square needs one).",
        "data",
        ge=1,
    )
    image_interpolation_mode: Literal["nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"] = option(
        only(("sd",), "lanczos"), "How images are resized.", "data", {"dreambooth": only(("sd",), "bilinear")}
    )
    buckets: bool | list[str] = option(
        only(SPATIAL, False),
        "Bring each image to the size of the nearest ratio instead of a square: of those given (WIDTHxHEIGHT ...), or of sizes "
        "with about as many pixels as a square of --resolution.",
        "data",
    )
    bucket_step: int = option(
        only(SPATIAL, 64) | {"wuerstchen": 128}, "Both sides of a size that --buckets makes are multiples of it.", "data", ge=1
    )
    bucket_area: int | None = option(
        only(SPATIAL, None),
        "Pixels of a size that --buckets makes, at the most. Default: the square of --resolution.",
        "data",
        ge=1,
    )
    bucket_max_ratio: float = option(
        only(SPATIAL, 4.0), "How often --buckets lets the short side of a size go into the long one.", "data", ge=1, le=100
    )
    image_mode: Literal["script", "scaled"] = option(
        "script",
        "Images of more than 8 bits per pixel: as the scripts read them, above 255 white; or scaled to 8 bits.",
        "data",
    )
    background: str = option(
        "none",
        "What transparent images are laid on: white, black or R,G,B. Default: nothing, so that the colours hidden there show, "
        "as in the scripts.",
        "data",
    )
    max_upscale: float = option(64.0, "Refuse images that would have to be enlarged more than so many times.", "data", gt=0)
    metadata_encoding: str = option("utf-8", "Encoding of tables and caption files, for example cp1252.", "data")
    follow_links: bool = option(False, "Follow links that lead out of the data set's folder.", "data")
    strict: bool = option(False, "Stop at the first image or caption that cannot be used, instead of skipping it.", "data")

    # What is trained decides the recipe, and what shards hold of captions.
    lora_rank: int | None = option(
        None,
        "Train adapters (LoRA, arXiv:2106.09685) of this rank, and not the weights of the model, which stay as they are.",
        "adapters",
        aliases=["rank"],
        ge=1,
    )
    train_text_encoder: bool = option(
        only(("sd",), False),
        "Train the text encoder too, at --text_encoder_lr; the shards hold tokens (--cache_text tokens, the default then).",
        "model",
    )
    placeholder_token: str | None = option(
        only(("sd",), None),
        "Train a new token of this name (textual inversion, arXiv:2208.01618), and nothing else: captions hold it, for example "
        "<cat-toy>, and learned_embeds.safetensors is the result. The shards hold tokens.",
        "model",
        min_length=1,
    )
    num_vectors: int = option(only(("sd",), 1), "How many vectors --placeholder_token stands for.", "model", ge=1, le=75)
    cache_text: Literal["states", "tokens"] = option(
        only(CAPTIONED, "states"),
        "What shards hold of a caption: the states that the text encoder makes of it; or its tokens, some hundred bytes, which "
        "the text encoder reads in every step, as it must where it is trained itself.",
        "data",
    )
    pre_compute_text_embeddings: bool = option(
        only(CAPTIONED, False), "Accepted from the scripts; so it is always with --cache_text states.", "data"
    )
    data_sets: list[dict[str, Any]] | None = option(None, "Several data sets, each a [[data]] table of the TOML file.", None)
    shards_dir: str | None = option(
        None,
        "Directory of the latent shards, built when absent; or the address of one that is read where it lies: https://, s3://, "
        "gs://, hf:// or another that fsspec knows. Default: `shards` in the output directory.",
        "data",
    )
    shard_records: int = option(1024, "Source samples per shard.", "data", ge=1, le=2**24)
    encode_batch_size: int = option(16, "Images encoded at a time while the shards are built.", "data", ge=1)
    dataloader_num_workers: int = option(
        0, "Threads that decode images while the shards are built; 0 decodes in the main thread.", "data", ge=0
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "Precision of weights, activations and shards; fp32 master weights are always kept.", "precision"
    )
    seed: int | None = option(
        None, "Seed of the run; drawn at random, and recorded, when not given.", "training", ge=0, lt=2**63
    )
    output_dir: str = option(
        {"sd": "sd-model-finetuned"}
        | only(KANDINSKY, "kandi_2_2-model-finetuned")
        | {"wuerstchen": "wuerstchen-model-finetuned"},
        "Where the trained pipeline, checkpoints and metrics go.",
        "output",
        {
            "lora": {"sd": "sd-model-finetuned-lora", "wuerstchen": "wuerstchen-model-finetuned-lora"}
            | only(KANDINSKY, "kandi_2_2-model-finetuned-lora"),
            "dreambooth": "dreambooth-model",
            "dreambooth_lora": "lora-dreambooth-model",
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_family(cls, values: dict[str, Any]) -> dict[str, Any]:
        family = str(values.get("family"))  # whatever it is; the field itself refuses what is no family
        defaults = defaults_of(cls, family, recipe_in(values))
        if values.get("train_text_encoder") or values.get("placeholder_token"):
            defaults["cache_text"] = "tokens"
        values = _of_several_folders(values)
        values = _of_the_optimizer(values)
        if (optimizer := str(values.get("optimizer"))) in OPTIMIZERS:
            defaults |= OPTIMIZERS[optimizer].defaults
        for name in ("caption_template", "validation_prompts", "lora_targets"):
            if isinstance(values.get(name), str):
                values = values | {name: [values[name]]}
        if values.get("offset_noise") is True:
            defaults["noise_offset"] = OFFSET
        return {name: value for name, value in defaults.items() if value is not REQUIRED} | values

    @field_validator("buckets", mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        parts = [part for text in value for part in str(text).split(",")] if isinstance(value, list) else [str(value)]
        found = [re.fullmatch(r"\s*([1-9]\d{0,5})\s*[xX]\s*([1-9]\d{0,5})\s*", part) for part in parts]
        if not (found and all(found)):
            raise PydanticCustomError("size", "give sizes as WIDTHxHEIGHT, for example 640x384, or no value to have them made")
        return [f"{size[1]}x{size[2]}" for size in found if size]

    @property
    def recipe(self) -> str:
        """Which script's defaults the options have: one of `RECIPES`, or "" for those of text to image."""
        return recipe_in(dict(self))

    @property
    def source(self) -> str | None:
        """What names the images and captions, None where there are only shards."""
        return self.dataset_name or self.train_data_dir

    @property
    def is_dreambooth(self) -> bool:
        """Whether the data sets are the images of an instance and of its class."""
        return self.recipe.startswith("dreambooth")

    @property
    def varies_captions(self) -> bool:
        """Whether one caption becomes several texts."""
        return self.shuffle_tags or len(self.caption_template or ()) > 1

    @property
    def stored_variants(self) -> int:
        """How many texts are stored of each caption."""
        return (self.caption_variants or CAPTION_VARIANTS) if self.varies_captions else 1

    @property
    def sample_seed(self) -> int:
        """By which `--max_train_samples` draws: the same for a command given twice, also without a seed."""
        return self.subset_seed if self.subset_seed is not None else self.seed or 0

    @property
    def background_color(self) -> tuple[int, int, int] | None:
        """What `background` means; None for nothing.

        Raises:
            ValueError: it means nothing that is known.
        """
        known = {"none": None, "white": (255, 255, 255), "black": (0, 0, 0)}
        if self.background in known:
            return known[self.background]
        red, green, blue = (int(part) for part in self.background.split(","))
        if not all(0 <= value <= 255 for value in (red, green, blue)):
            raise ValueError(self.background)
        return red, green, blue

    @property
    def shards_address(self) -> str | None:
        """Where the shards lie, if not on a disk; secrets included."""
        return self.shards_dir if self.shards_dir and is_remote(self.shards_dir) else None

    @property
    def shards_place(self) -> str:
        """Where the shards lie, for people to read."""
        return shown(self.shards_address) if self.shards_address else str(self.shards_path)

    @property
    def shards_path(self) -> Path:
        return Path(self.shards_dir) if self.shards_dir else Path(self.output_dir) / "shards"


class TrainConfig(CacheConfig):
    """Every option of `python -m engine.run`."""

    non_ema_revision: str | None = option(
        only(("sd",), None),
        "Revision of the trained weights, when the non-EMA ones are kept apart. Default: --revision.",
        "model",
    )
    initializer_token: str | None = option(
        only(("sd",), None), "A word, one token, whose vector --placeholder_token begins with.", "model"
    )
    gradient_checkpointing: bool = option(
        only(("sd", "kandinsky-decoder", "wuerstchen"), False),
        "Recompute activations in the backward pass to save memory.",
        "model",
    )
    enable_xformers_memory_efficient_attention: bool = option(
        only(XFORMERS, False), "The scripts' name of --attention xformers.", "model"
    )
    attention: Literal["auto", "flash", "cudnn", "efficient", "xformers"] = option(
        "auto",
        "Kernel of attention: auto chooses by card and shape, another is refused where it cannot run a shape of the model "
        "(xformers: sd, kandinsky-decoder only).",
        "model",
    )
    compile: bool = option(False, "Compile the trained model with torch.compile.", "model")
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = option(
        "default", "With --compile, how long to search: max-autotune times several kernels for each matrix product.", "model"
    )
    compile_cache_dir: str | None = option(
        None, "Where compiled code is kept, so that a restart does not compile again. Default: torch's temporary one.", "model"
    )

    cuda_graphs: Literal["auto", "on", "off"] = option(
        "auto",
        "Capture the training step as CUDA graphs: auto captures wherever it is possible (with several processes, where that "
        "is faster than reductions that overlap the backward pass), on refuses to run where it is not. A capture that fails "
        "ends the run.",
        "model",
    )

    train_batch_size: int = option(
        sd_differs(16, 1),
        "Samples per process and micro-batch.",
        "training",
        {"dreambooth": only(("sd",), 4), "dreambooth_lora": only(("sd",), 4)},
        ge=1,
    )
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.", "training", ge=1)
    num_train_epochs: int = option(
        100,
        "Passes over the data, when --max_train_steps is not given.",
        "training",
        {"dreambooth": 1, "dreambooth_lora": 1},
        ge=1,
    )
    max_train_steps: int | None = option(None, "Optimizer steps in all; overrides --num_train_epochs.", "training", ge=1)
    global_batch_size: int | None = option(
        None,
        "Samples per optimizer step over all processes, those of DreamBooth's class included; as many micro-batches add up as "
        "that takes. Instead of --gradient_accumulation_steps.",
        "training",
        ge=1,
    )
    gradient_accumulation_dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None,
        "Precision in which micro-batches add up. Default: fp32, with --zero_stage 1 the precision of the weights.",
        "training",
    )

    zero_stage: int = option(
        0,
        "DeepSpeed ZeRO stage: 0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.",
        "sharding",
        ge=0,
        le=3,
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = option(
        "none",
        "Keep masters, moments and the moving average in host memory, or in files under --nvme_path mapped into it, and step "
        "there.",
        "sharding",
    )
    offload_parameters: bool = option(False, "With --zero_stage 3, keep the sharded weights in host memory.", "sharding")
    nvme_path: str | None = option(None, "Directory on a fast disk for --offload_optimizer nvme.", "sharding")
    deepspeed_config: str | None = option(
        None,
        "JSON file of further DeepSpeed options, merged with the engine's own; what contradicts the other options is refused.",
        "sharding",
    )

    learning_rate: float = option(
        1e-4, "Learning rate after warm-up.", "optimizer", {"dreambooth": 5e-6, "dreambooth_lora": 5e-4}, ge=0
    )
    text_encoder_lr: float | None = option(
        only(("sd",), None), "Learning rate of the text encoder. Default: --learning_rate.", "optimizer", ge=0
    )
    scale_lr: bool = option(False, "Multiply the learning rate by accumulation, batch size and processes.", "optimizer")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        option("constant", "Schedule of the learning rate.", "optimizer")
    )
    lr_warmup_steps: int = option(500, "Warm-up in optimizer steps, for the schedules that warm up.", "optimizer", ge=0)
    lr_num_cycles: int = option(1, "How often cosine_with_restarts falls from the highest rate.", "optimizer", ge=1)
    lr_power: float = option(1.0, "Power of polynomial.", "optimizer", gt=0, le=100)
    layer_lr_decay: float = option(
        1.0,
        "Learning rate of a layer (a block of the model) over that of the next one: those nearest to the output learn at the "
        "whole rate, those before ever slower.",
        "optimizer",
        gt=0,
        le=1,
    )
    lr_of: list[str] | None = option(
        None,
        "PATTERN=RATE: weights that learn at another rate, by their names in the published model; * stands for any letters, a "
        "module for all in it. The first pattern that a weight fits counts.",
        "optimizer",
    )
    freeze: list[str] | None = option(
        None, "Weights that are not trained, by patterns of their names as --lr_of takes them.", "optimizer"
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "muon", "schedulefree_adamw"] = option(
        "adamw",
        "Optimizer. lion wants a rate 3 to 10 times lower than AdamW's, and a weight decay as much higher; prodigy finds the "
        "rate, of which --learning_rate (1 by default) is a factor; schedulefree_adamw needs no schedule but a warm-up, and "
        "saves the average that is part of it; adafactor's rate (0.01 by default) is relative to the size of the weights.",
        "optimizer",
    )
    use_8bit_adam: bool = option(False, "The scripts' name of --optimizer adamw8bit.", "optimizer")
    adam_beta1: float = option(0.9, "Decay of the first moment, of whatever optimizer has one.", "optimizer", ge=0, lt=1)
    adam_beta2: float = option(
        0.999, "Decay of the second moment; with --optimizer lion of its only one, 0.99 by default.", "optimizer", ge=0, lt=1
    )
    adam_weight_decay: float = option(sd_differs(1e-2, 0.0), "Weight decay.", "optimizer", ge=0)
    adam_epsilon: float = option(
        1e-8,
        "What is added to the root of the second moment: AdamW's epsilon, and Muon's, Prodigy's and schedule-free AdamW's.",
        "optimizer",
        gt=0,
    )
    max_skipped_steps: int = option(
        10, "Stop once so many steps were skipped because a loss or gradient was not finite.", "optimizer", ge=0
    )
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this global norm; 0 leaves them as they are.", "optimizer", ge=0
    )
    gradient_noise_scale: bool = option(
        False,
        "Log the simple noise scale (arXiv:1812.06162), the number of samples per step beyond which more help less, from the "
        "gradients of micro-batches and of whole steps.",
        "optimizer",
    )
    use_ema: bool = option(False, "Keep an exponential moving average of the weights, and export it.", "optimizer")
    offload_ema: bool = option(False, "Keep the moving average in host memory between steps.", "optimizer")
    set_grads_to_none: bool = option(False, "Accepted from the scripts; gradients are always freed.", "optimizer")
    foreach_ema: bool = option(False, "Accepted from the scripts; the moving average is always updated that way.", "optimizer")

    lora_alpha: float | None = option(
        None, "What adapters give is multiplied by this over the rank. Default: the rank, so by 1.", "adapters", gt=0
    )
    lora_targets: list[str] = option(
        only(FAMILIES, ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"])
        | {"sd": ["to_k", "to_q", "to_v", "to_out.0"]},
        "Which layers get adapters: the ends of their names, in which * stands for any letters; all-linear and convolutions "
        "stand for all of a kind.",
        "adapters",
    )
    lora_dropout: float = option(0.0, "Dropout of what adapters are given.", "adapters", ge=0, lt=1)
    lora_init: Literal["gaussian", "kaiming"] = option(
        only(FAMILIES, "gaussian") | {"wuerstchen": "kaiming"},
        "How the first matrix of an adapter begins, the second being zero: normal with deviation 1 / rank, or as linear ones.",
        "adapters",
    )
    use_dora: bool = option(
        False, "Train DoRA (arXiv:2402.09353), adapters with magnitudes of the weights beside them.", "adapters"
    )
    base_precision: Literal["bf16", "fp8", "int8", "nf4"] | None = option(
        None,
        "Precision in which the frozen linear layers are kept beside adapters; convolutions stay in that of the run. Needs "
        "--mixed_precision bf16 or fp16. Default: that of the run.",
        "adapters",
    )
    lora_weights: str | None = option(
        None,
        "Start from this adapter: a file or folder in the form of diffusers, kohya or PEFT. Layers and alphas are its own, and "
        "--lora_rank is to be its rank.",
        "adapters",
    )
    save_format: Literal["diffusers", "kohya", "peft"] = option(
        "diffusers",
        "The adapter's form in the output directory: diffusers' (pytorch_lora_weights.safetensors), kohya's, as web interfaces "
        "read it (DIR.safetensors), or PEFT's (adapter_model.safetensors with its configuration).",
        "adapters",
    )

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(
        only(("sd",), None), "What the model predicts. Default: as the pretrained scheduler says.", "objective"
    )
    rescale_betas_zero_snr: bool = option(
        only(("sd",), False),
        "Rescale the noise schedule so that its last timestep is pure noise (arXiv:2305.08891); needs --prediction_type "
        "v_prediction or sample. The pipeline samples by the same schedule.",
        "objective",
    )
    timestep_sampling: Literal["uniform", "stratified", "logit_normal", "mode", "cosmap"] = option(
        "uniform",
        "How timesteps are drawn: uniform; stratified, one from each of as many equal parts of the schedule as the global "
        "batch has samples; or by a density of arXiv:2403.03206.",
        "objective",
    )
    logit_mean: float = option(0.0, "Mean of logit_normal; a positive one draws more noisy timesteps.", "objective")
    logit_std: float = option(1.0, "Standard deviation of logit_normal.", "objective", gt=0)
    mode_scale: float = option(
        1.29, "Scale of mode; a positive one draws more of the middle.", "objective", ge=-1, le=2 / (math.pi - 2)
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = option(
        "none", "Which timesteps --timestep_bias_multiplier is for.", "objective"
    )
    timestep_bias_multiplier: float = option(1.0, "Draw these timesteps so many times as often.", "objective", gt=0)
    timestep_bias_portion: float = option(0.25, "Which part of the timesteps is earlier or later.", "objective", gt=0, le=1)
    timestep_bias_begin: float = option(0.0, "The first timestep of range.", "objective", ge=0)
    timestep_bias_end: float | None = option(
        None, "The end of range, exclusive. Default: that of the schedule.", "objective", ge=0
    )
    min_timestep: float | None = option(
        None,
        "The first timestep that is drawn, as the model takes them: integers from 0, wuerstchen's real numbers from 0 to 1.",
        "objective",
        ge=0,
    )
    max_timestep: float | None = option(
        None, "The end of the timesteps that are drawn, exclusive. Default: that of the schedule.", "objective", gt=0
    )
    loss_weighting: Literal["min_snr", "soft_min_snr", "p2", "debiased", "edm"] | None = option(
        None,
        "Weights of the loss by timestep: Min-SNR (arXiv:2303.09556), Soft-Min-SNR (arXiv:2401.11605), P2 (arXiv:2204.00227), "
        "debiased estimation (arXiv:2310.08442), EDM (arXiv:2206.00364). Default: min_snr with --snr_gamma, else none.",
        "objective",
    )
    snr_gamma: float | None = option(
        None,
        "Gamma of the Min-SNR loss weights (arXiv:2303.09556), which it switches on, or of Soft-Min-SNR; 5.0 is recommended, "
        "and what --loss_weighting min_snr or soft_min_snr takes without it.",
        "objective",
        gt=0,
    )
    p2_gamma: float = option(1.0, "Gamma of P2's weights.", "objective", ge=0)
    p2_k: float = option(1.0, "k of P2's weights.", "objective", gt=0)
    edm_sigma_data: float = option(0.5, "EDM's sigma_data, the standard deviation of the data.", "objective", gt=0)
    min_loss_weight: float = option(0.0, "No timestep weighs less; Min-SNR leaves pure noise no weight.", "objective", ge=0)
    loss_type: Literal["l2", "huber", "smooth_l1"] = option(
        "l2",
        "The loss of an element: its error's square, or a pseudo-Huber loss (arXiv:2403.16728), for smooth_l1 divided by its "
        "c.",
        "objective",
    )
    huber_c: float = option(
        0.1, "c of the Huber losses: at the last timestep, where it is scheduled.", "objective", ge=1e-6, le=1e6
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", "How c grows towards the first timestep, to 1: by timestep, or by signal-to-noise ratio.", "objective"
    )
    noise_offset: float = option(
        only(("sd",), 0.0), "Scale of an offset that the noise of a channel shares.", "objective", ge=0
    )
    offset_noise: bool = option(only(("sd",), False), "The DreamBooth script's name of --noise_offset 0.1.", "objective")
    input_perturbation: float = option(
        only(("sd",), 0.0),
        "Scale of extra noise in the input that the target does not see; 0.1 is recommended.",
        "objective",
        ge=0,
    )
    pyramid_noise_discount: float = option(
        only(SPATIAL, 0.0),
        "Add coarser noise, of half the side at every level, to the noise: so much of the level before; 0.3 is usual.",
        "objective",
        ge=0,
        le=1,
    )
    pyramid_noise_iterations: int = option(
        only(SPATIAL, 6), "Coarser levels of pyramid noise, at most down to a single element.", "objective", ge=1
    )
    dream_training: bool = option(
        only(("sd",), False), "Train with DREAM (arXiv:2312.00210): one extra forward pass.", "objective"
    )
    dream_detail_preservation: float = option(only(("sd",), 1.0), "DREAM's detail preservation factor p.", "objective", gt=0)
    prior_loss_weight: float = option(
        1.0,
        "With --with_prior_preservation, what the loss of the class counts; --snr_gamma and --loss_weighting weigh the "
        "instance's alone, as in the script.",
        "DreamBooth",
        ge=0,
        le=1e9,
    )
    proportion_empty_prompts: float = option(
        only(CAPTIONED, 0.0),
        "Share of the samples that are trained with the empty caption in place of theirs, which sampling guides against; 0.1 "
        "is usual.",
        "objective",
        ge=0,
        le=1,
    )
    proportion_empty_images: float = option(
        only(("kandinsky-decoder",), 0.0),
        "Share of the samples that are trained with the embedding of an empty image in place of theirs, which sampling guides "
        "against; 0.1 is usual.",
        "objective",
        ge=0,
        le=1,
    )

    allow_tf32: bool = option(False, "Allow TF32 matrix products on Ampere GPUs and newer.", "precision")
    masters: Literal["fp32", "none"] = option(
        "fp32",
        "Precision of the weights that are trained: fp32, of which those in training are copies; or none beside those in bf16, "
        "which, as their moments, are rounded stochastically: 8 bytes per parameter less with --optimizer adamw, 6 with lion. "
        "On one process, with these alone.",
        "precision",
    )
    matrix_precision: Literal["fp8"] | None = option(
        only(("kandinsky-prior", "wuerstchen"), None),
        "Precision of the matrix products within the model's blocks, on Hopper GPUs and newer; needs --compile and "
        "--mixed_precision bf16. Default: that of the weights.",
        "precision",
    )
    deterministic: bool = option(
        False, "Repeat a run on the same GPUs bit for bit, with slower convolutions and attention.", "precision"
    )

    logging_dir: str = option("logs", "TensorBoard directory, inside the output directory.", "output")
    report_to: Literal["tensorboard", "wandb", "all", "none"] = option(
        "tensorboard",
        "Where metrics are reported beside metrics.jsonl; all: TensorBoard, and wandb where it can be used.",
        "output",
    )
    tracker_project_name: str = option("text2image-fine-tune", "Project name in the tracker.", "output")
    tracker_run_name: str | None = option(
        None, "Name of the run in Weights & Biases. Default: the output directory's name.", "output"
    )
    log_every: int = option(10, "Steps between two lines of metrics; the device is not read in between.", "output", ge=1)
    trust_shards: bool = option(
        False, "With --shards_dir alone, train on shards that other encoders built than those at hand.", "data"
    )
    verify_shards: Literal["none", "rows", "all"] = option(
        "rows",
        "rows: compare every row of the shards with its checksum when it is read; all: read every shard before the start, too, "
        "and compare its digest; none: neither.",
        "data",
    )
    shards_cache: str | None = option(
        None,
        "Directory on a disk of this node where whole shards of a remote --shards_dir are kept, for all its processes. "
        "Default: rows are read as ranges of bytes ahead of the step, and nothing is kept.",
        "data",
    )
    shards_cache_limit: str | None = option(
        None,
        "What --shards_cache may take, for example 500GB or 2TiB: the longest unused shards make room. Default: no limit.",
        "data",
    )
    shuffle: Literal["global", "blocks"] | None = option(
        None,
        "global: every epoch in an order of all records; blocks: shards in another order every epoch, and the records of "
        "--shuffle_window shards among themselves, so that few shards are read at a time. Default: global, from remote storage "
        "blocks.",
        "data",
    )
    shuffle_window: int | None = option(
        None, f"Shards whose records --shuffle blocks mixes. Default: {SHUFFLE_WINDOW}.", "data", ge=1
    )
    quiet: bool = option(False, "Say nothing but warnings and mistakes.", "output")
    validation_fraction: float | None = option(
        None,
        "Hold out this fraction of the records, and report the loss over them. Which ones is the same in every run, and stays "
        "so when the data set grows; but a shard that loses samples chooses anew.",
        "validation",
        gt=0,
        lt=1,
    )
    validation_data_dir: str | None = option(
        None,
        "Report the loss over a data set of its own, given as --train_data_dir is and encoded into `validation` beside the "
        "shards; or over shards: their directory or address.",
        "validation",
    )
    validation_steps: int = option(
        500,
        "Steps between two rounds of the held-out loss; the last step has one, too. Without --validation_epochs, as with "
        "DreamBooth, also between two rounds of validation images.",
        "validation",
        {"dreambooth": 100},
        ge=1,
    )
    max_validation_samples: int = option(
        256, "Records of those held out that the loss is taken over; always the same ones.", "validation", ge=1
    )
    validation_timesteps: int = option(
        10, "Timesteps, in the middle of as many even ranges, at which each of them is compared.", "validation", ge=1, le=1000
    )
    best_checkpoint: bool = option(
        False,
        "Keep the checkpoint of the lowest held-out loss (of the moving average, if there is one), named in the file `best`.",
        "validation",
    )
    patience: int | None = option(
        None, "End the training once so many rounds in turn did not lower the held-out loss.", "validation", ge=1
    )
    validation_prompts: list[str] | None = option(
        None, "Prompts of the validation images.", "output", aliases=["validation_prompt"]
    )
    validation_epochs: int | None = option(
        5,
        "Epochs between two rounds of validation images.",
        "output",
        {"lora": only(("sd", *KANDINSKY), 1), "dreambooth": None, "dreambooth_lora": 50},
        ge=1,
    )
    num_validation_images: int = option(
        1,
        "Images per validation prompt; 0 draws none.",
        "output",
        {"lora": only(("sd", *KANDINSKY), 4), "dreambooth": 4, "dreambooth_lora": 4},
        ge=0,
    )
    validation_scheduler: Literal["DPMSolverMultistepScheduler", "DDPMScheduler"] | None = option(
        only(("sd",), None),
        "What validation images are sampled with. Default: the pipeline's own.",
        "output",
        {recipe: only(("sd",), "DPMSolverMultistepScheduler") for recipe in ("dreambooth", "dreambooth_lora")},
    )
    push_to_hub: bool = option(False, "Upload the trained pipeline to the hub.", "output")
    hub_token: str | None = option(None, "Token for the upload; never logged or stored.", "output", repr=False)
    hub_model_id: str | None = option(None, "Repository of the upload. Default: the output directory's name.", "output")

    checkpointing_steps: int = option(500, "Steps between two checkpoints.", "checkpoints", ge=1)
    openable_checkpoints: bool = option(
        True,
        "Write a checkpoint's model, and its moving average, as diffusers opens them too (checkpoint-N/unet, unet_ema), in the "
        "precision of the run: 2 or 4 bytes per parameter each.",
        "checkpoints",
    )
    checkpoint_async: bool = option(
        False,
        "Write checkpoints beside the training, which waits only for a copy of its state to host memory.",
        "checkpoints",
    )
    step_timeout: float | None = option(
        None,
        "Seconds after which a step that does not end is given up: the processes that are behind are named, and the exit code "
        "is 75.",
        "checkpoints",
        gt=0,
    )
    first_step_timeout: float | None = option(
        None,
        "The same for the first step, in which a model may be compiled. Default, with several processes or --step_timeout: "
        "1800, with --compile 3600, and never less than --step_timeout.",
        "checkpoints",
        gt=0,
    )
    checkpoints_total_limit: int | None = option(None, "How many checkpoints to keep. Default: all.", "checkpoints", ge=1)
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint directory; or `latest` for the newest in the output directory that is whole, `best` for the one that "
        "--best_checkpoint kept.",
        "checkpoints",
    )
    continue_on_grown_data: bool = option(
        False,
        "With --resume_from_checkpoint, go on although the data set gained, lost or changed samples since, which is refused "
        "otherwise: every later slot is read as if the run had had the samples of now from its start.",
        "checkpoints",
    )
    overwrite: bool = option(
        False,
        "Remove what an earlier run left in the output directory (checkpoints, metrics, pictures, pipeline; not shards), which "
        "is refused otherwise.",
        "output",
    )
    local_rank: int = option(-1, "Set by launchers; the environment variable LOCAL_RANK wins.", "training")

    @field_validator("lr_of", "freeze", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        """In a file one pattern may stand alone, and rates may be a table."""
        if isinstance(value, dict):
            return [f"{pattern}={rate}" for pattern, rate in value.items()]
        return [value] if isinstance(value, str) else value

    @property
    def rates_of_patterns(self) -> list[tuple[str, float]]:
        """What `lr_of` means, and after it `text_encoder_lr`.

        Raises:
            ValueError: it means nothing that is known.
        """
        split = [given.rpartition("=") for given in self.lr_of or ()]
        of_text_encoder = [] if self.text_encoder_lr is None else [("text_encoder", self.text_encoder_lr)]
        return [(pattern.strip(), float(rate)) for pattern, _, rate in split] + of_text_encoder

    @property
    def cache_bytes(self) -> int | None:
        """What `shards_cache_limit` means; None for no limit.

        Raises:
            ValueError: it means nothing that is known.
        """
        if self.shards_cache_limit is None:
            return None
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i?)B?|B)?", self.shards_cache_limit.strip(), re.IGNORECASE)
        if size is None or not float(size[1]):
            raise ValueError(self.shards_cache_limit)
        return int(float(size[1]) * (1024 if size[3] else 1000) ** ("KMGTP".index(size[2].upper()) + 1 if size[2] else 0))

    @property
    def proportion_unconditional(self) -> float:
        """Share of the samples that are trained without their condition, by the family's name of it."""
        return self.proportion_empty_prompts or self.proportion_empty_images

    @property
    def trains_beside(self) -> bool:
        """Whether the model stays as it is, and adapters or vectors of new tokens are trained beside it."""
        return self.lora_rank is not None or self.placeholder_token is not None

    @property
    def joins_text_encoder(self) -> bool:
        """Whether the text encoder is a part of the trained module, because something in it is trained."""
        return self.train_text_encoder or self.placeholder_token is not None

    @property
    def uses_xformers(self) -> bool:
        """Whether attention is xFormers', by either of its names."""
        return self.attention == "xformers" or self.enable_xformers_memory_efficient_attention

    @property
    def draws_images(self) -> bool:
        """Whether there are validation images."""
        return bool(self.validation_prompts) and self.num_validation_images > 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step and process; with images of the class each is of these or of the instance."""
        return self.gradient_accumulation_steps * (2 if self.with_prior_preservation else 1)

    @property
    def keeps_average(self) -> bool:
        """Whether an average of the weights is kept beside them, and is the model."""
        return self.use_ema or OPTIMIZERS[self.optimizer].averages_itself

    @property
    def weights_precision(self) -> str:
        """That of the weights in training, as `--gradient_accumulation_dtype` names it."""
        return "fp32" if self.mixed_precision == "no" else self.mixed_precision

    @property
    def accumulation_precision(self) -> str:
        """In which micro-batches add up: fp32 unless told otherwise, and with `--zero_stage 1` always as the weights."""
        return self.gradient_accumulation_dtype or (self.weights_precision if self.zero_stage == 1 else "fp32")


# What changes the result of a run that is resumed, beside what is refused then: another seed, global batch or other shards, and
# what the checkpoint has no state for. Checkpoints hold these, and what has changed is said; or refused, of the order of the
# samples (shuffle, shuffle_window) and of what is held out of them (validation_fraction).
ALTER_THE_RESULT = (
    "max_train_steps", "gradient_accumulation_dtype", "matrix_precision", "shuffle", "shuffle_window",
    "validation_fraction", "train_text_encoder", "text_encoder_lr", "initializer_token", "masters", "optimizer",
    "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "layer_lr_decay", "lr_of",
    "freeze",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "prediction_type", "rescale_betas_zero_snr", "timestep_sampling", "logit_mean", "logit_std", "mode_scale",
    "timestep_bias_strategy", "timestep_bias_multiplier", "timestep_bias_portion", "timestep_bias_begin", "timestep_bias_end",
    "min_timestep", "max_timestep", "loss_weighting", "snr_gamma", "p2_gamma", "p2_k", "edm_sigma_data", "min_loss_weight",
    "loss_type", "huber_c", "huber_schedule",
    "noise_offset", "input_perturbation", "pyramid_noise_discount", "pyramid_noise_iterations", "dream_training",
    "dream_detail_preservation",
    "proportion_empty_prompts", "proportion_empty_images", "prior_loss_weight",
    "lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "use_dora", "base_precision",
)  # fmt: skip


def options_of(config: CacheConfig) -> dict[str, Any]:
    """The options that the configuration's family has, with their values."""
    return config.model_dump(exclude=set(options_lacking(type(config), config.family)))
