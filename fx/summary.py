"""What came out, in one page: the paper's claims, our numbers with their intervals, and whether each claim holds here.

python -m fx.summary [--profile mini]     # data/results/<profile>/summary.md, summary.csv and figures/summary-<profile>.png

The claims stand in fx/claims.yaml, with the rows of the notebooks' tables that test them. A claim *holds* if every one of
these rows lies on the claimed side with its whole 95% interval, it *does not hold* if one lies on the other, and else it
is *not shown*. No number is typed in by hand.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import yaml
from matplotlib.figure import Figure

from fx import command, plots
from fx.paths import COMPLETE, FIGURES, NOTEBOOKS, TABLES

FILE = Path(__file__).parent / "claims.yaml"
OBJECTS = (
    *(f"Table {n}" for n in range(1, 12)),
    *(f"Figure {n}" for n in (1, 2, 3, "4a", "4b", "5a", "5b", *range(6, 11))),
)
HOLDS, FAILS, OPEN, MISSING, PICTURE = "holds", "does not hold", "not shown", "not run", "a picture"
SIDES = ("above", "below")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and where it is tested; the fields are those of fx/claims.yaml."""

    of: str
    claim: str
    notebook: str
    table: str = ""
    rows: dict[str, str] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    expected: str = ""
    within: tuple[float, float] | None = None
    against: float = 0.0
    least: int = 1
    picture: str = ""

    def __post_init__(self):
        if self.of not in OBJECTS:
            raise ValueError(f"{self.of!r} is no table or figure of the paper: choose from {', '.join(OBJECTS)}")
        if bool(self.table) == bool(self.picture):
            raise ValueError(f"{self.of}, {self.claim!r}: name a table or a picture, and not both")
        if self.table and (self.expected in SIDES) == (self.within is not None):
            raise ValueError(f"{self.of}, {self.claim!r}: expected is one of {', '.join(SIDES)}, or within is given")


def claims() -> list[Claim]:
    """All claims, in the order of fx/claims.yaml; ValueError for an entry that says too little or too much."""
    entries = yaml.safe_load(FILE.read_text())
    return [
        Claim(**entry | {name: tuple(entry[name]) for name in ("named", "within") if name in entry})
        for entry in entries
    ]


# one claim


def selected(claim: Claim, profile: str) -> pd.DataFrame | None:
    """The rows of the profile's table that test a claim; None where there is no such table.

    Columns: name (what tells the rows apart), estimate, low, high, and shown where comparisons were corrected together.
    ValueError for a table that lacks a column that the claim asks for.
    """
    path = TABLES / profile / f"{claim.table}.csv"
    if not path.is_file():
        return None
    rows = pd.read_csv(path)
    if missing := {*claim.rows, *claim.named, "low", "high"} - set(rows.columns):
        raise ValueError(f"{path.name} has no column {', '.join(sorted(missing))}, which {claim.of} asks for")
    for column, pattern in claim.rows.items():
        rows = rows[rows[column].astype(str).str.fullmatch(pattern)]
    names = [", ".join(_word(row[column]) for column in claim.named) for row in rows.to_dict("records")]
    estimate = rows["difference"] if "difference" in rows else rows["ratio"]
    found = pd.DataFrame(
        {"name": names, "estimate": estimate.to_numpy(), "low": rows.low.to_numpy(), "high": rows.high.to_numpy()}
    )
    return found.assign(shown=rows.shown.to_numpy()) if "shown" in rows else found


def _word(value: object) -> str:
    return plots.LABELS.get(value, str(value))


def row_verdict(claim: Claim, row: dict) -> str:
    """Whether one row supports a claim, by its interval; where rows were corrected together also by that."""
    low, high = row["low"], row["high"]
    if math.isnan(low):
        return OPEN
    if claim.within is not None:
        least, most = claim.within
        if least <= low and high <= most:
            return HOLDS
        return FAILS if low > most or high < least else OPEN
    beyond, against = (low > claim.against, high < claim.against)[:: 1 if claim.expected == "above" else -1]
    if beyond and bool(row.get("shown", True)):
        return HOLDS
    return FAILS if against else OPEN


