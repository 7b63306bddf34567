"""Tidy rows to the paper's tables: means with intervals, paired differences, the paper's own numbers beside them."""

import math
from pathlib import Path

import pandas as pd

from fx.metrics import bootstrap_interval, paired_interval
from fx.paths import COMPLETE, PAPER, SHIPPED_TABLES, TABLES


def summarise(rows: pd.DataFrame, by: list[str], scores: list[str], seed: int = 0) -> pd.DataFrame:
    """Mean of each score over items with its 95% bootstrap interval, one row per group in order of appearance.

    Columns: the groups, items, and per score the mean and `<score> 95%` as text "low..high", empty for a single item.
    """
    lines = []
    for key, group in rows.groupby(by, sort=False):
        line = dict(zip(by, key, strict=True)) | {"items": len(group)}
        for score in scores:
            low, high = bootstrap_interval(group[score].to_numpy(), seed=seed)
            line |= {score: group[score].mean(), f"{score} 95%": "" if math.isnan(low) else f"{low:.3f}..{high:.3f}"}
        lines.append(line)
    return pd.DataFrame(lines)


def paired_difference(
    rows: pd.DataFrame,
    arm: str,
    baseline: str,
    by: list[str],
    score: str = "AS",
    seed: int = 0,
    between: str = "arm",
) -> pd.DataFrame:
    """Mean over items of score(arm) - score(baseline) with its 95% bootstrap interval, per group.

    between: the column that tells the two apart, if it is not the arm. Both must hold the same items: ValueError otherwise.
    The interval of a single item is NaN, and whether it excludes 0 is missing (pandas.NA).
    """
    lines = []
    for key, group in rows.groupby(by, sort=False):
        wide = group.pivot(index="item", columns=between, values=score).reindex(columns=[arm, baseline])
        if wide.isna().any(axis=None):
            missing = sorted(wide.index[wide.isna().any(axis=1)])
            raise ValueError(f"{arm} and {baseline} were not run on the same items in {key}: {missing}")
        low, high = paired_interval(wide[arm].to_numpy(), wide[baseline].to_numpy(), seed=seed)
        difference = (wide[arm] - wide[baseline]).mean()
        lines.append(
            dict(zip(by, key, strict=True))
            | {
                "items": len(wide),
                "difference": difference,
                "low": low,
                "high": high,
                "excludes 0": pd.NA if math.isnan(low) else low > 0 or high < 0,
            }
        )
    return pd.DataFrame(lines)


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
    """Write data/results/<profile>/<name>.csv, floats with six significant digits."""
    folder = TABLES / profile
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path := folder / f"{name}.csv", index=False, float_format="%.6g")
    return path
