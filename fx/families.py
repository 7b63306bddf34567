"""What differs between model families: how a caption is encoded, the network called, and latents shaped and decoded.

| family | pipeline class | network | prediction |
|---|---|---|---|
| Stable Diffusion 1.x, 2.x, AltDiffusion | StableDiffusionPipeline | U-Net | eps or v |
| SDXL | StableDiffusionXLPipeline | U-Net with pooled text and time ids | eps or v |
| Stable Diffusion 3 | StableDiffusion3Pipeline | transformer | flow velocity |
| FLUX.1 | FluxPipeline | transformer on packed latents, with image and text ids | flow velocity |

FLUX.1-dev is distilled: it is told a guidance scale and predicts what guidance of that scale would have. Here it is always
told UNGUIDED, at which it stands for the model without guidance, so that every arm means what it means elsewhere.

Captions are encoded by the pipelines' own `encode_prompt`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from transformers import PreTrainedModel, XLMRobertaConfig, XLMRobertaModel

FLOWS = (StableDiffusion3Pipeline, FluxPipeline)
PIPELINES = (StableDiffusionPipeline, StableDiffusionXLPipeline, *FLOWS)
UNGUIDED = 1.0  # the guidance scale that a distilled network is told
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
    return "transformer" if isinstance(pipeline, FLOWS) else "unet"


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
            check_tokens(tokenizer, convert(caption, tokenizer), token_limit(type(pipeline), name, tokenizer))


def token_limit(kind: type, name: str, tokenizer) -> int | None:
    """Tokens of a caption that a pipeline of this class reads by its tokenizer of this name; None if it may cut more off.

    FLUX.1 takes from CLIP one pooled vector, for which the published pipeline cuts long captions off, and reads them by T5.
    """
    if kind is FluxPipeline:
        return None if name == TOKENIZERS[0] else 512
    return 256 if name == TOKENIZERS[2] else tokenizer.model_max_length


def check_tokens(tokenizer, caption: str, limit: int | None) -> None:
    """ValueError if a caption has more than `limit` tokens, start and end included; None for no limit."""
    if limit is not None and (n := len(tokenizer(caption).input_ids)) > limit:
        raise ValueError(f"the caption {caption!r} has {n} tokens, the text encoder reads at most {limit}: shorten it")


def encode(pipeline: DiffusionPipeline, caption: str, learning: bool = False) -> Condition:
    """A caption encoded as the family does it, b = 1; "" is the unconditional input, as in the pipeline's own guidance.

    learning: whether gradients are to reach the text encoders. Raises ValueError if the caption does not fit
    (`check_caption`).
    """
    check_caption(pipeline, caption)
    with torch.set_grad_enabled(learning):
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


@_encode.register
def _(pipeline: FluxPipeline, caption: str) -> Condition:
    text, pooled, _ = pipeline.encode_prompt(caption, device=pipeline.device, max_sequence_length=512)
    return Condition(text, {"pooled_projections": pooled})


# the network


def denoise(model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The network's prediction for latents x [n, c, h, w] at one timestep or [n] of them, in x's own precision."""
    condition = condition.expand(len(x)) if len(condition.text) == 1 else condition
    dtype = next(model.parameters()).dtype  # model.dtype walks through all of its modules, each time
    latents, text = x.to(dtype), condition.text.to(dtype)
    added = {name: value.to(dtype) for name, value in condition.added.items()}
    if isinstance(model, FluxTransformer2DModel):
        prediction = _denoise_packed(model, latents, t.expand(len(x)), text, added)
    elif "pooled_projections" in added:
        prediction = model(latents, timestep=t.expand(len(x)), encoder_hidden_states=text, **added).sample
    else:
        prediction = model(latents, t, encoder_hidden_states=text, added_cond_kwargs=added or None).sample
    return prediction.to(x.dtype)


def _denoise_packed(model: FluxTransformer2DModel, x: Tensor, t: Tensor, text: Tensor, added: dict) -> Tensor:
    """FLUX.1's: 2x2 latents are one token, which is told its row and column; a caption's tokens have no place."""
    n, _, height, width = x.shape
    ids = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, x.device, x.dtype)
    told = torch.full((n,), UNGUIDED, device=x.device) if model.config.guidance_embeds else None
    packed = model(
        pack(x),
        encoder_hidden_states=text,
        timestep=t / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
        guidance=told,
        **added,
    ).sample
    return unpack(packed, height, width)


