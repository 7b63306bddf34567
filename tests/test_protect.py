"""fx.protect: a folder of images in, a folder of changed images out."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image, ImageCms

from fx import protect
from fx.defenses import perturb
from fx.models import load_pipeline
from fx.protect import Settings, working_size


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny.save("sd1", tmp_path_factory.mktemp("base")))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images of different sizes and kinds, and a text."""
    draw, where = np.random.default_rng(0), tmp_path / "drawings"
    where.mkdir()
    for name, size in {"a dog.png": (16, 16), "Häuser.jpg": (40, 30), "z.webp": (20, 33)}.items():
        pixels = draw.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(where / name)
    (where / "notes.txt").write_text("about them")
    return where


def settings(base: str, **changes) -> Settings:
    plain = {"base": base, "method": "advdm", "eps": 6, "steps": 3, "step_size": 4.0, "caption": "a dog", "seed": 0}
    return Settings(**plain | changes)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_images_keep_their_names_and_sizes_and_stay_within_the_budget(base, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = protect.run(folder, tmp_path / "out", settings(base))
    assert sorted(path.name for path in written) == ["Häuser.png", "a dog.png", "z.png"]
    for name in ("a dog.png", "Häuser.jpg", "z.webp"):
        old, new = pixels(folder / name), pixels(tmp_path / "out" / f"{Path(name).stem}.png")
        assert new.shape == old.shape, "height and width"
        assert 0 < np.abs(new - old).max() <= 6
        assert (new != old).mean() > 0.3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_change_is_that_of_the_perturbation_enlarged_with_the_image(base, tmp_path):
    """At the size the model works at it is `perturb`'s own; of a larger image, shrunk again, much the same."""
    pipeline, rng = load_pipeline(base), np.random.default_rng(1)
    pixels = rng.integers(40, 216, (16, 16, 3)).astype(np.uint8)
    own = settings(base)
    options = {"method": own.method, "eps": own.eps, "steps": own.steps, "step_size": own.step_size}
    wanted = perturb(pipeline, pixels[None], **options, caption=own.caption, seed=own.seed, numbers=[5])[0]
    found = np.asarray(protect.protected(pipeline, Image.fromarray(pixels), own, 5))
    assert (found == wanted).all()
    large = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    small = np.asarray(large.resize((16, 16), Image.Resampling.LANCZOS))
    wanted = perturb(pipeline, small[None], **options, caption=own.caption, seed=own.seed, numbers=[5])[0]
    change = np.asarray(protect.protected(pipeline, large, own, 5)).astype(float) - np.asarray(large)
    shrunk = change.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.corrcoef(shrunk.ravel(), (wanted.astype(float) - small).ravel())[0, 1] > 0.7


def test_colours_keep_their_meaning_and_names_need_not_be_utf8(base, tmp_path):
    (folder := tmp_path / "in").mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (16, 16), "orange").save(folder / name, icc_profile=profile)
    Image.new("RGB", (16, 16), "teal").save(folder / f"{'n' * 240}.png")  # as long as a name may nearly be
    written = protect.run(folder, tmp_path / "out", settings(base))
    assert sorted(path.name for path in written) == sorted([name, f"{'n' * 240}.png"])
    with Image.open(tmp_path / "out" / name) as image:
        assert image.info["icc_profile"] == profile
    assert protect.run(folder, tmp_path / "out", settings(base)) == written


