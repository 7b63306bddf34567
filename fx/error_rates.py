"""How often an audit errs, measured on models whose training images are known (notebook 15).

    cases = in_a_ring(chosen["dreambooth"], ["style/mo", "style/yutaka-kachi"])
    images, sets = outcomes(cases, ask(cases, folder, n_generated=60))
    print(rates(sets, ["question"]))

A model is fine-tuned on half of an item's images and published; the audit that everybody can run (fx.audit) is asked about
all of them. The scores that it gives are weighed as it weighs them, in five questions (fx.audit.QUESTIONS).
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest, rankdata

from fx import audit, datasets, results, verdict
from fx.audit import QUESTIONS, WITNESSES, Audit, Findings
from fx.finetune import TrainingItem
from fx.publishing import Published, published
from fx.settings import Settings

FORMS = {"dreambooth": "fp16", "lora": "kohya"}  # as people publish them: in half precision, and with a header


@dataclass(frozen=True)
class Case:
    """A model that was fine-tuned on the first half of an item's images, to be asked about that item and about `other`.

    own: the settings, which say the method; length: how many times the usual training steps; most: controls of an item at
    most.
    """

    own: Settings
    item: str
    other: str
    length: float = 1.0
    most: int = 20

    def __post_init__(self):
        if self.item == self.other or self.length <= 0 or self.most < 1:
            raise ValueError(
                f"the other item {self.other} must be another than {self.item}, length {self.length} above 0, and "
                f"most {self.most} at least 1"
            )
        for name in (self.item, self.other):
            item = datasets.load_item(name)
            if item.n_training < 2 or not item.controls + item.more:
                raise ValueError(f"{name} needs two training images or more and a control or more")

    @property
    def trained(self) -> list[str]:
        """The names of the files that were trained on."""
        files = datasets.load_item(self.item).training
        return [file.name for file in files[: len(files) // 2]]

    @property
    def model(self) -> Published:
        """The fine-tuned model as its maker hands it on, with a model card or a header that says what it is."""
        steps = max(1, round(self.own.steps_per_image * self.length))
        tuned = self.own.fine_tune(TrainingItem(self.item, first=len(self.trained)), steps_per_image=steps)
        return Published(tuned, FORMS[self.own.method], says=True)

    def audits(self, folder: Path, **options) -> tuple[Audit, Audit]:
        """What is asked about the item and about the other one, whose images are copied into folders of `folder`."""
        checkpoint = str(published(self.model))
        return tuple(
            Audit(checkpoint, (self.own.base,), None, *lay_out(folder, name, self.most), **options)
            for name in (self.item, self.other)
        )


def lay_out(folder: Path, name: str, most: int) -> tuple[str, str]:
    """Folders of an item's suspects, its training images, and of its controls, `most` at most; copied there now."""
    item = datasets.load_item(name)
    files = {"suspects": item.training, "controls": (item.controls + item.more)[:most]}
    return tuple(str(audit.laid_out(folder / name / kind, paths)) for kind, paths in files.items())


def with_controls(names: Sequence[str], least: int) -> list[str]:
    """Those of the items that have at least so many images beside their training images."""
    items = [datasets.load_item(name) for name in names]
    return [item.name for item in items if len(item.controls) + len(item.more) >= least]


def first(names: Sequence[str], count: int) -> list[str]:
    """The first `count` of the items; ValueError if there are not so many."""
    if not 0 <= count <= len(names):
        raise ValueError(f"{count} items: there are {len(names)} with controls enough")
    return list(names[:count])


def in_a_ring(own: Settings, names: Sequence[str], **options) -> list[Case]:
    """A case for each item, whose other one is the next, the last one's the first; ValueError for a single item.

    `options` are other fields of the Case.
    """
    if len(names) == 1:
        raise ValueError(f"{names[0]} alone has no other item: name two or more of a kind")
    return [Case(own, name, other, **options) for name, other in zip(names, [*names[1:], *names[:1]], strict=True)]


