"""Items: the shipped sets as they lie on disk, and folders of whatever images a person has."""

import hashlib
import json
import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fx import datasets
from fx.paths import DATASETS

ORIENTATION = 0x0112  # the EXIF tag
# What a viewer does to the stored pixels [h, w, c] for each value of the tag (EXIF 2.3, sec. 4.6.4).
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def entries(dataset: str) -> list[dict]:
    """The index entries of all images of a shipped set."""
    return [
        image for item in datasets.shipped(dataset).values() for role in datasets.ROLES for image in item.get(role, [])
    ]


def saved(folder, name: str, image: Image.Image, **options):
    """`image` written to a file; its path."""
    image.save(path := folder / name, **options)
    return path


# the shipped sets


@pytest.mark.parametrize(
    ("dataset", "reported", "development", "training"),
    [("style", 20, 4, range(10, 11)), ("object", 30, 6, range(4, 7))],
)
def test_shipped_sets_have_the_promised_sizes(dataset, reported, development, training):
    assert len(datasets.names(dataset)) == reported
    assert len(datasets.names(dataset, "development")) == development
    for item in datasets.shipped(dataset).values():
        assert len(item["training"]) in training, item["name"]
        assert len(item["controls"]) <= 10, item["name"]
        assert item["name"]
        assert item["caption"]


@pytest.mark.parametrize("dataset", datasets.SETS)
def test_shipped_images_are_128_px_with_the_listed_bytes_licence_and_title(dataset):
    for entry in entries(dataset):
        path = DATASETS / dataset / entry["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"], path
        with Image.open(path) as image:
            assert image.size == (128, 128), path
        assert all(entry[key].strip() for key in ("licence", "title", "author", "source")), path


@pytest.mark.parametrize("dataset", datasets.SETS)
def test_every_shipped_file_is_listed_once_and_every_listed_file_is_there(dataset):
    listed = Counter(entry["file"] for entry in entries(dataset))
    root = DATASETS / dataset
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert max(listed.values()) == 1
    assert present - {"items.json", "README.md"} == set(listed)


def test_no_shipped_image_occurs_twice():
    pixels = Counter()
    for dataset in datasets.SETS:
        for entry in entries(dataset):
            image = datasets.open_image(DATASETS / dataset / entry["file"])
            pixels[hashlib.sha256(np.asarray(image).tobytes()).hexdigest()] += 1
    assert max(pixels.values()) == 1


@pytest.mark.parametrize("dataset", datasets.SETS)
def test_splits_are_disjoint_and_together_the_set(dataset):
    reported, development = (datasets.names(dataset, split) for split in datasets.SPLITS)
    assert not set(reported) & set(development)
    assert {*reported, *development} == {f"{dataset}/{slug}" for slug in datasets.shipped(dataset)}


@pytest.mark.parametrize("dataset", datasets.SETS)
def test_names_come_in_the_order_of_the_index(dataset):
    index = json.loads((DATASETS / dataset / "items.json").read_text("utf-8"))
    for split in datasets.SPLITS:
        expected = [f"{dataset}/{slug}" for slug, item in index.items() if item["split"] == split]
        assert datasets.names(dataset, split) == expected


def test_names_come_in_a_fixed_order_and_up_to_a_limit():
    assert datasets.names("style", limit=3) == datasets.names("style")[:3]
    assert datasets.names("style", limit=0) == []
    for limit in (-1, 21):
        with pytest.raises(ValueError, match=f"style has 20 reported items: a number from 0 to 20, not {limit}"):
            datasets.names("style", limit=limit)
    assert datasets.names("style") == datasets.names("style", "reported")


def test_a_shipped_item_has_its_images_caption_and_controls():
    entry = datasets.shipped("style")["mimooh"]
    item = datasets.load_item("style/mimooh")
    assert item.caption == entry["caption"]
    assert [path.read_bytes() for path in item.training] == [
        (DATASETS / "style" / image["file"]).read_bytes() for image in entry["training"]
    ]
    assert len(item.controls) == len(entry["controls"]) > 0
    assert item.n_training == len(entry["training"])
    assert datasets.load_item("style/mimooh", "another caption").caption == "another caption"


def test_unknown_set_and_split_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'styles': choose from style, object"):
        datasets.names("styles")
    with pytest.raises(ValueError, match="'test': choose from reported, development"):
        datasets.names("style", "test")


# folders


