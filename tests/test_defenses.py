"""Defenses: what Cutout and RandAugment may and may not do to training images."""

import pytest
import torch
from torchvision.transforms import v2

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


def test_randaugment_keeps_shape_and_range_and_applies_two_operations_of_magnitude_9():
    images = pictures(6) * 2 - 1
    torch.manual_seed(3)
    changed = randaugment(images)
    assert (changed.shape, changed.dtype) == (images.shape, torch.float32)
    assert changed.min() >= -1
    assert changed.max() <= 1
    torch.manual_seed(3)
    operation = v2.RandAugment(num_ops=2, magnitude=9)
    expected = [operation(((image + 1) / 2 * 255).round().to(torch.uint8)) for image in images]
    assert torch.allclose((changed + 1) / 2 * 255, torch.stack(expected).float(), atol=1e-3)
    assert (changed - images).abs().amax(dim=(1, 2, 3)).max() > 0.1


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
