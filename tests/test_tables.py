"""fx.tables: means, intervals and paired differences against pandas and SciPy, and the files of data/."""

import re
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fx import paths, tables
from fx.paths import COMPLETE, PAPER, ROOT, TABLES


def scored(n: int = 12, seed: int = 0) -> pd.DataFrame:
    """Scores of n items in two blocks and two arms: items differ a lot, cfg lies 0.02 above direct in block b only."""
    draw = np.random.default_rng(seed)
    rows = []
    for block in ("b", "a"):
        level = draw.uniform(0.1, 0.9, n)
        for arm in ("direct", "cfg"):
            gain = 0.02 if (block, arm) == ("b", "cfg") else 0.0
            score = level + gain + draw.normal(0, 0.01, n)
            rows.append(pd.DataFrame({"block": block, "arm": arm, "item": np.arange(n), "AS": score, "n": score * 2}))
    return pd.concat(rows, ignore_index=True)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))


def read(text: str) -> list[float]:
    assert re.fullmatch(r"-?\d\.\d{3}\.\.-?\d\.\d{3}", text), text
    return [float(number) for number in text.split("..")]


def test_summarise_gives_mean_interval_and_number_of_items_per_group():
    rows = scored().sample(frac=1, random_state=3)
    table = tables.summarise(rows, ["block", "arm"], ["AS", "n"])
    assert table.columns.tolist() == ["block", "arm", "items", "AS", "AS 95%", "n", "n 95%"]
    appearance = rows[["block", "arm"]].drop_duplicates()
    assert table[["block", "arm"]].to_numpy().tolist() == appearance.to_numpy().tolist()
    assert (table["items"] == 12).all()
    means = rows.groupby(["block", "arm"])[["AS", "n"]].mean()
    for line in table.to_dict("records"):
        group = rows[(rows.block == line["block"]) & (rows.arm == line["arm"])]
        for score in ("AS", "n"):
            assert line[score] == pytest.approx(means.loc[(line["block"], line["arm"]), score])
            expected = t_interval(group[score].to_numpy())
            assert read(line[f"{score} 95%"]) == pytest.approx(expected, abs=0.0005001)


def test_summarise_groups_by_one_column():
    rows = scored()
    table = tables.summarise(rows, ["arm"], ["AS"])
    assert table.arm.tolist() == ["direct", "cfg"]
    assert (table["items"] == 24).all()
    assert table.AS.tolist() == pytest.approx(rows.groupby("arm", sort=False).AS.mean().tolist())


def test_a_single_item_has_a_mean_and_a_difference_but_no_interval():
    rows = pd.DataFrame({"set": "s", "item": "x", "arm": ["cfg", "direct"], "AS": [0.75, 0.25]})
    table = tables.summarise(rows, ["arm"], ["AS"])
    assert table.AS.tolist() == [0.75, 0.25]
    assert table["AS 95%"].tolist() == [""] * 2
    line = tables.paired_difference(rows, "cfg", "direct", ["set"]).loc[0]
    assert line.difference == 0.5
    assert np.isnan([line.low, line.high, line.p]).all()
    assert line["excludes 0"] is pd.NA
    alone = tables.corrected(tables.paired_difference(rows, "cfg", "direct", ["set"])).loc[0]
    assert np.isnan(alone["p (Holm)"])
    assert alone["shown"] is pd.NA


def test_paired_difference_compares_item_by_item():
    rows = scored()
    table = tables.paired_difference(rows.sample(frac=1, random_state=0), "cfg", "direct", ["block"]).set_index("block")
    for block, group in rows.groupby("block"):
        merged = group[group.arm == "cfg"].merge(group[group.arm == "direct"], on="item")
        difference = (merged.AS_x - merged.AS_y).to_numpy()
        low, high = t_interval(difference)
        line = table.loc[block]
        assert line["items"] == 12
        assert line.difference == pytest.approx(difference.mean())
        assert (line.low, line.high) == pytest.approx((low, high))
        assert line.p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)
        assert line["excludes 0"] == (low > 0 or high < 0)
    assert table["excludes 0"].to_dict() == {"b": True, "a": False}
    # the items spread over 0.1..0.9, a comparison that is not paired could not see 0.02
    assert (table.high - table.low < 0.03).all()


def test_paired_difference_turns_round_with_its_arms_and_takes_the_asked_score():
    rows = scored()
    one = tables.paired_difference(rows, "cfg", "direct", ["block"])
    other = tables.paired_difference(rows, "direct", "cfg", ["block"], score="n")
    np.testing.assert_allclose(other.difference, -2 * one.difference)
    np.testing.assert_allclose(other[["low", "high"]], -2 * one[["high", "low"]].to_numpy(), atol=1e-12)
    assert other["excludes 0"].tolist() == one["excludes 0"].tolist()


