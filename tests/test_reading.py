"""fx.mini.reading: a blind reading can be repeated, and no sheet says what its pictures should show."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fx.mini import reading, sd, training

N = 80


@pytest.fixture
def pictures():
    """80 plain pictures, each of a grey of its own."""
    return np.full((N, 64, 64, 3), 1, np.uint8) * np.arange(10, 10 + N, dtype=np.uint8).reshape(N, 1, 1, 1)


def greys_on(path) -> list[int]:
    """The pictures' greys on a sheet in reading order, each found as a plain square of SIDE pixels."""
    page = np.asarray(Image.open(path))
    across, down = reading.SIDE + 8, reading.SIDE + 26
    found = []
    for y in range(0, page.shape[0], down):
        for x in range(0, page.shape[1], across):
            inside = page[y + 22 : y + 22 + reading.SIDE, x + 4 : x + 4 + reading.SIDE]
            assert (inside == inside[0, 0, 0]).all()
            found.append(int(inside[0, 0, 0]))
    return found


def test_the_prompts_are_those_that_readers_were_asked_about_each_once():
    asked = reading.prompts()
    assert asked.groupby("captions", sort=False).number.apply(list).to_dict() == {
        "learned": list(range(40)),
        "held out": list(range(40)),
    }
    assert set(reading.shipped().pictures) >= {848_000}


def test_sheets_hold_every_picture_once_in_mixed_order_and_the_key_knows_it(tmp_path, pictures):
    asked = reading.prompts()
    sheets = reading.write(tmp_path / "new", "some", pictures, asked)
    assert [path.name for path in sheets] == ["some-1.png", "some-2.png"]
    greys = [grey for path in sheets for grey in greys_on(path)]
    assert sorted(greys) == list(range(10, 10 + N))
    key = json.loads((tmp_path / "new/some-key.json").read_text())
    assert list(key) == [str(number) for number in range(1, N + 1)]
    for entry, grey in zip(key.values(), greys, strict=True):
        assert entry == asked.iloc[grey - 10].to_dict()
    assert abs(np.corrcoef(greys, np.arange(N))[0, 1]) < 0.3, "mixed"
    on_first = [entry["captions"] for entry in list(key.values())[:40]]
    assert 10 < on_first.count("learned") < 30, "both groups on both sheets"
    again = reading.write(tmp_path / "again", "some", pictures, asked)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in sheets]
    assert greys_on(reading.write(tmp_path / "other", "some", pictures, asked, seed=1)[0]) != greys[:40]


def test_a_sheet_has_numbers_above_the_pictures_and_no_caption(pictures):
    page = np.asarray(reading.sheet(pictures[:5], 41))
    assert page.shape[:2] == (reading.SIDE + 26, reading.COLUMNS * (reading.SIDE + 8))
    assert (page[:22, : reading.SIDE] < 128).any(), "a number"
    same = np.asarray(reading.sheet(pictures[:5], 41))
    assert np.array_equal(page, same)
    assert not np.array_equal(page, np.asarray(reading.sheet(pictures[:5], 42)))


def test_answers_come_back_beside_their_captions_in_the_order_of_the_prompts(tmp_path, pictures):
    asked = reading.prompts()
    reading.write(tmp_path, "some", pictures, asked)
    key = json.loads((tmp_path / "some-key.json").read_text())
    (answers := tmp_path / "answers.json").write_text(
        json.dumps({place: f"it is {entry['caption']}" for place, entry in key.items()})
    )
    rows = reading.beside_captions(tmp_path / "some-key.json", answers)
    pd.testing.assert_frame_equal(rows[["captions", "number", "caption"]], asked)
    assert rows.answer.tolist() == [f"it is {caption}" for caption in asked.caption]
    answers.write_text(json.dumps(dict.fromkeys(list(key)[1:], "a dog") | {"81": "a cat"}))
    with pytest.raises(ValueError, match=r"pictures 1, 81: give each one answer"):
        reading.beside_captions(tmp_path / "some-key.json", answers)


def test_samples_are_drawn_group_by_group_as_notebook_00_does(monkeypatch):
    calls = []

    def draw(pipeline, captions, steps, seed):
        calls.append((captions, steps, seed))
        return np.full((len(captions), 2, 2, 3), len(calls), np.uint8)

    monkeypatch.setattr(sd, "draw", draw)
    asked = reading.prompts()
    drawn = reading.draw(None, asked, steps=7, seed=3)
    assert drawn[:, 0, 0, 0].tolist() == [1] * 40 + [2] * 40
    assert [captions for captions, _, _ in calls] == [asked.caption[:40].tolist(), asked.caption[40:].tolist()]
    assert {call[1:] for call in calls} == {(7, 3)}


def test_the_command_reads_a_training_that_goes_on(tmp_path, monkeypatch, pictures, capsys):
    given = {}

    def draw(pipeline, asked, **_):
        given["weights"] = next(iter(pipeline.unet.parameters())).clone()
        return pictures

    monkeypatch.setattr(reading, "draw", draw)
    state = {name: torch.full_like(value, 0.25) for name, value in sd.build().state_dict().items()}
    (place := tmp_path / "going-on").mkdir()
    torch.save({"average": state, "model": {}, "step": 7}, place / "state.pt")
    reading.main(["--training", str(place), "--folder", str(tmp_path / "sheets")])
    assert (given["weights"] == 0.25).all()
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {
        *("going-on-1.png", "going-on-2.png", "going-on-key.json")
    }
    assert "7 steps" in capsys.readouterr().out
    (answers := tmp_path / "a.json").write_text(json.dumps({str(n): "a dog" for n in range(1, N + 1)}))
    reading.main(["--name", "going-on", "--folder", str(tmp_path / "sheets"), "--answers", str(answers)])
    assert capsys.readouterr().out.count("a dog") >= N


def test_load_average_gives_the_averaged_weights_and_not_the_last(tmp_path):
    def loss(model, generator):
        return {"loss": (model.weight - 1).pow(2).mean()}

    torch.manual_seed(0)
    schedule = training.Schedule(steps=30, lr=0.1, warmup=1, ema=0.9)
    average, _ = training.train(torch.nn.Linear(3, 1), loss, schedule, tmp_path)
    fresh = torch.nn.Linear(3, 1)
    assert training.load_average(fresh, tmp_path) == 30
    assert torch.equal(fresh.weight, average.weight)
    last = torch.load(tmp_path / "state.pt", weights_only=True)["model"]["weight"]
    assert not torch.equal(fresh.weight, last)
