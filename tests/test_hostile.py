"""Hostile input, one list: each case ends in a right result or in one message, reads no pickle, and runs nothing.

What is random about input is in test_fuzz.py; a disk that is full or goes away in test_results.py and kills.py.
"""

import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from fx import reproduce
from fx.datasets import load_item, open_image
from fx.inspect import as_json, as_text, inspect
from fx.models import load_pair, load_pipeline

SCRIPT = "<script>alert(1)</script>"
ESCAPE = "\x1b[2J\x1b]0;title\x07"  # clears a terminal and renames it


class Trap:
    """A pickle of this object makes a file named `sprung` where it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def picture(path: Path, side: int = 8) -> Path:
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(path, "PNG")
    return path


# images in a folder: (make it, the images that are found, or what is said)


def many(folder: Path) -> None:
    content = picture(folder / "0000.png").read_bytes()
    for number in range(1, 1000):
        (folder / f"{number:04d}.png").write_bytes(content)


def header_of_a_bomb(folder: Path) -> None:
    """A PNG of a hundred bytes that says it has 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    (folder / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )


def pipe(folder: Path) -> None:
    picture(folder / "b.png")
    os.mkfifo(folder / "a.png")


def not_utf8(folder: Path) -> None:
    name = os.fsdecode(os.fsencode(str(folder)) + b"/caf\xe9.png")
    try:
        picture(Path(name))
    except (OSError, UnicodeError):
        pytest.skip("this file system has no names that are not UTF-8")