def verdict(claim: Claim, rows: pd.DataFrame | None) -> str:
    """The verdict on a claim from those on its rows: all hold, or one speaks against it, or neither."""
    if rows is None:
        return MISSING
    found = [row_verdict(claim, row) for row in rows.to_dict("records")]
    if FAILS in found:
        return FAILS
    return HOLDS if found and len(found) >= claim.least and set(found) == {HOLDS} else OPEN


def judged(profile: str) -> pd.DataFrame:
    """A row per tested comparison, and one for each claim without any, in the order of the claims.

    Columns: of, claim, notebook, cell, table, verdict (of the claim), compared, estimate, low, high, here (of the row).
    """
    lines = []
    for claim in claims():
        told = {"of": claim.of, "claim": claim.claim, "notebook": claim.notebook, "cell": cell_of(claim)}
        told["table"] = claim.table or claim.picture
        if claim.picture:
            there = (FIGURES / f"{claim.picture}-{profile}.png").is_file()
            lines.append(told | {"verdict": PICTURE if there else MISSING})
            continue
        rows = selected(claim, profile)
        told["verdict"] = verdict(claim, rows)
        for row in [] if rows is None else rows.to_dict("records"):
            interval = {name: row[name] for name in ("estimate", "low", "high")}
            lines.append(told | {"compared": row["name"], **interval, "here": row_verdict(claim, row)})
        if rows is None or rows.empty:
            lines.append(told)
    columns = ["of", "claim", "notebook", "cell", "table", "verdict", "compared", "estimate", "low", "high", "here"]
    return pd.DataFrame(lines, columns=columns)


def notebook_of(number: str) -> Path | None:
    """The file of a notebook, by its number; None if there is none yet."""
    return next(iter(sorted(NOTEBOOKS.glob(f"{number}-*.ipynb"))), None)


def cell_of(claim: Claim) -> str:
    """Where a notebook shows the claim's table or picture of the complete run, as "In [7]"; "" where it does not."""
    path = notebook_of(claim.notebook)
    wanted = re.compile(rf"complete\(\"{re.escape(claim.table or claim.picture)}\"")
    for cell in json.loads(path.read_text())["cells"] if path else ():
        if cell["cell_type"] == "code" and cell["execution_count"] and wanted.search("".join(cell["source"])):
            return f"In [{cell['execution_count']}]"
    return ""


# the page

MINI = (
    "All of this was measured on small models of drawings: nothing here is a statement about Stable Diffusion. The "
    "checkpoints of Tables 4 and 7 and Figure 1 were made here, in the ways in which people make and publish theirs "
    "(notebook 08)."
)


def as_markdown(table: pd.DataFrame, profile: str) -> str:
    """The summary as a page; links lead from data/results/<profile> to the notebooks and tables."""
    said = table.drop_duplicates("claim")
    pictures = {claim.claim for claim in claims() if claim.picture}
    tested = said[~said.claim.isin(pictures)]
    count = tested.verdict.value_counts()
    numbers = ", ".join(f"*{word}* {count[word]}" for word in (HOLDS, FAILS, OPEN, MISSING) if word in count)
    lines = [
        f"# What came out: profile {profile}",
        "",
        "Written by `.venv/bin/python -m fx.summary` from the tables beside it; the claims are those of the paper, as "
        "fx/claims.yaml words them. A claim *holds* if every comparison lies on the claimed side with its whole 95% "
        "interval, it *does not hold* if one lies on the other side, else it is *not shown*. Table 1's first claim is "
        "corrected for its four comparisons (Holm); all others are exploratory. *not run*: this profile has no such "
        "table or picture yet. ✓: the whole interval is on the claimed side, ✗: on the other, ·: neither; *a picture*: "
        "there is nothing to test. "
        "Numbers are differences with intervals over items; in Table 6 ratios, with intervals over repeated measurements.",
        "",
        *([MINI, ""] if profile == COMPLETE else []),
        f"Verdicts on {len(tested)} claims that can be tested: {numbers}.",
        "",
        f"![every difference with its interval](../../../figures/summary-{profile}.png)",
        "",
        "| paper | claim | verdict | here | notebook |",
        "|---|---|---|---|---|",
    ]
    for claim, rows in table.groupby("claim", sort=False):
        first = rows.iloc[0]
        lines.append(
            f"| {first.of} | {claim} | {_bold(first.verdict)} | {_in_short(rows, profile)} | {_where(first)} |"
        )
    return "\n".join([*lines, ""])


