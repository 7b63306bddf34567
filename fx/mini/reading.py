"""A blind reading of mini-sd: can somebody who is not told the captions say what its samples show (notebook 00)?

python -m fx.mini.reading                                    # two sheets of the shipped weights, in runs/mini/reading
python -m fx.mini.reading --training runs/mini/sd-further    # of a training that is going on
python -m fx.mini.reading --name sd-further --answers answers.json    # answers beside captions, to be judged

Show the sheets, and nothing else, to a reader who names each numbered picture; write the answers as {"1": "medal", ...}.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from fx.mini import sd
from fx.mini.training import load_average
from fx.paths import MODELS
from fx.results import RUNS

FILE = MODELS / "mini-sd-blind-reading.json"
PER_SHEET, COLUMNS, SIDE = 40, 8, 128  # pictures on a sheet and in a row of it; pixels that a picture is shown at


def shipped() -> pd.DataFrame:
    """The readings so far: captions ("learned" or "held out"), number, caption, pictures seen, answers and verdicts."""
    return pd.read_json(FILE)


def prompts() -> pd.DataFrame:
    """The 80 prompts of every reading: captions ("learned" or "held out"), number and caption."""
    return shipped()[["captions", "number", "caption"]].drop_duplicates(ignore_index=True)


def draw(pipeline: StableDiffusionPipeline, asked: pd.DataFrame, steps: int = 25, seed: int = 0) -> np.ndarray:
    """One sample per prompt as notebook 00 draws them, each group from its own first seed on: uint8 [n, 64, 64, 3]."""
    groups = asked.groupby("captions", sort=False).caption
    return np.concatenate([sd.draw(pipeline, group.tolist(), steps=steps, seed=seed) for _, group in groups])


def write(folder: Path, name: str, pictures: np.ndarray, asked: pd.DataFrame, seed: int = 0) -> list[Path]:
    """Write the sheets `name`-1.png, ... and the key `name`-key.json; the paths of the sheets.

    pictures: uint8 [n, h, w, 3], of which row i of `asked` is the prompt. Pictures are numbered from 1 in mixed order; the
    key says which prompt belongs to a number.
    """
    order = np.random.default_rng(seed).permutation(len(pictures))
    folder.mkdir(parents=True, exist_ok=True)
    key = {str(place): asked.iloc[i].to_dict() for place, i in enumerate(order.tolist(), 1)}
    (folder / f"{name}-key.json").write_text(json.dumps(key, indent=1, ensure_ascii=False, default=int) + "\n")
    sheets = []
    for start in range(0, len(order), PER_SHEET):
        sheets.append(folder / f"{name}-{start // PER_SHEET + 1}.png")
        sheet(pictures[order[start : start + PER_SHEET]], start + 1).save(sheets[-1], optimize=True)
    return sheets


def sheet(pictures: Sequence[np.ndarray], first: int) -> Image.Image:
    """Pictures uint8 [n, h, w, 3] in rows of COLUMNS, SIDE pixels wide, under their numbers from `first` on."""
    across, down = SIDE + 8, SIDE + 26
    page = Image.new("RGB", (COLUMNS * across, -(-len(pictures) // COLUMNS) * down), "white")
    write_on = ImageDraw.Draw(page)
    for place, picture in enumerate(pictures):
        x, y = place % COLUMNS * across + 4, place // COLUMNS * down
        write_on.text((x, y + 4), str(first + place), fill="black", font_size=14)
        page.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y + 22))
    return page


def beside_captions(key: Path, answers: Path) -> pd.DataFrame:
    """A reader's answers in the order of the prompts: captions, number, caption, answer.

    ValueError if a number is missing or one too many.
    """
    known, given = json.loads(key.read_text()), json.loads(answers.read_text())
    if wrong := sorted(set(known) ^ set(given), key=str):
        raise ValueError(
            f"{answers.name} and {key.name} differ in the pictures {', '.join(wrong)}: give each one answer"
        )
    rows = pd.DataFrame([known[place] | {"answer": given[place]} for place in known])
    first = {name: place for place, name in enumerate(prompts().captions.unique())}
    return rows.sort_values("number").sort_values(
        "captions", key=lambda c: c.map(first), kind="stable", ignore_index=True
    )


def main(words: list[str] | None = None) -> None:
    """Write the sheets of one set of weights, or put answers beside the captions."""
    parser = argparse.ArgumentParser("python -m fx.mini.reading", description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", help="of the sheets and the key (default: that of the training's folder, or shipped)")
    parser.add_argument("--training", type=Path, help="a folder with state.pt of fx.mini.training.train")
    parser.add_argument("--folder", type=Path, default=RUNS / "mini/reading")
    parser.add_argument("--answers", type=Path, help="a reader's answers, to be put beside the captions")
    options = parser.parse_args(words)
    name = options.name or (options.training.name if options.training else "shipped")
    if options.answers:
        print(beside_captions(options.folder / f"{name}-key.json", options.answers).to_string())
        return
    pipeline = StableDiffusionPipeline.from_pretrained(MODELS / "mini-sd", dtype=torch.float32, safety_checker=None)
    if options.training:
        print(f"{load_average(pipeline.unet, options.training):,} steps of {options.training}")
    asked = prompts()
    for path in write(options.folder, name, draw(pipeline, asked), asked):
        print(path)


if __name__ == "__main__":
    main()
