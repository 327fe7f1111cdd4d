"""Schedulers of sampling, by the names that people know them by: other ways through the noise of the same trained model."""

import difflib
import inspect
import re
from dataclasses import dataclass
from typing import Any

import diffusers

from engine.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers.

    kind: its class.
    title: what the web interfaces call it.
    also: other names of it.
    settings: what it is given beside the configuration of the pipeline's own scheduler.
    """

    kind: str
    title: str
    also: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", "DDIM"),
    "ddpm": Sampler("DDPMScheduler", "DDPM"),
    "pndm": Sampler("PNDMScheduler", "PLMS", settings=(("skip_prk_steps", True),)),
    "lms": Sampler("LMSDiscreteScheduler", "LMS", ("lms discrete",)),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a", ("euler ancestral",)),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2", ("dpm 2",)),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a", ("dpm 2 a", "dpm2 ancestral")),
    "dpm++_2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", ("dpm++", "dpmpp 2m", "dpmsolver++")),
    "dpm++_2m_sde": Sampler(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE", ("dpmpp 2m sde",),
        (("algorithm_type", "sde-dpmsolver++"),),
    ),
    "dpm++_2s": Sampler("DPMSolverSinglestepScheduler", "DPM++ 2S", ("dpmpp 2s", "dpmsingle")),
    "deis": Sampler("DEISMultistepScheduler", "DEIS"),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC", ("uni pc",)),
    "lcm": Sampler("LCMScheduler", "LCM"),
    "tcd": Sampler("TCDScheduler", "TCD"),
}  # fmt: skip
SPACINGS = ("karras", "exponential", "beta")  # of the noise levels, behind a name: `euler karras`


def _plain(name: str) -> str:
    """A name without what people write differently: case, dashes and underscores, a `k_` before it, `Scheduler` behind it."""
    words = re.sub(r"[\s_-]+", " ", name.strip().lower())
    return words.removeprefix("k ").removesuffix("scheduler").strip()


# Of names that two have, as that of a class, the first has it.
_NAMES = {
    _plain(also): name
    for name, sampler in reversed(SAMPLERS.items())
    for also in (name, *sampler.also, sampler.kind, sampler.title)
}


def parse_scheduler(text: str) -> tuple[str, str | None]:
    """The name in `SAMPLERS` and the spacing that a text such as `dpm++ 2m karras` means.

    Raises:
        UserError: it is none.
    """
    words, spacing = _plain(text), None
    for known in SPACINGS:
        if words.endswith(f" {known}"):
            words, spacing = words.removesuffix(f" {known}"), known
    if words not in _NAMES:
        names = ", ".join(SAMPLERS)
        closest = difflib.get_close_matches(words, _NAMES, n=1)
        nearest = f"the nearest is {' '.join(filter(None, [_NAMES[closest[0]], spacing]))}; " if closest else ""
        raise UserError(f"--scheduler {text}: unknown; {nearest}there are {names}, most also with {', '.join(SPACINGS)} behind")
    return _NAMES[words], spacing


def schedulers_of(pipeline: Any) -> list[str]:
    """The names in `SAMPLERS` that a whole pipeline can sample with.

    Kandinsky's decoder scales no input and hands its generator on, so that only those serve it that want this. Its prior, and
    both stages of Wuerstchen, have a schedule of their own.
    """
    if "vae" in pipeline.components:
        return list(SAMPLERS)
    if "movq" in pipeline.components:
        return ["ddim", "ddpm", "dpm++_2m", "dpm++_2m_sde", "lcm", "tcd"]
    return []


def use_scheduler(pipeline: Any, text: str) -> None:
    """Has a whole pipeline sample with another scheduler, on the schedule that its own was made for.

    Raises:
        UserError: it cannot.
    """
    (name, spacing), served = parse_scheduler(text), schedulers_of(pipeline)
    sampler, config = SAMPLERS[name], pipeline.scheduler.config
    kind = getattr(diffusers, sampler.kind)
    takes = inspect.signature(kind.__init__).parameters
    if not served:
        raise UserError(f"--scheduler {text}: this model samples with the schedule that it was trained on; leave it out")
    if name not in served:
        raise UserError(f"--scheduler {text}: this model cannot be sampled with it; there are {', '.join(served)}")
    if spacing and f"use_{spacing}_sigmas" not in takes:
        raise UserError(f"--scheduler {text}: {name} has no {spacing} spacing; leave {spacing} out")
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in takes:
        able = [each for each in served if "rescale_betas_zero_snr" in
                inspect.signature(getattr(diffusers, SAMPLERS[each].kind).__init__).parameters]  # fmt: skip
        raise UserError(f"--scheduler {text}: it cannot start at the pure noise that this model was trained on; "
                        f"these can: {', '.join(able)}")  # fmt: skip
    settings = dict(sampler.settings) | {f"use_{known}_sigmas": known == spacing for known in SPACINGS}
    if "clip_sample" not in config:
        settings["clip_sample"] = False  # the default of some classes, which would clip latents
    given = {setting: value for setting, value in settings.items() if setting in takes}
    if sampler.kind != "DDPMScheduler":  # Kandinsky's decoder takes off the predicted variance where none is wanted
        config = {setting: value for setting, value in config.items() if setting != "variance_type"}
    scheduler = kind.from_config(config, **given)
    pipeline.register_modules(scheduler=scheduler)
    if hasattr(pipeline, "decoder_pipe"):
        pipeline.decoder_pipe.register_modules(scheduler=scheduler)


def title_of(pipeline: Any) -> tuple[str, str | None]:
    """What the web interfaces call a pipeline's scheduler and its spacing."""
    scheduler = pipeline.scheduler
    kind, config = type(scheduler).__name__, scheduler.config
    spacing = next((known for known in SPACINGS if config.get(f"use_{known}_sigmas")), None)
    alike = [sampler for sampler in SAMPLERS.values() if sampler.kind == kind]
    exact = [one for one in alike if one.settings and all(config.get(name) == value for name, value in one.settings)]
    found = (exact or alike)[:1]
    return (found[0].title if found else kind.removesuffix("Scheduler")), spacing
