"""Extraction end to end on the shipped mini models, with few steps, and its parts against independent computations."""

import ast
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fx import extraction, results
from fx.datasets import from_uint8, load_images, load_item
from fx.extraction import Extract, method_pictures, three_arms
from fx.finetune import FineTune
from fx.sampling import Generate
from fx.similarity import MiniSSCD, copy_thresholds, load_descriptor

TUNED = FineTune("object/candle", learning_rate=2.0e-5, steps_per_image=1)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")


def specs(**options) -> list[Extract]:
    return three_arms(
        TUNED, images_per_training=2, cfg_scale=3.0, finextract_scale=2.0, correction_scale=-0.02, **options
    )


def test_three_arms_share_everything_but_the_guidance():
    direct, cfg, finextract = specs(seed=5)
    assert [s.generate.arm for s in (direct, cfg, finextract)] == ["direct", "cfg", "finextract"]
    assert [s.generate.guidance_scale for s in (direct, cfg, finextract)] == [1.0, 3.0, 2.0]
    assert [s.generate.correction_scale for s in (direct, cfg, finextract)] == [0.0, 0.0, -0.02]
    assert {
        (s.generate.finetune, s.generate.images_per_training, s.generate.seed) for s in (direct, cfg, finextract)
    } == {(TUNED, 2, 5)}
    assert {(s.loose, s.strict) for s in (direct, cfg, finextract)} == {copy_thresholds("mini-sscd")}


@pytest.fixture
def place_images(runs):
    """A function that lets given images be what a spec generated."""
    original = results.perform.dispatch(Generate)

    def place(spec: Generate, images: np.ndarray) -> None:
        def perform(asked, folder):
            assert asked == spec
            np.save(folder / "images.npy", images)

        results.perform.register(Generate, perform)

    yield place
    results.perform.register(Generate, original)


def test_generated_copies_of_the_training_images_are_all_extracted(place_images):
    item = load_item(TUNED.item)
    training = load_images(item.training, 64)
    rng = np.random.default_rng(0)
    pixels = ((training.permute(0, 2, 3, 1).numpy() + 1) * 127.5).round()
    copies = np.concatenate([pixels] * 5) + rng.normal(0, 4, (5 * len(pixels), 64, 64, 3))
    generate = Generate(TUNED, images_per_training=5, steps=2)
    place_images(generate, copies.clip(0, 255).astype(np.uint8))
    spec = Extract(generate, strict=0.8, loose=0.7, rule="tightest")
    folder = results.complete(spec)
    matches = json.loads((folder / "matches.json").read_text())
    # images i, i + n0, i + 2 n0, ... are copies of training image i
    assert [match % item.n_training for match in matches["match"]] == list(range(item.n_training))
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["A-ESR_strict"] == scores["A-ESR_loose"] == 1.0
    assert scores["n_extracted"] == scores["n_training"] == item.n_training
    assert scores["n_generated"] == len(copies)


def test_scores_equal_a_computation_by_hand(place_images):
    images = np.random.default_rng(1).integers(0, 256, (12, 64, 64, 3)).astype(np.uint8)
    generate = Generate(TUNED, images_per_training=3, steps=2)
    place_images(generate, images)
    folder = results.complete(spec := Extract(generate, strict=0.3, loose=0.1))
    scores = json.loads((folder / "scores.json").read_text())
    matches = json.loads((folder / "matches.json").read_text())
    network = load_descriptor("mini-sscd")
    with torch.no_grad():
        found = network(from_uint8(images))
        wanted = network(load_images(load_item(TUNED.item).training, 64))
    best = (wanted @ found[matches["centres"]].T).clamp(0, 1).max(dim=1).values
    assert scores["AS"] == pytest.approx(best.mean().item(), abs=1e-5)
    assert scores["A-ESR_strict"] == pytest.approx((best > spec.strict).float().mean().item())
    assert scores["A-ESR_loose"] == pytest.approx((best > spec.loose).float().mean().item())
    assert scores["AS_all"] == pytest.approx((wanted @ found.T).clamp(0, 1).max(dim=1).values.mean().item(), abs=1e-5)
    assert scores["AS_all"] >= scores["AS"] >= scores["AS_one_to_one"]
    with torch.no_grad():
        unseen = network(load_images(load_item(TUNED.item).controls, 64))
    others = (unseen @ found[matches["centres"]].T).clamp(0, 1).max(dim=1).values
    assert scores["AS_controls"] == pytest.approx(others.mean().item(), abs=1e-5)
    rows, columns = linear_sum_assignment(-(wanted @ found[matches["centres"]].T).numpy())
    matched = (wanted[rows] * found[matches["centres"]][columns]).sum(dim=1).clamp(0, 1)
    assert scores["AS_one_to_one"] == pytest.approx(matched.mean().item(), abs=1e-5)
    assert scores["n_unproven"] == 0
    assert len(matches["centres"]) == scores["n_extracted"]


def test_another_descriptor_is_another_step(runs, tmp_path):
    MiniSSCD().save_pretrained(tmp_path / "mine")
    generate = Generate(TUNED, images_per_training=2, steps=2)
    ours = Extract(generate, strict=0.5, loose=0.4)
    assert results.digest(ours) != results.digest(Extract(generate, 0.5, 0.4, descriptor=str(tmp_path / "mine")))
    before = results.digest(theirs := Extract(generate, 0.5, 0.4, descriptor=str(tmp_path / "mine")))
    MiniSSCD(dimension=32).save_pretrained(tmp_path / "mine")
    assert results.digest(theirs) != before


