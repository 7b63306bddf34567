"""What notebooks would compute: found without doing it, each step once, and in sums that are known otherwise."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file
from torch import nn

from fx import plan, results, settings
from fx.finetune import TrainingItem
from fx.plan import Planned
from fx.refine import Contrastive
from fx.reproduce import find_notebooks, parameters

PARAMETERS = 'profile = "quick"\nitems = "style/mimooh"\nsection = "mini-sd"\nn = 20'
CELLS = (
    "from fx import datasets, plots, results, settings, tables\nfrom fx.evaluation import read_matches",
    "chosen = settings.load(section)",
    "rows = results.run([s.score(s.fine_tune(i), a, n_generated=n) for i in items.split() for s in chosen.values()"
    " for a in ('direct', 'cfg')])",
    "assert rows.AS.notna().all()\nbest = rows.loc[rows['A-ESR_strict'].idxmax()]",
    "read_matches(chosen['lora'].score(chosen['lora'].fine_tune(items.split()[0]), 'direct', n_generated=n))",
    "more = results.run([chosen['lora'].score(chosen['lora'].fine_tune('object/cactus'), 'direct', n_generated=2 * n)])",
    "results.run([chosen['lora'].score(chosen['lora'].fine_tune('object/cactus'), 'direct', n_generated=n)])",
    "results.complete(chosen['lora'].fine_tune('object/camera'))",
    "plots.save(plots.score_curves(rows, 'arm'), 'a', profile)\nraise SystemError('no step waits for this')",
)


@pytest.fixture
def notebook(tmp_path) -> Path:
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *map(new_code_cell, CELLS)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "01-toy.ipynb")
    return tmp_path / "01-toy.ipynb"


def kinds(found: list[Planned]) -> dict[str, int]:
    names = [step.place.partition("/")[0] for step in found]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def test_every_step_is_found_once_and_none_is_done(notebook, runs):
    found = plan.steps(notebook, {"items": "style/mimooh style/benji-park"})
    # two items by two methods, and LoRAs of two objects; four models in two arms and one in two numbers
    assert kinds(found) == {"score": 10, "extract": 10, "generate": 10, "finetune": 6}
    assert len({step.place for step in found}) == len(found)
    assert not any(step.done for step in found)
    assert not (runs / "generate").exists()
    assert not (runs / "finetune").exists()


@pytest.mark.parametrize("number", ["03", "10"])
def test_the_papers_notebooks_are_planned_without_its_models_and_images(number, runs):
    notebook = find_notebooks([number])[0]
    found = plan.steps(notebook, parameters(notebook, "paper", {}))
    bases = {step.base for step in found if step.base}
    assert "CompVis/stable-diffusion-v1-4" in bases
    tuned = [step for step in found if step.model == "dreambooth"]
    assert {step.trained for step in tuned} <= {200 * n for n in range(1, 101)}
    assert len(tuned) >= (50 if number == "03" else 10)


def test_a_step_counts_the_evaluations_it_makes(runs):
    s = settings.load("mini-sd")["lora"]
    model = s.fine_tune("style/mimooh")
    tuned = plan.described(model)
    assert (tuned.trained, tuned.model, tuned.forward) == (2000, "lora:64", 0)  # 200 steps an image, ten images
    direct, guided = (plan.described(s.generate(model, arm, 25)) for arm in ("direct", "finextract"))
    assert (direct.forward, guided.forward, direct.images) == (30 * 10, 30 * 10 * 2, 25)  # blocks of ten, ten steps
    refined = s.extract(s.generate(model, "finextract", 25), 10, refine=Contrastive(steps=5))
    assert plan.described(refined).forward == 10 * 5 * 2 * 3  # two models, a backward pass as two
    assert plan.described(replace(refined, refine=None)).forward == 0
    short = plan.described(s.fine_tune(TrainingItem("style/mimooh", first=3), steps_per_image=3, batch_size=4))
    assert short.trained == 12


def test_a_plan_writes_nothing_into_the_folders_of_images(tmp_path, monkeypatch):
    (own := tmp_path / "external/dreambooth/dog").mkdir(parents=True)
    (own / "00.jpg").touch()
    before = sorted((tmp_path / "external").rglob("*"))
    monkeypatch.setattr(plan, "EXTERNAL", tmp_path / "external")
    (stand_in := tmp_path / "stand-in").mkdir()
    plan.stand_in_images(stand_in)
    assert sorted((tmp_path / "external").rglob("*")) == before
    assert (stand_in / "dreambooth" / plan.originals.CLASSES).is_file()


def test_the_notebook_that_trains_the_shipped_models_is_not_planned():
    with pytest.raises(RuntimeError, match=r"^00-mini-models\.ipynb is not planned"):
        plan.steps(*find_notebooks(["00"]), {})


def test_a_base_model_of_which_a_part_is_missing_has_the_published_size(monkeypatch):
    def load(name):
        raise FileNotFoundError("the weights of its U-Net")

    monkeypatch.setattr(plan.needs, "has_model", lambda name: True)
    monkeypatch.setattr("fx.models.load_pipeline", load)
    plan.size_of.cache_clear()
    assert plan.size_of("CompVis/stable-diffusion-v1-4").parameters == 859_520_964
    assert plan.size_of("someone/unknown") is None
    plan.size_of.cache_clear()


def test_a_finished_step_is_told(runs, monkeypatch):
    s = settings.load("mini-sd")["lora"]
    place = results.folder(s.fine_tune("style/mimooh"))
    monkeypatch.setattr(results, "fault_in", lambda folder, asked: "" if folder == place else "it is missing")
    assert plan.described(s.fine_tune("style/mimooh")).done
    assert not plan.described(s.fine_tune("style/benji-park")).done


@pytest.fixture
def sizes(monkeypatch):
    known = {"small": plan.Size(1e9, 1_000_000, 10, 1_000, 0.5), "unknown": None}
    monkeypatch.setattr(plan, "size_of", known.get)


def test_hours_and_gigabytes_are_sums_over_what_is_not_done(sizes):
    first = [
        Planned("finetune/a", False, "small", trained=7200, model="dreambooth"),
        Planned("finetune/b", False, "small", trained=7200, model="lora:4"),
        Planned("generate/c-10", False, "small", forward=100, images=10),
        Planned("generate/c-100", False, "small", forward=7200, images=100),
        Planned("generate/d-100", True, "small", forward=7200, images=100),
        Planned("score/e", False),
    ]
    second = [first[0], Planned("finetune/f", False, "small", trained=720, model="dreambooth")]
    table = plan.estimate({"one": first, "two": second}).set_index("notebook")
    assert table.steps.tolist() == [5, 1, 6]  # of c the larger holds the smaller, and a counts once
    assert table.done.tolist() == [1, 0, 1]
    assert table.hours.tolist() == pytest.approx([3.0 + 2.5 + 1.0, 0.3, 6.8])
    pictures = 100 * plan.PNG * 3 * 10**2
    assert table.GB["one"] == pytest.approx((4e6 + 4 * 4_000 + pictures) / 1e9)
    assert table.GB["together"] == pytest.approx(table.GB["one"] + table.GB["two"])


def test_an_unknown_size_is_said_to_be_unknown(sizes):
    table = plan.estimate({"one": [Planned("generate/a-1", False, "unknown", forward=1, images=1)]})
    assert table.hours.isna().all()
    assert table.GB.isna().all()


@pytest.mark.parametrize(
    ("base", "parameters", "side"),
    [
        ("CompVis/stable-diffusion-v1-4", 859_520_964, 512),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684, 1024),
    ],
)
def test_what_is_not_here_has_the_published_number_of_parameters(base, parameters, side, monkeypatch):
    monkeypatch.setattr(plan.needs, "has_model", lambda name: False)
    monkeypatch.setattr(plan, "speed", lambda: 1e12)
    size = plan.size_of.__wrapped__(base)
    assert (size.parameters, size.side) == (parameters, side)
    assert size.seconds == size.operations / 1e12
    assert plan.size_of.__wrapped__("nobody/knows-this") is None


def test_the_size_of_a_model_that_is_here_is_its_own():
    size, folder = plan.size_of("mini-sd"), plan.MODELS / "mini-sd"
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    assert size.side == unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    held = [load_file(file) for file in (folder / "unet").glob("*.safetensors")]
    assert size.parameters == sum(tensor.numel() for tensors in held for tensor in tensors.values())
    assert size.seconds > 0


def test_operations_are_two_a_multiplication():
    layer = nn.Linear(30, 40, bias=False)
    assert plan.operations_of(lambda: layer(torch.zeros(7, 30))) == 2 * 7 * 30 * 40


def test_a_loras_parameters_are_its_rank_times_the_inner_size(tiny_pipeline):
    import copy

    from peft import LoraConfig

    unet = copy.deepcopy(tiny_pipeline.unet)
    inner = plan.inner_size(unet, "unet")
    unet.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert sum(w.numel() for name, w in unet.named_parameters() if "lora_" in name) == 3 * inner


def test_what_goes_wrong_in_another_process_is_said(tmp_path):
    (tmp_path / "01-none.ipynb").write_text("{")
    with pytest.raises(RuntimeError, match=r"01-none\.ipynb could not be planned: "):
        plan.steps(tmp_path / "01-none.ipynb", {})


def test_the_module_says_what_it_is_for(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fx.plan"])
    with pytest.raises(ValueError, match=r"fx\.reproduce --dry-run"):
        plan.main()