def test_corrected_takes_the_rows_for_one_family():
    table = pd.DataFrame({"block": list("abcd"), "p": [0.01, 0.04, 0.03, 0.005]})
    found = tables.corrected(table)
    assert found["p (Holm)"].tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert found["shown"].tolist() == [True, False, False, True]
    assert tables.corrected(table, level=0.975)["shown"].tolist() == [False, False, False, True]
    assert tables.corrected(table[:1])["p (Holm)"].tolist() == pytest.approx([0.01])


def test_paired_difference_between_other_things_than_arms():
    rows = scored()
    renamed = rows.rename(columns={"arm": "rule"})
    expected = tables.paired_difference(rows, "cfg", "direct", ["block"])
    assert tables.paired_difference(renamed, "cfg", "direct", ["block"], between="rule").equals(expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(-0.5, 0.5))
@settings(max_examples=15, deadline=None)
def test_paired_difference_of_a_constant_gain_is_that_gain(levels, gain):
    items = [f"item {number}" for number in range(len(levels))]
    rows = pd.DataFrame({"item": items * 2, "arm": ["x"] * len(items) + ["y"] * len(items), "set": "all"})
    rows["AS"] = [*(level + gain for level in levels), *levels]
    line = tables.paired_difference(rows, "x", "y", ["set"]).loc[0]
    assert [line.difference, line.low, line.high] == pytest.approx([gain] * 3, abs=1e-9)


@pytest.mark.parametrize("drop", [[3], [3, 7], list(range(12))])
def test_paired_difference_refuses_arms_that_hold_other_items(drop):
    rows = scored()
    rows = rows[~((rows.block == "a") & (rows.arm == "cfg") & rows["item"].isin(drop))]
    with pytest.raises(ValueError, match="cfg and direct were not run on the same items") as error:
        tables.paired_difference(rows, "cfg", "direct", ["block"])
    assert str(drop) in str(error.value)
    assert "'a'" in str(error.value)


COLUMNS = {
    **{1: "dataset", 2: "base_model", 3: "defense", 4: "method", 5: "extracted_3_words", 6: "memory_MB"},
    **{7: "checkpoint", 8: "data", 9: "artists", 10: "images", 11: "prompt"},
}


@pytest.mark.parametrize("number", COLUMNS)
def test_paper_returns_the_table_of_that_number_with_numbers_as_numbers(number):
    table = tables.paper(number)
    assert COLUMNS[number] in table
    text = pd.read_csv(PAPER / f"table{number:02d}.csv", dtype=str)
    assert table.shape == text.shape
    assert (table.isna() == text.isna()).all(axis=None)
    for name in table.columns.intersection(["AS", "A-ESR_0.6", "DINO", "CLIP-IQA", "memory_MB"]):
        assert pd.api.types.is_numeric_dtype(table[name])
        assert table[name].dropna().tolist() == [float(cell) for cell in text[name].dropna()]


@pytest.mark.parametrize("number", [0, 12])
def test_paper_refuses_a_table_the_paper_does_not_have(number):
    with pytest.raises(FileNotFoundError, match=f"no table {number}: .* 1 to 11"):
        tables.paper(number)


def test_save_writes_what_reads_back_to_six_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLES", tmp_path / "results")
    rows = pd.DataFrame(
        {"item": ["style/zazou", "a, b"], "AS": [1 / 3, np.nan], "lr": [2.0e-5, 123456.7], "n": [3, 4]}, index=[7, 8]
    )
    path = tables.save(rows, "table01", "smoke")
    assert path == tmp_path / "results/smoke/table01.csv"
    again = pd.read_csv(path)
    pd.testing.assert_frame_equal(again, rows.reset_index(drop=True), rtol=5e-6)
    assert "0.333333," in path.read_text()
    assert tables.save(rows[:1], "table01", "smoke") == path
    assert len(pd.read_csv(path)) == 1


