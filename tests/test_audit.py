"""The audit: what it reads, what it weighs, and that its sentence and page never say more than that."""

import base64
import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import tiny
from browser import browse, complaints, needs_browser, overhang, printed_pages, requests_of_the_page
from PIL import Image

from fx import audit, results, settings, verdict
from fx.audit import Audit, Findings, evidence, investigate, sentence, usable, write_report
from fx.caption_search import search, twice
from fx.captions import change_of, rank
from fx.finetune import FineTune, TrainingItem
from fx.label_free import SCALES
from fx.leads import Leads, Lookup
from fx.paths import ROOT
from fx.publishing import Published, published
from fx.tuned import load_tuned


@pytest.fixture
def folders(tmp_path, picture_folder) -> tuple[str, str]:
    """Suspects, four of which are trained on, and controls."""
    suspects, controls = tmp_path / "suspects", tmp_path / "Größe & <b>"
    for place, seed, count in ((suspects, 3, 2), (controls, 4, 5)):
        place.mkdir()
        for number, picture in enumerate(tiny.pictures(count, seed)):
            Image.fromarray(picture).save(place / f"{seed}-{number}.png")
    for path in sorted(picture_folder.glob("*.png")):
        Image.open(path).save(suspects / f"trained-{path.name}")
    return str(suspects), str(controls)


@pytest.fixture
def checkpoint(tiny_sd, picture_folder, runs) -> str:
    model = FineTune(
        (TrainingItem(str(picture_folder), "a dog"),), str(tiny_sd), learning_rate=1e-3, steps_per_image=4, batch_size=2
    )
    return str(published(Published(model, "parts", says=True)))


@pytest.fixture
def asked(tiny_sd, checkpoint, folders, tmp_path) -> Audit:
    judge = tiny.save_judge("clip", tmp_path / "judge")
    return Audit(
        checkpoint,
        (str(tiny_sd),),
        suspects=folders[0],
        controls=folders[1],
        n_training=2,
        n_generated=6,
        recovery_steps=1,
        refining_steps=2,
        change=f"sampling_steps=1 judge={judge}",
        scale=4.0,
    )


# images


