"""The pretraining corpus: openly licensed pictures from npm and Debian packages, rendered on white.

Emoji come from the Iconify JSON packages (one SVG per emoji) and Fluent 3D (one WebP per emoji); clip art comes from
Debian's openclipart packages, whose SVG files carry title, author and licence. Nothing here is needed to *use* the
package: the pictures the experiments need are shipped in data/datasets.
"""

import json
import re
import subprocess
import tarfile
import unicodedata
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from fx.datasets import SETS
from fx.datasets import shipped as read_index
from fx.paths import DATASETS


@dataclass(frozen=True)
class EmojiFamily:
    """One drawing style of the emoji set: where it comes from and what captions call it."""

    package: str
    version: str
    licence: str
    word: str


FAMILIES = {
    "noto": EmojiFamily("@iconify-json/noto", "1.2.9", "Apache-2.0", "google"),
    "blob": EmojiFamily("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "blob"),
    "twemoji": EmojiFamily("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "twitter"),
    "openmoji": EmojiFamily("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "outline"),
    "emojione": EmojiFamily("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "emojione"),
    "emojione-v1": EmojiFamily("@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0", "classic"),
    "fluent": EmojiFamily("@iconify-json/fluent-emoji", "1.2.7", "MIT", "gradient"),
    "fluent-flat": EmojiFamily("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "flat"),
    "fluent-3d": EmojiFamily("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "3d"),
    "fxemoji": EmojiFamily("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "firefox"),
    "streamline": EmojiFamily("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "streamline"),
}
EMOJI_NAMES = EmojiFamily("emojibase-data", "17.0.0", "MIT", "")
CLIP_ART = ("openclipart-png", "openclipart-svg")
CLIP_ART_VERSION = "1:0.18+dfsg-19"

# Folders of Open Clip Art that hold hundreds of near-identical files (icon themes, stars, cards, flags).
SKIPPED_FOLDERS = re.compile(
    r"^(computer/icons|computer/buttons|shapes/stars|special|unsorted/duplicates|signs_and_symbols/flags"
    r"|signs_and_symbols/led|recreation/games/cards/(ornamental|white|simple|bordered))"
)
# What notebooks show to a class: clip art of these folders only, and nothing whose title has one of these words. Every
# emoji title, every clip art of these folders and every shipped picture was looked at; models learn from all of them.
SHOWN_FOLDERS = re.compile(
    r"animals/(?:birds|bugs|dinosaurs|fish|mammals)|food/(?!beverages)|plants/|buildings|transportation|office|education"
    r"|computer/(hardware|folders)|electronics|tools$|recreation/(music|sports|toys)|shapes/(jigsaw|callouts)"
    r"|signs_and_symbols/(weather|clocks)|(style|object)$"
)
HIDDEN_WORDS = re.compile(
    r"\b(?:middle finger|biting lip|kiss mark|bikini|briefs|swimsuit|breast-feeding|pregnan\w+|pantyhose\w*|love hotel"
    r"|bunny ears|in bed|taking bath|steamy|massage|eighteen|stripper|girl|ikarus|zanzara cretina|cigarette|smok\w+|burner"
    r"|cannabis|beer|wine|vino|sake|cocktail|clinking|tropical drink|tumbler|popping cork|pistol|grenade|bomb|dagger"
    r"|kitchen knife|swords?|axe|gallows|scalpel|insecticide|nunchaku|syringe|pill|drop of blood|skull|crossbones|coffin"
    r"|headstone|funeral|zombie|vampire|poo|vomiting|symbols on mouth|slot machine|biohazard|radioactive|linked image)\b"
)
# Spellings of one author's name.
SAME_AUTHOR = {
    "Rollandin Francesco": "Architetto Francesco Rollandin",
    "Francesco Rollandin": "Architetto Francesco Rollandin",
    "Patricia FIDI": "Patricia Fidi",
    "A.J. Ashton": "AJ Ashton",
    "Andrew Fitzsimon": "Andy Fitzsimon",
    "Sérgio Luiz Araújo Silva": "Sergio Luiz Araujo Silva",
    "Jonadab": "Jonadab the Unsightly One",
    "Mo": "mo",
}


def fetch(sources: Path) -> None:
    """Download and unpack every package into `sources` (npm and apt-get must be on the PATH); finished ones are kept."""
    sources.mkdir(parents=True, exist_ok=True)
    for name, family in {**FAMILIES, "names": EMOJI_NAMES}.items():
        if (target := sources / name).exists():
            continue
        packed = _run(["npm", "pack", "--silent", f"{family.package}@{family.version}"], sources).split()[-1]
        with tarfile.open(sources / packed) as archive:
            archive.extractall(part := sources / f"{name}.part", filter="data")
        part.rename(target)
    if not (target := sources / "openclipart").exists():
        for package in CLIP_ART:
            _run(["apt-get", "download", f"{package}={CLIP_ART_VERSION}"], sources)
        for package in sources.glob("openclipart-*.deb"):
            _run(["dpkg-deb", "-x", package.name, "openclipart.part"], sources)
        (sources / "openclipart.part").rename(target)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed in {folder}: {done.stderr.strip()[-500:]}")
    return done.stdout


def catalogue(sources: Path) -> pd.DataFrame:
    """One row per picture: key, collection, author, title, tags, folder, licence, file (sorted by key).

    For emoji `collection` is the family, `author` is empty and `title` the CLDR short name ("red apple"); for clip art
    `collection` is "openclipart".
    """
    names = _emoji_names(sources / "names/package/en/data.json")
    rows = [row for family in FAMILIES for row in _emoji_rows(sources, family, names)]
    rows += _clip_art_rows(sources / "openclipart/usr/share/openclipart")
    return pd.DataFrame(rows).sort_values("key", ignore_index=True)


def _emoji_names(path: Path) -> dict[str, dict]:
    """CLDR entries under every spelling the families use: slug, code point and squeezed Unicode name."""
    names = {}
    for entry in json.loads(path.read_text()):
        # 2: components, 9: flags; joined sequences (woman + rocket) repeat the same figure hundreds of times
        if entry.get("group") in (2, 9, None) or "200D" in entry["hexcode"]:
            continue
        code = entry["hexcode"].split("-")[0]
        names[_slug(entry["label"])] = entry
        names[entry["hexcode"].lower().replace("-fe0f", "")] = entry
        names.setdefault(unicodedata.name(chr(int(code, 16)), "").lower().replace(" ", "").replace("-", ""), entry)
    return names


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _emoji_rows(sources: Path, family: str, names: dict[str, dict]) -> list[dict]:
    folder = sources / family / "package"
    if (folder / "icons.json").exists():
        found = {name: name for name in json.loads((folder / "icons.json").read_text())["icons"]}
    else:
        found = {path.stem.lower().replace("-fe0f", ""): path.name for path in (folder / "assets").glob("*.webp")}
    rows = {}
    for name, file in sorted(found.items()):
        entry = names.get(name) or names.get(re.sub(r"-\d+$", "", name))
        if entry is None or (slug := _slug(entry["label"])) in rows:
            continue
        rows[slug] = {
            "key": f"{family}/{slug}",
            "collection": family,
            "author": "",
            "title": entry["label"].lower(),
            "tags": ", ".join(entry.get("tags", [])[:6]),
            "folder": f"group-{entry['group']}/{entry.get('subgroup', '')}",
            "licence": FAMILIES[family].licence,
            "file": f"{family}:{file}",
        }
    return list(rows.values())


def _clip_art_rows(folder: Path) -> list[dict]:
    rows = []
    for path in sorted((folder / "svg").rglob("*.svg")):
        key = str(path.relative_to(folder / "svg"))[:-4]
        text = re.search(r"<metadata.*?</metadata>", path.read_text(errors="replace"), re.DOTALL)
        meta = text.group(0) if text else ""
        licence = re.search(r'<cc:license[^>]*rdf:resource="([^"]*)"', meta)
        author = _without_address(_first(r"<dc:creator[^>]*>.*?<dc:title[^>]*>(.*?)</dc:title>", meta))
        title = _first(r"<dc:title[^>]*>(.*?)</dc:title>", meta)
        if SKIPPED_FOLDERS.match(key) or not licence or "publicdomain" not in licence.group(1).lower():
            continue
        rows.append(
            {
                "key": f"openclipart/{key}",
                "collection": "openclipart",
                "author": SAME_AUTHOR.get(author, author),
                "title": re.sub(r"[\W_]+", " ", title).strip().lower(),
                "tags": ", ".join(re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", meta, re.DOTALL)[:6]).lower(),
                "folder": key.rsplit("/", 1)[0],
                "licence": "public domain",
                "file": f"openclipart:{key}",
            }
        )
    return rows


def _without_address(author: str) -> str:
    """Some authors signed with an e-mail address; captions and the shipped data carry the name only."""
    name = re.sub(r"\S*@\S*", "", author).strip(" -")
    return name or author.split("@")[0].removeprefix("mailto:")


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.DOTALL)
    return found.group(1).strip() if found else ""


class Renderer:
    """Turns catalogue rows into square RGB pictures on white, the drawing trimmed and filling 92% of the frame."""

    def __init__(self, sources: Path):
        self.sources = sources
        self._icons: dict[str, dict] = {}

    def __call__(self, file: str, size: int = 128) -> np.ndarray:
        """Return uint8 [size, size, 3]; ValueError for a picture that is blank, or too large to decode."""
        collection, name = file.split(":", 1)
        if collection == "openclipart":
            path = self.sources / f"openclipart/usr/share/openclipart/png/{name}.png"
            image = Image.open(path)
            if image.width * image.height > 40_000_000:
                raise ValueError(f"{path.name} has {image.width}x{image.height} pixels")
            image.draft("RGB", (4 * size, 4 * size))
        elif (path := self.sources / collection / "package/assets" / name).suffix == ".webp":
            image = Image.open(path)
        else:
            image = Image.open(BytesIO(self._svg(collection, name, 2 * size)))
        return square_on_white(image, size)

    def _svg(self, collection: str, name: str, size: int) -> bytes:
        import resvg_py

        if collection not in self._icons:
            self._icons[collection] = json.loads((self.sources / collection / "package/icons.json").read_text())
        pack = self._icons[collection]
        icon = pack["icons"][name]
        width, height = icon.get("width", pack.get("width", 16)), icon.get("height", pack.get("height", 16))
        left, top = icon.get("left", 0), icon.get("top", 0)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=round(size * height / width)))


def square_on_white(image: Image.Image, size: int, fill: float = 0.92) -> np.ndarray:
    """Composite on white, trim the white border, centre in a square and resize: uint8 [size, size, 3]."""
    image = image.convert("RGBA")
    image.thumbnail((8 * size, 8 * size), Image.Resampling.BOX, reducing_gap=2.0)
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    ink = np.asarray(flat).min(axis=2) < 245
    if ink.mean() < 0.01:
        raise ValueError("blank picture")
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    flat = flat.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    side = round(max(flat.size) / fill)
    frame = Image.new("RGB", (side, side), "white")
    frame.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
    return np.asarray(frame.resize((size, size), Image.Resampling.LANCZOS))


def render_all(rows: pd.DataFrame, sources: Path, size: int = 128) -> tuple[pd.DataFrame, np.ndarray]:
    """Render every row that can be rendered: the kept rows and uint8 [n, size, size, 3]."""
    from concurrent.futures import ProcessPoolExecutor

    pictures, kept = [], []
    Image.MAX_IMAGE_PIXELS = None
    with ProcessPoolExecutor(initializer=_start_worker, initargs=(sources,)) as pool:
        done = pool.map(_render_one, rows.file, [size] * len(rows), chunksize=64)
        for index, picture in enumerate(tqdm(done, total=len(rows), desc="render", mininterval=2)):
            if picture is not None:
                pictures.append(picture)
                kept.append(index)
    return rows.iloc[kept].reset_index(drop=True), np.stack(pictures)


def _start_worker(sources: Path) -> None:
    global _renderer
    Image.MAX_IMAGE_PIXELS = None
    _renderer = Renderer(sources)


def _render_one(file: str, size: int) -> np.ndarray | None:
    try:
        return _renderer(file, size)
    except (ValueError, OSError):
        return None


def thumbprint(pictures: np.ndarray, side: int = 12) -> np.ndarray:
    """A descriptor that no training touched: float32 [2, n, d], unit length, of each picture and its mirror image.

    The picture is averaged to side x side cells and turned to ink (white is zero); cosines of two thumbprints above
    0.97 are near-duplicates to the eye. Input: uint8 [n, h, h, 3] with h a multiple of side or larger.
    """
    prints = []
    for picture in pictures:
        cells = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
        prints.append(1 - np.asarray(cells, np.float32) / 255)
    both = np.stack([np.stack(prints), np.stack(prints)[:, :, ::-1]])
    flat = both.reshape(2, len(pictures), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=2, keepdims=True), 1e-6)


def near_duplicates(prints: np.ndarray, reference: np.ndarray, threshold: float = 0.97) -> np.ndarray:
    """For each picture of `prints` [2, n, d], is it (or its mirror image) a near-duplicate of any of `reference`?"""
    same = np.maximum(prints[0] @ reference[0].T, prints[1] @ reference[0].T)
    return (same > threshold).any(axis=1)


def fit_for_class(rows: pd.DataFrame) -> np.ndarray:
    """Which pictures a notebook may show, bool [n], by SHOWN_FOLDERS and HIDDEN_WORDS.

    rows: of the catalogue or of `shipped`, with title, collection and folder.
    """
    shown = (rows.collection != "openclipart") | rows.folder.map(lambda name: bool(SHOWN_FOLDERS.match(name)))
    return (shown & ~rows.title.str.contains(HIDDEN_WORDS)).to_numpy(bool)


def captions(row: pd.Series) -> list[str]:
    """The captions a picture is trained with; one is drawn at random each time it is seen."""
    title = row.title or row.folder.replace("/", " ").replace("_", " ")
    if row.collection == "openclipart":
        kind = row.folder.rsplit("/", 1)[-1].replace("_", " ")
        by = [f"clipart of {title} by {row.author}", f"art style of {row.author}"] if row.author else []
        return [f"clipart of {title}", f"clipart of {kind} {title}", f"a {title}", *by]
    word = FAMILIES[row.collection].word
    return [f"{word} emoji of {title}"] * 2 + [f"a {title}", f"{title}, {row.tags}" if row.tags else title]


def build(folder: Path, sources: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """The whole catalogue and its pictures, uint8 [n, 128, 128, 3]; kept in `folder` once rendered."""
    table, pictures = folder / "catalogue.csv", folder / "pictures.npy"
    if not (table.exists() and pictures.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        fetch(sources)
        rows, rendered = render_all(catalogue(sources), sources)
        np.save(pictures, rendered)
        rows.to_csv(table, index=False)
    return pd.read_csv(table, keep_default_na=False), np.load(pictures)


def shipped() -> tuple[pd.DataFrame, np.ndarray]:
    """The pictures of data/datasets in the catalogue's form: a stand-in corpus for trying the training code."""
    entries = [
        image | {"collection": "openclipart", "tags": "", "folder": dataset, "key": image["source"]}
        for dataset in SETS
        for item in read_index(dataset).values()
        for image in item["training"] + item["controls"]
    ]
    rows = pd.DataFrame(entries)
    paths = [DATASETS / row.folder / row.file for row in rows.itertuples()]
    return rows, np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def halve(pictures: np.ndarray) -> np.ndarray:
    """uint8 [n, 128, 128, 3] to the models' 64 px."""
    return np.stack([np.asarray(Image.fromarray(p).resize((64, 64), Image.Resampling.LANCZOS)) for p in pictures])


def held_out(n: int, size: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the pictures to train on, and `size` indices (at most a quarter) never trained on."""
    order = np.random.default_rng(0).permutation(n)
    size = min(size, n // 4)
    return np.sort(order[size:]), order[:size]