def ask(cases: Sequence[Case], folder: Path, **options) -> list[tuple[Findings, Findings]]:
    """What the audits of each case find; `options` are fields of Audit. Models are made first, all steps shared out."""
    results.run([case.model for case in cases], description="models")
    found = audit.investigate_all([asked for case in cases for asked in case.audits(folder, **options)])
    return list(zip(found[::2], found[1::2], strict=True))


def weighed(found: Findings, images: pd.DataFrame, controls: pd.DataFrame) -> Findings:
    """The verdict of an audit whose suspects and controls, files and scores, are these."""
    columns = ["file", *WITNESSES]
    again = replace(found, images=images[columns].reset_index(drop=True), controls=controls[columns], auc={})
    audit.weigh(again)
    return again


def asked_in(case: Case, own: Findings, other: Findings) -> dict[str, Findings]:
    """The QUESTIONS, answered from the scores of two audits."""
    trained = own.images.file.isin(case.trained)
    others = pd.concat([other.images, other.controls], ignore_index=True)
    pairs = {
        "half trained on": (own.images, own.controls),
        "half, other controls": (own.images, others),
        "none trained on": (own.images[~trained], own.controls),
        "none, other controls": (own.images[~trained], others),
        "another's model": (other.images, other.controls),
    }
    return {question: weighed(own, *pairs[question]) for question in QUESTIONS}


