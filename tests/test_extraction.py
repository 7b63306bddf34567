"""The attacker's step: what it extracts from known pictures, and that it never sees a training image."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COPIES, ORIGINALS, copies, pictures

from fx import cliques, datasets, extraction, finetune, results, sampling
from fx.datasets import from_uint8
from fx.extraction import Extract
from fx.finetune import FineTune, TrainingItem
from fx.sampling import Generate
from fx.similarity import MiniSSCD, copy_thresholds, load_descriptor
from fx.tuned import Checkpoint


@pytest.fixture
def checkpoint(tiny_sd, tmp_path) -> Checkpoint:
    """Somebody's checkpoint; its content does not matter where pictures are placed."""
    (tmp_path / "theirs.safetensors").write_bytes(b"weights")
    return Checkpoint(str(tmp_path / "theirs.safetensors"), str(tiny_sd), "a dog")


def outcome(spec: Extract) -> tuple[dict, dict]:
    """The scores and the sets of a finished Extract."""
    folder = results.complete(spec)
    return tuple(json.loads((folder / name).read_text()) for name in ("scores.json", "extraction.json"))


@functools.cache
def expected(rule: str) -> cliques.Extraction:
    """What a rule extracts from the copies: similarities by the shipped descriptor, in float64."""
    with torch.no_grad():
        found = load_descriptor("mini-sscd")(from_uint8(copies())).double().numpy()
    return cliques.extract((found @ found.T + (found @ found.T).T) / 2, ORIGINALS, rule)


@pytest.mark.parametrize("rule", cliques.RULES)
def test_every_rule_is_that_of_fx_cliques(place, checkpoint, rule):
    scores, sets = outcome(Extract(place(checkpoint, copies()), ORIGINALS, rule=rule))
    chosen = expected(rule)
    assert sets == {"cliques": [list(c) for c in chosen.cliques], "centres": list(chosen.centres)}
    assert scores == {
        "n_extracted": chosen.n_extracted,
        "n_unproven": chosen.n_unproven,
        "phi_end": pytest.approx(chosen.threshold),
    }


def test_the_rules_can_be_told_apart_by_these_copies():
    assert len({expected(rule).cliques for rule in cliques.RULES}) >= 3


def test_a_fixed_phi_is_taken_instead_of_the_rules_own(place, checkpoint):
    generate = place(checkpoint, copies())
    scores, sets = outcome(Extract(generate, ORIGINALS, phi=0.9))
    assert scores["phi_end"] == 0.9
    groups = {tuple(range(i, ORIGINALS * COPIES, ORIGINALS)) for i in range(ORIGINALS)}
    assert {tuple(clique) for clique in sets["cliques"]} == groups
    scores, sets = outcome(Extract(generate, ORIGINALS, phi=-1.0))
    assert scores == {"n_extracted": 1, "n_unproven": 0, "phi_end": -1.0}
    assert sets["cliques"] == [list(range(ORIGINALS * COPIES))]
    with pytest.raises(ValueError, match="phi is compared with similarities"):
        results.complete(Extract(generate, ORIGINALS, phi=1.5))


def test_distinct_images_are_those_of_fx_cliques(place, checkpoint):
    generate = place(checkpoint, copies())
    n = ORIGINALS + 2  # so that some are copies
    _, sets = outcome(Extract(generate, n, distinct=True))
    with torch.no_grad():
        found = load_descriptor("mini-sscd")(from_uint8(copies())).double().numpy()
    similarity = (found @ found.T + (found @ found.T).T) / 2
    _, strict = copy_thresholds("mini-sscd")
    kept = cliques.extract_distinct(similarity, n, strict)
    assert kept.centres != cliques.extract(similarity, n).centres
    assert sets == {"cliques": [list(c) for c in kept.cliques], "centres": list(kept.centres)}
    assert outcome(Extract(generate, generate.n_generated, distinct=True))[0]["n_extracted"] == generate.n_generated