@pytest.mark.parametrize(
    ("change", "message"), [({"seed": -1}, "seed -1"), ({"caption": "dog " * 100}, "tokens"), ({"eps": 0}, "eps 0")]
)
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(base, folder, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(protect, "load_pipeline", lambda name: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        protect.run(folder, tmp_path / "out", settings(base, **change))


def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_the_same(base, folder, tmp_path, monkeypatch):
    whole = {path.name: path.read_bytes() for path in protect.run(folder, tmp_path / "whole", settings(base))}
    calls, perturb = [], protect.perturb

    def third_time_unlucky(*values, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return perturb(*values, **named)

    monkeypatch.setattr(protect, "perturb", third_time_unlucky)
    with pytest.raises(KeyboardInterrupt):
        protect.run(folder, tmp_path / "out", settings(base))
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    (tmp_path / "out/.next.part").write_bytes(b"half")  # as a kill while writing would leave
    found = {path.name: path.read_bytes() for path in protect.run(folder, tmp_path / "out", settings(base))}
    assert len(calls) == 4, "only the one that was missing"
    assert found == whole
    protect.run(folder, tmp_path / "out", settings(base))
    assert len(calls) == 4, "nothing is left to do"


def test_a_changed_or_added_original_is_done_again_and_the_others_stay(base, folder, tmp_path):
    out = tmp_path / "out"
    protect.run(folder, out, settings(base))
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    Image.new("RGB", (16, 16), "red").save(folder / "a dog.png")
    Image.new("RGB", (16, 16), "blue").save(folder / "new.png")
    protect.run(folder, out, settings(base))
    changed = {path.name for path in out.glob("*.png") if kept.get(path.name) != path.stat().st_mtime_ns}
    assert changed == {"a dog.png", "new.png"}


def test_nothing_is_overwritten(base, folder, tmp_path):
    (out := tmp_path / "out").mkdir()
    (out / "mine.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds mine\.png, which is not overwritten"):
        protect.run(folder, out, settings(base))
    assert [path.name for path in out.iterdir()] == ["mine.png"]
    protect.run(folder, other := tmp_path / "other", settings(base))
    (other / ".DS_Store").write_bytes(b"a file manager's")
    protect.run(folder, other, settings(base))
    for content in ("{}", "[]", "no JSON", '{"settings": {}}'):
        (strange := tmp_path / "strange").mkdir(exist_ok=True)
        (strange / protect.RECORD).write_text(content)
        with pytest.raises(ValueError, match=r"is not what fx\.protect wrote: name another folder"):
            protect.run(folder, strange, settings(base))
    with pytest.raises(ValueError, match=r"were changed with .*'eps': 6.*: name another folder"):
        protect.run(folder, other, settings(base, eps=7))
    with pytest.raises(ValueError, match="is the folder of the originals"):
        protect.run(folder, folder / "../drawings", settings(base))
    with pytest.raises(ValueError, match="is a file: name a folder"):
        protect.run(folder, out / "mine.png", settings(base))


def test_what_could_go_wrong_later_is_refused_before_the_model_is_loaded(base, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(protect, "load_pipeline", lambda name: pytest.fail("the model was loaded"))
    out = tmp_path / "out"
    shutil.copy(folder / "a dog.png", folder / "z.png")
    with pytest.raises(ValueError, match=r"z\.png and z\.webp would both become z\.png"):
        protect.run(folder, out, settings(base))
    (folder / "z.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"z\.png is not an image that can be read"):
        protect.run(folder, out, settings(base))
    with pytest.raises(FileNotFoundError, match="neither a folder of images nor a shipped item"):
        protect.run(tmp_path / "nowhere", out, settings(base))
    (folder / "z.png").unlink()
    for wrong, message in (({"eps": 0}, "eps 0 must be"), ({"method": "magic"}, "unknown perturbation")):
        with pytest.raises(ValueError, match=message):
            protect.run(folder, out, settings(base, **wrong))
    assert not out.exists()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (64, 64)),
        ((128, 128), (64, 64)),
        ((1000, 500), (128, 64)),
        ((500, 1100), (64, 144)),
        ((70, 64), (64, 64)),
    ],
)
def test_the_working_size_has_the_models_shorter_side_and_nearly_the_images_shape(size, expected):
    assert working_size(size, 64, 16) == expected


def test_the_command_says_what_it_did_and_what_that_does_not_protect_from(base, folder, tmp_path, capsys):
    words = [
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--base",
        base,
        "--steps",
        "2",
        "--eps",
        "5",
        "--method",
        "mist",
    ]
    protect.main(words)
    said = capsys.readouterr().out
    assert "3 images in" in said
    assert "within 5 of 255" in said
    assert protect.LIMITS in said
    known = json.loads((tmp_path / "out" / protect.RECORD).read_text("utf-8"))
    assert known["settings"]["method"] == "mist"
    assert set(known["images"]) == {"a dog.png", "Häuser.png", "z.png"}
    with pytest.raises(SystemExit) as ended:
        protect.main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(protect.LIMITS.split()) in shown
    assert all(name in shown for name in ("advdm", "mist", "photoguard"))