def test_a_folder_is_an_item_of_its_images_in_order(tmp_path):
    colours = {"b.PNG": "red", "a.jpeg": "lime", "c.webp": "blue"}
    for name, colour in colours.items():
        saved(tmp_path, name, Image.new("RGB", (9, 5), colour))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.jpeg").write_bytes(b"what some systems leave beside a file")
    item = datasets.load_item(str(tmp_path), "a dog")
    assert [path.name for path in item.training] == ["a.jpeg", "b.PNG", "c.webp"]
    assert (item.name, item.caption, item.n_training, item.controls) == (tmp_path.name, "a dog", 3, ())


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_load_upright(tmp_path, orientation, suffix):
    stored = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    path = saved(tmp_path, f"a.{suffix}", Image.fromarray(stored), exif=exif, **options)
    loaded = np.asarray(datasets.open_image(path)).astype(int)
    expected = UPRIGHT[orientation](stored)
    assert loaded.shape == expected.shape
    assert np.abs(loaded - expected).max() <= (12 if suffix == "jpg" else 0)


@given(pixels=hnp.arrays(np.uint8, (2, 3, 4)))
@settings(max_examples=20)
def test_transparent_images_are_laid_on_white(tmp_path_factory, pixels):
    path = saved(tmp_path_factory.mktemp("rgba"), "a.png", Image.fromarray(pixels))
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    expected = alpha * colour + (1 - alpha) * 255
    assert np.abs(np.asarray(datasets.open_image(path)) - expected).max() <= 1


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    image.putpalette([0, 0, 0, 10, 20, 30])
    path = saved(tmp_path, "a.png", image, transparency=0)
    expected = [[[255, 255, 255], [10, 20, 30]], [[10, 20, 30], [255, 255, 255]]]
    assert np.asarray(datasets.open_image(path)).tolist() == expected


def test_grey_images_of_8_and_16_bits_and_with_alpha_keep_their_brightness(tmp_path):
    grey = np.array([[0, 60], [128, 255]], np.uint8)
    wide = grey.astype(np.uint16) * 256 + 7
    with_alpha = Image.merge("LA", (Image.fromarray(grey), Image.new("L", (2, 2), 255)))
    for name, image in {"8": Image.fromarray(grey), "16": Image.fromarray(wide), "alpha": with_alpha}.items():
        loaded = datasets.open_image(saved(tmp_path, f"{name}.png", image))
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), grey[..., None].repeat(3, 2)), name


def test_pixels_that_cannot_be_brought_to_8_bits_are_refused(tmp_path):
    path = saved(tmp_path, "a.tiff", Image.fromarray(np.full((2, 2), 0.5, np.float32)))
    with pytest.raises(ValueError, match="type 'F', not of 8 or 16 bits"):
        datasets.open_image(path)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (16, 16), (640, 480)])
def test_images_of_any_size_become_squares(tmp_path, size):
    path = saved(tmp_path, "a.png", Image.new("RGB", size, (255, 0, 51)))
    batch = datasets.load_images((path, path), 16)
    assert (batch.shape, batch.dtype) == ((2, 3, 16, 16), torch.float32)
    expected = torch.tensor([1.0, -1.0, -0.6])[:, None, None]
    assert torch.allclose(batch, expected.expand(2, 3, 16, 16), atol=1e-6)


@pytest.mark.parametrize("upright", [False, True])
def test_the_square_is_the_middle_of_the_image(tmp_path, upright):
    stripes = np.zeros((30, 90, 3), np.uint8)
    for third in range(3):
        stripes[:, 30 * third : 30 * (third + 1), third] = 255  # red, green, blue
    path = saved(tmp_path, "a.png", Image.fromarray(stripes.swapaxes(0, 1) if upright else stripes))
    difference = (datasets.load_images((path,), 10) - torch.tensor([-1.0, 1.0, -1.0])[:, None, None]).abs()
    assert difference[..., 2:-2, 2:-2].max() < 0.01
    assert difference.max() < 0.2  # resampling looks a little beyond the edge


def test_what_is_made_smaller_is_averaged_and_not_picked_from(tmp_path):
    board = np.repeat((255 * (np.indices((64, 64)).sum(axis=0) % 2))[..., None], 3, axis=2).astype(np.uint8)
    path = saved(tmp_path, "a.png", Image.fromarray(board))
    assert datasets.load_images((path,), 16).abs().max() < 0.05