def test_the_sets_are_those_of_the_descriptors_of_the_image_files(place, checkpoint, tmp_path):
    """Once more from the pixels, by a network of our own: descriptors, cosines, cliques."""
    torch.manual_seed(0)
    MiniSSCD(widths=(4, 6), blocks=(1, 1), dimension=8, size=32).save_pretrained(tmp_path / "mine")
    images = pictures(9, seed=3)
    spec = Extract(place(checkpoint, images), 3, descriptor=str(tmp_path / "mine"), rule="tightest")
    scores, sets = outcome(spec)
    with torch.no_grad():
        found = MiniSSCD.from_pretrained(tmp_path / "mine")(from_uint8(images)).numpy()
    assert np.allclose(np.load(results.folder(spec) / "descriptors.npy"), found, atol=1e-6)
    cosine = found.astype(float) @ found.T.astype(float)
    expected = cliques.extract((cosine + cosine.T) / 2, 3, "tightest")
    assert sets == {"cliques": [list(c) for c in expected.cliques], "centres": list(expected.centres)}
    assert scores["phi_end"] == expected.threshold


def test_where_nobody_knows_n0_it_is_estimated(place, checkpoint):
    generate = place(checkpoint, copies())
    scores, sets = outcome(Extract(generate, None))
    assert scores["n_estimated"] == scores["n_extracted"] == len(sets["centres"]) == ORIGINALS
    assert scores["n_estimated_low"] <= ORIGINALS <= scores["n_estimated_high"]
    known, known_sets = outcome(Extract(generate, ORIGINALS))
    assert not [name for name in known if "estimated" in name]
    assert known_sets == sets
    table = results.run([Extract(generate, None)])
    assert {"n_estimated", "n_estimated_low", "n_estimated_high"} <= set(table.columns)


def test_the_estimate_is_made_at_the_loose_threshold_of_the_descriptor(place, checkpoint, tmp_path):
    images, network = copies(), load_descriptor("mini-sscd")
    for loose, expected in ((0.9, ORIGINALS), (-1.0, 1)):  # below all similarities all are copies of one
        network.save_pretrained(tmp_path / f"at{loose}", {"loose": loose, "strict": 0.95})
        spec = Extract(place(checkpoint, images), None, descriptor=str(tmp_path / f"at{loose}"))
        assert outcome(spec)[0]["n_estimated"] == expected


def test_an_estimate_of_none_is_told_and_one_image_is_extracted(place, checkpoint):
    scores, sets = outcome(Extract(place(checkpoint, pictures(8)), None))
    assert copy_thresholds("mini-sscd")[0] > 0
    assert (scores["n_estimated"], scores["n_estimated_low"], scores["n_extracted"]) == (0, 0, 1)
    assert len(sets["centres"]) == 1


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (1, {"n_training": 1}, "1 generated image has no similarities to cluster: generate at least 2"),
        (8, {"n_training": 9}, "n_training 9 must lie between 1 and the 8 generated images, or be None"),
        (8, {"n_training": 0}, "n_training 0 must lie between 1 and the 8"),
        (5, {"n_training": None}, "5 generated images are too few to estimate n_training: generate at least 6"),
        (8, {"n_training": 2, "rule": "best"}, "unknown rule 'best': choose one of paper, published, tightest, peaks"),
        (8, {"n_training": 2, "preset": "288"}, "unknown preset '288': choose one of sscd, published"),
    ],
)
def test_impossible_specs_are_refused_at_once(checkpoint, n, options, message):
    with pytest.raises(ValueError, match=message):
        Extract(Generate(checkpoint, n_generated=n), **options)


def test_wrong_descriptors_stop_everything_before_anything_is_generated(place, checkpoint, tmp_path):
    generate = place(checkpoint, copies())
    (tmp_path / "sscd.pt").write_bytes(b"changed")
    MiniSSCD().save_pretrained(tmp_path / "bare")
    wrong = [
        (f"{tmp_path}/sscd.pt", 2, ValueError, "name it with the SHA-256"),
        (f"{tmp_path}/sscd.pt@sha256:{64 * '0'}", 2, ValueError, "not 0000"),
        ("nonsense", 2, FileNotFoundError, "unknown descriptor 'nonsense'"),
        (str(tmp_path / "bare"), None, ValueError, "was saved without thresholds"),
    ]
    for name, n_training, error, message in wrong:
        with pytest.raises(error, match=message):
            results.run([Extract(generate, 2), Extract(generate, n_training, descriptor=name)])
    assert not results.RUNS.exists()


