"""The paper's own images, from local folders: WikiArt's artists and DreamBooth's subjects (Sec. 5).

    datasets.names("wikiart", "reported", 4)      # needs the images: this module says where they go
    datasets.load_item("dreambooth/backpack_dog")

Nothing is fetched. Their items are like the shipped ones: "wikiart" and "dreambooth" stand where "style" and "object" do.
"""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fx.paths import EXTERNAL

N_TRAINING, N_CONTROLS, N_MORE = 10, 10, 40  # works of an artist; the paper has 10 and, in Fig. 4a, up to 50
REPORTED, DEVELOPMENT = 20, 4  # artists
# the artists of the paper's Table 5; which the other sixteen were, it does not say
FIRST = ("Post_Impressionism_vincent-van-gogh", "Fauvism_henri-matisse")
FIRST += ("High_Renaissance_leonardo-da-vinci", "Impressionism_claude-monet")
IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Source:
    """kind: the shipped set it stands in for; what: in words, with its home; gigabytes: None where they are not known;
    layout: how it must lie there.
    """

    kind: str
    what: str
    gigabytes: float | None
    licence: str
    layout: str
    read: Callable[[Path], dict[str, dict]]


def place(name: str) -> Path:
    """Where the images of a set are looked for: data/external/<name>, or below what FX_EXTERNAL names."""
    return EXTERNAL / name


def index(name: str) -> dict[str, dict]:
    """Slug -> name, caption, split and the paths of training images, controls and more, as of a shipped set.

    FileNotFoundError, with what is missing, how large it is and where it goes, where the folder is not there; ValueError
    where it holds no item.
    """
    source, folder = SOURCES[name], place(name)
    if not folder.is_dir():
        size = f", {source.gigabytes:g} GB" if source.gigabytes else ""
        raise FileNotFoundError(
            f"the images of {name!r} are not here: {source.what}{size} ({source.licence}). Put them, or a link to them, "
            f"into {folder}, as {source.layout}"
        )
    found = _read(name, folder)
    if not found:
        raise ValueError(f"{folder} holds no item of {name!r}: it must lie there as {source.layout}")
    return found


@cache
def _read(name: str, folder: Path) -> dict[str, dict]:
    return SOURCES[name].read(folder)


def by_hash(word: str) -> str:
    """A key that puts names into an order that is arbitrary and the same everywhere."""
    return hashlib.sha256(word.encode("utf-8", "surrogateescape")).hexdigest()


def read_wikiart(folder: Path) -> dict[str, dict]:
    """Artists with at least ten works in one style, of several styles the one with most; works in the order of `by_hash`."""
    works, strange = defaultdict(list), 0
    for style in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in style.iterdir():
            artist, underscore, _ = file.name.partition("_")
            if file.suffix.lower() in IMAGES and underscore:
                works[artist, style.name.removesuffix(f"_{artist}")].append(file)
            elif not file.name.startswith("."):
                strange += 1
    if strange:
        warnings.warn(
            f"{strange} files in {folder} are no images called <artist>_<title>: they are left out", stacklevel=4
        )
    own = {}
    for (artist, style), files in works.items():
        if len(files) >= N_TRAINING and len(files) > len(own.get(artist, ("", ()))[1]):
            own[artist] = style, files
    slugs = {f"{style}_{artist}": (style, artist, files) for artist, (style, files) in own.items()}
    order = sorted(slugs, key=lambda slug: (FIRST.index(slug) if slug in FIRST else len(FIRST), by_hash(slug)))
    found = {}
    for number, slug in enumerate(order[: REPORTED + DEVELOPMENT]):
        style, artist, files = slugs[slug]
        files = sorted(files, key=lambda file: by_hash(file.name))
        rest = files[N_TRAINING:]
        found[slug] = {
            "name": artist.replace("-", " "),
            "caption": f"art style of {style.replace('_', ' ')} {artist.replace('-', ' ')}",
            "split": "reported" if number < REPORTED else "development",
            "training": files[:N_TRAINING],
            "controls": rest[:N_CONTROLS],
            "more": rest[N_CONTROLS : N_CONTROLS + N_MORE],
        }
    return found


CLASSES = "prompts_and_classes.txt"


def read_dreambooth(folder: Path) -> dict[str, dict]:
    """Subjects in the order of the list that comes with them; controls are other subjects of the same class."""
    listed = folder / CLASSES
    if not listed.is_file():
        raise ValueError(f"{folder} holds no {CLASSES}, which says what the subjects are: fetch it with the images")
    classes = {}
    for line in listed.read_text("utf-8").splitlines():
        subject, comma, word = line.strip().partition(",")
        if comma and subject != "subject_name" and (folder / subject).is_dir():
            classes[subject] = word.strip()
    images = {
        subject: sorted(file for file in (folder / subject).iterdir() if file.suffix.lower() in IMAGES)
        for subject in classes
    }
    return {
        subject: {
            "name": subject,
            "caption": f"{'an' if classes[subject][0] in 'aeiou' else 'a'} {classes[subject]}",
            "split": "reported",
            "training": images[subject],
            "controls": [
                file
                for other in classes
                if other != subject and classes[other] == classes[subject]
                for file in images[other]
            ][:N_CONTROLS],
            "more": [],
        }
        for subject in classes
        if images[subject]
    }


SOURCES = {
    "wikiart": Source(
        "style",
        "WikiArt's paintings by style (Tan et al., 2019) from the repository cs-chan/ArtGAN on GitHub",
        25.4,
        "for research that is not commercial",
        "<Style>/<artist>_<title>.jpg",
        read_wikiart,
    ),
    "dreambooth": Source(
        "object",
        "DreamBooth's photographs (Ruiz et al., 2023), about 160, from the repository google/dreambooth on GitHub",
        None,
        "image by image in references_and_licenses.txt",
        f"<subject>/<number>.jpg beside {CLASSES}",
        read_dreambooth,
    ),
}
