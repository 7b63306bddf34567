"""fx.mini: how the corpus, the shipped items and the mini models come about.

Transforms, losses and scores are compared with closed forms and with independent computations; the catalogue is built
from a miniature `sources` folder that holds one example of everything the rules speak of.
"""

import copy
import hashlib
import io
import json
import math
import re
import shutil
import string
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel, CLIPTokenizer

from fx import datasets
from fx.mini import clip, corpus, items, pictures, sd, sscd, training, vae
from fx.similarity import MiniSSCD

WHITE = 1.0


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawings(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    """n random pictures, float32 [n, 3, side, side] in [-1, 1]."""
    return torch.rand(n, 3, side, side, generator=rng(seed)) * 2 - 1


def dots(n: int, side: int = 33, at: tuple[int, int] = (16, 24)) -> torch.Tensor:
    """n white pictures with one soft black dot at (row, column)."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ink = torch.exp(-((rows - at[0]) ** 2 + (columns - at[1]) ** 2) / 8.0)
    return (1 - 2 * ink).expand(n, 3, side, side).clone()


def centroids(x: torch.Tensor) -> np.ndarray:
    """Centre of the ink of each picture as (row, column) from the middle of the frame, [n, 2]."""
    ink = (1 - x.mean(1)).double().numpy()
    middle = (x.shape[-1] - 1) / 2
    axis = np.arange(x.shape[-1]) - middle
    total = ink.sum((1, 2))
    return np.stack([(ink.sum(2) * axis).sum(1) / total, (ink.sum(1) * axis).sum(1) / total], axis=1)


# Picture transforms


def test_to_float_maps_bytes_linearly_to_minus_one_to_one():
    values = torch.arange(256, dtype=torch.uint8)
    expected = torch.linspace(-1, 1, 256, dtype=torch.float64)
    torch.testing.assert_close(pictures.to_float(values).double(), expected, atol=1e-6, rtol=0)


def test_uniform_fills_its_range():
    drawn = pictures.uniform(4000, -2.0, 3.0, rng())
    assert drawn.shape == (4000,)
    assert -2 <= drawn.min() < -1.95
    assert 2.95 < drawn.max() <= 3
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.1)


TRANSFORMS = [
    *(pictures.warp, pictures.recolour, pictures.jitter, pictures.blur, pictures.noise, pictures.cover),
    *(pictures.corrupt, sscd.copy),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_transforms_keep_shape_and_range_and_draw_only_from_their_generator(transform):
    x = drawings(6)
    kept = x.clone()
    torch.manual_seed(0)
    once = transform(x, rng(3))
    torch.manual_seed(1)
    twice = transform(x, rng(3))
    assert once.shape == x.shape
    assert once.dtype == torch.float32
    assert once.abs().max() <= 1 + 1e-5
    assert torch.equal(once, twice)
    assert torch.equal(x, kept), "the input was changed"
    assert not torch.equal(once, transform(x, rng(4)))
    assert not torch.allclose(once, x, atol=0.05)


def test_warp_at_identity_settings_is_the_identity():
    x = drawings(4)
    torch.testing.assert_close(pictures.warp(x, rng(), zoom=(1, 1), shift=0, mirror=False), x, atol=1e-5, rtol=0)


def test_warp_mirrors_about_half_of_the_pictures_and_leaves_the_others_alone():
    x = drawings(1).expand(64, -1, -1, -1)
    seen = pictures.warp(x, rng(), zoom=(1, 1), shift=0)
    straight = (seen - x).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (seen - x.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (straight ^ mirrored).all()
    assert 20 <= mirrored.sum() <= 44


def test_jitter_moves_a_little_and_mirrors_about_half_of_the_pictures():
    rows, columns = centroids(pictures.jitter(dots(64), rng())).T
    assert 20 <= (columns < 0).sum() <= 44
    assert np.abs(rows).max() < 2.5
    assert np.abs(np.abs(columns) - 8).max() < 2.5
    assert np.abs(columns).std() > 0.3


def test_warp_shrinks_below_zoom_one_and_leaves_white_outside():
    black = torch.full((3, 3, 16, 16), -1.0)
    seen = pictures.warp(black, rng(), zoom=(0.5, 0.5), shift=0)
    expected = torch.full_like(black, WHITE)
    expected[:, :, 4:12, 4:12] = -1
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


def test_warp_magnifies_above_zoom_one():
    ink = [(1 - pictures.warp(dots(1, at=(16, 16)), rng(), zoom=(z, z), shift=0)).sum().item() for z in (1, 2)]
    assert ink[1] == pytest.approx(4 * ink[0], rel=0.02)


def test_warp_zoom_is_log_uniform_within_its_range():
    seen = pictures.warp(dots(400, at=(16, 16)), rng(), zoom=(0.5, 2), shift=0, mirror=False)
    ink = (1 - seen).sum((1, 2, 3)) / (1 - dots(1, at=(16, 16))).sum()
    zooms = ink.sqrt().log2()
    assert zooms.min() >= -1.02
    assert zooms.max() <= 1.02
    assert zooms.mean().item() == pytest.approx(0, abs=0.1)
    assert zooms.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.05)


def test_warp_turns_about_the_middle_by_at_most_the_asked_degrees():
    seen = pictures.warp(dots(200), rng(), zoom=(1, 1), turn=30, shift=0, mirror=False)
    rows, columns = centroids(seen).T
    assert np.hypot(rows, columns) == pytest.approx(8, abs=0.1)
    angles = np.degrees(np.arctan2(rows, columns))
    assert abs(angles).max() <= 30.5
    assert angles.min() < -25
    assert angles.max() > 25


def test_warp_shifts_by_at_most_the_asked_share_of_the_width():
    moved = centroids(pictures.warp(dots(200), rng(), zoom=(1, 1), shift=0.1, mirror=False)) - [0, 8]
    assert abs(moved).max() <= 3.35
    assert (moved.min(0) < -2.8).all()
    assert (moved.max(0) > 2.8).all()


def test_recolour_is_the_identity_at_strength_zero_and_affine_otherwise():
    x = drawings(5) * 0.2
    torch.testing.assert_close(pictures.recolour(x, rng(), strength=0), x, atol=1e-6, rtol=0)
    # small values are not clipped, so every new channel is an affine function of the three old ones
    for before, after in zip(x, pictures.recolour(x, rng(), strength=0.3), strict=True):
        design = torch.cat([before.flatten(1), torch.ones(1, 256)]).T.double()
        solution = torch.linalg.lstsq(design, after.flatten(1).T.double()).solution
        torch.testing.assert_close(design @ solution, after.flatten(1).T.double(), atol=1e-5, rtol=0)
        gain = solution[:3].sum(0)
        assert gain.max() - gain.min() < 1e-4, "grey must stay grey up to one contrast"
        assert 0.7 - 1e-4 <= gain[0] <= 1.3 + 1e-4
        assert abs(solution[3]).max() <= 0.3 + 1e-4


def test_blur_keeps_plain_pictures_and_removes_fine_detail():
    plain = torch.full((2, 3, 32, 32), 0.3)
    torch.testing.assert_close(pictures.blur(plain, rng()), plain)
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    assert pictures.blur(board.expand(1, 3, 32, 32), rng()).std() < 0.5
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert (pictures.blur(ramp, rng()) - ramp).abs().mean() < 0.05


def test_blur_leaves_between_a_half_and_a_fifth_of_the_rows():
    """What is enlarged from s rows has the rank s."""
    x = drawings(1, side=40)
    ranks = [int(torch.linalg.matrix_rank(pictures.blur(x, rng(seed))[0, 0].double(), rtol=1e-6)) for seed in range(60)]
    assert 8 <= min(ranks) <= 9
    assert 18 <= max(ranks) <= 20


def test_noise_has_a_strength_of_its_own_for_each_picture():
    strengths = pictures.noise(torch.zeros(200, 3, 16, 16), rng(), high=0.3).std((1, 2, 3))
    assert strengths.min() > 0.09
    assert strengths.max() < 0.32
    assert strengths.mean().item() == pytest.approx(0.2, abs=0.02)
    assert strengths.std().item() == pytest.approx(0.2 / math.sqrt(12), abs=0.015)


def test_cover_paints_one_rectangle_of_one_colour():
    x = drawings(60, side=40)
    seen = pictures.cover(x, rng(), high=0.5)
    sizes, corners, colours = [], [], []
    for before, after in zip(x, seen, strict=True):
        changed = (before != after).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert changed[box].all(), "the changed pixels are no full rectangle"
        assert (after[:, *box] == after[:, rows[0], columns[0]][:, None, None]).all(), "more than one colour"
        sizes.append((len(rows), len(columns)))
        corners.append((rows[0], columns[0]))
        colours.append(after[:, rows[0], columns[0]].numpy())
    sizes, corners, colours = np.array(sizes), np.array(corners), np.array(colours)
    assert sizes.min() >= 0.15 * 40 - 1
    assert sizes.max() <= 0.5 * 40 + 1
    assert (np.ptp(sizes, axis=0) > 8).all()
    assert (np.ptp(corners, axis=0) > 15).all()
    assert (np.ptp(colours, axis=0) > 1.5).all()
    assert abs(np.corrcoef(colours.T)[np.triu_indices(3, 1)]).max() < 0.4, "channels of their own"


def test_corrupt_uses_its_four_kinds_in_equal_shares():
    grey = torch.zeros(400, 3, 24, 24)
    seen = pictures.corrupt(grey, rng())
    changed = (seen != 0).any(1).float().mean((1, 2))
    blurred, noisy = changed == 0, changed == 1  # blur leaves plain grey as it is, noise changes every pixel
    assert 75 <= blurred.sum() <= 125
    assert 165 <= noisy.sum() <= 235
    assert (changed[~blurred & ~noisy] < 0.3).all(), "what is left must be covered by a rectangle"
    assert seen[noisy].std((1, 2, 3)).max() < 0.6
    strong = (seen[noisy].std((1, 2, 3)) > 0.31).sum()
    assert 30 <= strong <= 95, "only noise without blur is stronger than 0.3, in three fifths of its cases"


# Training loop


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.01), (1, 0.02), (9, 0.1), (10, 0.1), (80, 0.1), (70, 0.1), (85, 0.075), (90, 0.05), (99, 0.005)],
)
def test_rate_is_a_trapezoid(step, rate):
    schedule = training.Schedule(steps=100, lr=0.1, warmup=10, decay=0.2)
    assert schedule.rate(step) == pytest.approx(rate)


@given(st.integers(1, 500), st.integers(1, 300), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_rate_stays_within_zero_and_lr(steps, warmup, decay):
    schedule = training.Schedule(steps=steps, lr=0.3, warmup=warmup, decay=decay)
    rates = np.array([schedule.rate(step) for step in range(steps)])
    assert (rates > 0).all()
    assert rates.max() <= 0.3 + 1e-12
    assert (np.diff(rates, 2) <= 1e-12).all(), "up, level, down: concave"


def toy() -> nn.Module:
    torch.manual_seed(5)
    # no bias before the normalisation: its gradient would be rounding noise, which AdamW would follow
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def toy_loss(model: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.randn(16, 4, generator=generator).to(model[0].weight.dtype)
    value = (model(x)[:, 0] - x.sum(1).sin()).pow(2).mean()
    return {"loss": value, "double": 2 * value}


SCHEDULE = training.Schedule(steps=50, lr=0.05, warmup=5, decay=0.4, ema=0.9)


def kill_at(step: int):
    """toy_loss that raises KeyboardInterrupt when the batch of `step` is asked for."""

    def loss(model, generator):
        if generator.initial_seed() == step:
            raise KeyboardInterrupt
        return toy_loss(model, generator)

    return loss


def identical(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def without_time(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in log]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The toy model after its 50 steps, its average, its log, and per step its parameters (before) and its loss."""
    model, path, losses = toy(), [], []

    def recorded(model, generator):
        path.append([p.detach().clone() for p in model.parameters()])
        terms = toy_loss(model, generator)
        losses.append(terms["loss"].item())
        return terms

    average, log = training.train(model, recorded, SCHEDULE, folder := tmp_path_factory.mktemp("whole"))
    path.append([p.detach().clone() for p in model.parameters()])
    return SimpleNamespace(model=model, average=average, log=log, path=path, losses=losses, folder=folder)


def test_training_is_adamw_with_clipping_on_batches_seeded_by_their_step(tmp_path):
    """In float64: AdamW makes much of a gradient's rounding, and fifty steps make more."""
    trained, model = toy().double(), toy().double()
    training.train(trained, toy_loss, SCHEDULE, tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), foreach=False)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = SCHEDULE.rate(step)
        optimizer.zero_grad()
        toy_loss(model, rng(step))["loss"].backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
        optimizer.step()
    for ours, theirs in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_forward_pass_has_the_precision_asked_for_and_the_weights_stay_in_float32(tmp_path, precision):
    model, seen = toy(), set()
    model[0].register_forward_hook(lambda *call: seen.add(call[2].dtype))
    schedule = training.Schedule(steps=2, lr=0.05)
    average, _ = training.train(model, toy_loss, schedule, tmp_path, precision=precision)
    assert seen == {precision}
    assert {p.dtype for p in [*model.parameters(), *average.parameters()]} == {torch.float32}