def test_another_descriptor_is_another_step(runs, checkpoint, tmp_path):
    MiniSSCD().save_pretrained(tmp_path / "mine")
    generate = Generate(checkpoint, n_generated=8)
    theirs = Extract(generate, 2, descriptor=str(tmp_path / "mine"))
    digests = {results.digest(Extract(generate, 2)), results.digest(theirs)}
    MiniSSCD(dimension=32).save_pretrained(tmp_path / "mine")
    digests.add(results.digest(theirs))
    assert len(digests) == 3


# the threat model's line


@pytest.fixture
def secret(picture_folder, tmp_path) -> TrainingItem:
    """Training images under names that would be recognised anywhere."""
    (tmp_path / "secret-folder").mkdir()
    for path in sorted(picture_folder.iterdir()):
        with Image.open(path) as image:
            image.save(tmp_path / "secret-folder" / f"secret-{path.name}")
    return TrainingItem(str(tmp_path / "secret-folder"), "hush")


def training_files(item: TrainingItem) -> list[Path]:
    return sorted(Path(item.item).iterdir())


def test_the_folder_and_the_inputs_of_an_extraction_hold_nothing_of_the_training(place, secret, tiny_sd):
    model = FineTune((secret,), str(tiny_sd))
    spec = Extract(place(model, copies()), ORIGINALS)
    assert results.inputs(spec).keys() == {"descriptor"}
    folder = results.complete(spec)
    assert sorted(p.name for p in folder.iterdir()) == [
        "descriptors.npy",
        "extraction.json",
        "manifest.json",
        "scores.json",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"].keys() == {"descriptor"}
    assert manifest["spec"]["fields"]["generate"] == {"kind": "generate", "digest": results.digest(spec.generate)}
    hashes = [results.sha256_of(path) for path in training_files(secret)]
    for file in folder.iterdir():
        content = file.read_bytes()
        assert not [word for word in ("secret", "hush", *hashes, *(h[:16] for h in hashes)) if word.encode() in content]
        assert not [path for path in training_files(secret) if path.read_bytes() in content]
    generated = (results.folder(spec.generate) / "manifest.json").read_text()
    assert "secret" not in generated
    assert "hush" not in generated
    assert not [word for word in hashes if word in generated]


def test_an_extraction_follows_from_the_generated_images_alone(place, secret, tiny_sd, checkpoint):
    """The same pictures give the same files, whoever made them: a fine-tuning on these images, or a file."""
    specs = [Extract(place(model, copies()), None) for model in (FineTune((secret,), str(tiny_sd)), checkpoint)]
    one, other = (results.complete(spec) for spec in specs)
    assert one != other
    for name in ("descriptors.npy", "extraction.json", "scores.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def forbid(monkeypatch, item: TrainingItem | None) -> None:
    """Let every way to training images fail from now on."""
    known = set(training_files(item)) if item else set()
    for module, name in ((finetune, "load_training"), (finetune, "load_item"), (datasets, "load_item")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a training image was asked for"))
    monkeypatch.setattr(sampling, "own_caption", lambda *_: pytest.fail("the training caption was asked for"))
    real = datasets.open_image
    watched = lambda path: pytest.fail(f"{path} was opened") if Path(path) in known else real(path)  # noqa: E731
    monkeypatch.setattr(datasets, "open_image", watched)


def test_an_extraction_from_a_fine_tuned_model_works_without_its_training_images(
    place, secret, tiny_sd, tmp_path, monkeypatch
):
    spec = Extract(place(FineTune((secret,), str(tiny_sd)), copies()), ORIGINALS)
    finished = results.complete(spec.generate)
    expected = results.complete(spec)
    monkeypatch.setattr(extraction.results, "complete", lambda asked: {spec.generate: finished}[asked])
    forbid(monkeypatch, secret)
    (tmp_path / "again").mkdir()
    results.perform(spec, tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (expected / file.name).read_bytes()
    assert len(list((tmp_path / "again").iterdir())) == 3


def test_an_extraction_from_a_checkpoint_never_asks_for_training_images(place, checkpoint, monkeypatch):
    generate = place(checkpoint, copies(), caption="a dog")
    forbid(monkeypatch, None)
    scores, _ = outcome(Extract(generate, None))
    assert scores["n_estimated"] == ORIGINALS