@pytest.mark.parametrize(
    ("value", "place"), [(None, ROOT), ("", ROOT), ("some/place", ROOT / "some/place"), ("/a/place", Path("/a/place"))]
)
def test_fx_outputs_moves_tables_and_figures(value, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the working directory does not count
    monkeypatch.delenv("FX_OUTPUTS", raising=False)
    if value is not None:
        monkeypatch.setenv("FX_OUTPUTS", value)
    found = runpy.run_path(paths.__file__)
    assert (found["TABLES"], found["FIGURES"]) == (place / "data/results", place / "figures")
    assert found["PAPER"] == PAPER


def test_a_table_of_the_complete_run_is_the_committed_file_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SHIPPED_TABLES", tmp_path)
    monkeypatch.setattr(tables, "TABLES", tmp_path / "elsewhere")  # where this run writes does not count
    assert tables.complete("table01") == (
        f"table01.csv: there is no complete run (fx.reproduce --profile {COMPLETE}) yet"
    )
    assert "(fx.reproduce --profile paper) yet" in tables.complete("table01", "paper")
    for profile, value in ((COMPLETE, 0.25), ("paper", 0.5)):
        (tmp_path / profile).mkdir()
        pd.DataFrame({"arm": ["cfg"], "AS": [value]}).to_csv(tmp_path / profile / "table01.csv", index=False)
        assert tables.complete("table01", profile).to_dict("records") == [{"arm": "cfg", "AS": value}]
    assert tables.complete("table01").AS.tolist() == [0.25]


def test_the_readme_shows_the_shipped_table_1():
    table = pd.read_csv(TABLES / "mini/table01.csv").set_index(["dataset", "method", "arm"]).AS
    apart = pd.read_csv(TABLES / "mini/table01-differences.csv").query("baseline == 'cfg' and score == 'AS'")
    apart = apart.set_index(["dataset", "method"])
    names = {"style": "artists", "object": "objects"}, {"dreambooth": "DreamBooth", "lora": "LoRA"}
    expected = []
    for key in apart.index:
        means = [table[(*key, arm)] for arm in ("direct", "cfg", "finextract")]
        low, high = apart.loc[key, ["low", "high"]]
        cells = [f"{value:.3f}".replace("0.", ".", 1) for value in (*means, low, high)]
        expected.append(
            f"| {names[0][key[0]]}, {names[1][key[1]]} | {' | '.join(cells[:3])} | {cells[3]} to {cells[4]} |"
        )
    found = re.findall(r"^\| (?:artists|objects), .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found == expected


def test_the_readme_shows_the_scores_of_the_demo():
    rows = pd.read_csv(TABLES / "mini/demo.csv").astype({"A-ESR_strict": float})  # whole numbers in the file
    expected = rows.to_string(index=False, float_format="{:.3f}".format)
    assert expected in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_difference_of_no_rows_is_an_empty_table_that_can_be_kept_and_read(tmp_path):
    rows = scored(5)
    empty = tables.paired_difference(rows[:0], "cfg", "direct", ["block"])
    empty.to_csv(tmp_path / "empty.csv", index=False)
    found = pd.read_csv(tmp_path / "empty.csv")
    assert list(found.columns) == list(tables.paired_difference(rows, "cfg", "direct", ["block"]).columns)
    assert found.empty
    assert tables.in_words(empty, "block") == ""


def test_differences_takes_each_score_over_the_items_that_have_it():
    rows = scored(5).assign(other=lambda table: table.AS * 3, none=np.nan)
    rows.loc[rows["item"] == 2, "other"] = np.nan
    table = tables.differences(rows, "cfg", ["direct"], ["block"], ["AS", "other", "none"])
    assert table.score.tolist() == ["AS", "AS", "other", "other"]
    assert table["items"].tolist() == [5, 5, 4, 4]
    assert (table.baseline == "direct").all()
    alone = tables.paired_difference(rows[rows["item"] != 2], "cfg", "direct", ["block"], "other")
    pd.testing.assert_frame_equal(table[2:][alone.columns].reset_index(drop=True), alone)


def test_scores_stand_beside_those_of_controls_over_the_same_items():
    rows = scored(4).rename(columns={"AS": "AS (eye)"})
    rows["AS_controls (eye)"] = np.where(rows["item"] == 1, np.nan, rows["AS (eye)"] / 2)
    table = tables.beside_controls(rows, ["block", "arm"], ["AS (eye)"])
    assert table.columns.tolist() == ["block", "arm", "items", "AS (eye)", "AS_controls (eye)"]
    assert (table["items"] == 3).all()
    np.testing.assert_allclose(table["AS (eye)"], 2 * table["AS_controls (eye)"])
    kept = rows[rows["item"] != 1].groupby(["block", "arm"], sort=False)["AS (eye)"].mean()
    assert table["AS (eye)"].tolist() == pytest.approx(kept.tolist())
    assert tables.beside_controls(rows[rows["item"] == 1], ["block"], ["AS (eye)"]).empty


def test_differences_in_words_say_what_their_intervals_show():
    rows = pd.DataFrame(
        {
            "method": ["lora", "lora", "dreambooth", "dreambooth"],
            "compared": ["a", "b", "a", "b"],
            "difference": [0.1234, -0.05, 0.01, 0.2],
            "low": [0.0306, -0.09, -0.02, np.nan],
            "high": [0.2, -0.01, 0.04, np.nan],
        }
    )
    assert tables.in_words(rows, "method", "compared").splitlines() == [
        "lora, a: +0.123 (0.031 to 0.200), above 0",
        "lora, b: -0.050 (-0.090 to -0.010), below 0",
        "dreambooth, a: +0.010 (-0.020 to 0.040), not shown to differ from 0",
        "dreambooth, b: +0.200 (one item), no interval",
    ]
    assert tables.in_words("x.csv: there is no complete run yet", "method") == "x.csv: there is no complete run yet"
