"""fx.demo: its command line, the three extractions it asks for, and what it prints and draws of them."""

import json
import re
import runpy
import sys
from dataclasses import replace

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from fx import datasets, demo, evaluation, results, settings
from fx.evaluation import Score
from fx.extraction import Extract
from fx.finetune import TrainingItem
from fx.paths import ROOT, TABLES
from fx.sampling import Generate, picture_file, save_picture


@pytest.fixture(autouse=True)
def _thresholds(monkeypatch):
    """Thresholds of the descriptor as constants, so that no model is needed."""
    monkeypatch.setattr(evaluation, "copy_thresholds", lambda name: {"mini-sscd": (0.4, 0.55)}[name])
    yield
    plt.close("all")


def test_arguments_have_defaults_that_need_no_typing():
    options = vars(demo.arguments([]))
    assert options == {
        "items": list(demo.TYPICAL),
        "caption": None,
        "method": "dreambooth",
        "images": 10,
        "change": "",
        "seed": 0,
        "write_figure": False,
    }


def test_the_items_of_the_demo_are_typical_and_have_controls():
    """Their gain over CFG is the (lower) median of Table 1's items that have controls, artists and objects."""
    rows = pd.read_csv(TABLES / "mini/table01-items.csv").query("method == 'dreambooth'")
    for item, dataset in zip(demo.TYPICAL, ("style", "object"), strict=True):
        wide = rows[(rows.dataset == dataset) & rows.AS_controls.notna()].pivot(
            index="item", columns="arm", values="AS"
        )
        gains = (wide.finextract - wide.cfg).sort_values()
        assert item == gains.index[(len(gains) - 1) // 2]


def test_arguments_are_read():
    words = ["~/photos/dog", "--caption", "a dog", "--method", "lora", "--images", "5", "--seed", "3"]
    words += ["--change", "rank=3"]
    expected = {"items": ["~/photos/dog"], "caption": "a dog", "method": "lora", "images": 5, "seed": 3}
    expected |= {"write_figure": False, "change": "rank=3"}
    assert vars(demo.arguments(words)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sampling_steps=3 images_per_training=5", "cannot set images_per_training: use --images and --seed"),
        ("lora.seed=5", "cannot set seed: use"),
        ("sampling_steps='3", "No closing quotation"),
    ],
)
def test_what_a_change_could_not_change_is_refused(change, message, capsys):
    with pytest.raises(SystemExit):
        demo.arguments(["--change", change])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--method", "magic"], ["--images", "many"], ["--unheard-of"]])
def test_arguments_refuse_what_they_do_not_know(words, capsys):
    with pytest.raises(SystemExit) as error:
        demo.arguments(words)
    assert error.value.code == 2
    assert words[-1] in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dreambooth", "lora"])
def test_specs_are_three_arms_of_one_fine_tune_with_the_chosen_settings(method):
    words = ["object/rooster", "--method", method, "--images", "7", "--seed", "2", "--caption", "a bird"]
    (asked,) = demo.specs(demo.arguments([*words, "--change", "sampling_steps=3 batch_size=9"]))
    chosen = settings.load()[method]
    assert all(isinstance(spec, Score) and isinstance(spec.extract, Extract) for spec in asked)
    generates = [spec.extract.generate for spec in asked]
    assert [generate.arm for generate in generates] == ["direct", "cfg", "finextract"]
    assert [generate.guidance_scale for generate in generates] == [1.0, chosen.cfg_scale, chosen.finextract_scale]
    assert [generate.correction_scale for generate in generates] == [0.0, 0.0, chosen.correction_scale]
    n_training = datasets.load_item("object/rooster").n_training
    assert {spec.extract.n_training for spec in asked} == {n_training}
    assert {(g.n_generated, g.seed, g.steps, g.caption) for g in generates} == {(7 * n_training, 2, 3, None)}
    (tune,) = {generate.model for generate in generates}
    assert tune.training == (TrainingItem("object/rooster", "a bird"),)
    assert (tune.method, tune.seed, tune.batch_size) == (method, 2, 9)
    for name in ("base", "learning_rate", "steps_per_image", "rank", "alpha"):
        assert getattr(tune, name) == getattr(chosen, name)