def pack(x: Tensor) -> Tensor:
    """Latents [n, c, h, w] as FLUX.1's tokens [n, h/2 * w/2, 4c]."""
    return FluxPipeline._pack_latents(x, *x.shape)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """FLUX.1's tokens [n, h/2 * w/2, 4c] as latents [n, c, h, w]."""
    return FluxPipeline._unpack_latents(tokens, height, width, 1)


# latents


def image_size(pipeline: DiffusionPipeline) -> int:
    """The side in pixels of the images a pipeline makes."""
    return latent_shape(pipeline)[1] * pipeline.vae_scale_factor


def latent_shape(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """Channels, height and width of a latent."""
    config = network(pipeline).config
    if isinstance(pipeline, FluxPipeline):
        return (config.in_channels // 4, pipeline.default_sample_size, pipeline.default_sample_size)
    return (config.in_channels, config.sample_size, config.sample_size)


def size_factor(pipeline: DiffusionPipeline) -> int:
    """What the sides of an image must be multiples of: the autoencoder's factor times the network's or its patches'."""
    config = network(pipeline).config
    if isinstance(pipeline, FLOWS):
        return pipeline.vae_scale_factor * patch_size(pipeline)
    return pipeline.vae_scale_factor * 2 ** (len(config.block_out_channels) - 1)


def patch_size(pipeline: DiffusionPipeline) -> int:
    """The side in latents of what is one token to a flow's transformer; FLUX.1 is given 2x2 packed ones."""
    return 2 if isinstance(pipeline, FluxPipeline) else network(pipeline).config.patch_size


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
    if isinstance(pipeline, FLOWS):
        return "flow_prediction"
    return pipeline.scheduler.config.get("prediction_type", "epsilon")


@dataclass(frozen=True)
class Noising:
    """How training noises latents and what the network then learns to predict.

    Training draws numbers t, int64 [n], below `levels`. add(x0, eps, t) is x_t [n, c, h, w]; target(x0, eps, t) what is to
    be predicted there: eps, x0, v, or a flow's velocity eps - x0; timestep(t) what the network is told.
    """

    levels: int
    add: Callable[[Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]
    timestep: Callable[[Tensor], Tensor]


def noising(pipeline: DiffusionPipeline) -> Noising:
    """How a pipeline's network was trained and is fine-tuned; ValueError for a prediction type that is not known.

    A flow's numbers count its schedule's timesteps, evenly, in the order of sampling: with a shift (Stable Diffusion 3) more
    of them lie near the noise. (Its authors drew them from a logit-normal distribution; Esser et al., 2024, compare both.)
    """
    if isinstance(pipeline, FLOWS):
        return _flow_noising(FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config))
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    targets = {
        "epsilon": lambda x0, eps, t: eps,
        "sample": lambda x0, eps, t: x0,
        "v_prediction": schedule.get_velocity,
    }
    if (kind := prediction_type(pipeline)) not in targets:
        raise ValueError(f"fx trains with models that predict {', '.join(targets)} or a flow, not {kind}")
    return Noising(schedule.config.num_train_timesteps, schedule.add_noise, targets[kind], lambda t: t)


def _flow_noising(schedule: FlowMatchEulerDiscreteScheduler) -> Noising:
    """x_t = (1 - sigma) x0 + sigma eps, velocity eps - x0."""
    sigmas, timesteps = schedule.sigmas, schedule.timesteps

    def add(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        sigma = sigmas.to(x0)[t.to(x0.device)].view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * eps

    return Noising(len(timesteps), add, lambda x0, eps, t: eps - x0, lambda t: timesteps.to(t.device)[t])


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
        return flow_schedule(pipeline)
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


class FlowSchedule(FlowMatchEulerDiscreteScheduler):
    """Euler steps of a flow through the timesteps that the family's own pipeline takes for images of its size.

    tokens: of an image, by which a dynamic shift is set; even: whether the timesteps before it are spaced as FLUX.1's are.
    """

    tokens: int = 0
    even: bool = False

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Set the timesteps of this number of steps, first to last."""
        even = self.even and not self.config.get("use_flow_sigmas")
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if even else None
        named = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(self.tokens, *(self.config.get(name) or value for name, value in named.items()))
        mu = mu if self.config.use_dynamic_shifting else None
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu)


def flow_schedule(pipeline: DiffusionPipeline) -> FlowSchedule:
    """A fresh schedule of a flow model."""
    schedule, (_, height, width) = FlowSchedule.from_config(pipeline.scheduler.config), latent_shape(pipeline)
    patch = patch_size(pipeline)
    schedule.tokens, schedule.even = (height // patch) * (width // patch), isinstance(pipeline, FluxPipeline)
    return schedule


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
