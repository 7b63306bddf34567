"""What differs between model families: how a caption is encoded, the network called, and latents shaped and decoded.

| family | pipeline class | network | prediction |
|---|---|---|---|
| Stable Diffusion 1.x, 2.x, AltDiffusion | StableDiffusionPipeline | U-Net | eps or v |
| SDXL | StableDiffusionXLPipeline | U-Net with pooled text and time ids | eps or v |
| Stable Diffusion 3 | StableDiffusion3Pipeline | transformer | flow velocity |

Captions are encoded by the pipelines' own `encode_prompt`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, XLMRobertaConfig, XLMRobertaModel

PIPELINES = (StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline)
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class Condition:
    """An encoded caption: text [b, tokens, width] and what else the network is given, [b, ...] each."""

    text: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    def expand(self, n: int) -> "Condition":
        """The same caption for n images, from b = 1."""
        added = {name: value.expand(n, *value.shape[1:]) for name, value in self.added.items()}
        return Condition(self.text.expand(n, *self.text.shape[1:]), added)

    def rows(self, chosen: Tensor) -> "Condition":
        """The captions of these numbers, int64 [n], as a batch of n."""
        added = {name: value[chosen.to(value.device)] for name, value in self.added.items()}
        return Condition(self.text[chosen.to(self.text.device)], added)

    def followed_by(self, other: "Condition") -> "Condition":
        """Both as one batch."""
        added = {name: torch.cat([value, other.added[name]]) for name, value in self.added.items()}
        return Condition(torch.cat([self.text, other.text]), added)


def network_name(pipeline: DiffusionPipeline) -> str:
    """Where the pipeline keeps its denoising network: "unet" or "transformer"."""
    return "transformer" if isinstance(pipeline, StableDiffusion3Pipeline) else "unet"


def network(pipeline: DiffusionPipeline) -> nn.Module:
    """The denoising network of a pipeline."""
    return getattr(pipeline, network_name(pipeline))


def text_encoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The text encoders that the pipeline has, in order."""
    return [part for name in TEXT_PARTS if (part := getattr(pipeline, name, None)) is not None]


class AltConfig(XLMRobertaConfig):
    """Settings of AltDiffusion's text encoder, with the defaults its published folders rely on."""

    def __init__(self, project_dim: int = 512, use_attention_mask: bool = True, has_pre_transformation=False, **others):
        super().__init__(**others)
        self.project_dim, self.use_attention_mask = project_dim, use_attention_mask
        self.has_pre_transformation = has_pre_transformation


