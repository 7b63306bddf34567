"""Chosen settings, all in one file (fx/settings.yaml), and the specs that follow from them.

chosen = settings.load("mini-sd", "sampling_steps=10 lora.rank=16")     # {"dreambooth": Settings, "lora": Settings}
model = chosen["lora"].fine_tune("style/mimooh")
rows = results.run(chosen["lora"].three_arms(model))                    # direct, CFG and FineXtract, scored
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pandas as pd
import yaml

from fx.datasets import SETS
from fx.evaluation import REFERENCES, Quality, Reference, Score, known_items
from fx.extraction import Extract
from fx.finetune import METHODS, FineTune, TrainingItem, load_training
from fx.quality import column
from fx.refine import PER_STEP, contrast
from fx.sampling import ARMS, Generate
from fx.tuned import Tuned

FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Settings:
    """Everything that an experiment with one fine-tuning method is run with, but for what it varies.

    base, descriptor, judge: names of the base model, of the copy-detection network and of the network that judges quality
    and is the second to measure AS; fidelity_judge: "" for the same one; images_per_training: N / N0; preset, rule: of
    Extract; the others are fields of FineTune and Generate, or w' and k of an arm.
    """

    method: str
    base: str
    descriptor: str
    judge: str
    images_per_training: int
    sampling_steps: int
    sampler: str
    precision: str
    steps_per_image: int
    batch_size: int
    training_precision: str
    learning_rate: float
    cfg_scale: float
    finextract_scale: float
    correction_scale: float
    rank: int = 0
    alpha: int = 0
    seed: int = 0
    fidelity_judge: str = ""
    preset: str = "sscd"
    rule: str = "paper"

    @property
    def iqa_column(self) -> str:
        """The column of CLIP-IQA in what `quality` gives."""
        return column("CLIP-IQA", self.judge)

    @property
    def fidelity_column(self) -> str:
        """The column of fidelity in what `quality` gives."""
        return column("fidelity", self.fidelity_judge or self.judge)

    @property
    def second_as(self) -> str:
        """The column of AS by the judge, which has not chosen what is scored."""
        return column("AS", self.judge)

    def fine_tune(self, *training: str | TrainingItem, **changes) -> FineTune:
        """The fine-tuning on these items, names or TrainingItems; `changes` are other fields of the FineTune."""
        items = tuple(TrainingItem(part) if isinstance(part, str) else part for part in training)
        own = ("base", "method", "learning_rate", "steps_per_image", "batch_size", "rank", "alpha", "seed")
        given = {name: getattr(self, name) for name in own} | {"precision": self.training_precision}
        return FineTune(items, **(given | changes))

    def generate(self, model: Tuned, arm: str, n_generated: int, **changes) -> Generate:
        """N images of one arm, w' and k as chosen for it; `changes` are other fields of the Generate."""
        given = {"steps": self.sampling_steps, "sampler": self.sampler, "precision": self.precision, "seed": self.seed}
        w, k = self.guidance(arm)
        given |= {"guidance_scale": w, "correction_scale": k, "n_generated": n_generated}
        return Generate(model, arm, **(given | changes))

    def guidance(self, arm: str) -> tuple[float, float]:
        """w' and k of an arm: none for direct, CFG its own, every other FineXtract's; k is a term of FineXtract only."""
        scales = {"direct": 1.0, "cfg": self.cfg_scale}
        return scales.get(arm, self.finextract_scale), self.correction_scale if arm == "finextract" else 0.0

    def score(
        self,
        model: Tuned,
        arm: str,
        n_training: int | None = None,
        n_generated: int | None = None,
        training: tuple[TrainingItem, ...] = (),
        rule: str = "",
        **changes,
    ) -> Score:
        """The extraction by one arm and its scores.

        n_training: None for the number of images of `training`, or else of those the model was fine-tuned on; n_generated:
        None for N / N0 times that number; rule: "" for the settings' own; `changes` are other fields of the Generate.
        ValueError where no images to score against are known.
        """
        items = known_items(training, model)
        if n_training is None:
            n_training = sum(item.n_training for item in items)
        if n_generated is None:
            n_generated = self.images_per_training * n_training
        extract = self.extract(self.generate(model, arm, n_generated, **changes), n_training, rule=rule or self.rule)
        return Score(extract, training, judge=self.judge)

    def extract(self, generate: Generate, n_training: int | None, **changes) -> Extract:
        """The extraction of n_training images, None to estimate how many; `changes` are other fields of the Extract."""
        given = {"descriptor": self.descriptor, "preset": self.preset, "rule": self.rule}
        return Extract(generate, n_training, **(given | changes))

    def refined(
        self,
        model: Tuned,
        evaluations: int = 500,
        share: float = 0.6,
        n_training: int | None = None,
        training: tuple[TrainingItem, ...] = (),
    ) -> Score:
        """FineXtract, its extracted images refined by Contrastive (fx.refine), and its scores, for a cost.

        evaluations: of a network for one image, a backward pass counted as two, for each image to extract; share: of them
        that refines, the rest generates. n_training and training as in `score`. ValueError for a cost that does not suffice.
        """
        how = contrast(evaluations, share)
        each = ARMS["finextract"].predictions * self.sampling_steps
        refining = PER_STEP * how.steps
        if (number := (evaluations - refining) // each) < 1:
            raise ValueError(
                f"{evaluations} evaluations less {refining} that refine do not generate an image, which takes {each}"
            )
        n_training = n_training or sum(item.n_training for item in known_items(training, model))
        plain = self.score(model, "finextract", n_training, number * n_training, training)
        return replace(plain, extract=replace(plain.extract, refine=how))

    def three_arms(self, model: Tuned, **options) -> list[Score]:
        """The paper's comparison for one fine-tuned model, direct, CFG and FineXtract; `options` as in `score`."""
        return [self.score(model, arm, **options) for arm in ("direct", "cfg", "finextract")]

    def references(self, *training: str | TrainingItem) -> dict[str, Reference]:
        """What the scores on these items are held against, by name: "controls" (where there are any), "round trip"."""
        items = tuple(TrainingItem(part) if isinstance(part, str) else part for part in training)
        kinds = REFERENCES if any(load_training(part).controls for part in items) else ("round trip",)
        return {of: Reference(of, items, self.base, self.descriptor, self.preset, judge=self.judge) for of in kinds}

    def quality(self, generate: Generate, training: tuple[TrainingItem, ...] = ()) -> Quality:
        """CLIP-IQA and fidelity of generated images."""
        return Quality(generate, training, self.judge, self.fidelity_judge or self.judge)


def load(name: str = "mini-sd", change: str = "") -> dict[str, Settings]:
    """The settings of a section of fx/settings.yaml, by fine-tuning method.

    change: settings to replace, "name=value" for all methods or "method.name=value" for one, separated by blanks:
    "sampling_steps=10 lora.rank=16" (quotation marks keep the blanks of a value). Raises ValueError for an unknown
    section, method or setting and for a value of another type.
    """
    sections = _sections(name)
    common = {key: value for key, value in sections[name].items() if key not in (*METHODS, "sets")}
    chosen = {m: Settings(m, **common | sections[name][m]) for m in METHODS if m in sections[name]}
    for word in shlex.split(change):
        key, equals, value = word.partition("=")
        method, dot, setting = key.rpartition(".")
        if not equals or (dot and method not in chosen):
            raise ValueError(
                f"{word!r} in change is not setting=value or method.setting=value, method: {', '.join(chosen)}"
            )
        for one in [method] if dot else chosen:
            chosen[one] = replace(chosen[one], **{setting: _value(setting, value)})
    return chosen


def table(chosen: Mapping[str, Settings]) -> pd.DataFrame:
    """Settings side by side, a column each; without those that are as they usually are in all of them."""
    usual = {
        field.name: field.default for field in fields(Settings) if field.name in ("fidelity_judge", "preset", "rule")
    }
    shown = pd.DataFrame({name: vars(own) for name, own in chosen.items()})
    return shown.drop([name for name, value in usual.items() if (shown.loc[name] == value).all()])


def sets(name: str = "mini-sd") -> dict[str, str]:
    """The sets of items that a section's experiments are run on: of artists, "style", and of objects, "object".

    The shipped ones unless the section names others under `sets`. ValueError for an unknown section.
    """
    return {kind: kind for kind in SETS} | _sections(name)[name].get("sets", {})


def _sections(name: str) -> dict[str, dict]:
    """All sections of the file; ValueError if this one is not among them."""
    found = yaml.safe_load(FILE.read_text())
    if name not in found:
        raise ValueError(f"no settings {name!r}: fx/settings.yaml has {', '.join(found)}")
    return found


def _value(setting: str, text: str) -> str | int | float:
    """The text as the type of that setting; ValueError if there is no such setting or the text is none of its values."""
    kinds = {field.name: field.type for field in fields(Settings) if field.name != "method"}
    if setting not in kinds:
        raise ValueError(f"unknown setting {setting!r}: choose from {', '.join(kinds)}")
    try:
        return kinds[setting](text)
    except ValueError:
        raise ValueError(f"the setting {setting} takes {kinds[setting].__name__} values, not {text!r}") from None
