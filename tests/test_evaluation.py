"""What an evaluator adds: scores and quality against computations by hand; checkpoints of others from end to end."""

import copy
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tiny import ORIGINALS, copies, pictures

from fx import evaluation, quality, results
from fx.datasets import from_uint8, load_images, load_item
from fx.evaluation import Quality, Reference, Score, method_pictures, read_matches, scored_images, thresholds
from fx.extraction import Extract
from fx.families import round_trip
from fx.finetune import LORA_LAYERS, FineTune, TrainingItem
from fx.models import LORA_FILE, load_pipeline
from fx.sampling import Generate, generated_pictures
from fx.similarity import MiniSSCD, copy_thresholds, load_descriptor
from fx.tuned import Checkpoint, Extrapolated, load_tuned, own_caption, own_training


def save_pictures(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def training(tmp_path) -> TrainingItem:
    """A folder of four pictures, 32 px, of which `tiny.copies` are copies."""
    return TrainingItem(str(save_pictures(tmp_path / "photos", pictures(ORIGINALS))), "a dog")


@pytest.fixture
def controls(tmp_path) -> str:
    """A folder of three other pictures; it needs no caption."""
    return str(save_pictures(tmp_path / "controls", pictures(3, seed=9)))


@pytest.fixture
def model(training, tiny_sd) -> FineTune:
    return FineTune((training,), str(tiny_sd), learning_rate=2e-3, steps_per_image=2)


@pytest.fixture
def checkpoint(tiny_sd, tmp_path) -> Checkpoint:
    """Somebody's checkpoint; its content does not matter where pictures are placed."""
    (tmp_path / "theirs.safetensors").write_bytes(b"weights")
    return Checkpoint(str(tmp_path / "theirs.safetensors"), str(tiny_sd), "a dog")


def read(spec, name: str) -> dict:
    return json.loads((results.complete(spec) / name).read_text())


def described(images) -> torch.Tensor:
    with torch.no_grad():
        return load_descriptor("mini-sscd")(images if isinstance(images, torch.Tensor) else from_uint8(images))


# the score


def test_scores_equal_a_computation_by_hand(place, model, controls):
    images = np.random.default_rng(1).integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    extract = Extract(place(model, images), ORIGINALS)
    spec = Score(extract, controls=controls, strict=0.3, loose=0.1)
    scores, matches = read(spec, "scores.json"), read_matches(spec)
    centres = read(extract, "extraction.json")["centres"]
    found, wanted, unseen = (described(part) for part in (images, pictures(ORIGINALS), pictures(3, seed=9)))
    cosines = (wanted @ found[centres].T).numpy()
    best = cosines.clip(0, 1).max(axis=1)
    rows, columns = linear_sum_assignment(-cosines)
    once, other = cosines[rows, columns].clip(0, 1), (unseen @ found[centres].T).numpy().clip(0, 1).max(axis=1)
    judged = {name: features("mini-clip", part) for name, part in (("x", images[centres]), ("t", pictures(ORIGINALS)))}
    judged["c"] = features("mini-clip", pictures(3, seed=9))

    def psnr(part):
        errors = np.square(part[:, None] / 255 - images[centres][None] / 255).mean(axis=(2, 3, 4))
        return (-10 * np.log10(errors)).max(axis=1).mean()

    expected = {
        "AS": best.mean(),
        "A-ESR_strict": (best > 0.3).mean(),
        "A-ESR_loose": (best > 0.1).mean(),
        "AS_one_to_one": once.mean(),
        "A-ESR_strict_one_to_one": (once > 0.3).mean(),
        "A-ESR_loose_one_to_one": (once > 0.1).mean(),
        "AS_all": (wanted @ found.T).numpy().clip(0, 1).max(axis=1).mean(),
        "AS_random": at_random((wanted @ found.T).numpy().clip(0, 1), len(centres)),
        "AS_controls": other.mean(),
        "A-ESR_strict_controls": (other > 0.3).mean(),
        "A-ESR_loose_controls": (other > 0.1).mean(),
        "AS (mini-clip)": (judged["t"] @ judged["x"].T).clip(0, 1).max(axis=1).mean(),
        "AS_controls (mini-clip)": (judged["c"] @ judged["x"].T).clip(0, 1).max(axis=1).mean(),
        "PSNR": psnr(pictures(ORIGINALS)),
        "PSNR_controls": psnr(pictures(3, seed=9)),
        "n_scored": ORIGINALS,
    }
    assert scores == pytest.approx(read(extract, "scores.json") | expected, abs=1e-5)
    assert scores["AS_all"] >= scores["AS"] >= scores["AS_one_to_one"]
    assert matches["match"].tolist() == [centres[i] for i in cosines.argmax(axis=1)]
    assert matches["similarity"] == pytest.approx(best, abs=1e-5)
    assert matches["control_similarity"] == pytest.approx((unseen @ found[centres].T).numpy().max(axis=1), abs=1e-5)


def at_random(cosines: np.ndarray, n: int) -> float:
    return np.mean([cosines[:, some].max(axis=1).mean() for some in combinations(range(cosines.shape[1]), n)])


def features(judge: str, images: np.ndarray) -> np.ndarray:
    return quality.features(quality.load_judge(judge), images)


def test_a_score_is_judged_by_the_named_network_or_none(place, model, controls, tmp_path):
    judge = str(tiny.save_judge("vit", tmp_path / "ruler"))
    extract = Extract(place(model, copies()), ORIGINALS)
    named, bare = (Score(extract, controls=controls, judge=name, strict=0.3, loose=0.1) for name in (judge, ""))
    found = generated_pictures(extract.generate, read(extract, "extraction.json")["centres"])
    cosines = features(judge, pictures(ORIGINALS)) @ features(judge, found).T
    assert read(named, "scores.json")["AS (ruler)"] == pytest.approx(cosines.clip(0, 1).max(axis=1).mean(), abs=1e-5)
    assert set(read(named, "scores.json")) - set(read(bare, "scores.json")) == {"AS (ruler)", "AS_controls (ruler)"}
    before = results.digest(named)
    tiny.save_judge("vit", Path(judge), seed=1)
    assert results.digest(named) != before
    with pytest.raises(FileNotFoundError, match="nobody"):
        results.run([replace(named, judge="nobody")])


# what the scores are held against


def test_never_trained_images_stand_for_the_extracted_ones(runs, training, controls, tiny_sd):
    spec = Reference("controls", (training,), str(tiny_sd), controls=controls, strict=0.3, loose=0.1)
    wanted, others = (
        load_images(tuple(load_item(training.item, "x").training), 16),
        load_images(tuple(Path(controls) / f"{i}.png" for i in range(3)), 16),
    )
    cosines = (described(wanted) @ described(others).T).numpy()
    best, scores = cosines.clip(0, 1).max(axis=1), read(spec, "scores.json")
    rows, columns = linear_sum_assignment(-cosines)
    assert scores["AS"] == pytest.approx(best.mean(), abs=1e-5)
    assert scores["A-ESR_strict"] == (best > 0.3).mean()
    assert scores["AS_one_to_one"] == pytest.approx(cosines[rows, columns].clip(0, 1).sum() / ORIGINALS, abs=1e-5)
    assert (scores["n_scored"], scores["n_extracted"]) == (ORIGINALS, 3)
    assert not any("controls" in name for name in scores)
    many = save_pictures(Path(controls).parent / "many", pictures(7, seed=9))
    assert read(replace(spec, controls=str(many)), "scores.json")["n_extracted"] == ORIGINALS, (
        "not more than trained on"
    )


def test_a_round_trip_through_the_autoencoder_is_the_ceiling(runs, training, tiny_sd):
    spec = Reference("round trip", (training,), str(tiny_sd), strict=0.3, loose=0.1)
    pipeline, images = load_pipeline(str(tiny_sd)), load_images(load_item(training.item, "x").training, 16)
    with torch.no_grad():
        back = torch.cat([pipeline.vae(image[None], sample_posterior=False).sample for image in images]).clamp(-1, 1)
    expected = (described(images) @ described(back).T).numpy().clip(0, 1).max(axis=1).mean()
    scores = read(spec, "scores.json")
    assert scores["AS"] == pytest.approx(expected, abs=2e-3)  # the training images enter as 8-bit squares
    assert scores["PSNR"] < 58
    shipped = read(Reference("round trip", (TrainingItem("style/mimooh", first=3),)), "scores.json")
    assert shipped["AS"] > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": "noise"}, "unknown reference 'noise': choose from controls, round trip"),
        ({"training": ()}, "training is empty"),
        ({"loose": 7.0}, "threshold"),
    ],
)
def test_a_wrong_reference_is_refused(change, message, training):
    with pytest.raises(ValueError, match=message):
        Reference(**{"of": "controls", "training": (training,)} | change)


