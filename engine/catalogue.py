"""The model families: what must be known of one before its models are imported. And what files of pipelines are called."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

MODEL = "pretrained_model_name_or_path"
PRIOR = "pretrained_prior_model_name_or_path"
DECODER = "pretrained_decoder_model_name_or_path"
IMAGE_ENCODER = "pretrained_image_encoder_name_or_path"
PIPELINES = (MODEL, PRIOR, DECODER)  # the options that name diffusers pipelines

INDEX = "model_index.json"  # of a pipeline
PARTS = ("unet", "prior", "text_encoder")  # of pipelines, that are trained
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers' `load_lora_weights` looks for it in a folder
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
EMBEDDING = "learned_embeds.safetensors"  # of a new token, as the script of textual inversion names it


@dataclass(frozen=True)
class Entry:
    """What is known of a family.

    module: its file in `engine/models`.
    trained, frozen: the classes of its two sides there.
    pipeline: the option that names the pipeline with the trained model in it, and `part` what that calls the model.
    trains: which architectures it trains, in words.
    classes: the options that name its pipelines -> the classes of those in diffusers.
    published: the options that name its models -> where those were published, None for one that has to be named.
    captioned: whether its records hold captions.
    xformers: whether xFormers' attention serves it.
    result: the folder of the trained pipeline within the output directory.
    """

    module: str
    trained: str
    frozen: str
    pipeline: str
    part: str
    trains: str
    classes: dict[str, str]
    published: dict[str, str | None]
    captioned: bool = True
    xformers: bool = False
    result: str = ""


_KANDINSKY_CLASSES = {PRIOR: "KandinskyV22PriorPipeline", DECODER: "KandinskyV22Pipeline"}
_KANDINSKY: dict[str, str | None] = {
    PRIOR: "kandinsky-community/kandinsky-2-2-prior",
    DECODER: "kandinsky-community/kandinsky-2-2-decoder",
}

FAMILIES = {
    "sd": Entry(
        "stable_diffusion", "StableDiffusion", "StableDiffusionEncoding", MODEL, "unet",
        "Stable Diffusion 1.x and 2.x, text to image", {MODEL: "StableDiffusionPipeline"}, {MODEL: None}, xformers=True,
    ),
    "kandinsky-prior": Entry(
        "kandinsky_prior", "KandinskyPrior", "KandinskyPriorEncoding", PRIOR, "prior",
        "the prior of Kandinsky 2.2", _KANDINSKY_CLASSES, _KANDINSKY,
    ),
    "kandinsky-decoder": Entry(
        "kandinsky_decoder", "KandinskyDecoder", "KandinskyDecoderEncoding", DECODER, "unet",
        "the decoder of Kandinsky 2.2", _KANDINSKY_CLASSES, _KANDINSKY, captioned=False, xformers=True,
    ),
    "wuerstchen": Entry(
        "wuerstchen", "Wuerstchen", "WuerstchenEncoding", PRIOR, "prior",
        "the prior of Wuerstchen v2", {PRIOR: "WuerstchenPriorPipeline", DECODER: "WuerstchenDecoderPipeline"},
        {PRIOR: "warp-ai/wuerstchen-prior", DECODER: "warp-ai/wuerstchen", IMAGE_ENCODER: "dome272/wuerstchen"},
        result="prior_pipeline",
    ),
}  # fmt: skip

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]
