"""Defenses: what Cutout and RandAugment may and may not do to training images."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from fx.datasets import from_uint8
from fx.defenses import TRANSFORMS, cutout, randaugment

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


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_seed_fixes_the_outcome_and_the_input_stays(name):
    images = pictures(8)
    before = images.clone()
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outcomes.append(TRANSFORMS[name](images))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(images, before)
    assert not torch.equal(outcomes[0], images)