def test_a_reference_to_controls_that_nobody_has_is_refused(runs, training):
    with pytest.raises(ValueError, match="bring no controls along: name a folder"):
        results.run([Reference("controls", (training,))])
    assert not runs.exists()


def test_generated_copies_of_the_training_images_are_all_found(place, model):
    spec = Score(Extract(place(model, copies()), ORIGINALS, rule="tightest"), strict=0.8, loose=0.7)
    matches, scores = read_matches(spec) if results.complete(spec) else None, read(spec, "scores.json")
    assert [match % ORIGINALS for match in matches["match"]] == list(range(ORIGINALS))
    assert scores["A-ESR_strict"] == scores["A-ESR_loose"] == 1.0
    assert scores["AS"] > 0.95
    assert scores["AS_controls"] is None, "a folder brings no controls along"


def test_training_images_are_scored_as_they_were_learned(place, tiny_sd, tmp_path):
    """Wide photographs of a fine-tuning are cropped to squares of the generated images' side before they are described."""
    wide = np.concatenate([pictures(2, seed=5), pictures(2), pictures(2, seed=6)], axis=2)
    item = TrainingItem(str(save_pictures(tmp_path / "wide", wide)), "a dog")
    spec = Score(Extract(place(FineTune((item,), str(tiny_sd)), copies(2)), 2), strict=0.9, loose=0.8)
    assert evaluation.image_side(spec) == 32 if results.complete(spec) else None
    assert read(spec, "scores.json")["AS"] > 0.95
    images = load_images(load_item(item.item, "a dog").training, 32)
    extracted = copies(2)[read(spec.extract, "extraction.json")["centres"]]
    expected = (described(images) @ described(extracted).T).max(dim=1).values
    assert read_matches(spec)["similarity"] == pytest.approx(expected.numpy(), abs=1e-5)


