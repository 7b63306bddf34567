"""Tidy rows to the paper's tables: means with intervals, paired differences, the paper's own numbers beside them."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from fx import provenance
from fx.metrics import holm, mean_interval, paired_interval, paired_p_value
from fx.paths import COMPLETE, PAPER, SHIPPED_TABLES, TABLES


def summarise(rows: pd.DataFrame, by: list[str], scores: list[str]) -> pd.DataFrame:
    """Mean of each score over items with its 95% t-interval, one row per group in order of appearance.

    Columns: the groups, items, and per score the mean and `<score> 95%` as text "low..high", empty for a single item.
    """
    lines = []
    for key, group in rows.groupby(by, sort=False):
        line = dict(zip(by, key, strict=True)) | {"items": len(group)}
        for score in scores:
            low, high = mean_interval(group[score].to_numpy())
            line |= {score: group[score].mean(), f"{score} 95%": "" if math.isnan(low) else f"{low:.3f}..{high:.3f}"}
        lines.append(line)
    return pd.DataFrame(lines)


def paired_difference(
    rows: pd.DataFrame,
    arm: str,
    baseline: str,
    by: list[str],
    score: str = "AS",
    between: str = "arm",
) -> pd.DataFrame:
    """Mean over items of score(arm) - score(baseline) with its 95% t-interval and the t-test's p-value, per group.

    between: the column that tells the two apart, if it is not the arm. Both must hold the same items: ValueError otherwise.
    Without rows it is empty, with the same columns. The interval and p of a single item are NaN, and whether the interval
    excludes 0 is missing (pandas.NA).
    """
    lines = []
    for key, group in rows.groupby(by, sort=False):
        wide = group.pivot(index="item", columns=between, values=score).reindex(columns=[arm, baseline])
        if wide.isna().any(axis=None):
            missing = sorted(wide.index[wide.isna().any(axis=1)])
            raise ValueError(f"{arm} and {baseline} were not run on the same items in {key}: {missing}")
        pair = wide[arm].to_numpy(), wide[baseline].to_numpy()
        low, high = paired_interval(*pair)
        difference = (wide[arm] - wide[baseline]).mean()
        lines.append(
            dict(zip(by, key, strict=True))
            | {
                "items": len(wide),
                "difference": difference,
                "low": low,
                "high": high,
                "excludes 0": pd.NA if math.isnan(low) else low > 0 or high < 0,
                "p": paired_p_value(*pair),
            }
        )
    return pd.DataFrame(lines, columns=[*by, "items", "difference", "low", "high", "excludes 0", "p"])


def differences(
    rows: pd.DataFrame, arm: str, baselines: list[str], by: list[str], scores: list[str], between: str = "arm"
) -> pd.DataFrame:
    """`paired_difference` of one arm to each baseline in each score, each over the items that have the score.

    Two columns, score and baseline, say which row is which. A score that no item has gives no rows.
    """
    parts = []
    for score in scores:
        known = rows[rows[score].notna()]
        for baseline in baselines if len(known) else []:
            found = paired_difference(known, arm, baseline, by, score, between)
            parts.append(found.assign(score=score, baseline=baseline))
    return pd.concat(parts, ignore_index=True)


def beside_controls(rows: pd.DataFrame, by: list[str], scores: list[str]) -> pd.DataFrame:
    """Means of scores beside those of controls, `<score>_controls`, over the items that have controls and no others.

    Both columns of a pair have the same denominator, `items`. Empty without any item that has controls.
    """
    pairs = {score: _of_controls(score) for score in scores}
    known = rows[rows[list(pairs.values())].notna().all(axis=1)]
    groups = known.groupby(by, sort=False)
    columns = [name for pair in pairs.items() for name in pair]
    return groups[columns].mean().assign(items=groups.size()).reset_index()[[*by, "items", *columns]]


def _of_controls(score: str) -> str:
    """The column of a score's controls: "AS_controls", "AS_controls (mini-clip)"."""
    name, bracket, judge = score.partition(" (")
    return f"{name}_controls{bracket}{judge}"


def corrected(differences: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """A table of `paired_difference` whose rows are one family of comparisons: p by Holm (1979), and what is shown by it.

    Adds "p (Holm)" and "shown", whether it is below 1 - level: then the chance of a single wrong row is below 1 - level.
    Without p-values (single items) both are missing.
    """
    if differences.p.isna().any():
        return differences.assign(**{"p (Holm)": np.nan, "shown": pd.NA})
    p = holm(differences.p.to_numpy())
    return differences.assign(**{"p (Holm)": p, "shown": p < 1 - level})


def in_words(differences: pd.DataFrame | str, *by: str) -> str:
    """A line for each row of `paired_difference`: what `by` calls it, the difference, its interval, and what that shows.

    A sentence, which is what `complete` gives where there is no table, stays as it is.
    """
    if isinstance(differences, str):
        return differences
    lines = []
    for row in differences.to_dict("records"):
        if math.isnan(row["low"]):
            interval, shown = "one item", "no interval"
        else:
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            shown = "above 0" if row["low"] > 0 else "below 0" if row["high"] < 0 else "not shown to differ from 0"
        named = ", ".join(str(row[name]) for name in by)
        lines.append(f"{named}: {row['difference']:+.3f} ({interval}), {shown}")
    return "\n".join(lines)


def paper(number: int) -> pd.DataFrame:
    """The numbers of the paper's Table `number` (1-11) as reported; what it marks "N.A." (Table 10) is NaN."""
    path = PAPER / f"table{number:02d}.csv"
    if not path.exists():
        raise FileNotFoundError(f"no table {number}: data/paper holds the paper's Tables 1 to 11")
    return pd.read_csv(path)


def complete(name: str, profile: str = COMPLETE) -> pd.DataFrame | str:
    """A table of the complete run as the repository shows it; a sentence where there is none yet."""
    path = SHIPPED_TABLES / profile / f"{name}.csv"
    if not path.exists():
        return f"{path.name}: there is no complete run (fx.reproduce --profile {profile}) yet"
    return pd.read_csv(path)


def save(rows: pd.DataFrame, name: str, profile: str) -> Path:
    """Write data/results/<profile>/<name>.csv, floats with six significant digits, and note its steps (fx.provenance)."""
    folder = TABLES / profile
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path := folder / f"{name}.csv", index=False, float_format="%.6g")
    provenance.note(path, folder)
    return path
