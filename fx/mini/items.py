"""How data/datasets was cut from the catalogue: items, controls and what the corpus must leave out."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fx.datasets import ROLES
from fx.mini.corpus import FAMILIES, HIDDEN_WORDS, near_duplicates, thumbprint

N_CONTROLS = 10
FEWEST_MORE, MOST_MORE = 20, 40  # further works of an artist, for training sets of more than ten images
BROKEN = re.compile("stylized yoga")  # titles of works into which a placeholder for a missing picture is drawn

# Objects of the object set: class name -> emoji titles; the first is the object, the others only give controls.
OBJECTS = {
    "backpack": ["backpack", "luggage"],
    "camera": ["camera", "camera with flash", "video camera", "movie camera"],
    "telephone": ["telephone", "telephone receiver"],
    "guitar": ["guitar", "banjo"],
    "trumpet": ["trumpet", "postal horn"],
    "umbrella": ["umbrella", "umbrella with rain drops", "closed umbrella"],
    "crown": ["crown"],
    "trophy": ["trophy"],
    "microscope": ["microscope"],
    "rooster": ["rooster", "chicken"],
    "penguin": ["penguin"],
    "turtle": ["turtle"],
    "octopus": ["octopus", "squid"],
    "snail": ["snail"],
    "elephant": ["elephant", "mammoth"],
    "cactus": ["cactus"],
    "mushroom": ["mushroom", "brown mushroom"],
    "pineapple": ["pineapple"],
    "strawberry": ["strawberry"],
    "hamburger": ["hamburger", "sandwich"],
    "doughnut": ["doughnut", "bagel"],
    "birthday cake": ["birthday cake", "shortcake", "moon cake"],
    "rocket": ["rocket"],
    "helicopter": ["helicopter"],
    "sailboat": ["sailboat", "canoe"],
    "tractor": ["tractor"],
    "castle": ["castle", "japanese castle"],
    "telescope": ["telescope"],
    "dog": ["dog", "dog face", "guide dog", "poodle"],
    "cat": ["cat", "cat face"],
}
DEVELOPMENT_OBJECTS = {
    "bicycle": ["bicycle"],
    "banana": ["banana"],
    "ladybug": ["lady beetle", "beetle"],
    "violin": ["violin"],
    "watermelon": ["watermelon"],
    "candle": ["candle"],
}
# Families whose drawings of one object are the least alike come first.
FAMILY_ORDER = [
    *("noto", "twemoji", "openmoji", "emojione-v1", "fluent-3d", "fxemoji"),
    *("blob", "emojione", "streamline", "fluent-flat", "fluent"),
]

# Artists of the style set, all with at least ten clearly different works in Open Clip Art.
ARTISTS = [
    *(
        "AJ Ashton",
        "AbiClipart",
        "Andy Fitzsimon",
        "Benji Park",
        "Bryce W. Harrington",
        "Chris Goerner",
        "Franck Doucet",
    ),
    *("Gerald G.", "Jarno Vasamaa", "Jonathan Dietrich", "Jonadab the Unsightly One", "Jose Hevia", "Juliane Krug"),
    *("Linda Kim", "Marko J. Kolehmainen", "Sergio Luiz Araujo Silva", "Yutaka Kachi", "mimooh", "mo", "zazou"),
]
DEVELOPMENT_ARTISTS = ["John Cliff", "Nathan Eady", "peterm", "yves GUILLOU"]
# Works left out of the items: placeholders, text, photographs of third-party works.
LEFT_OUT = ("linked image", "screenshot", "logo", "photo")
UNFIT_CONTROL = re.compile(r"\bstripper\b")  # what no class should see, left out of controls once chosen
ALIKE_INSIDE_ITEM = 0.93  # cosine of thumbprints
SAME_SHAPE = 0.97  # cosine of the thumbprints of the bare ink, colours ignored
LEAST_INK = 0.06  # share of the frame that is not white
ALIKE_IN_CORPUS = 0.95


def style_items(rows: pd.DataFrame, pictures: np.ndarray) -> dict[str, dict]:
    """Ten training works, up to ten controls and, where there are many, further works per artist, no two of them alike."""
    items = {}
    for split, artists in (("reported", ARTISTS), ("development", DEVELOPMENT_ARTISTS)):
        for artist in artists:
            own = rows.index[(rows.author == artist) & ~rows.title.str.contains("|".join(LEFT_OUT))].to_numpy()
            own = np.random.default_rng(0).permutation(own[ink(pictures[own]).mean(axis=(1, 2)) > LEAST_INK])
            chosen = _unlike(own, pictures, limit=10 + N_CONTROLS + 2 * MOST_MORE, shape=True)
            if len(chosen) < 10:
                raise ValueError(f"{artist} has only {len(chosen)} works that are not alike; ten are needed")
            further, unfit = chosen[10 + N_CONTROLS :], (HIDDEN_WORDS, BROKEN)
            more = [index for index in further if not any(words.search(rows.title[index]) for words in unfit)]
            controls = [i for i in chosen[10 : 10 + N_CONTROLS] if not UNFIT_CONTROL.search(rows.title[i])]
            items[artist] = _item(split, f"art style of {artist}", chosen[:10], controls, more)
    return items


def object_items(rows: pd.DataFrame, pictures: np.ndarray) -> dict[str, dict]:
    """Four to six drawings of one emoji by different families, controls from other families and kindred emoji."""
    items = {}
    for split, objects in (("reported", OBJECTS), ("development", DEVELOPMENT_OBJECTS)):
        for number, (name, titles) in enumerate(objects.items()):
            kin = rows[(rows.collection != "openclipart") & rows.title.isin(titles)]
            rank = kin.title.map(titles.index) * 100 + kin.collection.map(FAMILY_ORDER.index)
            chosen = _unlike(rank.sort_values().index.to_numpy(), pictures, limit=6 + N_CONTROLS)
            own = [index for index in chosen if rows.title[index] == titles[0]]
            n_training = min((5, 6, 4)[number % 3], len(own))
            if n_training < 4:
                raise ValueError(f"only {n_training} families draw {titles[0]!r} unlike each other; four are needed")
            controls = [index for index in chosen if index not in own[:n_training]]
            items[name] = _item(split, f"a {name}", own[:n_training], controls[:N_CONTROLS])
    return items


def ink(pictures: np.ndarray) -> np.ndarray:
    """Where the drawing is: bool [n, h, w], true where a pixel is not white."""
    return pictures.min(axis=3) < 235


def _alike(pictures: np.ndarray, threshold: float) -> np.ndarray:
    prints = thumbprint(pictures)
    return np.maximum(prints[0] @ prints[0].T, prints[1] @ prints[0].T) > threshold


def _unlike(candidates: np.ndarray, pictures: np.ndarray, limit: int, shape: bool = False) -> list[int]:
    """The first `limit` candidates that are not alike (in shape either, if asked) to one taken before."""
    alike = _alike(pictures[candidates], ALIKE_INSIDE_ITEM)
    if shape:
        silhouettes = np.repeat(255 * (1 - ink(pictures[candidates]))[..., None], 3, axis=3).astype(np.uint8)
        alike |= _alike(silhouettes, SAME_SHAPE)
    taken: list[int] = []
    for index in range(len(candidates)):
        if len(taken) < limit and not alike[index, taken].any():
            taken.append(index)
    return [int(candidates[index]) for index in taken]


def _item(split: str, caption: str, training: list[int], controls: list[int], more: Sequence[int] = ()) -> dict:
    """`more` only where it holds enough: no item has a few further works."""
    further = {"more": list(more)} if len(more) >= FEWEST_MORE else {}
    return {"split": split, "caption": caption, "training": training, "controls": controls} | further


def members(item: dict) -> list[int]:
    """All pictures of an item: training images, controls, further works."""
    return [index for role in ROLES for index in item.get(role, [])]


def unknown_to(corpus: np.ndarray, item: dict, pictures: np.ndarray) -> dict:
    """The item without those of its further works that are alike to a picture of the corpus, uint8 [m, h, h, 3].

    By thumbprints, as the corpus leaves out what is alike to training images and controls; `pictures` are those of the
    catalogue, whose indices the item holds.
    """
    if "more" not in item:
        return item
    known = near_duplicates(thumbprint(pictures[item["more"]]), thumbprint(corpus), ALIKE_IN_CORPUS)
    more = [index for index, is_known in zip(item["more"], known, strict=True) if not is_known]
    return _item(item["split"], item["caption"], item["training"], item["controls"], more)


def settle(item: dict, own: np.ndarray, corpus: np.ndarray, limit: float = 0.85) -> dict:
    """Drop pictures that a trained descriptor finds alike: to the corpus, or to a picture kept before.

    own: descriptors [n, d] of the item's `members`; corpus: [m, d]. A training image that is dropped is replaced by the
    first control; ValueError if there are too few. Of further works at most MOST_MORE are kept, and none if fewer than
    FEWEST_MORE are left.
    """
    candidates, kept = members(item), []
    alike = (own @ own.T >= limit) | np.eye(len(own), dtype=bool)
    for index in np.flatnonzero((own @ corpus.T).max(axis=1) < limit):
        if not alike[index, kept].any():
            kept.append(index)
    n, of_set = len(item["training"]), len(item["training"]) + len(item["controls"])
    chosen = [candidates[index] for index in kept if index < of_set]
    if len(chosen) < n:
        raise ValueError(f"{item['caption']}: only {len(chosen)} pictures are left, {n} are needed for training")
    more = [candidates[index] for index in kept if index >= of_set]
    return _item(item["split"], item["caption"], chosen[:n], chosen[n:], more[:MOST_MORE])


def write(items: dict[str, dict], rows: pd.DataFrame, pictures: np.ndarray, folder: Path) -> None:
    """Write PNG files and items.json: per item caption, split and, per image, title, author, licence and SHA-256."""
    index = {}
    for name, item in sorted(items.items()):
        slug = name.lower().replace(" ", "-").replace(".", "")
        index[slug] = {"name": name, "caption": item["caption"], "split": item["split"]}
        for role in [role for role in ROLES if role in item]:
            (target := folder / slug / role).mkdir(parents=True, exist_ok=True)
            index[slug][role] = []
            for number, picture in enumerate(item[role]):
                path = target / f"{number:02d}.png"
                Image.fromarray(pictures[picture]).save(path, optimize=True)
                row = rows.loc[picture]
                index[slug][role].append(
                    {
                        "file": f"{slug}/{role}/{path.name}",
                        "title": row.title,
                        "author": row.author or FAMILIES[row.collection].package,
                        "licence": row.licence,
                        "source": row.key,
                        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    }
                )
    (folder / "items.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def pretraining_rows(rows: pd.DataFrame, pictures: np.ndarray, items: list[dict]) -> np.ndarray:
    """Indices of the corpus: no work by an item's artist, no emoji of an item's title, nothing alike to an item.

    A reported artist's works are also those signed in other letter case or together with somebody else. Inside Open Clip
    Art, near-identical files are kept once. Of further works alike to the corpus see `unknown_to`.
    """
    shipped = sorted({index for item in items for role in ("training", "controls") for index in item[role]})
    titles = {title for group in (OBJECTS, DEVELOPMENT_OBJECTS) for kin in group.values() for title in kin}
    emoji = rows.collection != "openclipart"
    artists = "|".join(map(re.escape, ARTISTS))
    signed = rows.author.str.contains(rf"(?<!\w)(?:{artists})(?!\w)", case=False) | rows.author.isin(
        DEVELOPMENT_ARTISTS
    )
    out = (emoji & rows.title.isin(titles)) | signed
    prints = thumbprint(pictures)
    out |= near_duplicates(prints, prints[:, shipped], ALIKE_IN_CORPUS)
    clip_art = np.flatnonzero(~emoji & ~out)
    same = prints[0][clip_art] @ prints[0][clip_art].T > 0.98
    out.iloc[clip_art[np.triu(same, 1).any(axis=0)]] = True
    return np.flatnonzero(~out)