def test_a_text_file_named_jpg_is_refused_by_name(picture_folder, tmp_path):
    (tmp_path / "a.png").write_bytes((picture_folder / "0.png").read_bytes())
    (tmp_path / "b.jpg").write_text("I am no image")
    with pytest.raises(ValueError, match=r"b\.jpg is not an image that can be read .*: remove or replace it"):
        datasets.load_item(str(tmp_path), "a dog")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_truncated_image_is_refused_by_name(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    whole = saved(tmp_path, f"a.{suffix}", noise).read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix} is not an image that can be read"):
        datasets.load_item(str(tmp_path), "a dog")


def test_an_empty_folder_a_missing_one_and_a_missing_caption_are_refused(tmp_path, picture_folder):
    with pytest.raises(ValueError, match=r"no images in .*it needs files ending in .*\.jpg"):
        datasets.load_item(str(tmp_path), "a dog")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*neither a folder of images nor a shipped item"):
        datasets.load_item(str(tmp_path / "nowhere"), "a dog")
    for name, hint in (
        ("style/zazu", "did you mean style/zazou"),
        ("zazou", "did you mean style/zazou"),
        ("q", "such as style/"),
    ):
        with pytest.raises(FileNotFoundError, match=f"no item '{name}'.*{hint}"):
            datasets.load_item(name)
    with pytest.raises(FileNotFoundError, match=r"0\.png': it is a file; name the folder that holds the images"):
        datasets.load_item(str(next(picture_folder.glob("*0.png"))))
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        datasets.load_item(str(tmp_path), "a dog")
    with pytest.raises(ValueError, match="needs a caption"):
        datasets.load_item(str(picture_folder))
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.png"):
        datasets.open_image(tmp_path / "gone.png")


# nothing is left out silently


@pytest.mark.parametrize("suffix", ["gif", "jfif", "avif", "jpe", "tga", "ppm", "jp2", "ico", "dib"])
def test_every_kind_of_image_that_pillow_opens_is_an_image_of_the_item(tmp_path, suffix):
    saved(tmp_path, "a.jpg", Image.new("RGB", (16, 16), "red"))
    saved(tmp_path, f"b.{suffix.upper()}", Image.new("RGB", (16, 16), "red"))
    assert datasets.load_item(str(tmp_path), "a dog").n_training == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "b.HEIC",
            b"\0\0\0\x18ftypheic",
            r"b\.HEIC is an image of a kind \(\.heic\) that Pillow cannot open here: convert it",
        ),
        ("b.dng", b"II*\0", r"b\.dng is an image of a kind"),
        ("b.svg", b"<svg/>", r"b\.svg is an image of a kind"),
        ("b", None, r"b is an image \(PNG\) by its content, but not by its name: give it the suffix \.png"),
        ("b.jpg_large", None, r"b\.jpg_large is an image \(PNG\) by its content"),
        ("b.wmf", b"\0", r"b\.wmf is not an image that can be read"),
    ],
)
def test_a_picture_that_would_be_left_out_is_refused_by_name(picture_folder, tmp_path, name, content, message):
    picture = (picture_folder / "0.png").read_bytes()
    (tmp_path / "a.png").write_bytes(picture)
    (tmp_path / name).write_bytes(picture if content is None else content)
    with pytest.raises(ValueError, match=message):
        datasets.load_item(str(tmp_path), "a dog")


def test_a_link_whose_target_is_gone_is_refused_and_one_that_leads_to_an_image_is_an_image(picture_folder, tmp_path):
    (tmp_path / "a.png").symlink_to(picture_folder / "0.png")
    (tmp_path / "notes.txt").symlink_to("nowhere.txt")
    assert datasets.load_item(str(tmp_path), "a dog").n_training == 1
    (tmp_path / "b.png").symlink_to("moved-away.png")
    with pytest.raises(ValueError, match=r"b\.png is a link whose target is not there: mend it, or remove it"):
        datasets.load_item(str(tmp_path), "a dog")