def test_compiled_training_calls_the_compiled_model_and_trains_the_given_one(uninterrupted, tmp_path, monkeypatch):
    """The compiler itself is torch's and takes minutes: a stand-in that says when it is called."""
    model, calls = toy(), []

    class Compiled(nn.Module):
        def __init__(self, original):
            super().__init__()
            self.original = original

        def __getitem__(self, layer):
            return self.original[layer]

        def forward(self, x):
            calls.append(len(x))
            return self.original(x)

    monkeypatch.setattr(torch, "compile", Compiled)
    average, log = training.train(model, toy_loss, SCHEDULE, tmp_path, compiled=True)
    assert calls == [16] * 50
    assert identical(model, uninterrupted.model)
    assert identical(average, uninterrupted.average)
    assert without_time(log) == without_time(uninterrupted.log)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["model"].keys() == toy().state_dict().keys()


def test_average_is_the_exponential_moving_average_of_the_parameters(uninterrupted):
    expected = [p.double() for p in uninterrupted.path[0]]
    for step, parameters in enumerate(uninterrupted.path[1:]):
        keep = min(0.9, (1 + step) / (10 + step))
        expected = [keep * old + (1 - keep) * new.double() for old, new in zip(expected, parameters, strict=True)]
    for ours, theirs in zip(uninterrupted.average.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
        assert not ours.requires_grad
    for kept, current in zip(uninterrupted.average.buffers(), uninterrupted.model.buffers(), strict=True):
        assert torch.equal(kept, current)
    assert not uninterrupted.average.training


def test_log_holds_the_means_of_twenty_steps_and_of_the_rest(uninterrupted):
    log = uninterrupted.log
    assert [row["step"] for row in log] == [19, 39, 49]
    assert [row["lr"] for row in log] == [SCHEDULE.rate(step) for step in (19, 39, 49)]
    means = np.array([np.mean(uninterrupted.losses[first : first + 20]) for first in (0, 20, 40)])
    assert [row["loss"] for row in log] == pytest.approx(means, rel=1e-6)
    assert [row["double"] for row in log] == pytest.approx(2 * means, rel=1e-6)


@pytest.mark.parametrize("kills", [(7,), (20,), (33,), (49,), (11, 12, 31)])
def test_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, uninterrupted, kills):
    for step in kills:
        with pytest.raises(KeyboardInterrupt):
            training.train(toy(), kill_at(step), SCHEDULE, tmp_path, save_every=0)
    began = []
    model = toy()

    def loss(model, generator):
        began.append(generator.initial_seed())
        return toy_loss(model, generator)

    average, log = training.train(model, loss, SCHEDULE, tmp_path, save_every=0)
    assert began[0] == kills[-1] // 20 * 20, "work that was saved is not repeated"
    assert identical(model, uninterrupted.model)
    assert identical(average, uninterrupted.average)
    assert without_time(log) == without_time(uninterrupted.log)
    times = [row["seconds"] for row in log]
    assert times == sorted(times)


def test_finished_run_is_not_repeated(uninterrupted):
    model = toy()
    average, log = training.train(model, kill_at(0), SCHEDULE, uninterrupted.folder)
    assert without_time(log) == without_time(uninterrupted.log)
    assert identical(model, uninterrupted.model)
    assert identical(average, uninterrupted.average)