def test_controls_are_those_named_or_else_those_of_the_items(place, model, controls, checkpoint):
    extract = Extract(place(model, copies()), ORIGINALS)
    assert scored_images(Score(extract)) == ([Path(model.training[0].item) / f"{i}.png" for i in range(4)], [])
    assert scored_images(Score(extract, controls=controls))[1] == [Path(controls) / f"{i}.png" for i in range(3)]
    shipped = load_item("style/mimooh")
    named = Score(extract, (TrainingItem("style/mimooh", first=2), model.training[0]))
    assert scored_images(named) == (
        [*shipped.training[:2], *scored_images(Score(extract))[0]],
        list(shipped.controls),
    )


def test_thresholds_are_the_descriptors_own_unless_given(checkpoint, tmp_path):
    MiniSSCD().save_pretrained(tmp_path / "mine", {"loose": 0.11, "strict": 0.22})
    MiniSSCD().save_pretrained(tmp_path / "bare")
    ours, mine, bare = (
        Extract(Generate(checkpoint), 2, descriptor=name)
        for name in ("mini-sscd", str(tmp_path / "mine"), str(tmp_path / "bare"))
    )
    assert thresholds(Score(ours)) == copy_thresholds("mini-sscd")
    assert thresholds(Score(mine)) == (0.11, 0.22)
    assert thresholds(Score(mine, strict=0.5)) == (0.11, 0.5)
    assert thresholds(Score(mine, loose=0.05)) == (0.05, 0.22)
    assert thresholds(Score(bare, strict=0.5, loose=0.4)) == (0.4, 0.5)
    with pytest.raises(ValueError, match="saved without thresholds"):
        thresholds(Score(bare, strict=0.5))
    for wrong in ({"strict": 1.5}, {"loose": -2.0}, {"loose": float("nan")}):
        with pytest.raises(ValueError, match="threshold"):
            Score(ours, **wrong)


