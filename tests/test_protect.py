"""fx.protect: a folder of images in, a folder of changed images out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from fx import protect
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
    (tmp_path / "out/.z.png.part").write_bytes(b"half")  # as a kill while writing would leave
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