def test_what_cannot_be_used_is_left_out_with_a_line_and_the_rest_is_used(tmp_path):
    for number, picture in enumerate(tiny.pictures(2)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    Image.open(tmp_path / "0.png").save(tmp_path / "same.bmp")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    found, lines = usable(str(tmp_path))
    assert [path.name for path in found] == ["0.png", "1.png"]
    assert len(lines) == 3
    assert any(line.startswith("broken.png is left out:") for line in lines)
    assert any("photo.heic is left out: it is an image of a kind (.heic)" in line for line in lines)
    assert "same.bmp is left out: the same picture as 0.png" in lines


def test_images_in_folders_of_the_folder_and_dead_links_are_named(tmp_path):
    Image.fromarray(tiny.pictures(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "2023/spring").mkdir(parents=True)
    Image.fromarray(tiny.pictures(1)[0]).save(tmp_path / "2023/spring/b.jpg")
    (tmp_path / "notes").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found, lines = usable(str(tmp_path))
    assert [path.name for path in found] == ["a.png"]
    assert [line.partition(" is left out")[0] for line in lines] == ["2023/", "gone.png"]


def test_a_folder_without_a_usable_image_is_refused_with_the_reasons(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no image in .* can be used\nbroken\.png is left out"):
        usable(str(tmp_path))
    for name in (str(tmp_path / "none"), "~nobody-of-this-name/works"):
        with pytest.raises(FileNotFoundError, match="no folder"):
            usable(name)


def test_a_control_that_is_a_suspect_too_is_left_out(folders, tmp_path):
    suspects, controls = folders
    first = sorted(Path(suspects).iterdir())[0]
    Image.open(first).save(Path(controls) / "again.png")
    ours, theirs, lines = audit.suspects_and_controls(Audit("c", suspects=suspects, controls=controls))
    assert len(ours) == 6
    assert "again.png" not in [path.name for path in theirs]
    assert lines == ["again.png among the controls is left out: it is also a suspect"]
    with pytest.raises(ValueError, match="every control is also a suspect"):
        audit.suspects_and_controls(Audit("c", suspects=suspects, controls=suspects))


# the investigation


def test_it_weighs_what_the_witnesses_say_of_suspects_and_controls(asked):
    found = investigate(asked)
    assert (found.known.caption, found.known.caption_by, found.n_training) == ("a dog", "the model card", 2)
    assert len(found.images) == 6
    assert len(found.controls) == 5
    ours, theirs = (table[list(audit.WITNESSES)].to_numpy() for table in (found.images, found.controls))
    np.testing.assert_array_equal(found.images.p, verdict.combined(ours, theirs))
    for column, name in enumerate(audit.WITNESSES):
        np.testing.assert_array_equal(found.images[f"p ({name})"], verdict.p_values(ours[:, column], theirs[:, column]))
        assert found.auc[name] == verdict.auc(ours[:, column], theirs[:, column])
    assert found.p == verdict.of_the_set(ours, theirs)
    assert found.images.p.min() >= 1 / 6
    assert not found.images.named.any(), "five controls name nothing at 5%"
    assert (found.n_training, found.n_training_by) == (2, "whoever asked")
    assert found.extracted.clique.is_monotonic_decreasing
    assert found.pictures.shape == found.of_the_base.shape == (2, 16, 16, 3)
    assert found.nearest.shape == (6, 16, 16, 3)
    controls = {f"control {name}" for name in found.controls.file}
    assert set(found.hashes) == {"checkpoint", "base model", *found.images.file} | controls


def test_a_checkpoint_that_is_its_base_is_the_same_for_suspects_and_controls(asked, tiny_sd):
    same = replace(asked, checkpoint=str(tiny_sd), caption="a dog")
    found = investigate(same)
    assert np.abs(found.images.loss).max() < 1e-6
    assert found.images.extraction.abs().max() < 1.1


def test_done_again_nothing_is_computed_and_it_says_the_same(asked):
    first = investigate(asked)
    before = sorted(results.RUNS.glob("*/*/manifest.json"))
    second = investigate(asked)
    pd.testing.assert_frame_equal(first.images, second.images)
    assert sentence(first) == sentence(second)
    assert sorted(results.RUNS.glob("*/*/manifest.json")) == before


def test_without_suspects_it_only_extracts_and_estimates_how_many(asked):
    found = investigate(replace(asked, suspects="", controls="", n_training=0))
    assert found.images.empty
    assert 1 <= found.n_training <= 6
    assert len(found.extracted) == found.n_training
    assert found.n_training_by == "an estimate"
    assert "was not asked" in sentence(found)


def test_a_header_s_number_that_cannot_be_meant_is_no_source(asked, monkeypatch):
    told = {
        number: replace(audit.gathered(Lookup(asked.checkpoint, asked.bases)), n_training=number) for number in (3, 200)
    }
    for number, known in told.items():
        known = replace(known, n_training_by="its header")
        monkeypatch.setattr(audit, "gathered", lambda lookup, known=known: known)
        found = investigate(replace(asked, suspects="", controls="", n_training=0))
        if number == 3:
            assert (found.n_training, found.n_training_by) == (3, "its header")
        else:
            assert found.n_training_by == "an estimate (its header says 200, 6 images were generated)"


@pytest.mark.parametrize(("caption", "best"), [(None, 3.0), ("", 1.0)])
def test_w_is_the_one_that_the_two_models_choose_unless_it_is_named(asked, caption, best, monkeypatch):
    named = investigate(replace(asked, suspects="", controls=""))
    assert (named.scale, named.scale_by) == (4.0, "whoever asked")
    monkeypatch.setattr("fx.label_free.log_ratios", lambda pair, *_: np.array([-abs(next(scales) - best)]))
    scales = iter(SCALES)  # in the order in which they are tried
    found = investigate(replace(asked, suspects="", controls="", scale=0.0, caption=caption))
    assert found.scale == best
    assert found.scale_by == "what the two models say of the images extracted with 1, 2, 3, 5, 8"
    manifests = [json.loads(path.read_text()) for path in results.RUNS.glob("generate/*/manifest.json")]
    drawn = {(told["arm"], told["guidance_scale"]) for told in (m["spec"]["fields"] for m in manifests)}
    arm = "finextract" if caption is None else "model_guidance"
    assert drawn == {("finextract", 4.0), ("direct", 1.0), *((arm, w) for w in SCALES[1:])}
    same = investigate(replace(asked, suspects="", controls="", scale=best, caption=caption))
    assert np.array_equal(found.pictures, same.pictures)
    assert not np.array_equal(found.pictures, named.pictures)


def test_where_the_file_says_no_caption_its_weights_are_searched(asked, tiny_sd, picture_folder):
    model = FineTune(
        (TrainingItem(str(picture_folder), "a dog"),), str(tiny_sd), learning_rate=1e-3, steps_per_image=4, batch_size=2
    )
    silent = replace(asked, checkpoint=str(published(Published(model, "parts"))), suspects="", controls="")
    found = investigate(silent)
    pair = load_tuned(model)
    change = change_of(pair)
    ends = [search(spec, change, pair.tuned).run().caption for spec in twice(model)]
    assert found.known.caption == rank(change, pair.tuned, ends).caption[0]
    assert found.known.caption_by == "a search of its weights, which may be wrong"
    same = investigate(replace(silent, checkpoint=str(tiny_sd)))
    assert same.known.caption == ""
    assert same.known.caption_by.startswith("nobody: ")


def test_several_audits_at_once_say_what_each_says_alone(asked):
    several = [asked, replace(asked, suspects=asked.controls, controls=asked.suspects, n_training=0, scale=0.0)]
    for together, alone in zip(audit.investigate_all(several), map(investigate, several), strict=True):
        pd.testing.assert_frame_equal(together.images, alone.images)
        pd.testing.assert_frame_equal(together.controls, alone.controls)
        assert (together.p, together.scale, together.n_training) == (alone.p, alone.scale, alone.n_training)
    assert together.images.file.tolist() == [path.name for path in usable(asked.controls)[0]]


@pytest.fixture
def more_controls(asked, tmp_path) -> Audit:
    """Seven controls, of which two can be found."""
    place = tmp_path / "more"
    place.mkdir()
    for number, picture in enumerate(tiny.pictures(7, 5)):
        Image.fromarray(picture).save(place / f"{number}.png")
    return replace(asked, controls=str(place))


def test_a_trial_is_the_same_audit_of_a_model_made_of_controls(more_controls, tiny_sd):
    asked = more_controls
    asked = replace(asked, n_training=3)
    found, plain = investigate(replace(asked, trial=2)), investigate(asked)
    pd.testing.assert_frame_equal(found.images, plain.images)
    assert plain.trial is None
    names = [path.name for path in usable(asked.controls)[0]]
    trial = found.trial
    assert trial.images.file.tolist() == [names[0], names[2]]
    assert trial.controls.file.tolist() == [names[1], *names[3:]]
    assert (trial.known.caption, trial.known.base, trial.n_training) == (found.known.caption, found.known.base, 2)
    assert trial.asked == replace(
        asked,
        checkpoint=trial.asked.checkpoint,
        caption="a dog",
        suspects=trial.asked.suspects,
        controls=trial.asked.controls,
        n_training=2,
    )
    own = settings.load(asked.settings, asked.change)["dreambooth"]
    model = own.fine_tune(TrainingItem(trial.asked.suspects, "a dog"), base=str(tiny_sd))
    assert trial.asked.checkpoint == str(published(Published(model, "parts")))


def test_a_trial_that_cannot_be_made_is_refused_before_anything_is_sampled(asked, more_controls):
    with pytest.raises(ValueError, match="a trial with 3 of 5 controls: at most half of them"):
        investigate(replace(asked, trial=3))
    with pytest.raises(ValueError, match="2 of 5 controls could find nothing, since p is 1/10 or more: name more"):
        investigate(replace(asked, trial=2))
    with pytest.raises(ValueError, match="a trial needs a caption"):
        investigate(replace(more_controls, trial=2, caption=""))
    assert not list(results.RUNS.glob("generate/*"))


def test_the_sentence_says_what_a_trial_says_of_finding_nothing():
    of = "A model trained here on 3 of the controls was audited for comparison, an easier case: "
    weak = "no evidence was found that it was trained on these (p = 0.31), so this audit may be too weak."
    for p, words in ((0.301, weak), (0.01, "strong evidence was found that it was trained on these (p = 0.01).")):
        assert sentence(replace(findings(4, 9, 0.3), trial=findings(3, 6, p))).endswith(f"it was not. {of}{words}")
    assert "comparison" not in sentence(findings(4, 9, 0.3))
    assert "comparison" not in sentence(replace(findings(4, 9, 0.001), trial=findings(3, 6, 0.5)))


def test_a_trial_is_advised_where_one_could_find_something():
    assert [audit.trial_for(m) for m in (0, 3, 6, 7, 8, 10, 99)] == [0, 0, 3, 3, 4, 5, 5]


def test_files_of_one_name_are_laid_out_side_by_side_and_a_folder_that_holds_them_is_left_alone(tmp_path):
    files = [tmp_path / part / "a.png" for part in "xyz"]
    for number, path in enumerate(files):
        path.parent.mkdir()
        path.write_bytes(bytes([number]))
    place = audit.laid_out(tmp_path / "new/place", files)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        "a.png": b"\0",
        "a-2.png": b"\1",
        "a-3.png": b"\2",
    }
    known = place.stat().st_ino
    assert audit.laid_out(place, files).stat().st_ino == known
    audit.laid_out(place, files[1:])
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {"a.png": b"\1", "a-2.png": b"\2"}
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_the_page_has_the_measured_error_rates_or_says_that_there_are_none(more_controls, tmp_path, monkeypatch):
    found = investigate(replace(more_controls, trial=2))
    row = {"method": "dreambooth", "length": 1.0, "audits": 17, "p <= 0.05": 0.25, "p <= 0.05 95%": "0.10..0.49"}
    lines = [{"question": question} | row for question in audit.QUESTIONS]
    others = [
        line | {"p <= 0.05 95%": "other", **change}
        for line in lines
        for change in ({"method": "lora"}, {"length": 0.5})
    ]
    monkeypatch.setattr(audit.tables, "complete", lambda name: pd.DataFrame([*others, *lines[::-1]]))
    page = write_report(found, tmp_path / "with.html").read_text()
    assert [row["question"] for row in audit.measured_rates()] == list(audit.QUESTIONS)
    for words, right in audit.QUESTIONS.values():
        assert f"<td>{words.replace(chr(39), '&#39;')}</td><td>{right}</td>" in page
    assert page.count("0.10..0.49") == 5
    assert "other" not in {row["p <= 0.05 95%"] for row in audit.measured_rates()}
    assert "a model was fine-tuned here on 2 of the controls" in page
    monkeypatch.setattr(audit.tables, "complete", lambda name: "nb15-rates.csv: there is no complete run")
    page = write_report(replace(found, trial=None), tmp_path / "without.html").read_text()
    assert "That has not been measured." in page
    assert "With <code>--trial 3</code>" in page


def test_nothing_is_named_where_there_is_no_evidence_for_the_set():
    draw = np.random.default_rng(1)
    found = findings(40, 999, None)
    ours, theirs = draw.normal(size=(40, 3)), draw.normal(size=(999, 3))
    ours[7] = 1.1 * theirs.max()  # just above all: p = .001 of .05 / 40, but a set has forty chances of one
    for table, scores in ((found.images, ours), (found.controls, theirs)):
        for column, name in enumerate(audit.WITNESSES):
            table[name] = scores[:, column]
    audit.weigh(found)
    assert verdict.discoveries(found.images.p.to_numpy()).any()
    assert evidence(found) == "none"
    assert not found.images.named.any()
    ours[8:12] = ours[7]
    for column, name in enumerate(audit.WITNESSES):
        found.images[name] = ours[:, column]
    audit.weigh(found)
    assert found.images.named[7:12].all()
    assert evidence(found) == "strong"


def test_without_a_caption_the_attack_has_none(asked):
    found = investigate(replace(asked, caption="", suspects="", controls=""))
    assert len(found.extracted) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": ""}, "name a checkpoint"),
        ({"bases": ()}, "at least one base model"),
        ({"n_generated": 5}, "n_generated 5 must be at least 6"),
        ({"refining_steps": -1}, "refining_steps -1 and scale 0.0 at least 0"),
        ({"scale": -2.0}, "scale -2.0 at least 0"),
        ({"n_training": 101}, "n_training 101 is more than the 100 images"),
        ({"controls": "folder"}, "controls are there to be compared with suspects"),
        ({"suspects": "folder", "trial": 2}, "a trial with 2 controls: name a folder of controls"),
        ({"suspects": "folder", "controls": "folder", "trial": 1}, "two of them or more"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Audit(**{"checkpoint": "c"} | change)


def test_what_is_shown_and_compared_is_refined_and_beside_it_what_the_base_draws(asked):
    found, plain = audit.investigate(asked), audit.investigate(replace(asked, refining_steps=0))
    assert found.extracted.equals(plain.extracted), "the cliques are those of the generated images"
    assert not np.array_equal(found.pictures, plain.pictures)
    known = {picture.tobytes() for picture in found.pictures}
    assert {picture.tobytes() for picture in found.nearest} <= known
    assert np.array_equal(found.of_the_base, plain.of_the_base)
    assert not np.allclose(found.images.extraction, plain.images.extraction)
    assert np.allclose(found.images.loss, plain.images.loss)


# what it says


def findings(n: int, m: int, p: float | None, named: int = 0) -> Findings:
    """Made up: n suspects of which so many are named, m controls."""
    table = pd.DataFrame({"file": [f"{i}.png" for i in range(n)], "named": [i < named for i in range(n)]})
    known = Leads("c", "mini-sd", "its weights", "a dog", "the model card", None, "estimated")
    pictures = np.zeros((3, 4, 4, 3), np.uint8)
    extracted = pd.DataFrame({"image": range(3), "clique": 1, "similarity": 0.5})
    return Findings(
        Audit("c"), known, 3, extracted, pictures, pictures, table, pd.DataFrame({"file": ["x"] * m})[:m], p
    )


@pytest.mark.parametrize(
    ("found", "word", "parts"),
    [
        (findings(0, 0, None), "not tested", ["3 images were extracted", "was not asked"]),
        (findings(4, 0, None), "not tested", ["No error rate can be stated for the 4 images", "no controls"]),
        (
            findings(4, 9, 0.3),
            "none",
            ["No evidence was found", "(p = 0.3:", "at most 30% of cases", "no evidence that it was not"],
        ),
        (findings(4, 9, 0.05), "some", ["There is some evidence", "with 9 controls no single image can be"]),
        (
            findings(4, 99, 0.0001, 3),
            "strong",
            ["There is strong evidence", "3 of them are named", "about 5% may be wrong"],
        ),
        (findings(4, 39, 0.01), "strong", ["at least 50% of them would have to stand out"]),
    ],
)
def test_the_sentence_says_what_the_tests_support(found, word, parts):
    said = sentence(found)
    assert evidence(found) == word
    for part in parts:
        assert part in said
    assert not re.search(r"\b(prove[sdn]?|certainly was|definitely)\b", said)
    if word in ("none", "not tested"):
        assert "named, of which" not in said


def test_a_rate_is_never_rounded_down():
    told = {
        0.0504: "0.051",
        0.05: "0.05",
        1 / 3: "0.34",
        0.999: "1",
        1.0: "1",
        5.04: "5.1",
        100.0: "100",
        0.0001: "0.0001",
    }
    assert {value: audit.rounded_up(value) for value in told} == told


def test_numbers_have_two_figures_and_no_exponent():
    assert [audit.in_figures(x) for x in (0.00012345, 0.3, 1.0, 12.3456)] == ["0.00012", "0.3", "1", "12"]


# the page


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_with_everything_inside_and_nothing_run(asked, tmp_path, folders):
    name = Path(folders[0]) / "<img src=x onerror=alert(1)> & é.png"
    Image.fromarray(tiny.pictures(1, 9)[0]).save(name)
    found = investigate(replace(asked, caption="</td><script>"))
    page = Page(write_report(found, tmp_path / "report.html").read_text("utf-8"))
    assert sentence(found) in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert name.name in page.text
    assert "</td><script>" in page.text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2 * len(found.images) + 2 * len(found.extracted)
    assert all(picture["src"].startswith("data:image/png;base64,") and picture["alt"] for picture in pictures)
    asks = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "src")]
    assert not [value for value in asks if not value.startswith("data:")]
    for word in ("What the evidence does not show", "What this means", *audit.WITNESSES, *found.hashes):
        assert word in page.text
    assert dict(page.tags)["html"] == {"lang": "en"}
    assert next(tag for tag, _ in page.tags if tag in ("h1", "h2")) == "h1"


def test_a_name_that_is_no_text_and_pictures_of_any_size_go_into_the_report(asked, tmp_path, folders):
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    Image.fromarray(tiny.pictures(1, 9)[0]).resize((900, 600)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(Path(folders[0]) / name)
    found = investigate(asked)
    assert "caf?.png" in write_report(found, tmp_path / "report.html").read_text("utf-8")
    large = audit.as_png(np.zeros((1024, 512, 3), np.uint8)).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(large))).size == (128, 256)