def test_scores_against_other_images_or_controls_are_other_steps(place, model, training, controls, checkpoint):
    extract = Extract(place(model, copies()), ORIGINALS)
    specs = [Score(extract), Score(extract, controls=controls), Score(extract, (TrainingItem(training.item, "x", 2),))]
    digests = [results.digest(spec) for spec in specs]
    for path in (Path(controls) / "1.png", Path(training.item) / "1.png"):
        Image.fromarray(pictures(1, seed=77)[0]).save(path)
        digests += [results.digest(spec) for spec in specs]
    # the controls change what is scored beside them; a training image of the fine-tuning changes everything after it
    assert len(set(digests)) == 3 + 1 + 3
    theirs = Score(Extract(place(checkpoint, copies()), ORIGINALS), (training,))
    before = results.digest(theirs), results.digest(theirs.extract)
    Image.fromarray(pictures(1, seed=78)[0]).save(Path(training.item) / "1.png")
    assert results.digest(theirs) != before[0]
    assert results.digest(theirs.extract) == before[1], "an extraction from a checkpoint knows no training images"


@pytest.mark.parametrize("kind", [Score, Quality])
def test_without_training_images_a_score_is_refused_with_the_way_out(place, checkpoint, training, kind):
    generate = place(checkpoint, copies())
    inner = Extract(generate, ORIGINALS) if kind is Score else generate
    with pytest.raises(ValueError, match=r"what .*theirs.* was trained on is not known: name the training items"):
        results.run([Extract(generate, ORIGINALS), kind(inner)])
    assert not results.RUNS.exists(), "nothing was begun"
    assert results.digest(kind(inner, (training,)))


def test_the_round_trip_is_the_autoencoders_most_likely_latent_decoded_and_clipped(tiny_pipeline):
    """In batches of any size; the autoencoder is one that reaches beyond [-1, 1]."""
    vae, images = tiny_pipeline.vae, from_uint8(pictures(5))
    vivid = copy.deepcopy(vae)
    with torch.no_grad():
        vivid.decoder.conv_out.weight.mul_(20)
        mean, _ = vivid.quant_conv(vivid.encoder(images)).chunk(2, dim=1)
        expected = vivid.decoder(vivid.post_quant_conv(mean))
    assert expected.abs().max() > 1
    for batch_size in (2, 16):
        assert torch.allclose(round_trip(vivid, images, batch_size), expected.clamp(-1, 1), atol=1e-3)


# quality


@pytest.fixture
def judges(tmp_path) -> tuple[str, str]:
    """A tiny CLIP for CLIP-IQA and a tiny DINO for fidelity."""
    return tuple(str(tiny.save_judge(kind, tmp_path / name)) for kind, name in (("clip", "eye"), ("vit", "ruler")))