def test_other_code_is_another_extraction_of_the_same_images(runs, monkeypatch):
    before = results.digest(spec := Extract(Generate(TUNED, images_per_training=2, steps=2), strict=0.5, loose=0.4))
    generated = results.digest(spec.generate)
    source = Path(extraction.__file__).with_name("cliques.py")
    assert extraction.CODE["cliques.py"] == hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(extraction.CODE, "cliques.py", "another")
    assert results.digest(spec) != before
    assert results.digest(spec.generate) == generated


def test_the_code_of_an_extraction_is_all_of_it_but_the_steps_before():
    imported = set()
    for file in extraction.CODE:
        for node in ast.walk(ast.parse(Path(extraction.__file__).with_name(file).read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    modules = {path.name for path in Path(extraction.__file__).parent.glob("*.py") if f"fx.{path.stem}" in imported}
    assert modules - {"results.py", "finetune.py", "models.py", "sampling.py", "paths.py"} == {*extraction.CODE} - {
        "extraction.py"
    }


def test_wrong_rules_presets_and_descriptors_stop_everything_before_training(runs, tmp_path):
    with pytest.raises(ValueError, match="unknown rule 'best': choose one of paper, published, tightest, peaks"):
        specs(rule="best")
    with pytest.raises(ValueError, match="unknown preset '288': choose one of sscd, published"):
        specs(preset="288")
    (tmp_path / "sscd.pt").write_bytes(b"changed")
    for name, message in (
        (f"{tmp_path}/sscd.pt", "name it with the SHA-256"),
        (f"{tmp_path}/sscd.pt@sha256:{64 * '0'}", "not 0000"),
    ):
        with pytest.raises(ValueError, match=message):
            results.run(specs(descriptor=name))
    with pytest.raises(FileNotFoundError, match="unknown descriptor 'nonsense'"):
        results.run(specs(descriptor="nonsense"))
    (tmp_path / "one").mkdir()
    shutil.copy(load_item(TUNED.item).training[0], tmp_path / "one")
    single = FineTune(str(tmp_path / "one"), caption="a candle", steps_per_image=1)
    with pytest.raises(ValueError, match="one: 1 generated image has no similarities to cluster; generate at least 2"):
        results.run(three_arms(single, 1, 3.0, 2.0, 0.0))
    assert not list(tmp_path.rglob("losses.npy"))


def test_thresholds_are_those_of_the_descriptor(tmp_path):
    MiniSSCD().save_pretrained(tmp_path / "mine", {"loose": 0.11, "strict": 0.22})
    asked = specs(descriptor=str(tmp_path / "mine"))
    assert {(s.descriptor, s.loose, s.strict) for s in asked} == {(str(tmp_path / "mine"), 0.11, 0.22)}


def test_steps_of_three_arms_are_sampling_steps():
    assert {s.generate.steps for s in specs(steps=7)} == {7}


def test_the_whole_chain_twice_gives_identical_rows(runs, tmp_path, monkeypatch):
    asked = [
        Extract(Generate(TUNED, s.generate.arm, s.generate.guidance_scale, s.generate.correction_scale, 2, 2), 0.5, 0.4)
        for s in specs()
    ]
    first = results.run(asked)
    monkeypatch.setattr(results, "RUNS", tmp_path / "again")
    second = results.run(asked)
    assert first.equals(second)
    assert list(first.arm) == ["direct", "cfg", "finextract"]
    pictures = method_pictures(asked[-1])
    similarity = pictures.pop("similarity")
    assert {name: picture.shape for name, picture in pictures.items()} == dict.fromkeys(
        ("base", "tuned", "generated", "clique", "extracted", "training"), (4, 64, 64, 3)
    )
    generated = np.load(results.folder(asked[-1].generate) / "images.npy")
    assert (pictures["generated"] == generated[:4]).all()
    matches = json.loads((results.folder(asked[-1]) / "matches.json").read_text())
    centres = [tuple(generated[i].ravel()) for i in matches["centres"]]
    first = centres.index(tuple(pictures["extracted"][0].ravel()))
    members = {tuple(generated[i].ravel()) for i in matches["cliques"][first]}
    assert {tuple(picture.ravel()) for picture in pictures["clique"]} <= members
    assert len({tuple(picture.ravel()) for picture in pictures["extracted"]}) == len(set(centres)) == 4
    network = load_descriptor("mini-sscd")
    with torch.no_grad():
        shown, wanted = network(from_uint8(pictures["extracted"])), network(from_uint8(pictures["training"]))
    # within a thousandth, since these training images went through uint8
    assert similarity == pytest.approx((shown * wanted).sum(dim=1).numpy(), abs=1e-3)
    assert similarity.tolist() == sorted(similarity, reverse=True)
    assert similarity[0] == pytest.approx(max(matches["similarity"]), abs=1e-6)


def test_a_caption_too_long_stops_everything_before_training(runs):
    long = FineTune("object/candle", caption="candle " * 80, learning_rate=1.0e-5)
    with pytest.raises(ValueError, match="tokens"):
        results.run([*specs(), *three_arms(long, 2, 3.0, 3.0, 0.0)])
    assert not list(results.RUNS.rglob("losses.npy"))
