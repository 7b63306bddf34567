"""The summary of claims: verdicts by interval, every table and figure of the paper, the committed page."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from fx import summary
from fx.paths import COMPLETE, ROOT, SHIPPED_TABLES
from fx.summary import FAILS, HOLDS, MISSING, OPEN, PICTURE, Claim

NAN = math.nan


def claim(**changes) -> Claim:
    fields = {"of": "Table 1", "claim": "c", "notebook": "03", "table": "t", "expected": "above", "named": ("arm",)}
    return Claim(**fields | changes)


def rows(*intervals: tuple[float, float], **columns) -> pd.DataFrame:
    low, high = zip(*intervals, strict=True)
    names = [f"row {number}" for number in range(len(low))]
    return pd.DataFrame({"name": names, "estimate": np.add(low, high) / 2, "low": low, "high": high} | columns)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Empty folders of tables and figures; a function that puts a table there."""
    monkeypatch.setattr(summary, "TABLES", tmp_path / "results")
    monkeypatch.setattr(summary, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(summary.plots, "FIGURES", tmp_path / "figures")
    (tmp_path / "results" / "p").mkdir(parents=True)
    (tmp_path / "figures").mkdir()

    def put(name: str, table: pd.DataFrame) -> None:
        table.to_csv(tmp_path / "results" / "p" / f"{name}.csv", index=False)

    return put


# verdicts


@pytest.mark.parametrize(
    ("expected", "interval", "found"),
    [
        ("above", (0.1, 0.2), HOLDS),
        ("above", (-0.1, 0.2), OPEN),
        ("above", (0.0, 0.2), OPEN),
        ("above", (-0.2, -0.1), FAILS),
        ("above", (NAN, NAN), OPEN),
        ("below", (-0.2, -0.1), HOLDS),
        ("below", (-0.2, 0.1), OPEN),
        ("below", (0.1, 0.2), FAILS),
    ],
)
def test_a_row_is_judged_by_its_whole_interval(expected, interval, found):
    assert summary.row_verdict(claim(expected=expected), {"low": interval[0], "high": interval[1]}) == found


@pytest.mark.parametrize(
    ("interval", "found"),
    [((0.96, 1.04), HOLDS), ((0.9, 1.04), OPEN), ((0.96, 1.1), OPEN), ((1.06, 1.2), FAILS), ((0.5, 0.9), FAILS)],
)
def test_a_claim_of_equality_asks_for_an_interval_within_bounds(interval, found):
    asked = claim(expected="", within=(0.95, 1.05))
    assert summary.row_verdict(asked, {"low": interval[0], "high": interval[1]}) == found


def test_against_moves_the_line_that_an_interval_must_lie_beyond():
    assert summary.row_verdict(claim(against=1.0), {"low": 0.5, "high": 0.9}) == FAILS
    assert summary.row_verdict(claim(against=1.0), {"low": 1.1, "high": 1.9}) == HOLDS


def test_what_a_correction_does_not_show_is_not_shown():
    assert summary.row_verdict(claim(), {"low": 0.1, "high": 0.2, "shown": False}) == OPEN
    assert summary.row_verdict(claim(), {"low": 0.1, "high": 0.2, "shown": True}) == HOLDS
    assert summary.row_verdict(claim(), {"low": -0.2, "high": -0.1, "shown": False}) == FAILS


@pytest.mark.parametrize(
    ("table", "least", "found"),
    [
        (None, 1, MISSING),
        (rows((0.1, 0.2), (0.1, 0.3)), 2, HOLDS),
        (rows((0.1, 0.2), (0.1, 0.3)), 3, OPEN),
        (rows((0.1, 0.2), (-0.1, 0.3)), 2, OPEN),
        (rows((0.1, 0.2), (-0.3, -0.1)), 2, FAILS),
        (rows((0.1, 0.2)).iloc[:0], 1, OPEN),
    ],
)
def test_a_claim_holds_only_if_all_of_its_rows_do_and_fails_by_a_single_one(table, least, found):
    assert summary.verdict(claim(least=least), table) == found


def test_rows_are_chosen_by_whole_words_of_their_columns_and_named_as_a_reader_says_it(outputs):
    table = pd.DataFrame({"arm": ["cfg", "cfg_more", "direct"], "k": [-0.02, -0.02, 0.1], "method": ["lora"] * 3})
    outputs("t", table.assign(difference=[1.0, 2.0, 3.0], low=0.5, high=4.0))
    found = summary.selected(claim(rows={"arm": "cfg|direct", "k": r"-0\.02"}, named=("method", "arm")), "p")
    assert found[["name", "estimate"]].values.tolist() == [["LoRA, CFG", 1.0]]
    assert "shown" not in found


def test_a_ratio_is_an_estimate_too_and_a_missing_table_is_none(outputs):
    outputs("t", pd.DataFrame({"arm": ["x"], "ratio": [1.3], "low": [1.2], "high": [1.4]}))
    assert summary.selected(claim(), "p").estimate.tolist() == [1.3]
    assert summary.selected(claim(table="other"), "p") is None


def test_a_column_that_a_claim_asks_for_must_be_there(outputs):
    outputs("t", pd.DataFrame({"arm": ["x"], "difference": [1.0], "low": [0.0], "high": [2.0]}))
    with pytest.raises(ValueError, match=r"t\.csv has no column dataset, which Table 1 asks for"):
        summary.selected(claim(rows={"dataset": "style"}), "p")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": "Table 12"}, "'Table 12' is no table or figure of the paper"),
        ({"picture": "fig02"}, "name a table or a picture, and not both"),
        ({"table": ""}, "name a table or a picture, and not both"),
        ({"expected": "higher"}, "expected is one of above, below, or within is given"),
        ({"within": (0.9, 1.1)}, "expected is one of above, below, or within is given"),
    ],
)
def test_a_claim_that_cannot_be_tested_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        claim(**changes)