def outcomes(cases: Sequence[Case], found: Sequence[tuple[Findings, Findings]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables: a row per question and suspect, and a row per question.

    Of each suspect: whether it was trained on, its scores and p-values, whether it is named. Of each question: how many
    suspects and controls there are and how many suspects were trained on; w' of the extraction; p of the set, the word for
    the evidence, the p that each witness alone would give, and its AUC over the controls: of the suspects that were trained
    on, or of all if none was.
    """
    images, sets = [], []
    for case, pair in zip(cases, found, strict=True):
        key = {"kind": datasets.kind(case.item), "item": case.item, "method": case.own.method, "length": case.length}
        for question, answer in asked_in(case, *pair).items():
            table = answer.images.assign(
                trained=question != "another's model" and answer.images.file.isin(case.trained)
            )
            images.append(table.assign(question=question, m=len(answer.controls), **key))
            counts = {"suspects": len(table), "controls": len(answer.controls), "trained": int(table.trained.sum())}
            seen = table[table.trained] if table.trained.any() else table
            auc = {
                f"AUC ({name})": verdict.auc(seen[name].to_numpy(), answer.controls[name].to_numpy())
                for name in WITNESSES
            }
            said = {"w'": answer.scale, "p": answer.p, "evidence": audit.evidence(answer)}
            alone = {
                f"p ({name})": verdict.of_the_set(answer.images[name].to_numpy(), answer.controls[name].to_numpy())
                for name in WITNESSES
            }
            sets.append({"question": question} | key | counts | said | alone | auc)
    return pd.concat(images, ignore_index=True), pd.DataFrame(sets)


def _deviations(scores: np.ndarray) -> np.ndarray:
    """How far each image stands out by each witness, [n, k]."""
    return np.column_stack([verdict.standing_out(column) for column in scores.T])


# ways to make one score, or several that `verdict.of_the_set` combines, of those of each image, [n, k]; the audit's first
COMBINATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "by set and by image": lambda scores: scores,
    "deviations added": verdict.standing_out,
    "deviations above 0 added": lambda scores: np.maximum(_deviations(scores), 0).sum(axis=1),
    "largest deviation": lambda scores: _deviations(scores).max(axis=1),
    "ranks added": lambda scores: rankdata(scores, axis=0).sum(axis=1),
} | {f"{name} alone": operator.itemgetter((slice(None), place)) for place, name in enumerate(WITNESSES)}


def by_combination(
    cases: Sequence[Case], found: Sequence[tuple[Findings, Findings]], level: float = 0.05
) -> pd.DataFrame:
    """In how many audits p of the set is at most `level` by each of the COMBINATIONS, controls being of the suspects' kind.

    Columns: combination, method, length, audits, and a count for each of five questions: half of the suspects trained on;
    all of them; all of them, and no more controls than suspects; none; another's model.
    """
    rows = []
    for case, pair in zip(cases, found, strict=True):
        asked = asked_in(case, *pair)
        own = asked["half trained on"]
        trained = own.images[own.images.file.isin(case.trained)]
        questions = {
            "half trained on": (own.images, own.controls),
            "all trained on": (trained, own.controls),
            "all, few controls": (trained, own.controls[: len(trained)]),
        } | {name: (asked[name].images, asked[name].controls) for name in ("none trained on", "another's model")}
        for name, combine in COMBINATIONS.items():
            row = {"combination": name, "method": case.own.method, "length": case.length}
            for question, pool in questions.items():
                scores = combine(pd.concat(pool)[list(WITNESSES)].to_numpy())
                p = verdict.of_the_set(scores[: len(pool[0])], scores[len(pool[0]) :])
                row[question] = p <= level + 1e-12
            rows.append(row)
    grouped = pd.DataFrame(rows).groupby(["method", "length", "combination"], sort=False)
    counts = grouped.sum()
    counts.insert(0, "audits", grouped.size())
    return counts.reset_index()


def rates(sets: pd.DataFrame, by: list[str], levels: Sequence[float] = (0.01, 0.05)) -> pd.DataFrame:
    """How often the evidence reaches a level, with Wilson's 95% interval, which takes the audits of a group as independent.

    Columns: the groups, audits; for each level the share of audits with p at most that, `… 95%`, text "low..high", and
    `… able`, of how many audits: those with suspects and controls enough for p to be so low. Missing where there is none.
    """
    lines = []
    for key, group in sets.groupby(by, sort=False):
        line = dict(zip(by, key, strict=True)) | {"audits": len(group)}
        for level in levels:
            able = group[[lowest(*row) <= level for row in zip(group.suspects, group.controls, strict=True)]]
            count, name = int((able.p <= level + 1e-12).sum()), f"p <= {level:g}"
            line[name] = count / len(able) if len(able) else np.nan
            line |= {f"{name} 95%": interval(count, len(able)) if len(able) else "", f"{name} able": len(able)}
        lines.append(line)
    return pd.DataFrame(lines)


def by_witness(sets: pd.DataFrame, by: list[str], level: float = 0.05) -> pd.DataFrame:
    """In how many audits p of the set is at most `level`: by the witnesses together, and by each alone.

    Columns: the groups, audits, `together`, and the witnesses.
    """
    columns = {"p": "together"} | {f"p ({name})": name for name in WITNESSES}
    reached = (sets[list(columns)] <= level + 1e-12).rename(columns=columns)
    grouped = pd.concat([sets[by], reached], axis=1).groupby(by, sort=False)
    return grouped[list(reached)].sum().assign(audits=grouped.size()).reset_index()[[*by, "audits", *reached]]


def lowest(suspects: int, controls: int) -> float:
    """No p-value of a set is lower: one over the ways to choose the suspects among all images."""
    return 1 / math.comb(suspects + controls, suspects)


def interval(count: int, n: int) -> str:
    """Wilson's 95% interval of a share, as text "low..high"."""
    found = binomtest(count, n).proportion_ci(method="wilson")
    return f"{found.low:.2f}..{found.high:.2f}"


def single_images(images: pd.DataFrame, by: list[str], level: float = 0.05) -> pd.DataFrame:
    """The share of suspects whose p is at most `level`, by witness and together, where there are controls enough for that.

    Rows without 1 / level - 1 controls or more are left out. Columns: the groups, suspects, `together`, and the witnesses.
    """
    known = images[images.m >= round(1 / level) - 1]
    columns = {"p": "together"} | {f"p ({name})": name for name in WITNESSES}
    reached = (known[list(columns)] <= level + 1e-12).rename(columns=columns)
    grouped = pd.concat([known[by], reached], axis=1).groupby(by, sort=False)
    return grouped[list(reached)].mean().assign(suspects=grouped.size()).reset_index()[[*by, "suspects", *reached]]


def calibration(p: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The share of p-values [n] that are at most each of `levels` [k]: [k], at most the levels where p-values are valid."""
    return (np.asarray(p)[None, :] <= np.asarray(levels)[:, None] + 1e-12).mean(axis=1)