def _bold(word: str) -> str:
    return f"**{word}**" if word in (HOLDS, FAILS, OPEN) else word


def _in_short(rows: pd.DataFrame, profile: str, most: int = 6) -> str:
    """The comparisons of a claim in a cell: name, estimate and interval; of many how many hold, and the ends."""
    first = rows.iloc[0]
    if first.verdict == PICTURE:
        return f"[{first.table}](../../../figures/{first.table}-{profile}.png)"
    if pd.isna(first.compared):
        return ""
    ratio = first.claim in _of_ratios()
    shown = [f"{_mark(row)} {row['compared']} {_numbers(row, ratio)}" for row in rows.to_dict("records")]
    if len(shown) > most:
        good = int((rows.here == HOLDS).sum())
        low, high = rows.loc[rows.estimate.idxmin()], rows.loc[rows.estimate.idxmax()]
        ends = [f"{row.compared} {_numbers(row, ratio)}" for row in (low, high)]
        shown = [f"{good} of {len(rows)} as claimed; the lowest and the highest:", *ends]
    return "<br>".join(text.strip().replace("|", "\\|") for text in shown)


def _mark(row: dict) -> str:
    return {HOLDS: "✓", FAILS: "✗"}.get(row["here"], "·")


def _numbers(row, ratio: bool) -> str:
    estimate = f"{row['estimate']:.3f} times" if ratio else f"{row['estimate']:+.3f}"
    if math.isnan(row["low"]):
        return f"{estimate} (one item)"
    return f"{estimate} ({row['low']:.3f} to {row['high']:.3f})"


def _of_ratios() -> set[str]:
    """The claims whose numbers are ratios."""
    return {claim.claim for claim in claims() if claim.within or claim.against}


def _where(row: pd.Series) -> str:
    path = notebook_of(row.notebook)
    name = f"[{row.notebook}](../../../notebooks/{path.name})" if path else f"{row.notebook}, not there yet"
    return f"{name}, {row.cell}" if row.cell else name


def drawing(table: pd.DataFrame) -> Figure | None:
    """Every difference with its interval, under the claim that it tests; None where nothing was compared."""
    rows = table[table.estimate.notna() & ~table.claim.isin(_of_ratios())]
    if rows.empty:
        return None
    colours, heights, labels = {HOLDS: "C0", FAILS: "C3", OPEN: "0.6"}, [], []
    n = len(rows) + rows.claim.nunique()
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.19 * n))
    place = n
    for claim, block in rows.groupby("claim", sort=False):
        place -= 1
        title = {"fontsize": 7, "style": "italic", "va": "center", "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
        axes.text(0.01, place, claim, transform=axes.get_yaxis_transform(), **title)
        axes.axhline(place + 0.5, color="0.85", linewidth=0.6)
        for row in block.itertuples():
            place -= 1
            reach = [[row.estimate - row.low], [row.high - row.estimate]]
            colour = colours[row.here]
            options = {"mfc": "white" if row.here == OPEN else colour, "fmt": "X" if row.here == FAILS else "o"}
            axes.errorbar(row.estimate, place, xerr=reach, color=colour, ms=5, **options)
            heights.append(place)
            labels.append(f"{row.of}: {row.compared}")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        ylim=(-0.7, n - 0.3), xlabel="difference, 95% interval over items (filled: as claimed; cross: the other side)"
    )
    axes.set_yticks(heights, labels, fontsize=7)
    return figure


def write(profile: str) -> Iterator[Path]:
    """Write the page, the table and the figure of a profile's results; the paths of what was written."""
    folder = TABLES / profile
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: run the notebooks first (python -m fx.reproduce --profile {profile})")
    table = judged(profile)
    table.to_csv(path := folder / "summary.csv", index=False, float_format="%.6g")
    yield path
    if (figure := drawing(table)) is not None:
        yield plots.save(figure, "summary", profile)
        plt.close(figure)
    (page := folder / "summary.md").write_text(as_markdown(table, profile))
    yield page


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m fx.summary", description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default=COMPLETE, help=f"whose tables to read (default {COMPLETE})")
    for path in write(parser.parse_args(words).profile):
        print(path)


if __name__ == "__main__":
    command.run("fx.summary", main)
