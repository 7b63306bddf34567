"""What is missing for a run: found without the network, each thing once, with its size and the place where it goes."""

import hashlib
import shutil
import socket

import pandas as pd
import pytest
import torch

from fx import needs, originals, quality, settings, tables, zoo
from fx.paths import MODELS


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """The cache of the Hub and the folders of images are empty ones, and nobody may open a connection."""
    monkeypatch.setattr(needs, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(originals, "EXTERNAL", tmp_path)

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)


def found(*sections: str, change: str = "") -> dict[str, needs.Need]:
    return {need.name: need for need in needs.needs(sections, change)}


def test_what_is_shipped_is_not_listed():
    assert needs.needs(["mini-sd", "mini-sd-reference"]) == []
    needs.check([])


def test_the_papers_section_needs_its_models_and_images_each_once():
    own = found("paper", "published", "paper-sdxl", "paper")
    assert list(own) == [
        "CompVis/stable-diffusion-v1-4",
        "sscd_disc_mixup.torchscript.pt",
        quality.CLIP,
        quality.DINO,
        "wikiart",
        "dreambooth",
        "sscd_disc_large.torchscript.pt",
        "stabilityai/stable-diffusion-xl-base-1.0",
    ]
    assert not any(need.here for need in own.values())
    assert own["wikiart"].gigabytes == 25.4
    with pytest.raises(ValueError, match="no settings 'papers'"):
        needs.needs(["papers"])


@pytest.mark.parametrize("section", ["paper", "published", "paper-sdxl", "paper-alt"])
def test_everything_that_a_section_names_is_known_by_size_and_licence(section):
    for need in needs.needs([section]):
        assert need.licence
        assert need.gigabytes or need.name == "dreambooth"
        assert need.how


def test_what_has_come_counts_as_here(monkeypatch, tmp_path):
    monkeypatch.setattr(
        needs, "try_to_load_from_cache", lambda name, file, revision: f"/cache/{file}" if "stable" in name else None
    )
    (tmp_path / "wikiart").mkdir()
    file = tmp_path / "sscd.pt"
    torch.jit.script(torch.nn.Flatten()).save(str(file))
    change = f"descriptor={file}@sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    own = found("paper", change=change)
    assert [name for name, need in own.items() if not need.here] == [
        quality.CLIP,
        quality.DINO,
        "dreambooth",
    ]
    shutil.copytree(MODELS / "mini-clip", tmp_path / "judge")
    assert found("paper", change=f"judge={tmp_path / 'judge'}")[str(tmp_path / "judge")].here


def test_a_file_with_another_digest_is_refused_and_not_called_missing(tmp_path):
    file = tmp_path / "sscd.pt"
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="has the SHA-256"):
        found("paper", change=f"descriptor={file}@sha256:{'0' * 64}")


def test_a_revision_is_looked_up_and_a_word_is_no_model(monkeypatch):
    asked = []
    monkeypatch.setattr(needs, "try_to_load_from_cache", lambda name, file, revision: asked.append((name, revision)))
    assert not needs.has_model("owner/name@v1")
    assert asked[0] == ("owner/name", "v1")
    asked.clear()
    assert not needs.has_model("mini-nothing")
    assert not asked


def test_one_message_names_everything_that_is_missing_and_where_it_goes(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        needs.check(needs.needs(["paper"]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 things are not here that this run needs:"
    assert len(lines) == 7
    assert f"into {tmp_path / 'wikiart'}, as <Style>/<artist>_<title>.jpg" in lines[5]
    assert "hf download CompVis/stable-diffusion-v1-4" in lines[1]


def test_the_published_checkpoints_are_needed_until_one_is_here(monkeypatch):
    roles = pd.Series({need.name: need.role for need in needs.published()})
    assert set(roles[roles == "base model"].index) == set(zoo.HUB.values())
    assert set(roles[roles == "checkpoint"].index) == set(tables.paper(7).checkpoint)
    assert all(need.on_hub and not need.here for need in needs.published())
    monkeypatch.setattr(needs, "has_model", lambda name: name == tables.paper(7).checkpoint[2])
    assert {need.role for need in needs.published()} == {"base model"}


def test_a_revision_is_part_of_the_way_to_get_it():
    assert needs._need("owner/name@refs/pr/1", "judge").how.endswith("hf download owner/name --revision refs/pr/1")


def test_the_table_says_what_is_here():
    shown = needs.table(needs.needs(["paper"]))
    assert shown.columns.tolist() == ["what", "for", "GB", "licence", "here"]
    assert set(shown.here) == {"no"}
    assert shown["for"].tolist() == ["base model", "descriptor", "judge", "judge of fidelity", "images", "images"]


def test_every_section_is_complete():
    """Settings that no test could run before the weights are there."""
    for name in ("paper", "published"):
        assert set(settings.load(name)) == {"dreambooth", "lora"}
        assert settings.sets(name) == {"style": "wikiart", "object": "dreambooth"}
    own, released = settings.load("paper")["dreambooth"], settings.load("published")["dreambooth"]
    assert (own.learning_rate, own.steps_per_image, own.batch_size) == (2e-6, 200, 1)  # App. E
    assert (own.finextract_scale, own.correction_scale, own.images_per_training) == (3.0, -0.02, 50)  # Sec. 5
    assert settings.load("paper")["lora"].finextract_scale == 5.0
    assert (released.sampler, released.rule, released.preset) == ("published",) * 3