def test_quality_is_that_of_fx_quality_in_chunks_of_any_size(place, model, judges, tmp_path):
    images = copies()
    spec = Quality(place(model, images), iqa_judge=judges[0], fidelity_judge=judges[1])
    eye, ruler = (quality.load_judge(name) for name in judges)
    iqa, training = quality.clip_iqa(eye, images), from_uint8(pictures(ORIGINALS))
    expected = {
        "CLIP-IQA (eye)": iqa.mean(),
        "CLIP-IQA (eye) of training images": quality.clip_iqa(eye, training).mean(),
        "fidelity (ruler)": quality.fidelity(ruler, images, training),
    }
    assert len({round(float(value), 4) for value in expected.values()}) == 3
    assert read(spec, "scores.json") == pytest.approx(expected, abs=1e-5)
    for chunk in (3, len(images)):
        (folder := tmp_path / f"chunk{chunk}").mkdir()
        results.perform.dispatch(Quality)(spec, folder, chunk=chunk)
        assert json.loads((folder / "scores.json").read_text()) == pytest.approx(expected, abs=1e-5)
        kept = np.load(folder / "clip-iqa.npy")
        assert kept.shape == (len(images),)
        np.testing.assert_allclose(kept, iqa, atol=1e-5)
    other = replace(spec, training=(replace(model.training[0], first=1),))
    assert read(other, "scores.json")["fidelity (ruler)"] == pytest.approx(
        quality.fidelity(ruler, images, training[:1]), abs=1e-5
    )


def test_another_judge_or_training_image_is_another_step(place, model, training, judges):
    spec = Quality(place(model, copies()), iqa_judge=judges[0], fidelity_judge=judges[1])
    digests = [results.digest(spec), results.digest(replace(spec, fidelity_judge=judges[0]))]
    digests.append(results.digest(replace(spec, training=(replace(training, first=2),))))
    tiny.save_judge("vit", Path(judges[1]), seed=1)
    digests.append(results.digest(spec))
    assert len(set(digests)) == 4
    with pytest.raises(FileNotFoundError, match="nobody"):
        results.run([replace(spec, iqa_judge="nobody")])
    assert not results.RUNS.exists()


# the whole chain


def chain(model, training: tuple[TrainingItem, ...] = (), caption: str | None = None) -> list[Score]:
    arms = (("direct", 1.0), ("cfg", 3.0), ("finextract", 2.0))
    generates = [Generate(model, arm, w, n_generated=8, steps=2, caption=caption) for arm, w in arms]
    return [Score(Extract(generate, 4), training, strict=0.5, loose=0.4) for generate in generates]


def test_the_whole_chain_twice_gives_identical_rows_and_its_drawing(runs, model, tmp_path, monkeypatch):
    first = results.run(chain(model))
    monkeypatch.setattr(results, "RUNS", tmp_path / "again")
    second = results.run(chain(model)[-1:])
    assert first[-1:].reset_index(drop=True).equals(second)
    assert list(first.arm) == ["direct", "cfg", "finextract"]
    spec = chain(model)[-1]
    shown = method_pictures(spec)
    similarity = shown.pop("similarity")
    names = ("base", "tuned", "generated", "clique", "extracted", "training")
    assert {name: picture.shape for name, picture in shown.items()} == dict.fromkeys(names, (4, 16, 16, 3))
    generated, sets = generated_pictures(spec.extract.generate), read(spec.extract, "extraction.json")
    assert (shown["generated"] == generated[:4]).all()
    centres = [tuple(generated[i].ravel()) for i in sets["centres"]]
    members = {
        tuple(generated[i].ravel()) for i in sets["cliques"][centres.index(tuple(shown["extracted"][0].ravel()))]
    }
    assert {tuple(picture.ravel()) for picture in shown["clique"]} <= members
    assert {tuple(picture.ravel()) for picture in shown["extracted"]} <= set(centres)
    wanted = described(load_images(tuple(scored_images(spec)[0]), 16))
    cosines = (described(shown["extracted"]) @ wanted.T).numpy()
    # within a thousandth, since the training images that are shown went through uint8
    assert similarity == pytest.approx((described(shown["extracted"]) * described(shown["training"])).sum(1), abs=1e-3)
    assert similarity == pytest.approx(cosines.max(axis=1), abs=1e-5)
    assert similarity.tolist() == sorted(similarity, reverse=True)
    assert similarity[0] == pytest.approx(read_matches(spec)["similarity"].max(), abs=1e-6)
    assert not np.array_equal(shown["base"], shown["tuned"])


# somebody else's checkpoint


