"""What a checkpoint is, in words: by the class and parts of a pipeline's index, and by the tensors of a single file."""

import re
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from engine.catalogue import FAMILIES, INDEX
from engine.errors import UserError
from engine.models.index import parts_of, read_index

# The first expression that the name of a pipeline's class begins with tells what it is; others are told by their parts.
_CLASSES = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusion.*Inpaint": "Stable Diffusion for inpainting",
    "StableDiffusionInstructPix2Pix": "InstructPix2Pix",
    "StableDiffusion.*Upscale": "Stable Diffusion for upscaling",
    "StableDiffusionDepth2Img": "Stable Diffusion with depth",
    "StableDiffusionImageVariation": "Stable Diffusion for variations of images",
    "StableDiffusionGLIGEN": "GLIGEN",
    "StableDiffusion": "Stable Diffusion 1.x or 2.x",
    "StableUnCLIP": "Stable unCLIP",
    "StableCascade": "Stable Cascade",
    "StableVideo": "Stable Video Diffusion",
    "Flux": "FLUX",
    "Kandinsky3": "Kandinsky 3",
    "Kandinsky5": "Kandinsky 5",
    "KandinskyV22Prior": "a Kandinsky 2.2 prior",
    "KandinskyV22Inpaint": "a Kandinsky 2.2 decoder for inpainting",
    "KandinskyV22Control": "a Kandinsky 2.2 decoder with depth",
    "KandinskyV22": "a Kandinsky 2.2 decoder",
    "KandinskyPrior": "a Kandinsky 2.1 prior",
    "Kandinsky": "a Kandinsky 2.1 decoder",
    "WuerstchenPrior": "a Wuerstchen prior (stage C)",
    "WuerstchenDecoder": "a Wuerstchen decoder (stages B and A)",
}
# What a UNet is for that takes so many channels, more than there are latents.
_CHANNELS = {
    5: "with depth",
    7: "for upscaling",
    8: "for editing (InstructPix2Pix)",
    9: "for inpainting",
}

# What a single file is by the first expression that is found in the name of one of its tensors.
_TENSORS = {
    r"lora_(up|down|A|B|a|b)\b|lora_unet|lora_te|hada_w|lokr_w|\.lora\.": "an adapter (LoRA), no model",
    r"^control_model\.|input_hint_block|controlnet_cond_embedding": "a ControlNet",
    r"double_blocks\.": "FLUX",
    r"joint_blocks\.": "Stable Diffusion 3",
    r"^conditioner\.embedders\.1\.": "Stable Diffusion XL",
    r"^conditioner\.": "the refiner of Stable Diffusion XL",
    r"clip_txt_mapper|clip_txt_pooled_mapper": "Stable Cascade",
    r"motion_modules\.": "a motion module of AnimateDiff",
    r"emb_params|string_to_param": "a textual inversion",
    r"effnet|^backbone\.": "an image encoder of Wuerstchen",
}
# And what it is where nothing begins like a whole Stable Diffusion.
_PARTS = {
    r"^(down_blocks|mid_block)\.": "the UNet of a diffusers pipeline, whose directory is to be given",
    r"text_model\.|token_embedding|^cond_stage_model\.": "a text encoder, which is one part of a model",
    r"^(first_stage_model\.)?(encoder|decoder)\.": "a VAE, which is one part of a model",
}


def kind_of_tensors(tensors: dict[str, Any]) -> str | None:
    """What a single file is, by the names and shapes of its tensors; None for Stable Diffusion 1.x and 2.x.

    Args:
        tensors: by name; only shapes are looked at.
    """
    for names, kind in _TENSORS.items():
        if any(re.search(names, name) for name in tensors):
            return kind
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is None:
        found = (kind for names, kind in _PARTS.items() if any(re.search(names, name) for name in tensors))
        return next(found, "none of the models that are known here")
    if "model.diffusion_model.label_emb.0.0.weight" in tensors:
        return "Stable Diffusion XL or Stable unCLIP"
    beside = _CHANNELS.get(first.shape[1])
    return beside and f"Stable Diffusion {beside}"


def require_kind(pipeline: Path, family: str, option: str) -> None:
    """Compares a pipeline with what an option of a family takes.

    Raises:
        UserError: it is another; what it is, and what to do with it.
    """
    index = read_index(pipeline)
    name, wanted = index["_class_name"], FAMILIES[family].classes[option]
    found, expected = _in_words(name), _in_words(wanted)
    if found == expected or found is None:
        other = _other_part(index, getattr(diffusers, wanted))
        if other is None:
            return
        raise UserError(f"--{option} {pipeline}: a {name} whose {other}; --family {family} trains {FAMILIES[family].trains}")
    raise UserError(f"--{option} {pipeline}: this is {found} ({name}), not {expected}; {_remedy(found, family)}")


def require_text_to_image(pipeline: Path, unet: dict[str, Any], latent_channels: int, embeds: str | None = None) -> None:
    """Compares the configuration of a pipeline's UNet with one that draws images from latents and one condition.

    Args:
        latent_channels: of the pipeline's autoencoder.
        embeds: what the UNet takes beside the text, as its `encoder_hid_dim_type` names it.

    Raises:
        UserError: it takes more than those, or other latents.
    """
    channels = unet["in_channels"]
    if channels != latent_channels:
        beside = _CHANNELS.get(channels)
        why = f"this is a model {beside}; what can be trained: {trained()}" if beside else "these do not belong together"
        raise UserError(f"{pipeline}: unet in_channels is {channels}, but its latents have {latent_channels} channels; {why}")
    others = {
        "encoder_hid_dim_type": (embeds, "conditions of another model"),
        "addition_embed_type": ("image" if embeds else None, "embeddings beside the prompt's, as Stable Diffusion XL does"),
        "class_embed_type": (None, "class embeddings, as Stable unCLIP does"),
    }
    for name, (wanted, what) in others.items():
        if unet.get(name) != wanted:
            raise UserError(f"{pipeline}: unet {name} is {unet[name]}: it takes {what}; what can be trained: {trained()}")


def trained() -> str:
    """What the families train."""
    return ", ".join(f"{entry.trains} (--family {name})" for name, entry in FAMILIES.items())


def _in_words(pipeline_class: str) -> str | None:
    return next((words for start, words in _CLASSES.items() if re.match(start, pipeline_class)), None)


def _other_part(index: dict[str, Any], expected: Any) -> str | None:
    """The first model that is listed with another class than pipelines of the class `expected` have."""
    listed = parts_of(index)
    for part, classes in expected._get_signature_types().items():
        if part not in expected._optional_components and part in listed and issubclass(classes[0], nn.Module):
            names = [one.__name__ for one in classes]
            if listed[part][1] not in names:
                return f"{part} is a {listed[part][1]}, not a {' or '.join(names)} ({INDEX})"
    return None


def _remedy(found: str, family: str) -> str:
    """Which option takes what was found, of this family or of another."""
    for name, entry in sorted(FAMILIES.items(), key=lambda item: item[0] != family):
        for option, pipeline_class in entry.classes.items():
            if _in_words(pipeline_class) == found:
                return f"--{option} takes it" + ("" if name == family else f" with --family {name}")
    return f"what can be trained: {trained()}"
