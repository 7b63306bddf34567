"""Defenses: what Cutout and RandAugment may and may not do to training images."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from fx import defenses
from fx.datasets import from_uint8, load_images, load_item, to_uint8
from fx.defenses import PERTURBATIONS, TRANSFORMS, Draws, Perturbation, cutout, perturb, randaugment, transform
from fx.families import encode, round_trip
from fx.models import load_pipeline

SIDE = 16


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    """Random images without a grey pixel: float32 [n, 3, 16, 16] in [0.1, 1]."""
    return 0.1 + 0.9 * torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def box(erased: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right (last ones excluded) of the true pixels of a mask [h, w]."""
    rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def test_cutout_erases_one_rectangle_of_at_most_half_the_side_and_nothing_else():
    images = pictures(200)
    torch.manual_seed(0)
    for image, changed in zip(images, cutout(images), strict=True):
        erased = (changed == 0).all(0)
        top, bottom, left, right = box(erased)
        assert erased[top:bottom, left:right].all()
        assert torch.equal(changed[:, ~erased], image[:, ~erased])
        for first, last in ((top, bottom), (left, right)):
            inside = first > 0 and last < SIDE
            assert last - first == SIDE // 2 if inside else SIDE // 4 <= last - first <= SIDE // 2


def test_cutout_reaches_every_place_and_draws_one_per_image():
    torch.manual_seed(0)
    erased = (cutout(pictures(400)) == 0).all(1)
    assert erased.any(0).all()
    places = {box(mask) for mask in erased}
    assert len(places) > 100
    middle = erased.float().mean(0)[SIDE // 2, SIDE // 2]
    assert abs(middle - 0.25) < 0.1  # half of the rows times half of the columns cover the middle


# RandAugment, once more with Pillow


def moved(image: Image.Image, *rows: float) -> Image.Image:
    """The image whose pixel (x, y) is that at (a x + b y + c, d x + e y + f) of the given one, black outside."""
    return image.transform(image.size, Image.Transform.AFFINE, rows)


def operations(side: int) -> dict[tuple[str, int], Callable[[Image.Image], Image.Image]]:
    """The fourteen operations of Cubuk et al. (2020) at magnitude 9 of 30, (name, sign), sign 0 for those without.

    At 30 a shear is 0.3, a translation 150 pixels of 331, a rotation 30 degrees, an enhancement 1 +- 0.9, a posterisation
    leaves 4 of 8 bits, a solarisation turns every pixel round.
    """
    step = int(0.3 * 150 / 331 * side)
    made = {
        ("identity", 0): lambda image: image,
        ("autocontrast", 0): ImageOps.autocontrast,
        ("equalize", 0): ImageOps.equalize,
        ("posterize", 0): lambda image: ImageOps.posterize(image, round(8 - 0.3 * 4)),
        ("solarize", 0): lambda image: ImageOps.solarize(image, 179),  # 0.7 of 255 is 178.5
    }
    for sign in (1, -1):
        made |= {
            ("shear x", sign): lambda image, sign=sign: moved(image, 1, sign * 0.09, 0, 0, 1, 0),
            ("shear y", sign): lambda image, sign=sign: moved(image, 1, 0, 0, sign * 0.09, 1, 0),
            ("translate x", sign): lambda image, sign=sign: moved(image, 1, 0, sign * step, 0, 1, 0),
            ("translate y", sign): lambda image, sign=sign: moved(image, 1, 0, 0, 0, 1, sign * step),
            ("rotate", sign): lambda image, sign=sign: image.rotate(sign * 9),
        }
        for kind in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Sharpness):
            made[kind.__name__, sign] = lambda image, sign=sign, kind=kind: kind(image).enhance(1 + 0.27 * sign)
    return made


