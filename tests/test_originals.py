"""The paper's own images: read from folders in their homes' layouts, into items like the shipped ones."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fx import datasets, originals, settings


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Both folders are looked for below tmp_path."""
    monkeypatch.setattr(originals, "EXTERNAL", tmp_path)
    originals._read.cache_clear()
    yield
    originals._read.cache_clear()


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), number % 256, np.uint8)).save(path)


def gallery(folder: Path, works: dict[str, int]) -> None:
    """works: "Style/artist" -> how many paintings."""
    for number, (where, count) in enumerate(works.items()):
        style, artist = where.split("/")
        for i in range(count):
            paint(folder / style / f"{artist}_work-{i}.jpg", 10 * number + i)


def photographs(folder: Path, classes: dict[str, str], count: int = 4) -> None:
    for number, subject in enumerate(classes):
        for i in range(count):
            paint(folder / subject / f"{i:02d}.jpg", 10 * number + i)
    lines = [
        "Classes",
        "",
        "subject_name,class",
        *(f"{s},{c}" for s, c in classes.items()),
        "",
        "Prompts",
        "",
        "prompt_list = [",
    ]
    (folder / "prompts_and_classes.txt").write_text("\n".join(lines))


def test_artists_need_ten_works_in_one_style_and_are_taken_with_the_style_of_most(tmp_path):
    gallery(tmp_path / "wikiart", {"Fauvism/henri-matisse": 12, "Realism/henri-matisse": 11, "Cubism/juan-gris": 9})
    assert datasets.names("wikiart") == ["wikiart/Fauvism_henri-matisse"]
    item = datasets.load_item("wikiart/Fauvism_henri-matisse")
    assert item.caption == "art style of Fauvism henri matisse"
    assert (len(item.training), len(item.controls), len(item.more)) == (10, 2, 0)
    assert {path.parent.name for path in item.training} == {"Fauvism"}
    assert datasets.load_item("wikiart/Fauvism_henri-matisse", "a painting").caption == "a painting"


def test_training_images_controls_and_more_are_different_works_in_an_order_of_their_own(tmp_path):
    gallery(tmp_path / "wikiart", {"Post_Impressionism/vincent-van-gogh": 70})
    item = datasets.load_item("wikiart/Post_Impressionism_vincent-van-gogh")
    assert item.caption == "art style of Post Impressionism vincent van gogh"
    parts = [item.training, item.controls, item.more]
    assert [len(part) for part in parts] == [10, 10, 40]
    works = [path for part in parts for path in part]
    assert len(set(works)) == 60
    assert works != sorted(works)
    assert works == sorted(works, key=lambda path: originals.by_hash(path.name))


def test_the_artists_of_table_5_come_first_and_the_others_in_a_fixed_order(tmp_path):
    works = {f"Realism/artist-{i:02d}": 10 for i in range(23)}
    gallery(tmp_path / "wikiart", works | {"Impressionism/claude-monet": 10, "Fauvism/henri-matisse": 10})
    reported, development = datasets.names("wikiart"), datasets.names("wikiart", "development")
    assert reported[:2] == ["wikiart/Fauvism_henri-matisse", "wikiart/Impressionism_claude-monet"]
    assert (len(reported), len(development)) == (20, 4)
    others = [name.partition("/")[2] for name in (*reported[2:], *development)]
    everybody = sorted((where.replace("/", "_") for where in works), key=originals.by_hash)
    assert others == everybody[:22]
    assert others != sorted(others)


def test_a_folder_per_style_and_artist_is_read_too(tmp_path):
    for i in range(10):
        paint(tmp_path / "wikiart/Impressionism_claude-monet" / f"claude-monet_{i}.jpg", i)
    assert datasets.names("wikiart") == ["wikiart/Impressionism_claude-monet"]
    assert datasets.load_item("wikiart/Impressionism_claude-monet").caption == "art style of Impressionism claude monet"


def test_files_that_are_no_works_are_counted_in_a_warning(tmp_path):
    gallery(tmp_path / "wikiart", {"Fauvism/henri-matisse": 10})
    for name in ("readme.txt", "untitled.jpg"):
        (tmp_path / "wikiart/Fauvism" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="2 files in .*wikiart are no images called <artist>_<title>"):
        datasets.names("wikiart")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datasets.names("wikiart")


def test_subjects_have_their_class_as_caption_and_others_of_it_as_controls(tmp_path):
    photographs(
        tmp_path / "dreambooth", {"dog": "dog", "can": "can", "dog2": "dog", "clock": "alarm clock", "dog3": "dog"}
    )
    assert datasets.names("dreambooth") == [f"dreambooth/{s}" for s in ("dog", "can", "dog2", "clock", "dog3")]
    assert datasets.names("dreambooth", "development") == []
    item = datasets.load_item("dreambooth/dog")
    assert (item.caption, item.n_training, item.more) == ("a dog", 4, ())
    assert [path.parent.name for path in item.controls] == ["dog2"] * 4 + ["dog3"] * 4
    assert datasets.load_item("dreambooth/can").controls == ()
    assert datasets.load_item("dreambooth/clock").caption == "an alarm clock"


def test_a_subject_that_is_listed_without_images_is_none(tmp_path):
    photographs(tmp_path / "dreambooth", {"dog": "dog"})
    listed = tmp_path / "dreambooth/prompts_and_classes.txt"
    listed.write_text(listed.read_text().replace("dog,dog", "dog,dog\nvase,vase\ncat,cat"))
    (tmp_path / "dreambooth/cat").mkdir()
    assert datasets.names("dreambooth") == ["dreambooth/dog"]


@pytest.mark.parametrize(("name", "size"), [("wikiart", "25.4 GB"), ("dreambooth", "about 160")])
def test_where_the_images_are_not_here_it_says_what_where_and_how_much(name, size, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=rf"'{name}' are not here: .*{size}.*Put them, or a link to them, into {tmp_path / name}, as <",
    ):
        datasets.names(name)
    (tmp_path / name).mkdir()
    (tmp_path / name / "prompts_and_classes.txt").write_text("subject_name,class\n")
    with pytest.raises(ValueError, match=f"holds no item of '{name}'"):
        datasets.names(name)


def test_photographs_without_their_list_are_refused(tmp_path):
    paint(tmp_path / "dreambooth/dog/00.jpg", 0)
    with pytest.raises(ValueError, match=r"holds no prompts_and_classes\.txt"):
        datasets.names("dreambooth")


def test_an_unknown_item_of_them_is_no_folder_either(tmp_path):
    photographs(tmp_path / "dreambooth", {"dog": "dog"})
    with pytest.raises(FileNotFoundError, match="no item 'dreambooth/dogs'"):
        datasets.load_item("dreambooth/dogs")


def test_what_stands_for_artists_and_objects():
    kinds = {name: datasets.kind(name) for name in ("style/mimooh", "object", "wikiart/a", "dreambooth/dog", "my/cat")}
    assert list(kinds.values()) == ["style", "object", "style", "object", "my"]
    assert settings.sets("mini-sd") == {"style": "style", "object": "object"}
    with pytest.raises(ValueError, match="no settings 'mini'"):
        settings.sets("mini")