class AltTextEncoder(PreTrainedModel):
    """AltDiffusion's text encoder (Chen et al., 2022): XLM-R and a linear projection to CLIP's width.

    With `has_pre_transformation` (AltDiffusion-m18) the last but one hidden state is normalised and projected instead.
    """

    config_class = AltConfig
    base_model_prefix = "roberta"
    _keys_to_ignore_on_load_unexpected = (r"pooler", r"logit_scale", r"position_ids")

    def __init__(self, config: AltConfig):
        super().__init__(config)
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        self.transformation = nn.Linear(config.hidden_size, config.project_dim)
        if config.has_pre_transformation:
            self.transformation_pre = nn.Linear(config.hidden_size, config.project_dim)
            self.pre_LN = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> tuple[Tensor]:
        """Token numbers [b, tokens] to projected states [b, tokens, project_dim], the only entry of a tuple."""
        states = self.roberta(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        if self.config.has_pre_transformation:
            return (self.transformation_pre(self.pre_LN(states.hidden_states[-2])),)
        return (self.transformation(states.last_hidden_state),)


# captions


def check_caption(pipeline: DiffusionPipeline, caption: str) -> None:
    """ValueError if a caption has more tokens than a text encoder reads; it would be cut off silently otherwise."""
    for name in TOKENIZERS:
        if (tokenizer := getattr(pipeline, name, None)) is not None:
            convert = getattr(pipeline, "maybe_convert_prompt", lambda prompt, _: prompt)  # textual inversion
            check_tokens(
                tokenizer, convert(caption, tokenizer), 256 if name == "tokenizer_3" else tokenizer.model_max_length
            )


def check_tokens(tokenizer, caption: str, limit: int) -> None:
    """ValueError if a caption has more than `limit` tokens, start and end included."""
    if (n := len(tokenizer(caption).input_ids)) > limit:
        raise ValueError(f"the caption {caption!r} has {n} tokens, the text encoder reads at most {limit}: shorten it")


@torch.no_grad()
def encode(pipeline: DiffusionPipeline, caption: str) -> Condition:
    """A caption encoded as the family does it, b = 1; "" is the unconditional input, as in the pipeline's own guidance.

    Raises ValueError if the caption does not fit (`check_caption`).
    """
    check_caption(pipeline, caption)
    return _encode(pipeline, caption)


@functools.singledispatch
def _encode(pipeline, caption: str) -> Condition:
    names = ", ".join(kind.__name__ for kind in PIPELINES)
    raise TypeError(f"no support for pipelines of class {type(pipeline).__name__}: fx knows {names}")


@_encode.register
def _(pipeline: StableDiffusionPipeline, caption: str) -> Condition:
    return Condition(pipeline.encode_prompt(caption, pipeline.device, 1, False)[0])


@_encode.register
def _(pipeline: StableDiffusionXLPipeline, caption: str) -> Condition:
    options = {"device": pipeline.device, "do_classifier_free_guidance": True}
    text, empty, pooled, empty_pooled = pipeline.encode_prompt(caption, **options)
    if caption == "":  # zeros for SDXL 1.0, see force_zeros_for_empty_prompt
        text, pooled = empty, empty_pooled
    size = (image_size(pipeline),) * 2
    width = pooled.shape[-1]
    time_ids = pipeline._get_add_time_ids(size, (0, 0), size, text.dtype, width).to(text.device)
    return Condition(text, {"text_embeds": pooled, "time_ids": time_ids})


@_encode.register
def _(pipeline: StableDiffusion3Pipeline, caption: str) -> Condition:
    text, _, pooled, _ = pipeline.encode_prompt(
        caption, None, None, device=pipeline.device, do_classifier_free_guidance=False
    )
    return Condition(text, {"pooled_projections": pooled})


# the network


def denoise(model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The network's prediction for latents x [n, c, h, w] at one timestep, in x's own precision."""
    condition = condition.expand(len(x)) if len(condition.text) == 1 else condition
    text = condition.text.to(model.dtype)
    added = {name: value.to(model.dtype) for name, value in condition.added.items()}
    if "pooled_projections" in added:
        prediction = model(x.to(model.dtype), timestep=t.expand(len(x)), encoder_hidden_states=text, **added).sample
    else:
        prediction = model(x.to(model.dtype), t, encoder_hidden_states=text, added_cond_kwargs=added or None).sample
    return prediction.to(x.dtype)


# latents


def image_size(pipeline: DiffusionPipeline) -> int:
    """The side in pixels of the images a pipeline makes."""
    return network(pipeline).config.sample_size * pipeline.vae_scale_factor


def latent_shape(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """Channels, height and width of a latent."""
    config = network(pipeline).config
    return (config.in_channels, config.sample_size, config.sample_size)


@torch.no_grad()
def decode(pipeline: DiffusionPipeline, latents: Tensor, chunk: int = 16) -> Tensor:
    """Scaled latents [n, c, h, w] to images [n, 3, H, W] in [-1, 1], `chunk` at a time, in the autoencoder's precision.

    `fx.models` keeps autoencoders in float32: SDXL's overflows in float16.
    """
    vae = pipeline.vae
    scale, shift = latent_statistics(vae)
    parts = (part.to(vae.dtype) / scale + shift for part in latents.split(chunk))
    return torch.cat([vae.decode(part).sample for part in parts])


@torch.no_grad()
def round_trip(vae: nn.Module, images: Tensor, chunk: int = 16) -> Tensor:
    """Images [n, 3, h, w] in [-1, 1] encoded (mode of the posterior) and decoded again: float32 on the CPU, clipped."""
    parts = (vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode() for part in images.split(chunk))
    return torch.cat([vae.decode(part).sample.float().cpu().clamp(-1, 1) for part in parts])


def latent_statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift [1, c, 1, 1]: the network's latents are (the autoencoder's - shift) * scale, by its config.json.

    There `scaling_factor` and `shift_factor` (Stable Diffusion 3) say so, or `latents_mean` and `latents_std` per channel.
    """
    config, channels = vae.config, vae.config.latent_channels
    mean, std = config.get("latents_mean"), config.get("latents_std")
    mean = [config.get("shift_factor") or 0.0] * channels if mean is None or std is None else mean
    std = [1.0] * channels if std is None else std
    mean, std = (torch.tensor(each, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1) for each in (mean, std))
    return config.scaling_factor / std, mean


# schedules


def prediction_type(pipeline: DiffusionPipeline) -> str:
    """The parametrisation of the network's predictions, one of fx.guidance.PARAMETRISATIONS."""
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return "flow_prediction"
    return pipeline.scheduler.config.get("prediction_type", "epsilon")


def training_target(pipeline: DiffusionPipeline) -> tuple[DDPMScheduler, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The schedule that noises latents, and what the network learns to predict of (x0, eps, t): eps, x0 or v.

    ValueError for a flow model, which is trained otherwise.
    """
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    targets = {"epsilon": lambda x0, eps, t: eps, "sample": lambda x0, eps, t: x0, "v_prediction": noising.get_velocity}
    if (kind := prediction_type(pipeline)) not in targets:
        raise ValueError(f"fx trains with models that predict {', '.join(targets)}, not {kind}")
    return noising, targets[kind]


SAMPLERS = ("ddim", "dpm++", "euler", "published")


def make_scheduler(pipeline: DiffusionPipeline, sampler: str):
    """A fresh diffusers scheduler on the model's own noise schedule.

    ddim: deterministic DDIM (Song et al., 2021); dpm++: DPM-Solver++ of second order (Lu et al., 2022); euler: for flow
    models, and the only one for them. Raises ValueError for another combination. A schedule with zero terminal SNR is
    walked with trailing timesteps, since only these begin where training ended (Lin et al., 2024).
    """
    check_sampler(pipeline, sampler)
    config = pipeline.scheduler.config
    if sampler == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    settings = {"clip_sample": False, "thresholding": False}  # made for pixels, not for latents
    zero_snr = {"timestep_spacing": "trailing"} if config.get("rescale_betas_zero_snr") else {}
    if sampler == "ddim":
        return DDIMScheduler.from_config(config, **settings, **zero_snr)
    if sampler == "dpm++":
        settings |= {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
        return DPMSolverMultistepScheduler.from_config(
            config, **settings, **{"timestep_spacing": "linspace"} | zero_snr
        )
    return PNDMScheduler.from_config(config, skip_prk_steps=True)


def check_sampler(pipeline: DiffusionPipeline, sampler: str) -> None:
    """ValueError for a sampler that is unknown or does not go with the model."""
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
    kind = prediction_type(pipeline)
    if (kind == "flow_prediction") != (sampler == "euler"):
        fitting = "euler" if kind == "flow_prediction" else "ddim, dpm++ or published"
        raise ValueError(f"the sampler {sampler} does not fit a model with {kind}: use {fitting}")
    if pipeline.scheduler.config.get("rescale_betas_zero_snr") and kind == "epsilon":
        raise ValueError(
            "the model's schedule ends at zero SNR (rescale_betas_zero_snr), where eps is all there is to see: an epsilon "
            "model cannot start from there; correct prediction_type in scheduler_config.json if it predicts v"
        )
    if sampler == "published" and kind != "epsilon":
        raise ValueError(f"the published sampler is written for epsilon models, this one has {kind}: use ddim")