def test_kill_while_the_log_is_written_loses_nothing(tmp_path, uninterrupted, monkeypatch):
    write, calls = Path.write_text, []

    def half(self, text, *args, **options):
        calls.append(self)
        if len(calls) == 2:
            write(self, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write(self, text, *args, **options)

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        training.train(toy(), toy_loss, SCHEDULE, tmp_path, save_every=0)
    monkeypatch.undo()
    average, log = training.train(toy(), toy_loss, SCHEDULE, tmp_path, save_every=0)
    assert without_time(log) == without_time(uninterrupted.log)
    assert identical(average, uninterrupted.average)


# Corpus: a miniature of the packages

SQUARE = '<path fill="{colour}" d="M{x} {y}h{w}v{h}h-{w}z"/>'
EMOJI = [
    {"label": "red apple", "hexcode": "1F34E", "tags": ["apple", "fruit"], "group": 4, "subgroup": 42},
    {"label": "Red heart", "hexcode": "2764", "tags": [], "group": 0, "subgroup": 14},
    {"label": "rocket", "hexcode": "1F680", "tags": list("abcdefgh"), "group": 5, "subgroup": 56},
    {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "tags": [], "group": 8, "subgroup": 1},
    {"label": "light skin tone", "hexcode": "1F3FB", "tags": [], "group": 2, "subgroup": 1},
    {"label": "chequered flag", "hexcode": "1F3C1", "tags": [], "group": 9, "subgroup": 1},
    {"label": "man astronaut", "hexcode": "1F468-200D-1F680", "tags": [], "group": 1, "subgroup": 1},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
METADATA = """<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF><cc:Work rdf:about="">
  <dc:title>{title}</dc:title>
  <dc:subject><rdf:Bag>{tags}</rdf:Bag></dc:subject>
  <dc:publisher><cc:Agent><dc:title>Some Library</dc:title></cc:Agent></dc:publisher>
  <dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator>
  <dc:rights><cc:Agent><dc:title>Somebody Else</dc:title></cc:Agent></dc:rights>
  <cc:license rdf:resource="{licence}"/>
</cc:Work></rdf:RDF></metadata></svg>"""
CLIP_ART = {  # key: title, author as signed, licence
    "animals/cat_01": ("A_Cat - (sitting)!", "Mo", PUBLIC_DOMAIN),
    "animals/my_dog": ("", "Jane Doe (jane@example.org)", PUBLIC_DOMAIN),
    "animals/cow": ("Cow", "Jane Doe [jane@example.org]", "http://creativecommons.org/licenses/by-sa/3.0/"),
    "animals/pig": ("Pig", "Jane Doe &lt;jane@example.org&gt;", PUBLIC_DOMAIN),
    "animals/hen": ("Hen", "Jane Doe - jane@example.org", PUBLIC_DOMAIN),
    "animals/owl": ("Owl", "mailto:jane@example.org", PUBLIC_DOMAIN),
    "people/house": ("House", "Rollandin Francesco", PUBLIC_DOMAIN),
    "people/tower": ("Tower", "Architetto Francesco Rollandin", PUBLIC_DOMAIN),
    "computer/icons/disk": ("Disk", "Jane Doe", PUBLIC_DOMAIN),
    "recreation/games/cards/white/ace": ("Ace", "Jane Doe", PUBLIC_DOMAIN),
    "recreation/games/chess": ("Chess", "Jane Doe", PUBLIC_DOMAIN),
}


def add_pack(sources: Path, family: str, names: list[str], **extra) -> None:
    """An Iconify JSON package whose icons are 20x20 with a red rectangle of 10x5 near the right edge."""
    body = SQUARE.format(colour="#ff0000", x=9, y=7, w=10, h=5)
    (folder := sources / family / "package").mkdir(parents=True)
    pack = {"width": 20, "height": 20, "icons": {name: {"body": body} for name in names}}
    pack["icons"].update(extra)
    (folder / "icons.json").write_text(json.dumps(pack))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Two icon packs, one pack of WebP files, the emoji names and a little clip art."""
    root = tmp_path_factory.mktemp("sources")
    (root / "names/package/en").mkdir(parents=True)
    (root / "names/package/en/data.json").write_text(json.dumps(EMOJI))
    wide = {"body": SQUARE.format(colour="#0000ff", x=110, y=-18, w=10, h=10)}
    add_pack(
        *(root, "noto", ["red-apple", "red-heart", "chequered-flag", "man-astronaut", "light-skin-tone", "unheard-of"]),
        **{"rocket-1": {**wide, "left": 100, "top": -20, "width": 40}},
    )
    add_pack(root, "fxemoji", ["redapple", "heavyblackheart", "rocket", "rocket-2", "regionalindicatorsymbollettera"])
    (root / "fluent-3d/package/assets").mkdir(parents=True)
    image = Image.new("RGBA", (40, 40))
    image.paste((0, 128, 0, 255), (10, 0, 30, 40))
    for name in ("1f34e", "2764-fe0f", "1f3c1", "0023-fe0f-20e3"):
        image.save(root / f"fluent-3d/package/assets/{name}.webp", lossless=True)
    art = root / "openclipart/usr/share/openclipart"
    for key, (title, author, licence) in CLIP_ART.items():
        tags = "".join(f"<rdf:li>{tag}</rdf:li>" for tag in ("Tag0", *(f"t{n}" for n in range(1, 7))))
        for suffix in ("svg", "png"):
            (art / suffix / key).parent.mkdir(parents=True, exist_ok=True)
        text = METADATA.format(title=title, author=author, licence=licence, tags=tags)
        (art / "svg" / f"{key}.svg").write_text(text, "utf-8")
        drawing = Image.new("RGBA", (60, 30))
        drawing.paste((0, 0, 0, 255), (30, 0, 50, 20))
        drawing.save(art / "png" / f"{key}.png")
    (art / "svg/animals/nothing_known.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return root


@pytest.fixture(scope="module")
def catalogue(sources) -> pd.DataFrame:
    return corpus.catalogue(sources).set_index("key", drop=False)


def test_catalogue_lists_what_the_rules_allow_sorted_by_key(catalogue):
    clip_art = set(CLIP_ART) - {"animals/cow", "computer/icons/disk", "recreation/games/cards/white/ace"}
    expected = {f"{family}/{name}" for family in ("noto", "fxemoji") for name in ("red-apple", "red-heart", "rocket")}
    expected |= {f"fluent-3d/{name}" for name in ("red-apple", "red-heart", "keycap")}
    expected |= {f"openclipart/{key}" for key in clip_art}
    assert catalogue.key.tolist() == sorted(expected)
    columns = ["key", "collection", "author", "title", "tags", "folder", "licence", "file"]
    assert catalogue.columns.tolist() == columns
    assert not catalogue.isna().any(axis=None)


def test_catalogue_gives_emoji_their_cldr_names_licence_and_file(catalogue):
    assert catalogue.loc["noto/red-apple"].drop("key").to_dict() == {
        "collection": "noto",
        "author": "",
        "title": "red apple",
        "tags": "apple, fruit",
        "folder": "group-4/42",
        "licence": "Apache-2.0",
        "file": "noto:red-apple",
    }
    assert catalogue.loc["noto/red-heart", "title"] == "red heart"
    assert catalogue.loc["noto/rocket", ["file", "tags"]].tolist() == ["noto:rocket-1", "a, b, c, d, e, f"]
    assert catalogue.loc["fxemoji/red-heart", "file"] == "fxemoji:heavyblackheart"
    assert catalogue.loc["fxemoji/rocket", "file"] == "fxemoji:rocket"
    assert catalogue.loc["fluent-3d/red-heart", ["file", "licence"]].tolist() == ["fluent-3d:2764-fe0f.webp", "MIT"]


def test_catalogue_reads_title_author_and_tags_of_clip_art(catalogue):
    assert catalogue.loc["openclipart/animals/cat_01"].drop("key").to_dict() == {
        "collection": "openclipart",
        "author": "mo",
        "title": "a cat sitting",
        "tags": "tag0, t1, t2, t3, t4, t5",
        "folder": "animals",
        "licence": "public domain",
        "file": "openclipart:animals/cat_01",
    }
    assert catalogue.loc["openclipart/animals/my_dog", "title"] == ""


def test_catalogue_knows_spellings_and_drops_addresses(catalogue):
    authors = catalogue.author[catalogue.collection == "openclipart"]
    assert authors["openclipart/people/house"] == authors["openclipart/people/tower"]
    for name in ("my_dog", "pig", "hen"):
        assert authors[f"openclipart/animals/{name}"] == "Jane Doe"
    assert authors["openclipart/animals/owl"] == "jane"
    assert not authors.str.contains("@|example").any()


def test_captions_name_style_title_author_and_tags(catalogue):
    assert corpus.captions(catalogue.loc["noto/red-apple"]) == [
        *("google emoji of red apple", "google emoji of red apple"),
        *("a red apple", "red apple, apple, fruit"),
    ]
    assert corpus.captions(catalogue.loc["noto/red-heart"])[-1] == "red heart"
    assert corpus.captions(catalogue.loc["openclipart/animals/cat_01"]) == [
        *("clipart of a cat sitting", "clipart of animals a cat sitting", "a a cat sitting"),
        *("clipart of a cat sitting by mo", "art style of mo"),
    ]
    anonymous = catalogue.loc["openclipart/animals/my_dog"].copy()
    anonymous["author"], anonymous["folder"] = "", "wild_animals/small_dogs"
    assert corpus.captions(anonymous) == [
        *("clipart of wild animals small dogs", "clipart of small dogs wild animals small dogs"),
        "a wild animals small dogs",
    ]


def test_every_family_has_captions_and_pinned_sources():
    words = {family.word for family in corpus.FAMILIES.values()}
    assert len(words) == len(corpus.FAMILIES)
    assert set(items.FAMILY_ORDER) == set(corpus.FAMILIES)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", family.version) for family in corpus.FAMILIES.values())


def ink_box(picture: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row and first and last column that are not white."""
    ink = picture.min(axis=2) < 200
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


@pytest.mark.parametrize(
    ("file", "shape", "colour"),
    [
        ("noto:red-apple", (30, 59), (255, 0, 0)),
        ("noto:rocket-1", (59, 59), (0, 0, 255)),
        ("fluent-3d:2764-fe0f.webp", (59, 29), (0, 128, 0)),
        ("openclipart:animals/cat_01", (59, 59), (0, 0, 0)),
    ],
)
def test_renderer_draws_every_kind_of_source_on_white(sources, file, shape, colour):
    picture = corpus.Renderer(sources)(file, size=64)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    top, bottom, left, right = ink_box(picture)
    assert (bottom - top + 1, right - left + 1) == pytest.approx(shape, abs=2)
    assert abs(picture[32, 32].astype(int) - colour).max() <= 3
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()


def test_renderer_refuses_a_picture_too_large_to_decode(tmp_path):
    path = tmp_path / "openclipart/usr/share/openclipart/png/maps/world.png"
    path.parent.mkdir(parents=True)
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (8000).to_bytes(4, "big") + (5001).to_bytes(4, "big")  # width and height of the header
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="8000x5001"):
        corpus.Renderer(tmp_path)("openclipart:maps/world")


def test_render_all_keeps_the_rows_that_can_be_rendered(sources, tmp_path):
    blank = sources / "openclipart/usr/share/openclipart/png/animals/blank.png"
    Image.new("RGB", (20, 20), "white").save(blank)
    files = ["noto:red-apple", "openclipart:animals/blank", "openclipart:no/such", "fluent-3d:1f34e.webp"]
    kept, rendered = corpus.render_all(pd.DataFrame({"file": files}, index=[3, 5, 7, 9]), sources, size=32)
    assert kept.file.tolist() == [files[0], files[3]]
    assert kept.index.tolist() == [0, 1]
    renderer = corpus.Renderer(sources)
    assert np.array_equal(rendered, np.stack([renderer(file, 32) for file in kept.file]))


def test_square_on_white_trims_centres_and_leaves_a_white_border():
    image = Image.new("RGBA", (600, 400))
    image.paste((200, 30, 30, 255), (220, 10, 460, 130))
    top, bottom, left, right = ink_box(picture := corpus.square_on_white(image, 100))
    assert right - left + 1 == pytest.approx(92, abs=1)
    assert bottom - top + 1 == pytest.approx(46, abs=1)
    assert abs(left - (99 - right)) <= 1
    assert abs(top - (99 - bottom)) <= 1
    assert abs(picture[50, 50].astype(int) - (200, 30, 30)).max() <= 1
    assert min(picture[[0, -1]].min(), picture[:, [0, -1]].min()) >= 253, "white up to the ringing of the resize"


def test_square_on_white_puts_what_is_transparent_on_white():
    image = Image.new("RGBA", (10, 10), (255, 0, 0, 102))
    assert abs(corpus.square_on_white(image, 20)[10, 10].astype(int) - (255, 153, 153)).max() <= 1


@pytest.mark.parametrize("dot", [0, 9])
def test_square_on_white_refuses_a_blank_picture(dot):
    image = Image.new("RGBA", (100, 100), "white")
    image.paste((0, 0, 0, 255), (0, 0, dot, 11))  # 99 pixels of 10,000
    with pytest.raises(ValueError, match="blank"):
        corpus.square_on_white(image, 32)
    image.paste((0, 0, 0, 255), (0, 0, 10, 10))
    assert ink_box(corpus.square_on_white(image, 32))


def test_thumbprint_is_the_cell_means_of_the_ink_at_unit_length():
    seen = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    prints = corpus.thumbprint(seen)
    assert prints.shape == (2, 3, 12 * 12 * 3)
    cells = 1 - seen.reshape(3, 12, 2, 12, 2, 3).mean((2, 4)) / 255
    for own, expected in ((prints[0], cells), (prints[1], cells[:, :, ::-1])):
        flat = expected.reshape(3, -1)
        np.testing.assert_allclose(own, flat / np.linalg.norm(flat, axis=1, keepdims=True), atol=4e-4)
    np.testing.assert_allclose(np.linalg.norm(prints, axis=2), 1, atol=1e-5)
    assert not corpus.thumbprint(np.full((1, 24, 24, 3), 255, np.uint8)).any()


def blocks(n: int, seed: int = 0) -> np.ndarray:
    """n unlike drawings, uint8 [n, 24, 24, 3]: a quarter of 12x12 cells in random colours on white."""
    draw = np.random.default_rng(seed)
    cells = np.where(draw.random((n, 12, 12, 1)) < 0.25, draw.integers(0, 200, (n, 12, 12, 3)), 255)
    return cells.repeat(2, 1).repeat(2, 2).astype(np.uint8)


def test_near_duplicates_finds_copies_and_mirror_images_only():
    reference = blocks(3)
    faded = (255 - (255 - reference[1]) * 0.8).astype(np.uint8)  # less ink, the same drawing
    candidates = np.stack([blocks(1, seed=9)[0], reference[2], reference[0][:, ::-1], faded, reference[0][::-1]])
    prints = corpus.thumbprint(candidates)
    found = corpus.near_duplicates(prints, corpus.thumbprint(reference))
    assert found.tolist() == [False, True, True, True, False]
    between = (prints[0][0] @ corpus.thumbprint(reference)[0].T).max()
    assert corpus.near_duplicates(prints[:, :1], corpus.thumbprint(reference), between - 0.01).all()


def test_fetch_gets_the_pinned_packages_once(tmp_path, monkeypatch):
    commands = []

    def fake(command: list[str], folder: Path) -> str:
        commands.append(" ".join(command))
        if command[0] == "npm":
            with tarfile.open(folder / "packed.tgz", "w:gz") as archive:
                member = tarfile.TarInfo("package/package.json")
                member.size = len(content := command[-1].encode())
                archive.addfile(member, io.BytesIO(content))
            return "npm says\npacked.tgz\n"
        if command[0] == "apt-get":
            (folder / f"{command[-1].partition('=')[0]}_1_all.deb").write_text("")
        else:
            (folder / "openclipart.part").mkdir(exist_ok=True)
            (folder / "openclipart.part" / command[2]).write_text("")
        return ""

    monkeypatch.setattr(corpus, "_run", fake)
    sources = tmp_path / "sources"
    corpus.fetch(sources)
    for name, family in {**corpus.FAMILIES, "names": corpus.EMOJI_NAMES}.items():
        assert (sources / name / "package/package.json").read_text() == f"{family.package}@{family.version}"
    clip_art = {path.name for path in (sources / "openclipart").iterdir()}
    assert clip_art == {"openclipart-png_1_all.deb", "openclipart-svg_1_all.deb"}
    assert f"apt-get download openclipart-svg={corpus.CLIP_ART_VERSION}" in commands
    assert not list(sources.glob("*.part"))
    count = len(commands)
    corpus.fetch(sources)
    assert len(commands) == count, "finished packages are kept"


def test_fetch_says_which_command_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FAMILIES", {})
    (tmp_path / "npm").write_text("#!/bin/sh\necho no such version >&2\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match=r"npm pack --silent emojibase-data@.* failed in .*no such version"):
        corpus.fetch(tmp_path / "sources")


def test_halved_pictures_are_those_pictures_at_half_the_size_in_their_order():
    rows, columns = np.mgrid[0:128, 0:128]
    ramp = np.stack([rows, columns, 255 - rows], axis=2).astype(np.uint8)
    board = np.repeat((255 * ((rows + columns) % 2))[..., None], 3, axis=2).astype(np.uint8)
    halved = corpus.halve(np.stack([ramp, board]))
    assert (halved.shape, halved.dtype) == ((2, 64, 64, 3), np.uint8)
    means = ramp.reshape(64, 2, 64, 2, 3).mean((1, 3))
    inside = slice(3, -3)
    assert np.abs(halved[0] - means)[inside, inside].max() <= 1
    assert np.abs(halved[1].astype(int) - 127).max() <= 4, "every other pixel is no answer"


@pytest.mark.parametrize(("n", "size", "out"), [(1000, 200, 200), (1000, 512, 250), (7, 512, 1)])
def test_held_out_pictures_are_the_same_ever_after_and_no_more_than_a_quarter(n, size, out):
    learned, unseen = corpus.held_out(n, size)
    assert len(unseen) == out
    assert sorted([*learned, *unseen]) == list(range(n)), "each picture is in one of the two"
    assert learned.tolist() == sorted(learned)
    assert unseen.tolist() != sorted(unseen) or out == 1, "drawn, not cut off"
    again = corpus.held_out(n, size)
    assert (again[0].tolist(), again[1].tolist()) == (learned.tolist(), unseen.tolist())


def test_the_shipped_datasets_stand_in_for_the_corpus():
    rows, seen = corpus.shipped()
    assert (seen.shape, seen.dtype) == ((len(rows), 128, 128, 3), np.uint8)
    listed = [
        (folder, image)
        for folder in datasets.SETS
        for item in datasets.shipped(folder).values()
        for role in ("training", "controls")
        for image in item[role]
    ]
    assert list(zip(rows.folder, rows.file, strict=True)) == [(folder, image["file"]) for folder, image in listed]
    assert rows.title.tolist() == [image["title"] for _, image in listed]
    for number in (0, 300, len(rows) - 1):
        path = datasets.DATASETS / rows.folder[number] / rows.file[number]
        assert np.array_equal(seen[number], np.asarray(datasets.open_image(path)))
    assert all(corpus.captions(row) for _, row in rows[::50].iterrows())


def test_the_corpus_is_fetched_and_rendered_once_and_read_as_it_was_written(tmp_path, monkeypatch):
    calls = []
    rows = pd.DataFrame({"title": ["null", "", "NA"], "file": ["a", "b", "c"]})
    drawn = np.arange(3 * 12, dtype=np.uint8).reshape(3, 2, 2, 3)
    monkeypatch.setattr(corpus, "fetch", lambda sources: calls.append(sources))
    monkeypatch.setattr(corpus, "catalogue", lambda sources: rows)
    monkeypatch.setattr(corpus, "render_all", lambda given, sources: (given, drawn))
    for _ in range(2):
        found, seen = corpus.build(tmp_path / "corpus", tmp_path / "sources")
        assert found.title.tolist() == ["null", "", "NA"], "a title is a text, whatever it says"
        assert np.array_equal(seen, drawn)
    assert calls == [tmp_path / "sources"]


# Items


def cosine_alike(a: np.ndarray, b: np.ndarray) -> float:
    """Highest cosine of the ink of two drawings made of 2x2 cells, the second also mirrored."""
    first = 1 - a[::2, ::2].astype(float).ravel() / 255
    best = 0.0
    for other in (b, b[:, ::-1]):
        second = 1 - other[::2, ::2].astype(float).ravel() / 255
        best = max(best, first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    return best


def silhouette(picture: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(picture.min(axis=2, keepdims=True) < 235, 0, 255), 3, axis=2)


def may_stand_together(a: np.ndarray, b: np.ndarray, shape: bool) -> bool:
    return cosine_alike(a, b) <= 0.93 and not (shape and cosine_alike(silhouette(a), silhouette(b)) > 0.97)


def catalogue_of(rows: list[dict]) -> pd.DataFrame:
    empty = {"collection": "openclipart", "author": "", "title": "x", "tags": "", "folder": "f", "licence": "MIT"}
    frame = pd.DataFrame([empty | row for row in rows])
    return frame.assign(key=[f"key/{n}" for n in range(len(rows))], file=[f"file:{n}" for n in range(len(rows))])


@pytest.fixture
def works(monkeypatch) -> SimpleNamespace:
    """Twenty-four works of "Ann B." with planted copies and unusable ones, fourteen of "Cleo", some by others."""
    monkeypatch.setattr(items, "ARTISTS", ["Ann B."])
    monkeypatch.setattr(items, "DEVELOPMENT_ARTISTS", ["Cleo"])
    ann, cleo, other = blocks(24, seed=1), blocks(14, seed=2), blocks(12, seed=3)
    ann[20] = ann[0]  # the same
    ann[21] = ann[1][:, ::-1]  # mirrored
    ann[22] = np.where(ann[2] < 255, 255 - ann[2], 255)  # the same shape in other colours
    ann[23] = 255
    ann[23, :2, :12] = 0  # 6% of the frame is 34 pixels of 576
    titles = ["drawing"] * 24
    titles[19] = "a photo of a drawing"
    rows = [{"author": "Ann B.", "title": title} for title in titles]
    rows += [{"author": "Cleo"}] * 14 + [{"author": "Ann"}] * 12
    return SimpleNamespace(rows=catalogue_of(rows), pictures=np.concatenate([ann, cleo, other]))


def test_style_items_take_ten_works_and_controls_no_two_alike(works):
    chosen = items.style_items(works.rows, works.pictures)
    assert list(chosen) == ["Ann B.", "Cleo"]
    for artist, item in chosen.items():
        assert item["caption"] == f"art style of {artist}"
        assert len(item["training"]) == 10
        everything = item["training"] + item["controls"]
        assert len(set(everything)) == len(everything)
        assert set(works.rows.author[everything]) == {artist}
        assert not works.rows.title[everything].str.contains("photo").any()
        for place, index in enumerate(everything):
            for before in everything[:place]:
                assert may_stand_together(works.pictures[index], works.pictures[before], shape=True)
    assert [item["split"] for item in chosen.values()] == ["reported", "development"]
    assert len(chosen["Cleo"]["controls"]) == 4
    ann = set(chosen["Ann B."]["training"] + chosen["Ann B."]["controls"])
    assert 23 not in ann
    # nineteen unlike works can be had: of each planted pair exactly one
    assert len(ann) == 19
    assert all(len(ann & {original, twin}) == 1 for original, twin in ((0, 20), (1, 21), (2, 22)))
    again = items.style_items(works.rows, works.pictures)
    assert again == chosen


def test_style_items_hold_at_most_ten_controls(works):
    works.rows.loc[works.rows.author == "Ann", "author"] = "Cleo"
    assert (works.rows.author == "Cleo").sum() == 26
    cleo = items.style_items(works.rows, works.pictures)["Cleo"]
    assert (len(cleo["training"]), len(cleo["controls"])) == (10, 10)
    works.rows.loc[cleo["controls"][3], "title"] = "a stripper"  # not for a class: no other control moves for it
    assert items.style_items(works.rows, works.pictures)["Cleo"] == cleo | {
        "controls": cleo["controls"][:3] + cleo["controls"][4:]
    }


def test_style_items_of_an_artist_with_many_works_have_further_ones_for_larger_sets(works, monkeypatch):
    assert all("more" not in item for item in items.style_items(works.rows, works.pictures).values()), "none has enough"
    monkeypatch.setattr(items, "FEWEST_MORE", 3)
    works.rows.loc[works.rows.author == "Ann", "author"] = "Cleo"
    cleo = items.style_items(works.rows, works.pictures)["Cleo"]
    everything = items.members(cleo)
    assert [len(cleo[role]) for role in ("training", "controls", "more")] == [10, 10, 6]
    assert everything == cleo["training"] + cleo["controls"] + cleo["more"]
    assert len(set(everything)) == 26
    assert set(works.rows.author[everything]) == {"Cleo"}
    works.rows.loc[cleo["more"][2], "title"] = "an axe"  # not for a class
    assert items.style_items(works.rows, works.pictures)["Cleo"]["more"] == cleo["more"][:2] + cleo["more"][3:]


def test_further_works_that_the_corpus_knows_are_dropped(works, monkeypatch):
    monkeypatch.setattr(items, "FEWEST_MORE", 2)
    item = {"split": "reported", "caption": "x", "training": [0], "controls": [3], "more": [4, 5, 6, 7]}
    known = np.concatenate([works.pictures[[5]][:, :, ::-1], works.pictures[[0, 3]], blocks(3, seed=8)])
    assert items.unknown_to(known, item, works.pictures) == {**item, "more": [4, 6, 7]}
    assert items.unknown_to(works.pictures[4:7], item, works.pictures) == {k: v for k, v in item.items() if k != "more"}
    bare = {k: v for k, v in item.items() if k != "more"}
    assert items.unknown_to(known, bare, works.pictures) == bare


def test_style_items_refuse_an_artist_with_too_few_works(works):
    works.rows.loc[works.rows.author == "Cleo", "author"] = ["Cleo"] * 9 + ["Dora"] * 5
    with pytest.raises(ValueError, match="Cleo has only 9 works"):
        items.style_items(works.rows, works.pictures)


@pytest.fixture
def emoji(monkeypatch) -> SimpleNamespace:
    """Three objects and a fourth for development, each title drawn by all eleven families, no two alike."""
    objects = {"apple": ["red apple", "green apple"], "pear": ["pear"], "rocket": ["rocket"]}
    monkeypatch.setattr(items, "OBJECTS", objects)
    monkeypatch.setattr(items, "DEVELOPMENT_OBJECTS", {"dog": ["dog"]})
    titles = ["red apple", "green apple", "pear", "rocket", "dog", "car"]
    rows = [{"collection": family, "title": title} for title in titles for family in sorted(corpus.FAMILIES)]
    rows.append({"title": "pear", "author": "Ann"})  # clip art of the same title is no emoji
    return SimpleNamespace(rows=catalogue_of(rows), pictures=blocks(len(rows), seed=4))


def test_object_items_take_families_in_order_and_controls_from_kin(emoji):
    chosen = items.object_items(emoji.rows, emoji.pictures)
    assert [len(item["training"]) for item in chosen.values()] == [5, 6, 4, 5]
    assert [item["split"] for item in chosen.values()] == ["reported"] * 3 + ["development"]
    assert [item["caption"] for item in chosen.values()] == ["a apple", "a pear", "a rocket", "a dog"]
    for (name, item), first in zip(chosen.items(), ["red apple", "pear", "rocket", "dog"], strict=True):
        assert set(emoji.rows.title[item["training"]]) == {first}
        assert emoji.rows.collection[item["training"]].tolist() == items.FAMILY_ORDER[: len(item["training"])], name
        assert not set(item["training"]) & set(item["controls"])
    apple = emoji.rows.loc[chosen["apple"]["controls"]]
    assert apple.title.tolist() == ["red apple"] * 6 + ["green apple"] * 4, "at most ten, the object itself first"
    assert emoji.rows.collection[chosen["pear"]["controls"]].tolist() == items.FAMILY_ORDER[6:]


def test_object_items_pass_over_drawings_that_are_alike(emoji):
    pear = emoji.rows.index[emoji.rows.title == "pear"]
    by_family = dict(zip(emoji.rows.collection[pear], pear, strict=True))
    first, second = items.FAMILY_ORDER[:2]
    emoji.pictures[by_family[second]] = emoji.pictures[by_family[first]][:, ::-1]
    item = items.object_items(emoji.rows, emoji.pictures)["pear"]
    assert by_family[second] not in item["training"] + item["controls"]
    assert len(item["training"]) == 6
    emoji.pictures[pear] = emoji.pictures[pear[0]]
    with pytest.raises(ValueError, match="only 1 families draw 'pear'"):
        items.object_items(emoji.rows, emoji.pictures)


def test_settle_drops_what_a_descriptor_finds_alike_and_moves_controls_up(monkeypatch):
    def at(*degrees: float) -> np.ndarray:
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)

    item = {"split": "reported", "caption": "a dog", "training": [10, 11, 12], "controls": [20, 21, 22, 23]}
    # cos 30 = 0.87 and cos 35 = 0.82 lie on either side of 0.85; 11 is alike to 10, and 21 to the corpus
    own = at(0, 30, 60, 95, 175, 130, 165)
    settled = items.settle(item, own, corpus=at(200, 250))
    assert settled == {**item, "training": [10, 12, 20], "controls": [22, 23]}
    assert items.settle(item, own, corpus=at(270)) == {**item, "training": [10, 12, 20], "controls": [21, 22]}
    assert items.settle(item, own, at(270), limit=0.99) == item, "nothing is that alike"
    more = {**item, "controls": [20, 21], "more": [22, 23]}
    monkeypatch.setattr(items, "FEWEST_MORE", 1)
    assert items.settle(more, own, at(200, 250)) == {**item, "training": [10, 12, 20], "controls": [], "more": [22, 23]}
    monkeypatch.setattr(items, "MOST_MORE", 1)
    assert items.settle(more, own, at(270))["more"] == [22]
    monkeypatch.setattr(items, "FEWEST_MORE", 2)
    assert "more" not in items.settle(more, own, at(270))
    assert items.settle(item, at(0, 50, 100, 150, 200, 250, 300), at(325))["controls"] == [20, 21, 22]
    with pytest.raises(ValueError, match="a dog: only 2 pictures are left, 3 are needed"):
        items.settle(item, at(0, 10, 100, 105, 110, 5, 95), at(200))


def test_ink_is_what_is_not_white():
    picture = np.full((1, 2, 2, 3), 255, np.uint8)
    picture[0, 0, 0] = 234, 255, 255
    picture[0, 1, 1] = 235, 235, 235
    assert items.ink(picture).tolist() == [[[True, False], [False, False]]]


def test_write_ships_an_index_that_matches_its_files(tmp_path, emoji, monkeypatch):
    emoji.rows.loc[0, "author"] = "Ann"
    chosen = {"St. Ann": {"split": "reported", "caption": "art style of St. Ann", "training": [0, 12], "controls": [7]}}
    items.write(chosen, emoji.rows, emoji.pictures, tmp_path / "style")
    index = json.loads((tmp_path / "style/items.json").read_text("utf-8"))
    assert list(index) == ["st-ann"]
    entry = index["st-ann"]
    assert {key: entry[key] for key in ("name", "caption", "split")} == {
        "name": "St. Ann",
        "caption": "art style of St. Ann",
        "split": "reported",
    }
    listed = {"training": [0, 12], "controls": [7]}
    for role, numbers in listed.items():
        for image, number in zip(entry[role], numbers, strict=True):
            path = tmp_path / "style" / image["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == image["sha256"]
            assert np.array_equal(np.asarray(Image.open(path)), emoji.pictures[number])
            assert (image["title"], image["source"]) == (emoji.rows.title[number], emoji.rows.key[number])
            assert image["licence"] == "MIT"
    assert entry["training"][0]["author"] == "Ann"
    assert entry["training"][1]["author"] == corpus.FAMILIES[emoji.rows.collection[12]].package
    assert len(list((tmp_path / "style").rglob("*.png"))) == 3
    # the folder is what fx.datasets reads
    monkeypatch.setattr(datasets, "DATASETS", tmp_path)
    datasets.shipped.cache_clear()
    try:
        item = datasets.load_item("style/st-ann")
    finally:
        datasets.shipped.cache_clear()
    assert (item.caption, item.n_training, len(item.controls)) == ("art style of St. Ann", 2, 1)


def test_pretraining_rows_leave_out_artists_titles_and_alike_pictures(works, emoji):
    clip_art = [{"author": "Eve", "title": f"work {n}"} for n in range(6)]
    clip_art += [{"author": author, "title": "w"} for author in ("ann b.", "Eve and Ann B.", "Cleopatra", "Eve", "Eve")]
    new = blocks(11, seed=6)
    new[0] = works.pictures[0]  # a shipped work under another name
    new[1] = works.pictures[30][:, ::-1]  # a shipped work mirrored
    new[3] = new[2]  # a copy inside the clip art
    rows = pd.concat([works.rows, emoji.rows, catalogue_of(clip_art)], ignore_index=True)
    seen = np.concatenate([works.pictures, emoji.pictures, new])
    start = len(rows) - 11
    shipped = [{"training": [0, 30], "controls": [2, 52]}]
    kept = items.pretraining_rows(rows, seen, shipped)
    left = set(range(len(rows))) - set(kept.tolist())
    assert set(range(38)) <= left, "works of Ann B. and Cleo"
    titled = rows.index[rows.title.isin(["red apple", "green apple", "pear", "rocket", "dog"])]
    assert set(titled[rows.collection[titled] != "openclipart"]) <= left
    assert {start, start + 1, start + 3} <= left
    assert {start + 6, start + 7} <= left, "other letter case, and signed together"
    others = set(range(38, 50)) | set(rows.index[rows.title == "car"]) | {start + n for n in (2, 4, 5, 8, 9, 10)}
    others |= set(rows.index[(rows.title == "pear") & (rows.author == "Ann")])
    assert set(kept.tolist()) == others


def test_pretraining_rows_leave_out_what_is_alike_and_not_only_what_is_the_same(works, emoji):
    """A shipped work with cells erased: alike above a cosine of 0.95 of their ink."""
    work = works.pictures[2]
    cells = np.argwhere(work[::2, ::2].min(axis=2) < 255)
    tried = [work]
    for row, column in cells:
        erased = tried[-1].copy()
        erased[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 255
        tried.append(erased)
    cosines = [cosine_alike(work, picture) for picture in tried[:-1]]
    near = next(number for number, cosine in enumerate(cosines) if 0.955 < cosine < 0.985)
    far = next(number for number, cosine in enumerate(cosines) if 0.85 < cosine < 0.945)
    clip_art = catalogue_of([{"author": "Eve", "title": "near"}, {"author": "Eve", "title": "far"}])
    rows = pd.concat([works.rows, emoji.rows, clip_art], ignore_index=True)
    seen = np.concatenate([works.pictures, emoji.pictures, [tried[near], tried[far]]])
    kept = items.pretraining_rows(rows, seen, [{"training": [2], "controls": []}])
    assert {len(rows) - 2, len(rows) - 1} & set(kept.tolist()) == {len(rows) - 1}


# mini-clip

CAPTIONS = ["clipart of a red rocket", "a dog", "art style of mimooh", "google emoji of red apple, fruit", "x" * 3]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return clip.train_tokenizer(CAPTIONS * 3, tokenizer_folder)


@pytest.mark.parametrize("word", ["{}", "a{}", "dog{}", "{0}{0}"])
def test_tokenizer_round_trips_every_printable_ascii_letter_inside_and_at_the_end_of_a_word(tokenizer, word):
    unknown = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for letter in string.ascii_letters + string.digits + string.punctuation:
        text = word.format(letter)
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert unknown not in ids[1:-1], text
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower()


def test_tokenizer_learns_whole_words_and_comes_back_equal_from_disk(tokenizer, tokenizer_folder):
    for word in re.findall(r"\w+", " ".join(CAPTIONS)):
        assert tokenizer.convert_ids_to_tokens(tokenizer(word.title()).input_ids)[1:-1] == [f"{word}</w>"]
    again = CLIPTokenizer.from_pretrained(tokenizer_folder)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.model_max_length == tokenizer.model_max_length == 32
    texts = [*CAPTIONS, "", "A RED dog's 12 apples!?", "naïve café — ½", "bad picture of " * 20]
    assert clip.tokenize(again, texts).tolist() == clip.tokenize(tokenizer, texts).tolist()


def test_tokenize_pads_and_cuts_to_thirty_two(tokenizer):
    ids = clip.tokenize(tokenizer, ["a dog", "dog " * 100, ""])
    assert ids.shape == (3, 32)
    assert ids.dtype == torch.int64
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (ids[:, -1] == tokenizer.eos_token_id).all()
    assert (ids[1, 1:-1] != tokenizer.eos_token_id).all()
    assert (ids[0, 3:] == tokenizer.pad_token_id).all()
    assert int(ids.max()) < clip.VOCABULARY


def test_build_clip_embeds_captions_up_to_their_end_and_pictures(tokenizer):
    model = clip.build(tokenizer).eval()
    short = clip.tokenize(tokenizer, ["a dog"])
    other = short.clone()
    other[0, 10:] = 7  # what stands behind the end of the text does not count
    with torch.no_grad():
        another = clip.tokenize(tokenizer, ["a rocket"])
        texts = [model.get_text_features(ids).pooler_output for ids in (short, other, another)]
        image = model.get_image_features(pixel_values=drawings(1, side=64)).pooler_output
    torch.testing.assert_close(texts[0], texts[1])
    assert not torch.allclose(texts[0], texts[2], atol=1e-3)
    assert texts[0].shape == image.shape == (1, 128)
    assert model.text_model.config.max_position_embeddings == clip.MAX_TOKENS == 32


class Recorder:
    """Stands for a CLIP model: keeps what it is shown and answers with fixed logits."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits

    def __call__(self, input_ids, pixel_values, return_dict):
        self.input_ids, self.images = input_ids, pixel_values
        return SimpleNamespace(logits_per_image=self.logits)

    def texts(self, tokenizer) -> list[str]:
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in self.input_ids]


def test_contrastive_loss_is_the_symmetric_cross_entropy(tokenizer):
    model = Recorder(torch.randn(20, 20, generator=rng(1)) * 3 + torch.eye(20) * 4)
    white = torch.full((4, 3, 64, 64), 255, dtype=torch.uint8)
    terms = clip.contrastive_loss(white, [["a dog"]] * 4, tokenizer, batch=20)(model, rng())
    logits = model.logits.double().numpy()
    rows, columns = log_softmax(logits, axis=1).diagonal(), log_softmax(logits, axis=0).diagonal()
    assert terms["loss"].item() == pytest.approx(-(rows.mean() + columns.mean()) / 2, rel=1e-5)
    assert terms["accuracy"].item() == pytest.approx((logits.argmax(1) == np.arange(20)).mean())


def test_contrastive_loss_pairs_each_picture_with_a_caption_of_its_own(tokenizer):
    levels = torch.tensor([0, 50, 100, 150], dtype=torch.uint8)
    plain = levels.view(4, 1, 1, 1).expand(4, 3, 64, 64)
    captions = [["a dog", "red dog"], ["a rocket"], ["a fruit", "red fruit"], ["a apple"]]
    model = Recorder(torch.eye(60))
    clip.contrastive_loss(plain, captions, tokenizer, batch=60, bad=0.0)(model, rng())
    shown = ((model.images[:, 0, 32, 32] + 1) * 127.5).round().long() // 50
    texts = model.texts(tokenizer)
    assert all(text in captions[index] for text, index in zip(texts, shown.tolist(), strict=True))
    assert set(texts) == {text for variants in captions for text in variants}
    assert (model.images == 1).flatten(1).any(1).sum() > 20, "shifted a little: white appears at an edge"


def test_contrastive_loss_calls_corrupted_pictures_bad_and_as_many_clean_ones_good(tokenizer):
    white = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    model = Recorder(torch.eye(200))
    clip.contrastive_loss(white, [["a dog"]] * 2, tokenizer, batch=200, bad=0.3)(model, rng())
    texts = np.array(model.texts(tokenizer))
    assert set(texts) == {"a bad picture of a dog", "a good picture of a dog", "a dog"}
    bad, good = texts == "a bad picture of a dog", texts == "a good picture of a dog"
    assert 42 <= bad.sum() <= 78
    assert 42 <= good.sum() <= 78
    changed = (model.images < 1).flatten(1).any(1).numpy()  # white stays white under jitter, and under blur alone
    assert not changed[~bad].any()
    assert 0.6 < changed[bad].mean() < 0.9


def small_clip(tokenizer) -> CLIPModel:
    """An untrained CLIP of two narrow towers, for 64 px pictures and 32 tokens."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = {**tower, "image_size": 64, "patch_size": 32}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def test_contrastive_loss_falls_in_a_toy_run(tokenizer, tmp_path):
    colours = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 140)], dtype=torch.uint8)
    plain = colours.view(8, 3, 1, 1).repeat(1, 1, 64, 64)
    captions = [["dog"], ["rocket"], ["fruit"], ["mimooh"], ["clipart"], ["art"], ["google"], ["apple"]]
    loss = clip.contrastive_loss(plain, captions, tokenizer, batch=8, bad=0.0)
    schedule = training.Schedule(steps=40, lr=5e-3, warmup=5, ema=0.5)
    average, log = training.train(small_clip(tokenizer), loss, schedule, tmp_path)
    assert log[-1]["loss"] < 0.8 < math.log(8), "chance is log 8, repeated pictures in a batch leave about 0.5"
    scores = clip.retrieval(average, tokenizer, plain, [variants[0] for variants in captions])
    assert scores["recall@1"] >= 7 / 8


def test_quality_scores_compare_the_antonym_prompts_of_clip_iqa(tokenizer, monkeypatch):
    monkeypatch.setattr(clip, "corrupt", lambda x, generator: -x)
    seen = torch.tensor([26, 128, 179, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    shown = []

    def text_features(ids):
        shown.extend(tokenizer.decode(row, skip_special_tokens=True) for row in ids)
        return SimpleNamespace(pooler_output=torch.tensor([[2.0, 0.0], [0.0, 3.0]]))

    def image_features(pixel_values):
        angle = (1 - pixel_values[:, 0, 0, 0]) * math.pi / 4  # 1 points at the good prompt, -1 at the bad one
        return SimpleNamespace(pooler_output=torch.stack([angle.cos(), angle.sin()], dim=1) * 7)

    model = SimpleNamespace(
        get_text_features=text_features, get_image_features=image_features, logit_scale=torch.tensor(math.log(5.0))
    )
    scores = clip.quality_scores(model, tokenizer, seen)
    assert shown == ["a good picture", "a bad picture"]
    x = np.array([26, 128, 179, 255]) / 127.5 - 1
    angle = (1 - np.stack([x, -x])) * math.pi / 4
    expected = 1 / (1 + np.exp(5 * (np.sin(angle) - np.cos(angle))))
    assert scores["clean"] == pytest.approx(expected[0].mean(), rel=1e-5)
    assert scores["corrupted"] == pytest.approx(expected[1].mean(), rel=1e-5)
    assert scores["clean scores higher"] == 0.75


def test_retrieval_is_the_share_of_pictures_whose_caption_ranks_first_or_among_five(tokenizer):
    n, draw = 12, np.random.default_rng(0)
    images, texts = draw.normal(size=(n, 3)), draw.normal(size=(n, 3))
    images[:3] = texts[:3] * [[1], [5], [0.2]]  # three captions fit perfectly, lengths do not count
    model = SimpleNamespace(
        get_image_features=lambda pixel_values: SimpleNamespace(pooler_output=torch.from_numpy(images)),
        get_text_features=lambda ids: SimpleNamespace(pooler_output=torch.from_numpy(texts)),
    )
    scores = clip.retrieval(model, tokenizer, torch.zeros(n, 3, 8, 8, dtype=torch.uint8), ["a dog"] * n)
    cosines = images @ texts.T / np.outer(np.linalg.norm(images, axis=1), np.linalg.norm(texts, axis=1))
    better = (cosines > cosines.diagonal()[:, None]).sum(1)
    assert scores == pytest.approx(
        {
            "recall@1": (better < 1).mean(),
            "recall@5": (better < 5).mean(),
            "chance@1": 1 / 12,
            "chance@5": 5 / 12,
        }
    )
    assert 0.25 <= scores["recall@1"] < scores["recall@5"] < 1


# mini-sscd


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mix_targets_say_what_each_picture_shows(share):
    x = drawings(40)
    mixed, targets = sscd.mix(x, rng(), share)
    n, width = 40, 16
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    own, neighbour = targets.diagonal(), targets[torch.arange(n), (torch.arange(n) - 1) % n]
    torch.testing.assert_close(own + neighbour, torch.ones(n))
    assert (neighbour >= 0).all()
    assert (own >= 0.5).all(), "the picture itself makes up at least half"
    ways = set()
    for i in range(n):
        keep, other = own[i], x[(i - 1) % n]
        border = int((keep * width).round())
        beside = torch.cat([x[i][:, :, :border], other[:, :, border:]], dim=2)
        blended = keep * x[i] + (1 - keep) * other
        match = [torch.allclose(mixed[i], expected, atol=1e-6) for expected in (beside, blended)]
        assert any(match), i
        ways.add(tuple(match) if keep < 0.9 else None)
    mixed_share = (neighbour > 0).float().mean().item()
    assert mixed_share == pytest.approx(share, abs=0 if share in (0, 1) else 0.25)
    if share:
        assert {(True, False), (False, True)} <= ways


class Projection(nn.Module):
    """A fixed random embedding of pictures at unit length."""

    def forward(self, x):
        weights = torch.randn(x[0].numel(), 6, generator=rng(11))
        return F.normalize(x.flatten(1) @ weights)


@pytest.mark.parametrize("entropy", [0.0, 3.0])
def test_copy_loss_is_infonce_with_mixed_targets_plus_koleo(entropy):
    seen = torch.randint(0, 256, (20, 3, 16, 16), generator=rng(2), dtype=torch.uint8)
    terms = sscd.copy_loss(seen, batch=12, temperature=0.1, entropy=entropy)(Projection(), rng(4))
    # the same draws, the formulas anew
    draw = rng(4)
    chosen = seen[torch.randperm(20, generator=draw)[:12]].float() / 127.5 - 1
    mixed, targets = sscd.mix(sscd.copy(chosen, draw), draw)
    a, b = (Projection()(x).double().numpy() for x in (mixed, sscd.copy(chosen, draw)))
    targets, logits = targets.double().numpy(), a @ b.T / 0.1
    towards_originals = -(targets * log_softmax(logits, axis=1)).sum(1).mean()
    share = targets / targets.sum(0)
    towards_copies = -(share * log_softmax(logits, axis=0)).sum(0).mean()
    nearest = [min(np.linalg.norm(b[i] - b[j]) for j in range(12) if j != i) for i in range(12)]
    contrast, koleo = (towards_originals + towards_copies) / 2, -np.log(nearest).mean()
    assert terms["contrast"].item() == pytest.approx(contrast, rel=1e-4)
    assert terms["koleo"].item() == pytest.approx(koleo, rel=1e-3)
    assert terms["loss"].item() == pytest.approx(contrast + entropy * koleo, rel=1e-3)
    assert terms["hit"].item() == pytest.approx((logits.argmax(1) == targets.argmax(1)).mean())


def test_copy_loss_is_lower_for_a_perfect_model_than_for_a_blind_one(monkeypatch):
    monkeypatch.setattr(sscd, "copy", lambda x, generator: x)
    # picture i has one black row, the i-th, so that the row means say what a mixed picture shows
    seen = torch.full((12, 3, 12, 240), 255, dtype=torch.uint8)
    seen[torch.arange(12), :, torch.arange(12)] = 0
    loss = sscd.copy_loss(seen, batch=12)
    perfect = loss(lambda x: F.normalize((1 - x).mean((1, 3))), rng())
    blind = loss(lambda x: F.normalize(torch.randn(len(x), 12, generator=rng(1))), rng())
    assert perfect["hit"] == 1
    assert perfect["loss"] + 1 < blind["loss"]


def test_copy_loss_is_finite_and_teaches_a_real_network():
    torch.manual_seed(0)
    model = MiniSSCD(widths=(4, 4), blocks=(1, 1), dimension=8, size=16)
    seen = torch.randint(0, 256, (8, 3, 16, 16), generator=rng(2), dtype=torch.uint8)
    sscd.copy_loss(seen, batch=8)(model, rng())["loss"].backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g.isfinite().all() for g in gradients)
    assert all(g.abs().sum() > 0 for g in gradients)


def test_a_copy_is_moved_and_each_edit_is_made_to_some_pictures_whatever_the_others(monkeypatch):
    """Every edit leaves a mark in a row of its own."""
    edits = ("recolour", "blur", "noise", "cover")
    for row, name in enumerate(edits):

        def mark(x, generator, row=row):
            marked = x.clone()
            marked[:, :, row] = 1
            return marked

        monkeypatch.setattr(sscd, name, mark)
    moved = []
    monkeypatch.setattr(sscd, "warp", lambda x, generator, **how: moved.append(how) or x)
    made = sscd.copy(torch.zeros(3000, 3, 4, 4), rng()).mean((1, 3)).numpy()
    ((low, high),) = ((how["zoom"]) for how in moved)
    assert low < 1 < high
    assert min(moved[0]["turn"], moved[0]["shift"]) > 0
    assert ((made == 0) | (made == 1)).all()
    assert (made.mean(0) > 0.25).all()
    assert (made.mean(0) < 0.55).all()
    assert abs(np.corrcoef(made.T)[np.triu_indices(4, 1)]).max() < 0.08


def test_settle_statistics_measures_batch_norm_on_copies():
    torch.manual_seed(0)
    model = MiniSSCD(widths=(4, 4), blocks=(1, 1), dimension=8, size=16).eval()
    model.stem[1].running_mean.fill_(7)
    model.stem[1].num_batches_tracked.fill_(5)
    before = copy.deepcopy(model.state_dict())
    seen = torch.randint(0, 256, (10, 3, 16, 16), generator=rng(2), dtype=torch.uint8)
    settled = sscd.settle_statistics(model, seen, batches=3)
    means = []
    for index in range(3):
        draw = rng(index)
        x = sscd.copy(seen[torch.randperm(10, generator=draw)].float() / 127.5 - 1, draw)
        means.append(F.conv2d(x, before["stem.0.weight"], stride=2, padding=1).mean((0, 2, 3)))
    torch.testing.assert_close(settled.stem[1].running_mean, torch.stack(means).mean(0), atol=1e-5, rtol=1e-4)
    assert not any(module.training for module in settled.modules())
    for name, value in settled.state_dict().items():
        assert "running" in name or "tracked" in name or torch.equal(value, before[name]), name


def test_describe_works_through_all_pictures_in_order():
    seen = torch.randint(0, 256, (7, 3, 16, 16), generator=rng(3), dtype=torch.uint8)
    torch.testing.assert_close(sscd.describe(Projection(), seen, batch=3), Projection()(seen.float() / 127.5 - 1))


def test_copy_scores_hold_each_copy_and_each_pair_of_different_titles_once():
    seen = torch.randint(0, 256, (7, 3, 16, 16), generator=rng(3), dtype=torch.uint8)
    titles = ["dog", "cat", "dog", "rocket", "cat", "dog", "tree"]
    same, different = sscd.copy_scores(Projection(), seen, titles, seed=5)
    x = seen.float() / 127.5 - 1
    original, copied = (Projection()(y).numpy() for y in (x, sscd.copy(x, rng(5))))
    np.testing.assert_allclose(same, [a @ b for a, b in zip(original, copied, strict=True)], atol=1e-6)
    pairs = [original[i] @ original[j] for i in range(7) for j in range(i + 1, 7) if titles[i] != titles[j]]
    assert different.shape == (21 - 3 - 1,)
    np.testing.assert_allclose(np.sort(different), np.sort(pairs), atol=1e-6)


# mini-sd

BETAS = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
ABAR = np.cumprod(1 - BETAS)


class StubUNet:
    """Keeps what it is shown and predicts a fixed function of it."""

    def __call__(self, x, t, context):
        self.x, self.t, self.context = x, t, context
        self.predicted = torch.tanh(x) * 0.5 + context.mean((1, 2)).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=self.predicted)


@pytest.mark.parametrize("gamma", [5.0, 0.5, 1e9])
def test_diffusion_loss_is_the_min_snr_weighted_error_of_the_noise(gamma):
    latents = torch.tensor([-20.0, 0.0, 20.0]).view(3, 1, 1, 1).repeat(1, 4, 8, 8)
    texts = torch.arange(1, 6).view(5, 1, 1).repeat(1, 2, 3).half()
    choices = [[0, 3], [1], [2, 4]]
    unet = StubUNet()
    terms = sd.diffusion_loss(latents, choices, texts, torch.zeros(2, 3), batch=40, gamma=gamma)(unet, rng(7))
    abar = torch.from_numpy(ABAR)[unet.t].view(-1, 1, 1, 1)
    # eps follows from x_t and x_0; which x_0 it was follows from eps being standard normal
    candidates = torch.stack([(unet.x - abar.sqrt() * x0) / (1 - abar).sqrt() for x0 in latents.double()])
    which = (candidates.pow(2).mean((2, 3, 4)) - 1).abs().argmin(0)
    eps = candidates[which, torch.arange(40)]
    assert eps.pow(2).mean() == pytest.approx(1, abs=0.1)
    error = (unet.predicted.double() - eps).pow(2).mean((1, 2, 3))
    snr = ABAR / (1 - ABAR)
    weight = torch.from_numpy(np.where(snr > gamma, gamma / snr, 1.0))[unet.t]
    assert terms["mse"].item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx((weight * error).mean().item(), rel=1e-4)
    captioned = unet.context[:, 0, 0].long()
    assert all(c == 0 or c - 1 in choices[i] for c, i in zip(captioned.tolist(), which.tolist(), strict=True))
    assert {0, 1, 2, 3, 4, 5} >= set(captioned.tolist()) > {1, 2, 3, 4, 5} - {5}
    assert unet.context.dtype == torch.float32


class Recording(StubUNet):
    """Keeps all that it is shown, in order."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, t, context):
        out = super().__call__(x, t, context)
        self.seen.append((x, t, context, self.predicted))
        return out

    def all(self) -> list[torch.Tensor]:
        return [torch.cat(parts).double() for parts in zip(*self.seen, strict=True)]


@pytest.mark.parametrize("gamma", [5.0, 0.5])
def test_held_out_loss_is_the_weighted_error_with_the_same_noise_and_timesteps_for_every_model(gamma):
    latents, texts = torch.randn(30, 4, 2, 2, generator=rng(1)), torch.randn(30, 2, 3, generator=rng(2)).half()
    unet = Recording()
    torch.manual_seed(5)
    found = sd.held_out_loss(unet, latents, texts, repeats=4, batch=7, gamma=gamma)
    after = torch.rand(1)
    x, t, context, predicted = unet.all()
    abar = torch.from_numpy(ABAR)[t.long()].view(-1, 1, 1, 1)
    eps = (x - abar.sqrt() * latents.double().repeat(4, 1, 1, 1)) / (1 - abar).sqrt()
    assert eps.std() == pytest.approx(1, abs=0.05)
    assert eps.mean() == pytest.approx(0, abs=0.06)
    error = (predicted - eps).pow(2).mean((1, 2, 3)).numpy()
    snr = ABAR / (1 - ABAR)
    weight = np.where(snr > gamma, gamma / snr, 1.0)[t.long().numpy()]
    assert found["mse"] == pytest.approx(error.mean(), rel=1e-3)
    assert found["loss"] == pytest.approx((weight * error).mean(), rel=1e-3)
    assert torch.equal(context, texts.double().repeat(4, 1, 1)), "every picture under its own caption"
    for once in t.reshape(4, 30):  # evenly over the schedule, in each repeat other ones
        assert np.diff(np.sort(once)).max() <= 38
    assert len(set(t.tolist())) == 120
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), "it draws from a generator of its own"

    class Perfect:
        def __call__(self, x, t, context):
            first = sum(len(part) for part in self.seen)
            self.seen.append(x)
            return SimpleNamespace(sample=eps[first : first + len(x)].float())

    perfect = Perfect()
    perfect.seen = []
    assert sd.held_out_loss(perfect, latents, texts, repeats=4, batch=30, gamma=gamma)["mse"] < 1e-5


def test_diffusion_loss_drops_a_tenth_of_the_captions_and_uses_all_timesteps():
    texts = torch.ones(2, 2, 3)
    unet = StubUNet()
    sd.diffusion_loss(torch.zeros(5, 1, 2, 2), [[0, 1]] * 5, texts, torch.full((2, 3), -1.0), batch=6000)(unet, rng())
    dropped = unet.context[:, 0, 0] == -1
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert (unet.context[~dropped] == 1).all()
    assert (unet.context[dropped] == -1).all()
    assert texts.unique().tolist() == [1], "the encoded captions were overwritten"
    assert unet.t.min() < 5
    assert unet.t.max() > 994
    assert np.abs(np.histogram(unet.t.numpy(), 10, (0, 1000))[0] - 600).max() < 120


def test_scheduler_is_stable_diffusions():
    noising = sd.scheduler()
    np.testing.assert_allclose(noising.betas, BETAS, rtol=1e-5)
    np.testing.assert_allclose(noising.alphas_cumprod, ABAR, rtol=1e-4)
    assert noising.config.prediction_type == "epsilon"
    noising.set_timesteps(25)
    assert noising.timesteps.tolist() == [40 * i + 1 for i in range(24, -1, -1)]
    assert noising.final_alpha_cumprod.item() == pytest.approx(ABAR[0], rel=1e-5)


def test_encoding_works_through_everything_in_order(tokenizer):
    seen = torch.randint(0, 256, (5, 3, 8, 8), generator=rng(), dtype=torch.uint8)
    stub = SimpleNamespace(encode=lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x[:, :2] * 3)))
    latents = sd.encode_pictures(stub, seen, batch=2)
    torch.testing.assert_close(latents, (seen[:, :2].float() / 127.5 - 1) * 3)
    captions = [f"a {'dog' if i % 3 else 'rocket'} {i % 7}" for i in range(300)]

    def encoder(ids):
        assert len(ids) <= 256
        return SimpleNamespace(last_hidden_state=ids[..., None].float() / 4)

    states = sd.encode_captions(encoder, tokenizer, captions)
    assert states.dtype == torch.float16
    torch.testing.assert_close(states[..., 0].float(), clip.tokenize(tokenizer, captions).float() / 4)


def test_mini_models_assemble_into_a_stock_pipeline(tokenizer):
    torch.manual_seed(0)
    unet, tower = sd.build(), clip.build(tokenizer).eval()
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(16.9e6, rel=0.01)
    pipeline = sd.assemble(unet, vae.build(), tower, tokenizer, scale=0.7)
    images = sd.draw(pipeline, ["a dog"], steps=1)
    assert images.shape == (1, 64, 64, 3)
    assert images.dtype == np.uint8
    assert images.std() > 1
    assert pipeline.vae.config.scaling_factor == 0.7
    assert not any(part.training for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder))
    ids = clip.tokenize(tokenizer, ["a dog"])
    with torch.no_grad():
        expected = tower.text_model(ids).last_hidden_state
        torch.testing.assert_close(pipeline.text_encoder(ids).last_hidden_state, expected)


def test_draw_gives_each_picture_a_seed_of_its_own():
    calls = []

    class Pipeline:
        def set_progress_bar_config(self, disable):
            assert disable

        def __call__(self, prompts, guidance_scale, num_inference_steps, generator, output_type):
            assert output_type == "np"
            calls.append((guidance_scale, num_inference_steps))
            assert len(prompts) <= 50
            values = [(int(p) + g.initial_seed() % 2 * 0.4) / 255 for p, g in zip(prompts, generator, strict=True)]
            seeds.extend(g.initial_seed() for g in generator)
            return SimpleNamespace(images=np.full((1, 2, 2, 3), 1.0) * np.array(values).reshape(-1, 1, 1, 1))

    prompts = [str(n) for n in range(120)]
    seeds = []
    images = sd.draw(Pipeline(), prompts, w=2.0, steps=9, seed=3)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == list(range(120)), "in order, rounded to whole numbers"
    assert set(calls) == {(2.0, 9)}
    whole, seeds = seeds, []
    assert len(set(whole)) == 120
    sd.draw(Pipeline(), prompts[:30], seed=3)
    assert seeds == whole[:30], "a picture's seed does not depend on how many are drawn"
    seeds = []
    sd.draw(Pipeline(), prompts, seed=4)
    assert not set(seeds) & set(whole)


def test_save_writes_half_precision_folders_that_load_again(tokenizer, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=32,
        out_channels=32,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    tower = small_clip(tokenizer)
    pipeline = sd.assemble(unet, vae.build(), tower, tokenizer, scale=0.7)
    (tmp_path / "mini-sd").mkdir()
    (tmp_path / "mini-sd/old").write_text("from an earlier call")
    sd.save(tmp_path, pipeline, tower)
    assert {path.name for path in tmp_path.iterdir()} == {"mini-vae", "mini-clip", "mini-sd"}
    assert not (tmp_path / "mini-sd/old").exists()
    assert (tmp_path / "mini-sd/vae").readlink() == Path("../mini-vae")
    assert next(unet.parameters()).dtype == next(tower.parameters()).dtype == torch.float32, "the models were changed"
    weights = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")]
    assert len({path.resolve() for path in weights}) == 5, "the U-Net in two files"
    assert all(path.suffix == ".safetensors" for path in weights)
    assert all(tensor.dtype in (torch.float16, torch.int64) for path in weights for tensor in load_file(path).values())
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "mini-sd", dtype=torch.float32)
    assert loaded.vae.config.scaling_factor == 0.7
    assert loaded.scheduler.config.prediction_type == "epsilon"
    for part in ("unet", "vae", "text_encoder"):
        before, after = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(torch.equal(before[name].half().float(), after[name].float()) for name in before), part
    prepared = AutoImageProcessor.from_pretrained(tmp_path / "mini-clip")([np.full((80, 80, 3), 255, np.uint8)])
    assert torch.equal(prepared["pixel_values"][0], torch.ones(3, 64, 64))
    again = CLIPModel.from_pretrained(tmp_path / "mini-clip", dtype=torch.float32)
    assert torch.equal(again.visual_projection.weight, tower.visual_projection.weight.half().float())
    for folder in ("mini-clip", "mini-sd/tokenizer"):
        assert CLIPTokenizer.from_pretrained(tmp_path / folder).get_vocab() == tokenizer.get_vocab()


def test_a_split_unet_is_the_same_and_another_can_link_to_all_but_its_cross_attention(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    unet.save_pretrained(first := tmp_path / "first")
    sd.split(first)
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(files) == 2
    rest, crossing = (load_file(first / name) for name in files)
    assert rest.keys() | crossing.keys() == unet.state_dict().keys()
    assert crossing.keys() == {name for name in unet.state_dict() if ".attn2." in name} != set()
    again = UNet2DConditionModel.from_pretrained(first).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in unet.state_dict().items())
    (second := tmp_path / "second").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors.index.json"):
        shutil.copy(first / name, second)
    (second / files[0]).symlink_to(f"../first/{files[0]}")
    save_file({name: tensor + 1 for name, tensor in crossing.items()}, second / files[1], metadata={"format": "pt"})
    other = UNet2DConditionModel.from_pretrained(second).state_dict()
    assert all(torch.equal(tensor + (".attn2." in name), other[name]) for name, tensor in unet.state_dict().items())


def test_fit_for_class_goes_by_folder_and_title():
    rows = pd.DataFrame(
        [
            ("noto", "beer mug", "group-4/drink", False),
            ("noto", "red apple", "group-4/food", True),
            ("noto", "pool 8 ball", "group-6/game", True),  # no word begins or ends within another
            ("blob", "pregnant woman", "group-1/person", False),
            ("openclipart", "apple", "food/fruit", True),
            ("openclipart", "apple", "people", False),
            ("openclipart", "wine", "food/fruit", False),
            ("openclipart", "rooster", "food/beverages", False),
            ("openclipart", "stripper", "style", False),
            ("openclipart", "rooster", "object", True),
        ],
        columns=["collection", "title", "folder", "fit"],
    )
    assert corpus.fit_for_class(rows).tolist() == rows.fit.tolist()
    assert corpus.fit_for_class(rows[:0]).shape == (0,)


# mini-vae


def test_build_vae_makes_latents_of_a_sixth_of_the_numbers():
    model = vae.build().eval()
    with torch.no_grad():
        latents = model.encode(drawings(1, side=64)).latent_dist.mean
        assert latents.shape == (1, 32, 8, 8)
        assert model.decode(latents).sample.shape == (1, 3, 64, 64)


def test_decoder_only_leaves_the_latents_where_they_are():
    model = vae.build().requires_grad_(False)
    trained = {name for name, p in vae.decoder_only(model).named_parameters() if p.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    assert trained == {name for name in everything if name.startswith(("decoder", "post_quant_conv"))}
    assert {name.partition(".")[0] for name in everything - trained} == {"encoder", "quant_conv"}


class StubVAE:
    """A posterior of known mean and variance, and reconstructions that are off by 0.1 everywhere."""

    def encode(self, images):
        self.images = images
        mean, var = torch.full((len(images), 2), 0.5), torch.full((len(images), 2), 4.0)
        posterior = SimpleNamespace(mean=mean, var=var, logvar=var.log(), sample=lambda generator: mean)
        return SimpleNamespace(latent_dist=posterior)

    def decode(self, latents):
        return SimpleNamespace(sample=self.images + 0.1)


def test_reconstruction_loss_is_l1_plus_four_mse_plus_weighted_kl():
    seen = torch.randint(0, 256, (5, 3, 128, 128), generator=rng(), dtype=torch.uint8)
    model = StubVAE()
    terms = vae.reconstruction_loss(seen, batch=9, kl=0.01)(model, rng())
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(0.5, 2.0), normal(0.0, 1.0)).item()
    assert terms["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(0.1 + 4 * 0.01 + 0.01 * kl, rel=1e-4)
    assert terms["psnr"].item() == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-3)
    assert model.images.shape == (9, 3, 64, 64)
    assert model.images.abs().max() <= 1 + 1e-5


def test_reconstruction_loss_recolours_one_picture_in_eight():
    model = StubVAE()
    white = torch.full((3, 3, 128, 128), 255, dtype=torch.uint8)
    vae.reconstruction_loss(white, batch=80)(model, rng())
    changed = (model.images < 1).flatten(1).any(1)
    assert not changed[10:].any()
    assert changed[:10].sum() >= 3  # white that is made brighter stays white


def test_psnr_is_that_of_each_picture():
    levels = torch.tensor([10, 60, 110, 200, 250], dtype=torch.uint8)
    seen = levels.view(5, 1, 1, 1).expand(5, 3, 8, 8)

    class Halving:
        device, dtype = "cpu", torch.float32

        def encode(self, images):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images))

        def decode(self, latents):
            return SimpleNamespace(sample=latents * 0.5)

    x = levels.double() / 127.5 - 1
    expected = 20 * torch.log10(2 / (0.5 * x).abs())
    torch.testing.assert_close(vae.psnr(Halving(), seen, batch=2).double(), expected, atol=1e-3, rtol=0)


def test_rebuild_works_through_all_pictures_in_order_and_ratio_is_their_psnr():
    seen = torch.randint(0, 256, (5, 3, 8, 8), generator=rng(), dtype=torch.uint8)

    class Darker:
        device, dtype = "cpu", torch.float32

        def encode(self, images):
            assert len(images) <= 2
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images))

        def decode(self, latents):
            return SimpleNamespace(sample=latents - 0.5)

    rebuilt = vae.rebuild(Darker(), seen, batch=2)
    x = seen.double() / 127.5 - 1
    expected = (x - 0.5).clamp(-1, 1)
    torch.testing.assert_close(rebuilt.double(), expected, atol=1e-6, rtol=0)
    noise = (expected - x).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(vae.ratio(seen, rebuilt).double(), 10 * torch.log10(4 / noise), atol=1e-3, rtol=0)


def test_anatomy_tells_areas_from_detail_and_grey_from_colour():
    x = drawings(6, side=16)
    shares = vae.anatomy(x)
    assert sum(shares.values()) == pytest.approx(x.pow(2).mean().item(), rel=1e-5)
    assert min(shares.values()) > 0
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1).expand(1, 3, 16, 16)
    patch = torch.ones(1, 3, 16, 16) * torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    for image, name in (
        (torch.full((1, 3, 16, 16), 0.5), "areas, grey"),
        (patch, "areas, colour"),
        (board, "detail, grey"),
        (board * patch, "detail, colour"),
    ):
        found = vae.anatomy(image)
        assert found.pop(name) == pytest.approx(image.pow(2).mean().item())
        assert max(found.values()) < 1e-6, name


def test_psnr_clips_the_reconstruction_to_the_range_of_pictures():
    seen = torch.full((1, 3, 8, 8), 204, dtype=torch.uint8)  # 0.6

    class Overshooting:
        device, dtype = "cpu", torch.float32

        def encode(self, images):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images))

        def decode(self, latents):
            return SimpleNamespace(sample=latents + 5)

    assert vae.psnr(Overshooting(), seen).item() == pytest.approx(20 * math.log10(2 / 0.4), abs=1e-3)
