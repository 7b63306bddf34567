"""The zoo: models of every kind, each of its own item and base, as members whose making only an evaluator knows."""

import shutil
from dataclasses import replace

import pytest

from fx import checkpoints, datasets, leads, results, settings, zoo
from fx.finetune import TrainingItem
from fx.leads import Lookup, gathered
from fx.paths import MODELS
from fx.publishing import published

ITEMS = ["style/aj-ashton", "style/abiclipart", "object/backpack", "object/cactus"]


@pytest.fixture
def chosen(tmp_path, runs):
    """Settings that fine-tune a copy of mini-sd, which reads the shipped items' captions, for a step."""
    shutil.copytree(MODELS / "mini-sd", tmp_path / "first")
    return settings.load("mini-sd", f"base={tmp_path / 'first'} steps_per_image=1 batch_size=10")


def test_artists_and_objects_and_the_bases_take_turns_within_each_method(chosen):
    found = zoo.members(chosen, ITEMS, ["a", "b", "c"])
    assert [member.kind for member in found] == list(zoo.KINDS)
    assert {member.training.item for member in found} == set(ITEMS)
    for method in ("dreambooth", "lora"):
        own = [member for member in found if member.method == method]
        assert [member.base for member in own] == (["a", "a", "b", "c"] * 3)[: len(own)]
        plain = [member for member in own if not zoo.KINDS[member.kind].rare]
        sets = [member.training.item.partition("/")[0] for member in own]
        assert {sets[i] for i in range(0, len(own), 2) if own[i] in plain} == {"style"}
        assert set(sets[1::2]) == {"object"}


def test_every_kind_is_made_as_it_is_called(chosen):
    for member in zoo.members(chosen, ITEMS, [chosen["lora"].base]):
        kind, made = zoo.KINDS[member.kind], member.model.model
        assert made.method == member.method == kind.method
        assert made.steps_per_image == max(1, round(kind.length * chosen[kind.method].steps_per_image))
        assert (member.model.form, member.model.says) == (kind.form, kind.says)
        assert {name: getattr(made, name) for name in kind.changes} == dict(kind.changes)
        item = datasets.load_item(member.training.item)
        assert member.caption == (f"a sks {item.caption[2:]}" if kind.rare else item.caption)
        assert not kind.rare or item.name.startswith("object/")


def test_a_member_is_published_where_its_path_says_and_looked_up_by_what_is_there(chosen):
    base = chosen["lora"].base
    folder, adapter = zoo.members(chosen, ITEMS, [base], ["folder", "kohya, no header"])
    assert checkpoints.kind_of(checkpoints.find(folder.path)) == "parts"
    assert adapter.path.endswith("model.safetensors")
    spec = adapter.lookup([base], ["a", "b"])
    assert spec == Lookup(adapter.path, (base,), ("a", "b"))
    assert "style/" not in str(spec)
    known = gathered(spec)
    assert known == leads.gather(adapter.path, [base], ["a", "b"])
    assert (known.base, known.base_by, known.n_training_by) == (base, "its shapes", "estimated")
    assert (known.method, gathered(folder.lookup([base])).method) == ("lora", "dreambooth")
    assert gathered(folder.lookup([base])).caption == folder.caption  # it says so


def test_a_lookup_follows_the_checkpoint_and_the_bases_that_it_was_given(chosen, tmp_path):
    base = chosen["lora"].base
    one, other = zoo.members(chosen, ITEMS, [base], ["kohya", "kohya, no header"])
    specs = [one.lookup([base]), one.lookup([base], ["a"]), other.lookup([base])]
    assert len({results.digest(spec) for spec in specs}) == 3
    before = results.digest(specs[0])
    settings_file = tmp_path / "first/scheduler/scheduler_config.json"
    settings_file.write_text(settings_file.read_text().replace("1000", "999"))
    assert results.digest(specs[0]) != before
    with pytest.raises(ValueError, match="bases is empty"):
        Lookup(one.path, ())