def test_what_usually_lies_beside_images_is_no_matter_but_sub_folders_with_images_are_named(picture_folder, tmp_path):
    (tmp_path / "a.png").write_bytes((picture_folder / "0.png").read_bytes())
    for name in ("a.txt", "a.caption", "metadata.json", "Thumbs.db", ".hidden.png", "weights.npz", "data.h5"):
        (tmp_path / name).write_bytes(b"P6 is no picture")
    (tmp_path / "empty").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert datasets.load_item(str(tmp_path), "a dog").n_training == 1
    (tmp_path / "10_dog").mkdir()
    (tmp_path / "10_dog/b.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="10_dog holds images too, which are left out"):
        assert datasets.load_item(str(tmp_path), "a dog").n_training == 1


@pytest.mark.parametrize("suffix", ["gif", "tiff", "webp"])
def test_a_file_with_several_pictures_is_refused(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = saved(tmp_path, f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(
        ValueError, match=rf"a\.{suffix} is not .* \(it holds 3 pictures, and only the first would be seen"
    ):
        datasets.open_image(path)


def test_a_photo_with_a_preview_in_it_is_one_picture(tmp_path):
    photo, preview = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (8, 8), "lime")
    path = saved(tmp_path, "a.jpg", photo, format="MPO", save_all=True, append_images=[preview])
    assert datasets.open_image(path).size == (16, 16)


def test_an_image_of_too_many_pixels_is_refused_by_name(tmp_path, monkeypatch):
    path = saved(tmp_path, "scan.png", Image.new("L", (50, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        ValueError, match=r"scan\.png is not an image that can be read \(Image size \(2500 pixels\) exceeds"
    ):
        datasets.load_item(str(tmp_path), "a dog")
    path.rename(tmp_path / "scan")
    with pytest.raises(ValueError, match=r"scan is an image \(PNG\) by its content"):
        datasets.load_item(str(tmp_path), "a dog")


@pytest.mark.parametrize("raised", [False, True])
def test_an_image_with_broken_exif_data_is_taken_as_stored_with_one_warning_that_names_it(
    tmp_path, monkeypatch, raised
):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8))
    path = saved(tmp_path, "a.png", stored, exif=b"Exif\0\0II*\0\xff\0\0\0")
    if raised:
        monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda _: (_ for _ in ()).throw(SyntaxError("not a TIFF")))
    with pytest.warns(UserWarning, match="EXIF") as said:
        assert np.array_equal(np.asarray(datasets.open_image(path)), np.asarray(stored))
    assert len(said) == 1
    assert "a.png: its EXIF data are broken (" in str(said[0].message)


@pytest.mark.parametrize("error", [TypeError("?"), ZeroDivisionError(), RecursionError(), EOFError()])
def test_whatever_pillow_raises_is_one_message_with_the_file(tmp_path, monkeypatch, error):
    path = saved(tmp_path, "a.png", Image.new("RGB", (2, 2)))
    with monkeypatch.context() as broken:
        broken.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(
            ValueError, match=r"a\.png is not an image that can be read \((\?|[A-Z]\w+)\): remove or replace"
        ):
            datasets.open_image(path)


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/x", "a\0b"])
def test_a_name_that_can_be_no_folder_is_refused(name):
    with pytest.raises(FileNotFoundError, match="no item"):
        datasets.load_item(name, "a dog")


# pixels


@given(pictures=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6).map(lambda s: (*s, 3))))
@settings(max_examples=50)
def test_uint8_pictures_survive_the_round_trip(pictures):
    images = datasets.from_uint8(pictures)
    n, h, w, _ = pictures.shape
    assert (images.shape, images.dtype) == ((n, 3, h, w), torch.float32)
    assert np.allclose(images.numpy(), pictures.transpose(0, 3, 1, 2) / 255.0 * 2 - 1, atol=1e-6)
    again = datasets.to_uint8(images)
    assert again.dtype == np.uint8
    assert np.array_equal(again, pictures)


@given(value=st.floats(-3, 3, width=32))
@settings(max_examples=50)
def test_to_uint8_clips_and_rounds_to_the_nearest(value):
    pixel = int(datasets.to_uint8(torch.full((1, 3, 1, 1), value))[0, 0, 0, 0])
    assert abs(pixel - 255 * (min(max(value, -1), 1) + 1) / 2) <= 0.5 + 1e-4


def test_an_image_is_opened_once_and_again_when_its_file_has_changed(picture_folder, tmp_path, monkeypatch):
    shutil.copytree(picture_folder, folder := tmp_path / "pictures")
    opened, plain = [], datasets.open_image
    monkeypatch.setattr(datasets, "open_image", lambda path: opened.append(path.name) or plain(path))
    n = datasets.load_item(str(folder), "a dog").n_training
    datasets.load_item(str(folder), "a cat")
    assert sorted(opened) == sorted(path.name for path in folder.iterdir())
    assert len(opened) == n
    broken = folder / "0.png"
    broken.write_bytes(bytes(broken.stat().st_size))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0\.png is not an image that can be read"):
            datasets.load_item(str(folder), "a dog")
    broken.unlink()
    datasets.load_item(str(folder), "a dog")
    assert opened[n:] == ["0.png", "0.png"]