def test_the_demo_as_it_comes_is_the_extraction_with_the_settings_as_they_stand():
    chosen = settings.load()["dreambooth"]
    assert demo.specs(demo.arguments([])) == [chosen.three_arms(chosen.fine_tune(item)) for item in demo.TYPICAL]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images 0", "--images 0 must be"),
        ("--seed -1", "--seed -1 at least 0"),
        ("one two --caption x", "--caption is for one item, not for 2"),
    ],
)
def test_arguments_refuse_impossible_numbers(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        demo.arguments(words.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Finished steps for a folder of three pictures: per arm 8 plain images of known levels and which of them match."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, level in enumerate((10, 20, 30)):
        Image.new("RGB", (12, 12), (level,) * 3).save(photos / f"{number}.png")
    first = {"direct": 100, "cfg": 120, "finextract": 140}
    matches = {"direct": [0, 1, 2], "cfg": [7, 7, 3], "finextract": [5, 0, 6]}

    def folder(spec):
        generate = spec if isinstance(spec, Generate) else spec.extract.generate
        return tmp_path / type(spec).__name__ / generate.arm

    def run(asked, description):
        for spec in asked:
            arm = spec.extract.generate.arm
            for step in (spec, spec.extract.generate):
                folder(step).mkdir(parents=True)
            for number in range(8):
                pixels = np.full((6, 6, 3), first[arm] + number, np.uint8)
                save_picture(picture_file(folder(spec.extract.generate), number), pixels)
            (folder(spec) / "matches.json").write_text(
                json.dumps({"match": matches[arm], "similarity": [0.3, 0.45, 0.6]})
            )
        scores = {
            "AS": 0.4321,
            "AS_controls": None,
            "A-ESR_strict": 0.1,
            "A-ESR_loose": 0.5,
            "n_extracted": 3,
            "n_generated": 8,
        }
        return pd.DataFrame([{"arm": spec.extract.generate.arm, "phi": 0.9, **scores} for spec in asked])

    def choose(chosen, model, n_training, n_generated):
        assert (n_training, n_generated) == (3, 30)
        return replace(chosen, finextract_scale=2.5), pd.DataFrame({"w": [1.0, 2.5], "log_ratio": [0.1, 0.2]})

    monkeypatch.setattr(demo, "choose_scale", choose)
    monkeypatch.setattr(results, "run", run)
    monkeypatch.setattr(results, "folder", folder)
    monkeypatch.setattr(results, "complete", folder)
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(demo, "FIGURES", tmp_path / "figures")
    return photos, {arm: [first[arm] + index for index in chosen] for arm, chosen in matches.items()}


def levels(axes) -> list[int]:
    """The grey levels of a row of plain pictures."""
    (image,) = axes.images
    row = np.asarray(image.get_array())[3]
    return [int(row[start + 3, 0]) for start in range(0, len(row), 8)]


def test_picture_shows_below_each_training_image_what_every_arm_extracted_for_it(finished):
    photos, expected = finished
    (asked,) = demo.specs(demo.arguments([str(photos), "--caption", "a dog"]))
    results.run(asked, "demo")
    figure = demo.comparison(asked)
    assert [axes.get_ylabel() for axes in figure.axes] == ["training", "direct", "CFG", "FineXtract"]
    assert [levels(axes) for axes in figure.axes] == [[10, 20, 30], *expected.values()]
    notes = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert notes == [[], *3 * [["0.30", "0.45*", "0.60**"]]], "thresholds .4 and .55"
    assert figure.get_suptitle().startswith(str(photos))


def test_main_prints_the_scores_of_each_arm_and_saves_the_picture(finished, tmp_path, capsys):
    photos, _ = finished
    demo.main([str(photos), "--caption", "a dog"])
    printed = capsys.readouterr().out
    assert results.environment_summary() in printed
    assert "3 training images, caption 'a dog', dreambooth" in printed
    assert "strict 0.550, loose 0.400" in printed
    table = [line.split() for line in printed.splitlines() if line.split()[:1] == ["photos"]]
    assert table == [
        ["photos", arm, "0.432", "-", "0.100", "0.500", "3", "8"] for arm in ("direct", "cfg", "finextract")
    ]
    (path,) = (tmp_path / "runs/demo").iterdir()
    assert str(path) in printed
    assert re.fullmatch(r"photos-dreambooth-N10-seed0-[0-9a-f]{8}\.png", path.name)
    with Image.open(path) as image:
        assert image.format == "PNG"


def test_the_scale_of_a_folder_is_chosen_and_said_unless_it_is_named(finished, capsys):
    photos, _ = finished
    words = [str(photos), "--caption", "a dog"]
    (asked,) = demo.specs(demo.arguments(words))
    assert [spec.extract.generate.guidance_scale for spec in asked] == [
        1.0,
        settings.load()["dreambooth"].cfg_scale,
        2.5,
    ]
    assert "w' = 2.5 is chosen without the training images" in capsys.readouterr().out
    for change in ("finextract_scale=4", "dreambooth.finextract_scale=4"):
        (asked,) = demo.specs(demo.arguments([*words, "--change", change]))
        assert asked[-1].extract.generate.guidance_scale == 4
    demo.specs(demo.arguments([*words, "--images", "1"]))
    assert "without" not in capsys.readouterr().out, "three images are too few for signs"


def test_the_picture_goes_into_the_work_area_unless_the_figure_is_asked_for(finished, tmp_path, capsys):
    demos = [[], ["--method", "lora"], ["--seed", "1"], ["--images", "5"], ["object/rooster"]]
    demos += [["object/rooster", "--caption", "a bird"], ["object/rooster", "--change", "sampling_steps=3"]]
    asked = [demo.arguments(words) for words in demos]
    paths = {demo.picture_path(options, item) for options in asked for item in options.items}
    assert len(paths) == 4 * 2 + 3
    assert {path.parent for path in paths} == {tmp_path / "runs/demo"}
    for item in demo.TYPICAL:
        figure = demo.picture_path(demo.arguments(["--write-figure"]), item)
        assert figure == tmp_path / f"figures/demo-{item.replace('/', '-')}-mini.png"
        assert (ROOT / "figures" / figure.name).is_file()
    for words in demos[1:]:
        with pytest.raises(SystemExit):
            demo.arguments([*words, "--write-figure"])
        assert "--write-figure is for the demo as it comes" in capsys.readouterr().err


def test_main_refuses_a_folder_without_caption_before_any_work(finished, tmp_path):
    photos, _ = finished
    with pytest.raises(ValueError, match="needs a caption"):
        demo.main([str(photos)])
    assert not (tmp_path / "Score").exists()


@pytest.mark.parametrize(
    ("change", "message"), [("steps=3", "unknown setting 'steps'"), ("sampling_steps=many", "takes int values")]
)
def test_main_refuses_a_wrong_change_before_any_work(finished, tmp_path, change, message):
    photos, _ = finished
    with pytest.raises(ValueError, match=message):
        demo.main([str(photos), "--caption", "a dog", "--change", change])
    assert not (tmp_path / "Score").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_command_ends_with_one_clear_line_for_an_unknown_item(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fx.demo", "nonsense"])
    with pytest.raises(SystemExit) as error:
        runpy.run_module("fx.demo", run_name="__main__")
    assert error.value.code.startswith("fx.demo: no item 'nonsense'")
    assert "\n" not in error.value.code
