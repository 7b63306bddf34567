"""Model guidance as pure functions of predictions (Sec. 4.1, 4.2, App. H).

There is one formula, Eq. 13, and the sampler calls it for every arm that is guided; an arm is which two predictions enter
(`fx.sampling.ARMS`). Without its correction, k = 0, it is Eq. 6 on these two.

A prediction is what a diffusion network returns for (x_t, t): a tensor [n, c, h, w] in one of four parametrisations,
named as diffusers names them. With x_t = alpha x0 + sigma eps they stand for

    epsilon          eps, in units of the noise
    sample           x0
    v_prediction     alpha eps - sigma x0, where alpha^2 + sigma^2 = 1 (Salimans and Ho, 2022)
    flow_prediction  eps - x0, the velocity, where alpha + sigma = 1 (rectified flow: alpha = 1 - t, sigma = t)

Each is an affine function of eps at fixed x_t and t, and an affine function commutes with a combination whose
coefficients sum to one. So Eq. 6, Eq. 8 and Eq. 13 with k = 0 may be computed on whatever the network predicts. The k term
of Eq. 13 makes the sum 1 + k; it is a multiple of eps, and `finextract` adds it as one in every parametrisation.

`base` is theta, `tuned` is theta'. Scales are numbers, or tensors that broadcast against the predictions.
"""

from torch import Tensor

PARAMETRISATIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def model_guidance(base: Tensor, tuned: Tensor, w: float) -> Tensor:
    """Eq. 6: eps_theta' + (w - 1)(eps_theta' - eps_theta), at w = 1 the second prediction, above it beyond.

    Both predictions unconditional. On two others it is Eq. 8, classifier-free guidance (theta' without and with the
    caption; w is diffusers' `guidance_scale`), and conditional-only guidance of App. H (theta and theta' with it).
    """
    return base + w * (tuned - base)


def finextract(
    base_unconditional: Tensor,
    tuned_conditional: Tensor,
    w: float,
    k: float = 0.0,
    prediction_type: str = "epsilon",
    x: Tensor | None = None,
    alpha: float | None = None,
    sigma: float | None = None,
) -> Tensor:
    """Eq. 13: eps_theta'(c) + (w' - 1)(eps_theta'(c) - eps_theta) + k eps_theta, as a prediction of the given type.

    x [n, c, h, w], alpha and sigma describe the point x_t = alpha x0 + sigma eps at which both predictions were made;
    only a correction (k != 0) of another type than epsilon needs them. Raises ValueError for an unknown type, without
    the point where it is needed, and at alpha = 0, where eps is x itself and the term has no finite equivalent.
    """
    guided = model_guidance(base_unconditional, tuned_conditional, w)
    if _is_zero(k):
        check_type(prediction_type)
        return guided
    return guided + k * noise_term(base_unconditional, prediction_type, x, alpha, sigma)


def noise_term(prediction: Tensor, prediction_type: str, x: Tensor | None, alpha, sigma) -> Tensor:
    """What a prediction of this type grows by when its own eps is added to the eps that it stands for.

    For epsilon eps itself; otherwise slope * eps, the slope being d prediction / d eps at fixed x: -sigma / alpha for
    sample, 1 / alpha for v_prediction and flow_prediction. Written out so that no division by sigma occurs.
    """
    check_type(prediction_type)
    if prediction_type == "epsilon":
        return prediction
    if x is None or alpha is None or sigma is None:
        raise ValueError(f"a correction of {prediction_type} takes x, alpha and sigma at which it was predicted")
    if alpha == 0:
        raise ValueError(
            f"the correction scale k needs a finite noise term, but {prediction_type} at alpha = 0 (zero terminal SNR) has "
            "none: use k = 0, or let k be 0 at the first timestep"
        )
    if prediction_type == "sample":
        return prediction - x / alpha
    if prediction_type == "v_prediction":
        return prediction + (sigma / alpha) * x
    return prediction + x / alpha


def to_epsilon(prediction: Tensor, prediction_type: str, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The eps that a prediction stands for at x = alpha x0 + sigma eps, all tensors [n, c, h, w].

    Raises ValueError for an unknown type, and for sample at sigma = 0, where x holds no noise to read off.
    """
    check_type(prediction_type)
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return alpha * prediction + sigma * x
    if prediction_type == "flow_prediction":
        return x + alpha * prediction
    if sigma == 0:
        raise ValueError("a predicted sample says nothing about eps at sigma = 0")
    return (x - alpha * prediction) / sigma


def from_epsilon(eps: Tensor, prediction_type: str, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The prediction of the given type that stands for eps at x = alpha x0 + sigma eps; the inverse of `to_epsilon`.

    Raises ValueError for an unknown type, and at alpha = 0 for any type but epsilon: x is then all noise.
    """
    check_type(prediction_type)
    if prediction_type == "epsilon":
        return eps
    if alpha == 0:
        raise ValueError(f"at alpha = 0 no {prediction_type} follows from eps: x holds nothing of x0")
    if prediction_type == "sample":
        return (x - sigma * eps) / alpha
    if prediction_type == "v_prediction":
        return (eps - sigma * x) / alpha
    return (eps - x) / alpha


def check_type(prediction_type: str) -> None:
    """ValueError for a parametrisation that is not one of PARAMETRISATIONS."""
    if prediction_type not in PARAMETRISATIONS:
        raise ValueError(f"unknown prediction type {prediction_type!r}: choose from {', '.join(PARAMETRISATIONS)}")


def _is_zero(k) -> bool:
    return not isinstance(k, Tensor) and k == 0