FOLDERS: dict[str, tuple[Callable[[Path], object], int | str]] = {
    "a thousand files": (many, 1000),
    "a link to itself": (
        lambda f: picture(f / "b.png") and (f / "a.png").symlink_to("a.png"),
        "a.png is a link whose target",
    ),
    "a folder that holds itself": (lambda f: picture(f / "b.png") and (f / "again").symlink_to(f), 1),
    "a folder named as an image": (lambda f: picture(f / "b.png") and (f / "a.png").mkdir(), 1),
    "a pipe named as an image": (pipe, 1),
    "an empty file": (lambda f: (f / "a.png").write_bytes(b""), "a.png is not an image that can be read"),
    "an animation": (
        lambda f: Image.new("RGB", (8, 8)).save(
            f / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
        ),
        "a.gif is not an image that can be read .it holds 2 pictures",
    ),
    "a header that lies about its size": (header_of_a_bomb, "a.png is not an image that can be read"),
    "20,000 pixels wide": (lambda f: Image.new("1", (20_000, 400)).save(f / "a.png"), 1),
    "a name that is not UTF-8": (not_utf8, 1),
    "a name that is a script": (lambda f: picture(f / f"{SCRIPT.replace('/', '-')}.png"), 1),
    "a name of two lines": (lambda f: picture(f / "a\nb.png"), 1),
    "an SVG": (
        lambda f: (f / "a.svg").write_text(f"<svg>{SCRIPT}</svg>"),
        "a.svg is an image of a kind .* cannot open here",
    ),
    "a pickle named as an image": (lambda f: (f / "a.png").write_bytes(pickle.dumps(Trap())), "a.png is not an image"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_images(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "images").mkdir()
    make, expected = FOLDERS[case]
    make(folder)
    if isinstance(expected, int):
        item = load_item(str(folder), "a dog")
        assert item.n_training == expected
        assert {open_image(path).mode for path in item.training} == {"RGB"}
    else:
        with pytest.raises(ValueError, match=expected) as told:
            load_item(str(folder), "a dog")
        assert "\n" not in str(told.value)
    assert not (tmp_path / "sprung").exists()


# weights: (the file's content, what an inspection says of it, None where it is sound)


def header(entries: dict, length: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, *offsets: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


A, B = "lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"
WEIGHTS = {
    "a header longer than the file": header({}, length=2**63 - 1),
    "a header of no length": header({}, length=0),
    "offsets beyond the end": header({A: entry([2, 2], 0, 16)}, data=bytes(8)),
    "offsets that overlap": header({A: entry([2], 0, 8), B: entry([2], 4, 12)}, data=bytes(12)),
    "offsets backwards": header({A: entry([2], 8, 0)}, data=bytes(8)),
    "a negative size": header({A: entry([-2], 0, 8)}, data=bytes(8)),
    "more numbers than there are": header({A: entry([2**40, 2**40], 0, 8)}, data=bytes(8)),
    "a type nobody knows": header({A: entry([2], 0, 8, dtype="F3")}, data=bytes(8)),
    "a hole": header({A: entry([1], 4, 8)}, data=bytes(8)),
    "nested without end": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a header that is a list": header([1, 2]),  # type: ignore[arg-type]
    "not UTF-8": struct.pack("<Q", 6) + b'{"\xff":' + b"1}",
    "a pickle": pickle.dumps(Trap()),
    "a zip of a pickle": b"",  # written below
    "an empty file": b"",
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (file := tmp_path / "theirs.safetensors").write_bytes(WEIGHTS[case])
    if case == "a zip of a pickle":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    found = inspect(str(file))
    assert found.troubles
    assert all("\n" not in trouble for trouble in found.troubles)
    json.loads(as_json(found))
    with pytest.raises(ValueError, match=r"theirs\.safetensors") as told:
        load_pair(str(tiny_sd), file)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "sprung").exists()


METADATA = {
    "a script": {"ss_tag_frequency": json.dumps({SCRIPT: {SCRIPT: 3}}), "ss_sd_model_name": SCRIPT},
    "letters that steer a terminal": {"modelspec.title": ESCAPE, "ss_tag_frequency": json.dumps({ESCAPE: {ESCAPE: 1}})},
    "a folder of another machine": {"ss_dataset_dirs": json.dumps({"../../../etc": {"n_repeats": 1, "img_count": 3}})},
    "numbers that are none": {"ss_network_dim": "NaN", "ss_num_train_images": "-1e999", "ss_dataset_dirs": "[NaN]"},
    "nested without end": {"ss_tag_frequency": "[" * 100_000},
    "a million tags": {"ss_tag_frequency": json.dumps({"f": dict.fromkeys(map(str, range(10**5)), 1)})},
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata(case, tmp_path):
    tensors = {A: np.zeros((1, 2), np.float32), B: np.zeros((2, 1), np.float32)}
    (file := tmp_path / "theirs.safetensors").write_bytes(save(tensors, METADATA[case]))
    found = inspect(str(file))
    text = as_text(found)
    assert not set(text) & set(map(chr, (*range(10), *range(11, 32), 127))), "control characters"
    assert len(text) < 20_000
    json.loads(as_json(found))


# parameters, work areas and names of models: (what is done, what is said)


def laughs(depth: int = 9) -> str:
    """YAML that is small and would be 10^depth words."""
    lines = ["[a0: &a0 [ha]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    return ", ".join(lines) + "]"


PARAMETERS = {
    "python": ("artists=!!python/object/apply:os.system ['touch sprung']", "is not YAML"),
    "a name of python": ("artists=!!python/name:os.system", "is not YAML"),
    "one that grows without end": (f"artists={laughs()}", "is no number, no text"),
    "a number that is none": ("artists=.nan", "takes int values|plain decimal"),
    "a date": ("artists=2026-13-01", "is not YAML"),
    "nested without end": (f"artists={'[' * 5000}", "is not YAML"),
    "two names": ("artists=objects=3", "takes int values"),
    "of another notebook": ("mixtures=3", "03-extraction.ipynb has no parameter mixtures"),
    "code": ("artists=__import__('os').system('touch sprung')", "takes int values"),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, expected = PARAMETERS[case]
    with pytest.raises((ValueError, SystemExit)) as told:
        reproduce.main(["03", "-p", text, "--dry-run"])
    said = f"{told.value} {capsys.readouterr().err}"
    assert len(said) < 5000
    assert re.search(expected, said), said
    assert not (tmp_path / "sprung").exists()


NAMES = {
    "up and away": "../../../../etc/passwd",
    "a name of nothing": "",
    "a zero byte": "mini-sd\0.safetensors",
    "of another user": "~nobody-of-this-name/model",
    "an address": "https://example.org/model.safetensors",
    "longer than a file system takes": "a" * 1000,
    "a device": "/dev/zero",
    "a revision that climbs": "somebody/model@../../..",
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_models(case, tiny_sd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (lambda name: load_pair(str(tiny_sd), name), load_pipeline):
        with pytest.raises((ValueError, FileNotFoundError)) as told:
            load(NAMES[case])
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 4000