# the claims of the paper


def test_every_table_and_figure_of_the_paper_has_a_claim():
    assert {found.of for found in summary.claims()} == set(summary.OBJECTS)
    assert len({found.claim for found in summary.claims()}) == len(summary.claims())  # the page has a line for each


@pytest.mark.parametrize("found", summary.claims(), ids=lambda found: f"{found.of} {found.claim}"[:60])
def test_a_claims_table_or_picture_is_one_that_its_notebook_makes(found):
    path = summary.notebook_of(found.notebook)
    text, name = path.read_text(), found.table or found.picture
    start, _, end = name.partition("-")  # "table01" + part with the part "-primary", or f"fig03-{item}-…"
    in_parts = rf"\"{start}" in text and rf"\"-{end}\"" in text
    formatted = bool(found.picture) and rf"f\"{start}-{{" in text
    assert rf"\"{name}\"" in text or in_parts or formatted, f"{path.name} makes no {name}"


@pytest.mark.parametrize(
    "found", [c for c in summary.claims() if c.table], ids=lambda found: f"{found.of} {found.claim}"[:60]
)
def test_a_claim_finds_its_rows_in_a_committed_table(found, monkeypatch):
    monkeypatch.setattr(summary, "TABLES", SHIPPED_TABLES)
    chosen = summary.selected(found, COMPLETE)
    assert chosen is None or len(chosen) >= found.least


def test_the_committed_summary_is_made_of_the_committed_tables(monkeypatch):
    monkeypatch.setattr(summary, "TABLES", SHIPPED_TABLES)
    table = summary.judged(COMPLETE)
    folder = SHIPPED_TABLES / COMPLETE
    assert (folder / "summary.md").read_text() == summary.as_markdown(table, COMPLETE), "run python -m fx.summary"
    stored = pd.read_csv(folder / "summary.csv", dtype={"notebook": str})
    assert stored.verdict.tolist() == table.verdict.tolist()
    assert np.allclose(stored.estimate, table.estimate.astype(float), rtol=1e-5, equal_nan=True)


# the page and the figure


def test_the_page_says_for_each_claim_what_was_found(outputs, tmp_path, monkeypatch):
    two = [
        claim(claim="one | two"),
        claim(claim="gone", table="other"),
        claim(claim="look", table="", expected="", picture="f"),
    ]
    monkeypatch.setattr(summary, "claims", lambda: two)
    outputs("t", pd.DataFrame({"arm": ["cfg"], "difference": [0.15], "low": [0.1], "high": [0.2]}))
    (tmp_path / "figures" / "f-p.png").touch()
    table = summary.judged("p")
    assert table.verdict.tolist() == [HOLDS, MISSING, PICTURE]
    page = summary.as_markdown(table, "p")
    assert "Verdicts on 2 claims that can be tested: *holds* 1, *not run* 1." in page
    assert "✓ CFG +0.150 (0.100 to 0.200)" in page
    assert "[f](../../../figures/f-p.png)" in page
    assert "[03](../../../notebooks/03-extraction.ipynb)" in page