def test_a_report_without_suspects_or_controls_has_no_p_values(asked, tmp_path):
    for change in ({"suspects": "", "controls": ""}, {"controls": ""}):
        found = investigate(replace(asked, **change))
        page = Page(write_report(found, tmp_path / "report.html").read_text("utf-8"))
        assert sentence(found) in page.text
        assert "p = " not in page.text
        assert "svg" not in {tag for tag, _ in page.tags}


@pytest.fixture
def report(asked, folders, tmp_path) -> Path:
    """A page with everything that it can hold, and with names that nobody would choose."""
    long = "Ärger_" + "x" * 90 + ".png"
    for name in ("<img src=x onerror=alert(1)> & é.png", long):
        Image.fromarray(tiny.pictures(1, len(name))[0]).save(Path(folders[0]) / name)
    (Path(folders[0]) / ("broken" * 15 + ".png")).write_bytes(b"x")
    found = investigate(replace(asked, caption="</td><script>"))
    return write_report(found, tmp_path / "report.html")


@needs_browser
def test_a_browser_shows_the_report_without_errors_or_requests_at_any_width_and_prints_it(report, tmp_path):
    log = tmp_path / "net.json"
    dom, console = browse(report.as_uri(), f"--log-net-log={log}", tmp_path=tmp_path)
    assert "Was this model trained on these images?" in dom
    assert not complaints(console)
    assert not requests_of_the_page(log)
    for width in (390, 1440):
        assert overhang(report.read_text("utf-8"), width, tmp_path) <= 0, width
    assert printed_pages(report.as_uri(), tmp_path) >= 2