@pytest.fixture(params=["unet", "lora"])
def theirs(request, tiny_sd, tmp_path) -> Checkpoint:
    """A fine-tuned U-Net in a folder, or a LoRA file, both random and made without any FineTune."""
    pipeline = load_pipeline(str(tiny_sd))
    torch.manual_seed(3)
    if request.param == "unet":
        for parameter in pipeline.unet.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        pipeline.unet.save_pretrained(tmp_path / "foreign/unet")
        return Checkpoint(str(tmp_path / "foreign"), str(tiny_sd), "a dog")
    pipeline.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=LORA_LAYERS["unet"], init_lora_weights=False)
    )
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.save_lora_weights(tmp_path / "foreign", unet_lora_layers=layers)
    return Checkpoint(str(tmp_path / "foreign" / LORA_FILE), str(tiny_sd), "a dog")


def test_a_checkpoint_is_extracted_and_scored_without_any_fine_tuning(runs, theirs, training, monkeypatch):
    original = results.perform.dispatch(FineTune)
    results.perform.register(FineTune, lambda *_: pytest.fail("a fine-tuning was done"))
    try:
        rows = results.run(chain(theirs, (training,)))
    finally:
        results.perform.register(FineTune, original)
    assert {path.parent.parent.name for path in runs.glob("*/*/manifest.json")} == {"generate", "extract", "score"}
    assert rows["AS"].between(0, 1).all()
    assert rows["path"].tolist() == [theirs.path] * 3
    assert (rows["n_scored"] == 4).all()
    images = [generated_pictures(spec.extract.generate) for spec in chain(theirs)]
    assert not np.array_equal(images[0], images[1])
    manifest = json.loads((results.folder(chain(theirs)[0].extract.generate) / "manifest.json").read_text())
    assert manifest["inputs"] == {
        "model.base": results.sha256_of(theirs.base),
        "model.checkpoint": results.sha256_of(theirs.path),
    }
    assert manifest["spec"]["fields"]["model"]["fields"]["path"] == theirs.path
    pair = load_tuned(theirs)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor(500)
    found, base = (pair.predict(name, x, t, pair.condition(name, "a dog")) for name in ("tuned", "base"))
    assert (found - base).abs().max() > 1e-2


def test_a_changed_checkpoint_file_is_another_step_all_the_way(runs, theirs, training):
    spec = chain(theirs, (training,))[0]
    steps = (spec, spec.extract, spec.extract.generate)
    before = [results.digest(step) for step in steps]
    (file,) = [Path(theirs.path)] if Path(theirs.path).is_file() else Path(theirs.path).rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert not {*before} & {results.digest(step) for step in steps}


def test_what_is_known_of_a_model(checkpoint, model, training, runs):
    assert (own_caption(checkpoint), own_training(checkpoint)) == ("a dog", ())
    assert own_caption(replace(checkpoint, caption=None)) is None
    assert (own_caption(model), own_training(model)) == ("a dog", (training,))
    for known in (checkpoint, model):
        further = Extrapolated(known, 2.0)
        assert (own_caption(further), own_training(further)) == (own_caption(known), own_training(known))
        assert further.base == known.base
    with pytest.raises(TypeError, match="'mini-sd' is no FineTune, Checkpoint or Extrapolated"):
        load_tuned("mini-sd")


def test_an_unknown_caption_is_refused_before_any_work_and_an_empty_one_is_none(runs, theirs, training):
    unknown = replace(theirs, caption=None)
    with pytest.raises(ValueError, match=r"no single caption is known of .* give Generate a caption, or caption=''"):
        results.run([*chain(theirs, (training,)), *chain(unknown, (training,))])
    assert not runs.exists()
    rows = results.run(chain(unknown, (training,), caption="")[:1])
    assert rows["AS"].notna().all()


def test_a_missing_checkpoint_is_refused_before_any_work(runs, checkpoint, training):
    missing = replace(checkpoint, path="nowhere")
    with pytest.raises(FileNotFoundError, match="unknown model 'nowhere'"):
        results.run([*chain(checkpoint, (training,)), *chain(missing, (training,))])
    assert not runs.exists()