def test_of_many_comparisons_the_page_gives_the_number_and_the_ends(outputs, monkeypatch):
    monkeypatch.setattr(summary, "claims", lambda: [claim()])
    numbers = np.arange(9) / 10
    outputs(
        "t",
        pd.DataFrame({"arm": list("abcdefghi"), "difference": numbers, "low": numbers - 0.05, "high": numbers + 0.05}),
    )
    page = summary.as_markdown(summary.judged("p"), "p")
    assert (
        "8 of 9 as claimed; the lowest and the highest:<br>a +0.000 (-0.050 to 0.050)<br>i +0.800 (0.750 to 0.850)"
        in page
    )


def test_a_ratio_is_no_difference_on_the_page(outputs, monkeypatch):
    of_ratio = claim(table="table06-ratios", expected="", within=(0.9, 1.1))
    monkeypatch.setattr(summary, "claims", lambda: [of_ratio])
    outputs("table06-ratios", pd.DataFrame({"arm": ["cfg"], "ratio": [1.3], "low": [1.2], "high": [1.4]}))
    assert "✗ CFG 1.300 times (1.200 to 1.400)" in summary.as_markdown(summary.judged("p"), "p")


def test_the_figure_shows_every_difference_with_its_interval(outputs, monkeypatch):
    of_ratio = claim(claim="d", table="table06-ratios", expected="", within=(0.9, 1.1))
    monkeypatch.setattr(summary, "claims", lambda: [claim(), of_ratio])
    outputs("t", pd.DataFrame({"arm": ["a", "b"], "difference": [0.1, -0.2], "low": [0.05, -0.5], "high": [0.15, 0.1]}))
    outputs("table06-ratios", pd.DataFrame({"arm": ["a"], "ratio": [1.0], "low": [0.9], "high": [1.1]}))
    (axes,) = summary.drawing(summary.judged("p")).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Table 1: a", "Table 1: b"]
    ends = [segment.tolist() for bars in axes.containers for segment in bars[2][0].get_segments()]
    assert np.allclose(ends, [[[0.05, 1], [0.15, 1]], [[-0.5, 0], [0.1, 0]]])
    assert "c" in [text.get_text() for text in axes.texts]


def test_the_command_writes_the_page_the_table_and_the_figure(outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(summary, "claims", lambda: [claim()])
    outputs("t", pd.DataFrame({"arm": ["a"], "difference": [0.1], "low": [0.05], "high": [0.15]}))
    summary.main(["--profile", "p"])
    written = capsys.readouterr().out.split()
    assert [path.rpartition("/")[2] for path in written] == ["summary.csv", "summary-p.png", "summary.md"]
    assert (tmp_path / "figures" / "summary-p.png").stat().st_size > 1000


def test_a_profile_without_results_is_named(outputs):
    with pytest.raises(ValueError, match=r"run the notebooks first .python -m fx.reproduce --profile nothing"):
        summary.main(["--profile", "nothing"])


def test_what_has_a_verdict_is_what_readme_and_the_first_page_say():
    table = pd.read_csv(SHIPPED_TABLES / COMPLETE / "summary.csv").drop_duplicates("claim")
    tested = set(table.of[table.verdict.isin([HOLDS, FAILS, OPEN])])
    figures = {"4a", "4b", "5a", "5b", "8", "9", "10"}
    assert tested == {f"Table {n}" for n in range(1, 12)} | {f"Figure {n}" for n in figures}
    assert set(table.of[~table.of.isin(tested)]) == {f"Figure {n}" for n in (1, 2, 3, 6, 7)}
    for page in ("README.md", "docs/index.md"):
        words = " ".join((ROOT / page).read_text().split())
        assert re.search(r"for Tables 1 to 11 and Figures 4, 5, 8, 9(,| and) 10[.;]", words), page