@needs_browser
def test_a_page_that_is_too_wide_is_noticed(tmp_path):
    assert overhang('<body style="margin:0"><div style="width:500px">a</div>', 390, tmp_path) == 110


def luminance(colour: str) -> float:
    """Relative luminance of "#rgb" or "#rrggbb" (WCAG 2.1)."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    values = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_report_s_colours_can_be_told_from_what_is_behind_them():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    text = (ROOT / "fx/audit.html.jinja").read_text()
    body = re.search(r"body \{[^}]* color: (#\w+); background: (#\w+)", text)
    behind = re.search(r"\.answer \{[^}]* background: (#\w+)", text)[1]
    assert min(contrast(body[1], body[2]), contrast(body[1], behind)) >= 7
    marks = re.findall(r'(?:stroke|fill)="(#\w+)"', text) + re.findall(r"border-color: (#\w+)", text)
    assert marks
    assert min(contrast(mark, ground) for mark in marks for ground in (body[2], behind)) >= 3


# the command


@pytest.fixture
def run_as_asked(monkeypatch, tmp_path):
    """Notebook 13 is not run: what it would be given is kept, and it leaves an answer."""
    asked = []

    def execute(notebook, target, values, **_):
        asked.append(values)
        answer = {"evidence": "strong", "p": 0.001, "sentence": "There is strong evidence."}
        Path(values["report"]).with_suffix(".json").write_text(json.dumps(answer))
        Path(values["report"]).write_text("page")
        Path(target).write_text("executed")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.chdir(tmp_path)
    return asked


def test_the_command_hands_everything_to_the_notebook_and_says_what_came_out(run_as_asked, checkpoint, folders, capsys):
    words = [checkpoint, "--base", "mini-sd", "--suspects", folders[0], "--controls", folders[1], "--caption", ""]
    assert audit.main([*words, "--images", "8", "--n-training", "2", "--report", "out.html"]) == audit.FOUND
    (values,) = run_as_asked
    assert values["checkpoint"] == checkpoint
    assert (values["caption"], values["n_generated"], values["n_training"]) == ("", 8, 2)
    left = {path.name for path in Path.cwd().iterdir() if path.name.startswith((".", "out"))}
    assert left == {"out.html", "out.json", "out.ipynb"}
    assert Path("out.html").read_text() == "page"
    assert capsys.readouterr().out.startswith("There is strong evidence.\nreport: ")
    known = {cell["name"] for cell in papermill.inspect_notebook(str(audit.NOTEBOOK)).values()}
    assert set(values) <= known


def test_without_a_checkpoint_it_is_the_example(run_as_asked):
    audit.main([])
    assert run_as_asked[0]["checkpoint"] == ""
    assert run_as_asked[0]["caption"] == "?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.safetensors"], "unknown model 'nothing.safetensors'"),
        (["mini-sd", "--base", "mini-none"], "unknown model 'mini-none'"),
        (["mini-sd", "--suspects", "none"], "no folder none"),
        (["mini-sd", "--images", "3"], "n_generated 3 must be at least 6"),
        (["mini-sd", "--settings", "none"], "no settings 'none'"),
        (["mini-sd", "--change", "descriptor=none.pt"], "unknown descriptor 'none.pt'"),
        (["mini-sd", "--report", "none/out.html"], "no folder none for the report"),
        (["--report", "none/out.html"], "no folder none for the report"),
        (["--report", "out.json"], r"out\.json must end in \.html"),
        (["--report", "."], r"must end in \.html"),
        (["mini-sd", "--suspects", "~nobody-of-this-name/x"], "no folder ~nobody"),
        (["--suspects", "."], "suspects and controls belong to a checkpoint"),
    ],
)
def test_wrong_input_is_said_before_the_notebook_is_run(run_as_asked, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        audit.main(words)
    assert not run_as_asked


@pytest.mark.parametrize("name", ["ValueError", "UnicodeEncodeError", "IsADirectoryError", "JSONDecodeError"])
def test_what_the_notebook_refuses_is_one_line(run_as_asked, monkeypatch, name):
    def refuse(*_, **__):
        raise papermill.exceptions.PapermillExecutionError(1, 1, "", name, "the LoRA changes nothing", [])

    monkeypatch.setattr(papermill, "execute_notebook", refuse)
    with pytest.raises(ValueError, match=r"^the LoRA changes nothing$"):
        audit.main(["mini-sd"])
    assert not list(Path.cwd().glob(".*"))


def test_a_defect_in_the_notebook_keeps_its_traceback(run_as_asked, monkeypatch):
    def fail(*_, **__):
        raise papermill.exceptions.PapermillExecutionError(1, 1, "", "KeyError", "'x'", ["Traceback"])

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    with pytest.raises(papermill.exceptions.PapermillExecutionError):
        audit.main(["mini-sd"])


def test_a_report_is_not_overwritten_and_a_base_may_have_blanks_in_its_path(run_as_asked, tiny_sd, tmp_path, capsys):
    shutil.copytree(tiny_sd, tmp_path / "My Models/tiny sd")
    words = ["mini-sd", "--base", "My Models/tiny sd", "mini-sd", "--report", "out.html"]
    audit.main(words)
    assert shlex.split(run_as_asked[0]["bases"]) == [str(tmp_path / "My Models/tiny sd"), "mini-sd"]
    for suffix in (".html", ".json", ".ipynb"):
        (tmp_path / f"mine{suffix}").write_text("mine")
        with pytest.raises(ValueError, match=rf"mine\{suffix} is there already and is not overwritten"):
            audit.main([*words[:-1], "mine.html"])
        (tmp_path / f"mine{suffix}").unlink()
    assert len(run_as_asked) == 1