def test_randaugment_is_two_operations_of_magnitude_9_drawn_alike_each_from_the_same_fourteen():
    """Every outcome is one of 529 by Pillow, and which of them says what was drawn."""
    side, n = 24, 400
    draw = np.random.default_rng(0)
    tiles = draw.integers(30, 200, (side // 4, side // 4, 3)).repeat(4, axis=0).repeat(4, axis=1)
    pixels = (tiles + draw.integers(-15, 15, (side, side, 3))).astype(np.uint8)
    known = operations(side)
    once = {first: change(Image.fromarray(pixels)) for first, change in known.items()}
    twice = {(first, second): np.asarray(known[second](once[first])) for first in known for second in known}
    expected = torch.from_numpy(np.stack(list(twice.values()))).float().flatten(1)

    torch.manual_seed(0)
    changed = randaugment(from_uint8(pixels[None]).expand(n, -1, -1, -1))
    assert (changed.shape, changed.dtype) == ((n, 3, side, side), torch.float32)
    assert -1 <= changed.min() < changed.max() <= 1
    found = ((changed + 1) * 127.5).permute(0, 2, 3, 1).flatten(1)
    chosen = torch.cdist(found, expected, p=1).argmin(dim=1)
    apart = (found - expected[chosen]).abs()
    assert (apart > 2).float().mean(dim=1).max() < 0.1, "one of the outcomes, but for rounding"

    drawn = Counter(operation for number in chosen.tolist() for operation in list(twice)[number])
    by_name = Counter()
    for (name, _), count in drawn.items():
        by_name[name] += count
    least, most = stats.binom.interval(1 - 1e-3, 2 * n, 1 / 14)
    assert len(by_name) == 14
    assert least <= min(by_name.values()) <= max(by_name.values()) <= most, by_name
    signed = [name for name, sign in known if sign == 1]
    for name in signed:
        least, most = stats.binom.interval(1 - 1e-3, by_name[name], 0.5)
        assert least <= drawn[name, 1] <= most, name


def test_a_name_may_carry_a_strength():
    images = torch.ones(40, 3, 64, 64)
    torch.manual_seed(0)
    erased = [
        (transform(name)(images) == 0).float().mean(dim=(1, 2, 3)).max().item() for name in ("cutout", "cutout:0.25")
    ]
    assert erased == [0.5**2, 0.25**2]  # the whole square lies within some of the images
    torch.manual_seed(0)
    of_usual = transform("randaugment")(pictures(40))
    torch.manual_seed(0)
    assert torch.equal(transform("randaugment:9")(pictures(40)), of_usual)
    torch.manual_seed(0)
    assert not torch.equal(transform("randaugment:25")(pictures(40)), of_usual)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_seed_fixes_the_outcome_and_the_input_stays(name):
    images = pictures(8)
    before = images.clone()
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outcomes.append(transform(name)(images))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(images, before)
    assert not torch.equal(outcomes[0], images)


# perturbations


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_pipeline(str(tiny.save("sd1", tmp_path_factory.mktemp("base"))))


def photographs(n: int, seed: int = 0, height: int = 16, width: int = 16) -> np.ndarray:
    """Smooth coloured pictures with some black and white in them, uint8 [n, h, w, 3]."""
    draw = np.random.default_rng(seed).normal(128, 300, (n, height, width, 3))
    return ndimage.gaussian_filter(draw, (0, 2, 2, 0)).clip(0, 255).round().astype(np.uint8)


def gain(base, pictures: np.ndarray, method: str, seed: int = 99, repeats: int = 60) -> float:
    """The mean of what a method makes large, over draws that `perturb` did not have."""
    images, condition, found = from_uint8(pictures), encode(base, "a picture"), []
    with torch.no_grad():
        for step in range(repeats):
            draws = defenses._draws(base, images, seed, range(len(pictures)), step)
            found.append(PERTURBATIONS[method].gain(base, images, condition, draws).mean().item())
    return float(np.mean(found))


@pytest.mark.parametrize("method", ["mist", "photoguard"])
def test_a_perturbation_does_what_it_is_for_within_its_budget(base, method):
    before = photographs(3)
    after = perturb(base, before, method, eps=8, steps=40)
    assert (after.dtype, after.shape) == (np.uint8, before.shape)
    assert np.abs(after.astype(int) - before).max() == 8
    assert gain(base, after, method) > max(gain(base, before, method), gain(base, noisy(before, 8), method))
    larger = perturb(base, before, method, eps=24, steps=40)
    assert np.abs(larger.astype(int) - before).max() == 24
    assert gain(base, larger, method) > gain(base, after, method)


def noisy(pictures_of: np.ndarray, eps: int) -> np.ndarray:
    """A change of the same budget that follows nothing."""
    change = np.random.default_rng(1).choice([-eps, eps], pictures_of.shape)
    return (pictures_of + change).clip(0, 255).astype(np.uint8)


def test_advdm_makes_the_shipped_base_model_denoise_drawings_worse():
    """A model that has learned nothing cannot be worsened: this takes mini-sd."""
    trained = load_pipeline("mini-sd")
    before = to_uint8(load_images(load_item("style/mimooh").training[:2], 64))
    after = perturb(trained, before, "advdm", eps=16, steps=12, step_size=3.0)
    assert np.abs(after.astype(int) - before).max() == 16
    errors = [gain(trained, images, "advdm", repeats=30) for images in (before, noisy(before, 16), after)]
    assert errors[2] > 1.2 * max(errors[:2])


def test_a_picture_owns_its_draws_and_a_seed_fixes_them(base):
    before = photographs(3)
    together = perturb(base, before, eps=8, steps=5)
    assert np.array_equal(together, perturb(base, before, eps=8, steps=5))
    alone = perturb(base, before[[2]], eps=8, steps=5, numbers=[2])[0]
    assert (alone != together[2]).mean() < 0.02, "but for rounding"
    assert (perturb(base, before[[2]], eps=8, steps=5, numbers=[1])[0] != together[2]).mean() > 0.3
    assert (perturb(base, before, eps=8, steps=5, seed=1) != together).mean() > 0.3


def test_ascent_follows_the_sign_of_the_slope_to_the_edge_of_the_budget_and_of_the_pixels(base, monkeypatch):
    slope = torch.from_numpy(np.random.default_rng(3).choice([-1.0, 0.5, 2.0], (2, 3, 16, 16))).float()
    linear = Perturbation("", lambda pipeline, images, condition, draws: (slope * images).sum(dim=(1, 2, 3)))
    monkeypatch.setitem(defenses.PERTURBATIONS, "linear", linear)
    before, calls = photographs(2), []
    after = perturb(base, before, "linear", eps=10, steps=20, step_size=1.0, progress=lambda: calls.append(1))
    wanted = (before + 10 * slope.sign().permute(0, 2, 3, 1).numpy()).clip(0, 255)
    assert np.array_equal(after, wanted)
    assert len(calls) == 20
    one = perturb(base, before, "linear", eps=10, steps=1, step_size=2.5).astype(float)
    start = np.stack([np.random.default_rng([0, n]).uniform(-10, 10, (3, 16, 16)) for n in range(2)])
    start = (before + start.transpose(0, 2, 3, 1)).clip(0, 255)
    moved = start + 2.5 * slope.sign().permute(0, 2, 3, 1).numpy()
    assert np.abs(one - moved.clip(before - 10.0, before + 10.0).clip(0, 255)).max() <= 0.51


def test_the_random_perturbation_is_the_start_of_the_others_and_stays_there(base):
    before = photographs(2)
    start = [np.random.default_rng([4, n]).uniform(-10, 10, (3, 16, 16)) for n in range(2)]
    wanted = (before + np.stack(start).transpose(0, 2, 3, 1)).clip(0, 255)
    after = perturb(base, before, "random", eps=10, steps=3, seed=4)
    assert np.abs(after - wanted).max() <= 0.51


def test_the_denoising_error_is_the_training_loss_of_each_image(base):
    pictures_of, condition = from_uint8(photographs(3)), encode(base, "a picture")
    draw = torch.Generator().manual_seed(0)
    eps, posterior = torch.randn(2, 3, 4, 4, 4, generator=draw)
    t = torch.tensor([0, 400, 999])
    found = defenses.denoising_error(base, pictures_of, condition, Draws(t, eps, posterior))
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t]
    for n in range(3):
        latent = base.vae.encode(pictures_of[[n]]).latent_dist
        x0 = (latent.mean + latent.logvar.mul(0.5).exp() * posterior[n]) * base.vae.config.scaling_factor
        x = kept[n].sqrt() * x0 + (1 - kept[n]).sqrt() * eps[n]
        wanted = (base.unet(x, t[n], condition.text).sample - eps[n]).square().mean()
        assert found[n].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_other_gains_are_distances_of_latents(base):
    images, condition = from_uint8(photographs(2)), encode(base, "")
    means = [base.vae.encode(image[None]).latent_dist.mean for image in images]
    stripes = base.vae.encode(defenses.pattern(16, 16)[None]).latent_dist.mean
    near_zero = PERTURBATIONS["photoguard"].gain(base, images, condition, None)
    near_stripes = PERTURBATIONS["mist"].gain(base, images, condition, None)
    for n, mean in enumerate(means):
        assert near_zero[n].item() == pytest.approx(-(mean**2).mean().item(), rel=1e-4)
        assert near_stripes[n].item() == pytest.approx(-((mean - stripes) ** 2).mean().item(), rel=1e-4)


def test_the_pattern_is_black_and_white_and_repeats_along_both_sides():
    stripes = defenses.pattern(24, 40, period=8)
    assert set(stripes.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(stripes[:, 8:], stripes[:, :-8])
    assert torch.equal(stripes[:, :, 8:], stripes[:, :, :-8])
    assert torch.equal(stripes[:, 4:], -stripes[:, :-4])


def test_the_model_is_left_as_it_was(base):
    flags = [parameter.requires_grad for parameter in base.unet.parameters()]
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    perturb(base, photographs(1), eps=2, steps=2)
    assert [parameter.requires_grad for parameter in base.unet.parameters()] == flags
    assert all(parameter.grad is None for part in (base.unet, base.vae) for parameter in part.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.unet.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "magic"}, "unknown perturbation 'magic': choose from advdm, mist, photoguard"),
        ({"eps": 0}, "eps 0 must be a whole number of grey levels"),
        ({"eps": 256}, "eps 256 must"),
        ({"eps": 4.5}, "eps 4.5 must be a whole number"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"step_size": 0.0}, "step_size 0.0 above 0"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(base, monkeypatch, wrong, message):
    monkeypatch.setattr(defenses, "encode", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        perturb(base, photographs(1), **wrong)


# purifications


def test_jpeg_loses_more_at_lower_quality_and_hardly_anything_of_a_plain_picture():
    pictures_of = photographs(2, height=24, width=40)
    errors = [np.abs(defenses.jpeg(pictures_of, quality).astype(int) - pictures_of).mean() for quality in (95, 75, 20)]
    assert 0 < errors[0] < errors[1] < errors[2]
    plain = np.full((1, 16, 16, 3), (200, 30, 90), np.uint8)
    assert np.abs(defenses.jpeg(plain).astype(int) - plain).max() <= 2


def test_blur_is_a_gaussian_filter_on_each_colour():
    pictures_of = photographs(2, height=24, width=40)
    wanted = ndimage.gaussian_filter(pictures_of.astype(float), (0, 1.5, 1.5, 0), mode="nearest")
    assert np.abs(defenses.blur(pictures_of, 1.5) - wanted).mean() < 2
    assert np.abs(defenses.blur(pictures_of, 1.5) - wanted).mean() < np.abs(pictures_of - wanted).mean() / 2


def test_noise_and_resize_adds_noise_of_the_named_size_and_loses_what_is_finer_than_the_share():
    plain = np.full((4, 64, 64, 3), 128, np.uint8)
    noisy = defenses.noise_and_resize(plain, sigma=10.0, share=1.0)
    assert noisy.astype(float).std() == pytest.approx(10, rel=0.05)
    assert noisy.astype(float).mean() == pytest.approx(128, abs=0.3)
    assert defenses.noise_and_resize(plain, sigma=10.0, share=0.25).astype(float).std() < 6
    board = np.repeat((255 * (np.indices((64, 64)).sum(0) % 2))[None, :, :, None], 3, axis=3).astype(np.uint8)
    assert np.abs(defenses.noise_and_resize(board, sigma=0.0, share=0.5).astype(int) - 128).max() < 60
    assert np.array_equal(defenses.noise_and_resize(plain), defenses.noise_and_resize(plain))
    assert defenses.noise_and_resize(photographs(1, height=24, width=40)).shape == (1, 24, 40, 3)


def test_regeneration_goes_from_the_round_trip_of_the_autoencoder_to_something_else(base):
    pictures_of = photographs(3)
    kept = ((round_trip(base.vae, from_uint8(pictures_of)) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    apart = [
        np.abs(defenses.regenerate(base, pictures_of, strength=strength, steps=50) - kept).mean()
        for strength in (0.02, 0.3, 0.9)
    ]
    assert apart[0] < apart[1] < apart[2]
    once, again = (defenses.regenerate(base, pictures_of, strength=0.3, steps=10) for _ in range(2))
    assert np.array_equal(once, again)
    assert once.shape == pictures_of.shape
