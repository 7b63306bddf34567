"""Model guidance and its relatives as pure functions of noise predictions (Sec. 4.1, 4.2, App. H).

Every prediction is a tensor eps [n, c, h, w] in units of the noise; scales are plain numbers. `base` is theta, `tuned`
is theta'.
"""

from torch import Tensor


def extrapolate(start: Tensor, end: Tensor, scale: float) -> Tensor:
    """start + scale * (end - start): at scale 1 `end` itself, above 1 beyond it."""
    return start + scale * (end - start)


def model_guidance(base: Tensor, tuned: Tensor, w: float) -> Tensor:
    """Eq. 6, no caption: eps_theta' + (w - 1)(eps_theta' - eps_theta), both predictions unconditional."""
    return extrapolate(base, tuned, w)


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, w: float) -> Tensor:
    """Eq. 8 within one model: eps(c) + (w' - 1)(eps(c) - eps). Diffusers' `guidance_scale` is the same w'."""
    return extrapolate(unconditional, conditional, w)


def finextract(base_unconditional: Tensor, tuned_conditional: Tensor, w: float, k: float = 0.0) -> Tensor:
    """Eq. 13: eps_theta'(c) + (w' - 1)(eps_theta'(c) - eps_theta) + k eps_theta."""
    return extrapolate(base_unconditional, tuned_conditional, w) + k * base_unconditional


def conditional_only(base_conditional: Tensor, tuned_conditional: Tensor, w: float) -> Tensor:
    """App. H: Eq. 6 with both models given the caption."""
    return extrapolate(base_conditional, tuned_conditional, w)