def test_relatives_are_pipelines_of_their_own_names_made_of_development_items(chosen):
    drawings, things = zoo.relatives(chosen, 1, 2)
    assert [spec.name for spec in (drawings, things)] == ["first-drawings", "first-things"]
    development = {name for dataset in datasets.SETS for name in datasets.names(dataset, "development")}
    learned = [[part.item for part in spec.model.training] for spec in (drawings, things)]
    assert [len(items) for items in learned] == [1, 2]
    assert {item for items in learned for item in items} < development
    one, other = published(drawings), published(things)
    member = zoo.members(chosen, ITEMS, [str(one)], ["LoRA rank 64"])[0]
    assert member.base == str(one)
    assert leads.inspect(member.path).base_names[-1] == str(one)
    kind = zoo.members(chosen, ITEMS, [str(other)], ["folder"])[0]
    known = gathered(kind.lookup([chosen["lora"].base, str(one), str(other)]))
    assert (known.base, known.base_by) == (str(other), "its weights")


@pytest.mark.parametrize(
    ("items", "kinds", "message"),
    [
        (ITEMS, ["folder", "fodler"], "unknown kind 'fodler': choose from folder, LoRA rank 64"),
        ([], ["folder"], "no item or no base model"),
        (ITEMS[:2], ["folder", "rare token"], "'rare token' takes an object, and among the items is none"),
    ],
)
def test_what_cannot_be_made_is_refused(chosen, items, kinds, message):
    with pytest.raises(ValueError, match=message):
        zoo.members(chosen, items, ["a"], kinds)


def test_the_papers_checkpoints_are_those_of_its_table_7(tmp_path):
    (tmp_path / "mau-cat").mkdir()
    found = zoo.online(tmp_path)
    assert len(found) == 6
    first = found[0]
    assert (first.online, first.path, first.n_training) == ("sd-dreambooth-library/mau-cat",) * 2 + (5,)
    assert first.training == TrainingItem(str(tmp_path / "mau-cat"), "unknown")
    assert [member.training for member in found[1:]] == [None] * 5 == [member.training for member in zoo.online()][1:]
    assert [member.n_training for member in found] == [5, 5, 6, 14, 22, 138]
    assert {(member.method, member.base.rpartition("/")[2]) for member in found} == {
        ("dreambooth", "stable-diffusion-v1-5"),
        ("lora", "stable-diffusion-xl-base-1.0"),
    }
    assert first.caption is None


def test_what_cannot_be_had_is_left_out_with_a_line_each(chosen, tmp_path):
    base = chosen["lora"].base
    own = zoo.members(chosen, ITEMS, [base], ["folder"])[0]
    missing, unreadable = replace(own, online=str(tmp_path / "none")), replace(own, base=str(tmp_path / "neither"))
    found, lines = zoo.reachable([own, missing, unreadable])
    assert found == [own]
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path / 'none'} is left out: unknown model")
    assert lines[1].startswith("folder is left out: unknown model")


def test_suspects_hold_every_true_caption_and_each_only_once(chosen):
    known = zoo.suspects()
    assert len(set(known)) == len(known)
    items = [name for dataset in datasets.SETS for name in datasets.names(dataset)]
    made = zoo.members(chosen, items, ["a"])
    assert {member.caption for member in made} <= set(known)
    assert zoo.with_rare("an umbrella") == "an sks umbrella"


def test_the_listing_has_n0_and_the_size_of_the_weights(chosen):
    base = chosen["lora"].base
    made = zoo.members(chosen, ITEMS, [base], ["folder", "half precision", "kohya"])
    rows = zoo.listing(made).set_index("checkpoint")
    assert rows.N0.tolist() == [len(datasets.load_item(member.training.item).training) for member in made]
    assert rows.MB["folder"] == pytest.approx(
        sum(file.stat().st_size for file in published(made[0].model).glob("unet/*.safetensors")) / 1e6
    )
    assert rows.MB["kohya"] < rows.MB["half precision"]
    assert set(rows.base) == {"first"}
