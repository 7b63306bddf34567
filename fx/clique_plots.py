"""Figures of cliques (Sec. 4.3): their pictures, their graph and their similarities.

A clique is known by its number in the order in which it was removed, from 1; its centre is the image that is extracted.
"""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from fx import plots  # noqa: F401  (its import sets the style of all figures)

COLOURS = [colour for number, colour in enumerate(sns.color_palette("colorblind", 10)) if number != 7]  # 7 is grey
ALONE = "0.6"  # the frame of an image that is in no clique, or alone in its own
NODE = 0.5  # half the side of a picture in the drawing of a graph; the middles of two are 1.2 or more apart
Shown = tuple[np.ndarray, list[str]]  # pictures uint8 [n, h, w, 3] and what stands under each


def clique_drawing(members: Shown, centre: Shown, training: Shown, title: str = "", columns: int = 8) -> Figure:
    """One clique as pictures: images of it -> its centre -> training images, each with its own text below.

    members: in rows of `columns`; centre: one picture; training: in rows of three.
    """
    rows = max(-(-len(members[0]) // columns), 2)
    figure = plt.figure(figsize=(9, 0.86 * rows + 0.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.01, hspace=0, w_pad=0.02)
    parts = figure.subfigures(1, 3, width_ratios=[columns, 2.2, 3.9])
    headings = ("images of the clique", "its centre, extracted", "training images that they are most like")
    for part, shown, width, heading in zip(parts, (members, centre, training), (columns, 1, 3), headings, strict=True):
        part.suptitle(heading, fontsize=9)
        axes = part.subplots(-(-len(shown[0]) // width), width, squeeze=False).ravel()
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, picture, text in zip(axes, *shown, strict=False):  # the last row may have room
            axis.imshow(picture)
            axis.set_xlabel(text, fontsize=7, labelpad=1)
    for part in parts[1:]:
        arrow = FancyArrowPatch((-0.04, 0.5), (0.04, 0.5), transform=part.transSubfigure, arrowstyle="-|>", lw=1.5)
        arrow.set(mutation_scale=14, color="black", clip_on=False)
        part.add_artist(arrow)
    figure.suptitle(title, fontsize=10)
    return figure


def ordered_by_clique(similarity: np.ndarray, cliques: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The cliques as given, in each the images of highest mean similarity to it first; images of none follow, each alone."""
    ordered = [tuple(sorted(clique, key=lambda i: (-similarity[i, list(clique)].mean(), i))) for clique in cliques]
    rest = sorted(set(range(len(similarity))) - {image for clique in cliques for image in clique})
    return ordered + [(image,) for image in rest]


def clique_heatmap(axes: Axes, similarity: np.ndarray, cliques: list[tuple[int, ...]], smallest: int = 3) -> Axes:
    """Similarities [n, n] ordered by clique, from 0 (and below) to 1; cliques of `smallest` images or more in a frame.

    The frames are numbered at the left. Returns the axes, whose last image is what a colour bar takes.
    """
    ordered = ordered_by_clique(similarity, cliques)
    order = [image for clique in ordered for image in clique]
    axes.imshow(similarity[np.ix_(order, order)], vmin=0, vmax=1, cmap="cividis")
    starts = np.cumsum([0, *map(len, ordered)])
    framed = [number for number, clique in enumerate(cliques) if len(clique) >= smallest]
    for number in framed:
        corner, side = (starts[number] - 0.5,) * 2, len(cliques[number])
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=2))
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="black", linewidth=0.8))
    middles = [starts[number] + (len(cliques[number]) - 1) / 2 for number in framed]
    axes.set(xticks=[], yticks=middles, yticklabels=[str(number + 1) for number in framed])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes


def clique_heatmaps(
    panels: dict[str, tuple[np.ndarray, list[tuple[int, ...]]]], marks: dict[str, float], smallest: int = 3
) -> Figure:
    """`clique_heatmap` of several runs, title -> (similarities, cliques), under one colour bar with named marks."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels) + 1.1, 3.7), squeeze=False, layout="constrained"
    )
    for axis, (title, (similarity, cliques)) in zip(axes[0], panels.items(), strict=True):
        clique_heatmap(axis, similarity, cliques, smallest).set_title(title, fontsize=9)
    axes[0, 0].set_ylabel("images, clique by clique")
    bar = figure.colorbar(axes[0, -1].images[-1], ax=axes, extend="min", label="similarity of two images")
    for name, value in marks.items():
        bar.ax.axhline(value, color="white", linewidth=1.5)
        bar.ax.annotate(name, (0, value), (-4, 0), textcoords="offset points", ha="right", va="center", fontsize=7)
    return figure


def disc_places(radii: np.ndarray, gap: float = 0.2, stretch: float = 1.7) -> np.ndarray:
    """Centres [k, 2] of discs that do not touch: one after the other as near to the middle as there is room.

    stretch: how much wider than high the whole may become. There is no chance in it.
    """
    reach = 2 * np.sqrt(np.square(radii + gap).sum()) + 2 * max(radii)
    steps = np.arange(-np.ceil(reach), np.ceil(reach) + 0.25, 0.25)
    grid = np.stack(np.meshgrid(steps * stretch, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    grid = grid[np.argsort(np.square(grid / [stretch, 1]).sum(axis=1), kind="stable")]
    room, places = np.full(len(grid), np.inf), []  # from each point of the grid to the nearest disc
    for radius in radii:
        places.append(grid[(room >= radius + gap).argmax()])
        room = np.minimum(room, np.linalg.norm(grid - places[-1], axis=1) - radius)
    return np.array(places)


def node_places(similarity: np.ndarray, cliques: list[tuple[int, ...]]) -> np.ndarray:
    """Where the pictures of a graph stand, [n, 2]: those of a clique in a disc, the ones most like the others inside."""
    ordered = ordered_by_clique(similarity, cliques)
    discs = disc_places(np.array([np.sqrt(len(clique) - 1) + 0.8 for clique in ordered]))
    places = np.empty((len(similarity), 2))
    for middle, clique in zip(discs, ordered, strict=True):
        seeds = np.arange(len(clique))  # of a sunflower; offset and turn are those at which squares are farthest apart
        turn, radius = seeds * np.pi * (3 - np.sqrt(5)) + np.radians(15), np.sqrt(seeds + 0.2 * (len(clique) > 1))
        places[list(clique)] = middle + radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return places


def clique_graph(
    images: np.ndarray,
    similarity: np.ndarray,
    phi: float,
    cliques: list[tuple[int, ...]],
    centres: list[int],
    width: float = 8,
) -> Figure:
    """The graph of Sec. 4.3 with pictures uint8 [n, h, w, 3] as nodes and an edge where `similarity` [n, n] >= phi.

    Edges inside a clique have its colour, those between cliques are grey; centres have a bold frame. Where a clique stands
    says nothing: the largest is in the middle (`disc_places`), the smaller ones around it. width: of the figure in inches,
    in which a hundred pictures can be told apart.
    """
    places = node_places(similarity, cliques)
    low, high = places.min(axis=0) - 1, places.max(axis=0) + 1.3
    figure, axes = plt.subplots(figsize=(width, width * (high - low)[1] / (high - low)[0]))
    owner = np.full(len(images), -1)
    for number, clique in enumerate(cliques):
        owner[list(clique)] = number if len(clique) > 1 else -1
    _draw_edges(axes, places, np.argwhere(np.triu(similarity >= phi, 1)), owner)
    for image, place in enumerate(places):
        colour = COLOURS[owner[image] % len(COLOURS)] if owner[image] >= 0 else ALONE
        _draw_node(axes, images[image], place, colour, image in centres)
    for number, clique in enumerate(cliques):
        if len(clique) > 1:
            x, y = places[list(clique)].T
            axes.text(x.mean(), y.max() + NODE + 0.25, f"{number + 1}: {len(clique)} images", ha="center", zorder=6)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axes.axis("off")
    return figure


def _draw_node(axes: Axes, picture: np.ndarray, place: np.ndarray, colour: tuple | str, bold: bool) -> None:
    """A picture at (x, y) in a frame; a bold one stands above the others."""
    side, (x, y) = NODE + 0.06 * bold, place
    axes.imshow(picture, extent=(x - side, x + side, y - side, y + side), zorder=3 + bold)
    frame = Rectangle((x - side, y - side), 2 * side, 2 * side, fill=False, edgecolor=colour)
    axes.add_patch(frame).set(linewidth=3 if bold else 1, zorder=4 + bold)


def _draw_edges(axes: Axes, places: np.ndarray, pairs: np.ndarray, owner: np.ndarray) -> None:
    """Edges [m, 2] as lines: grey and under the others where they do not stay inside one clique (owner [n], -1 for none)."""
    inside = (owner[pairs[:, 0]] == owner[pairs[:, 1]]) & (owner[pairs[:, 0]] >= 0)
    colours = [COLOURS[number % len(COLOURS)] for number in owner[pairs[inside, 0]]]
    faint = min(0.15, 100 / max((~inside).sum(), 1))
    axes.add_collection(LineCollection(places[pairs[~inside]], colors="0.4", linewidths=0.4, alpha=faint, zorder=1))
    axes.add_collection(LineCollection(places[pairs[inside]], colors=colours, linewidths=0.6, alpha=0.4, zorder=2))
