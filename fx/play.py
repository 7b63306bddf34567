"""What the site's interactive page shows: extracted images and AS over w' at fixed x_T, and cliques over phi.

    python -m fx.play       # writes data/results/mini/play-*.csv and figures/play-*-mini.png

The items, and all settings but w', are those of the demo (DreamBooth). Every number is a score of the runner or what
fx.cliques makes of a run's own similarities; the page computes nothing.
"""

import argparse

import networkx as nx
import numpy as np
import pandas as pd
from PIL import Image

from fx import command, demo, results, settings, tables
from fx.cliques import largest_cliques
from fx.datasets import load_images, to_uint8
from fx.evaluation import Score, image_side, read_matches, scored_images
from fx.paths import COMPLETE, FIGURES
from fx.sampling import generated_pictures
from fx.similarity import similarity_matrix

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
SHOWN = 6  # training images of an item, the first ones
COLUMNS = 8  # pictures in a row of the sheet of generated images
STEP = 0.02  # of phi


def specs(item: str) -> dict[float, Score]:
    """The extractions of an item by w'; at 1 there is no guidance."""
    chosen = settings.load()["dreambooth"]
    model = chosen.fine_tune(item)
    guided = {w: chosen.score(model, "finextract", guidance_scale=w) for w in SCALES if w != 1}
    return {1.0: chosen.score(model, "direct")} | guided


def sheet(rows: list[np.ndarray]) -> Image.Image:
    """Rows of pictures uint8 [n, h, w, 3] as one image without margins; rows may differ in length."""
    side, most = rows[0].shape[1], max(map(len, rows))
    canvas = np.full((side * len(rows), side * most, 3), 255, np.uint8)
    for number, row in enumerate(rows):
        canvas[number * side : (number + 1) * side, : side * len(row)] = np.concatenate(list(row), axis=1)
    return Image.fromarray(canvas)


def over_scales(item: str) -> tuple[pd.DataFrame, pd.DataFrame, Image.Image]:
    """Scores by w'; similarity of each shown training image to its match by w'; their pictures, training images first."""
    asked = specs(item)
    results.run([spec.extract for spec in asked.values()], description="images")  # scores alone may be there already
    rows = results.run(list(asked.values()), description="scores")
    scores = rows[["AS", "A-ESR_strict", "A-ESR_loose", "phi_end"]].assign(item=item, guidance_scale=list(asked))
    first = next(iter(asked.values()))
    training = to_uint8(load_images(tuple(scored_images(first)[0][:SHOWN]), image_side(first)))
    pictures, matches = [training], []
    for w, spec in asked.items():
        found = read_matches(spec)
        pictures.append(generated_pictures(spec.extract.generate, found["match"][:SHOWN]))
        matches += [(item, w, n, value) for n, value in enumerate(found["similarity"][:SHOWN])]
    columns = ["item", "guidance_scale", "training image", "similarity"]
    return (
        scores[["item", "guidance_scale", "AS", "A-ESR_strict", "A-ESR_loose", "phi_end"]],
        pd.DataFrame(matches, columns=columns),
        sheet(pictures),
    )


def over_phi(similarity: np.ndarray) -> pd.DataFrame:
    """The clique of every image by phi, numbered from 1 in the order in which they are removed, 0 for an image alone.

    phi begins where nearly all pairs are joined, below the start of the paper's rule.
    """
    start = np.floor(np.quantile(similarity[np.triu_indices(len(similarity), 1)], 0.02) / STEP) * STEP
    lines = []
    for phi in np.arange(start, 1.0 + STEP / 2, STEP).round(2).tolist():
        cliques, _ = largest_cliques(similarity, phi)
        number = {image: n if len(clique) > 1 else 0 for n, clique in enumerate(cliques, 1) for image in clique}
        lines += [(phi, image, number[image]) for image in range(len(similarity))]
    return pd.DataFrame(lines, columns=["phi", "image", "clique"])


def places(similarity: np.ndarray) -> np.ndarray:
    """Where images stand in the drawing, [n, 2] in 0..1: alike ones near one another (Fruchterman and Reingold, 1991).

    Half of each coordinate is its rank, so that one outlier does not press all others together.
    """
    graph = nx.Graph()
    graph.add_nodes_from(range(len(similarity)))
    for i, j in zip(*np.triu_indices(len(similarity), 1), strict=True):
        graph.add_edge(int(i), int(j), weight=float(max(similarity[i, j], 0)) ** 3)
    found = np.array(list(nx.spring_layout(graph, seed=0, k=1.2 / len(similarity) ** 0.5, iterations=300).values()))
    ranks = found.argsort(axis=0).argsort(axis=0) / (len(found) - 1)
    return (found - found.min(axis=0)) / np.ptp(found, axis=0) / 2 + ranks / 2


def main(words: list[str] | None = None) -> None:
    """Write the tables and pictures."""
    about = "Write what the site's interactive page shows, play-*.csv and play-*-mini.png (some minutes)."
    argparse.ArgumentParser("python -m fx.play", description=about).parse_args(words)
    parts = [over_scales(item) for item in demo.TYPICAL]
    small = specs(demo.TYPICAL[1])[settings.load()["dreambooth"].finextract_scale]
    similarity = similarity_matrix(np.load(results.folder(small.extract) / "descriptors.npy"))
    rows, columns = np.triu_indices(len(similarity), 1)
    found = places(similarity)
    saved = {
        "play-scales": pd.concat([scores for scores, *_ in parts]),
        "play-matches": pd.concat([matches for _, matches, _ in parts]),
        "play-cliques": over_phi(similarity),
        "play-pairs": pd.DataFrame({"i": rows, "j": columns, "similarity": similarity[rows, columns].round(4)}),
        "play-places": pd.DataFrame({"image": range(len(found)), "x": found[:, 0].round(4), "y": found[:, 1].round(4)}),
    }
    for name, table in saved.items():
        print(tables.save(table, name, COMPLETE))
    generated = generated_pictures(small.extract.generate)
    sheets = {item.replace("/", "-"): pictures for item, (*_, pictures) in zip(demo.TYPICAL, parts, strict=True)}
    sheets["cliques"] = sheet([generated[i : i + COLUMNS] for i in range(0, len(generated), COLUMNS)])
    for name, pictures in sheets.items():
        pictures.quantize(128).save(path := FIGURES / f"play-{name}-mini.png", optimize=True)
        print(path)


if __name__ == "__main__":
    command.run("fx.play", main)
