"""Figures: from one row of pictures to the tables' point plots; every figure is saved once per profile."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.transforms import ScaledTranslation

from fx import provenance
from fx.metrics import mean_interval
from fx.paths import COMPLETE, FIGURES, SHIPPED_FIGURES

ARM_COLOURS = {
    "direct": "0.55",
    "cfg": "tab:orange",
    "finextract": "tab:blue",
    "conditional_only": "tab:green",
    "model_guidance": "tab:purple",
    "caption_first": "tab:olive",
    "model_first": "tab:cyan",
}
ARM_LABELS = {
    "direct": "direct",
    "cfg": "CFG",
    "finextract": "FineXtract",
    "conditional_only": "conditional only",
    "model_guidance": "model guidance",
    "caption_first": "caption first",
    "model_first": "model first",
}
LABELS = ARM_LABELS | {
    "style": "artists",
    "object": "objects",
    "dreambooth": "DreamBooth",
    "lora": "LoRA",
    "A-ESR_strict": r"A-ESR, strict $\tau$",
    "A-ESR_loose": r"A-ESR, loose $\tau$",
    "AS_one_to_one": "AS, one to one",
    "A-ESR_strict_one_to_one": r"A-ESR, strict $\tau$, one to one",
}
plt.style.use(Path(__file__).with_name("figure.mplstyle"))


def show_row(axes: Axes, pictures: np.ndarray, label: str, gap: int = 2) -> None:
    """Pictures uint8 [n, h, w, 3] side by side on one pair of axes, the label at the left."""
    padded = np.pad(pictures, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    axes.imshow(np.concatenate(padded, axis=1))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label, rotation=0, ha="right", va="center")


def add_note(axes: Axes, left: float, bottom: float, note: str) -> None:
    """A short text in the lower left corner of a picture, whose place on the axes is given in pixels."""
    axes.text(left + 1, bottom - 2, note, fontsize=7, va="bottom", bbox={"facecolor": "white", "pad": 0.8, "lw": 0})


def picture_rows(
    rows: dict[str, np.ndarray], title: str = "", width: float = 0.75, notes: dict[str, list[str]] | None = None
) -> Figure:
    """One labelled row of pictures per entry; `width` is the printed width of a picture in inches.

    notes: for some of the rows, a short text to stand in the lower left corner of each of its pictures.
    """
    columns = max(len(pictures) for pictures in rows.values())
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(columns * width + 1, len(rows) * width + 0.3), squeeze=False, layout="constrained"
    )
    for axis, (label, pictures) in zip(axes[:, 0], rows.items(), strict=True):
        missing = columns - len(pictures)
        blank = np.full((missing, *pictures.shape[1:]), 255, np.uint8)
        show_row(axis, np.concatenate([pictures, blank]), label)
        step = axis.get_images()[0].get_array().shape[1] / columns
        for number, note in enumerate((notes or {}).get(label, [])):
            add_note(axis, number * step, pictures.shape[1], note)
    figure.suptitle(title)
    return figure


def marked(similarities: np.ndarray, loose: float, strict: float) -> list[str]:
    """Similarities as text: two stars above the strict threshold of a copy, one above the loose one."""
    return [f"{value:.2f}" + "*" * (int(value > loose) + int(value > strict)) for value in similarities]


def captioned_grid(pictures: np.ndarray, captions: list[str], columns: int = 8, width: float = 1.15) -> Figure:
    """Pictures uint8 [n, h, w, 3] in a grid, each `width` inches wide and under its own caption."""
    rows, height = -(-len(pictures) // columns), width * pictures.shape[1] / pictures.shape[2] + 0.3
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption in zip(axes.flat, pictures, captions, strict=False):
        axis.imshow(picture)
        axis.set_title("\n".join(textwrap.wrap(caption, 18)[:3]), fontsize=7)
    return figure


def loss_curves(losses: dict[str, np.ndarray], window: int = 50) -> Figure:
    """Training losses over steps, each as a running mean over `window` steps (over all of the shortest, if fewer)."""
    window = min(window, *map(len, losses.values()))
    figure, axes = plt.subplots(figsize=(6, 2.6))
    for label, values in losses.items():
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, label=label)
    axes.set(xlabel="optimiser step", ylabel=f"diffusion loss (mean of {window})")
    axes.legend()
    return figure


def known_arms(rows: pd.DataFrame) -> list[str]:
    """The arms in a table, in the order of figures; ValueError for one that has no colour, whose rows would be lost."""
    if unknown := sorted(set(rows.arm) - set(ARM_COLOURS)):
        raise ValueError(f"no colour for the arm {', '.join(unknown)}: add it to fx.plots.ARM_COLOURS and ARM_LABELS")
    return [arm for arm in ARM_COLOURS if arm in set(rows.arm)]


def scores_by_arm(rows: pd.DataFrame, score: str = "AS", block: str = "block") -> Figure:
    """Mean score of each arm in each block with its 95% t-interval over items; single items as faint points."""
    figure, axes = plt.subplots(figsize=(7, 2.8))
    arms = known_arms(rows)
    common = {"data": rows, "x": block, "y": score, "hue": "arm", "hue_order": arms, "palette": ARM_COLOURS, "ax": axes}
    sns.stripplot(**common, dodge=True, jitter=False, alpha=0.3, size=3, legend=False)
    sns.pointplot(**common, dodge=0.53, linestyle="none", errorbar=mean_interval, capsize=0.06)
    for text in axes.get_legend().get_texts():
        text.set_text(ARM_LABELS[text.get_text()])
    axes.set_xlabel("")
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title="")
    return figure


SYMBOLS = {
    "guidance_scale": "guidance scale $w'$",
    "correction_scale": "correction scale $k$",
    "n_training": "training images $N_0$",
    "images_per_training": r"generated images, $N\,/\,N_0$",
    "steps_per_image": "images seen per training image",
    "evaluations": "network evaluations per image",
    "cost": "network evaluations per item",
    "rank": "rank of the LoRA",
}


def score_curves(
    rows: pd.DataFrame, x: str, score: str = "AS", block: str = "method", lines: str = "arm", log: bool = False
) -> Figure:
    """Mean score over a quantity `x`, one panel per block, one line per arm with its 95% t-interval over items.

    lines: the column that tells the lines apart, if it is not the arm. Over guidance scales direct sampling, which has
    none, is a dashed line at its mean. log: whether x has a logarithmic axis. Bars of AS are cut off where it ends.
    """
    blocks = list(dict.fromkeys(rows[block]))
    figure, axes = plt.subplots(1, len(blocks), figsize=(3.6 * len(blocks), 2.6), sharey=True, squeeze=False)
    order = known_arms(rows) if lines == "arm" else list(dict.fromkeys(rows[lines]))
    colours = ARM_COLOURS if lines == "arm" else dict(zip(order, sns.color_palette("colorblind"), strict=False))
    markers = dict(zip(order, "osD^vP*X<>", strict=False))  # told apart in grey too
    flat = {"direct"} & set(order) if x == "guidance_scale" else set()
    kinds = [kind for kind in order if kind not in flat]
    for axis, name in zip(axes[0], blocks, strict=True):
        panel = rows[rows[block] == name]
        curves = panel[~panel[lines].isin(flat)]
        for number, kind in enumerate(kinds):
            shift = 3.0 * (number - (len(kinds) - 1) / 2)
            _curve(axis, curves[curves[lines] == kind], x, score, shift, color=colours[kind], marker=markers[kind])
        for kind in flat & set(panel[lines]):
            axis.axhline(panel[panel[lines] == kind][score].mean(), color=colours[kind], linestyle="--")
        axis.set(title=LABELS.get(name, name), xlabel=SYMBOLS.get(x, x.replace("_", " ")))
        axis.set_ylabel(LABELS.get(score, score))
        if log:
            ticks = sorted(set(curves[x]))
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
    if score in ("AS", "AS of controls"):  # not a difference of two
        low, high = axes[0, 0].get_ylim()  # the panels share it; bars of two items may reach beyond what AS can be
        axes[0, 0].set_ylim(max(low, -0.05), min(high, 1.05))
    looks = {kind: {"linestyle": "--"} if kind in flat else {"marker": markers[kind]} for kind in order}
    handles = [Line2D([], [], color=colours[kind], **look) for kind, look in looks.items()]
    names = [LABELS.get(kind, str(kind)) for kind in order]
    axes[0, -1].legend(handles, names, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _curve(axis: Axes, rows: pd.DataFrame, x: str, score: str, shift: float, **look) -> None:
    """Means over x with their intervals as bars, drawn `shift` points to the side, so that lines do not hide one another."""
    place = axis.transData + ScaledTranslation(shift / 72, 0, axis.figure.dpi_scale_trans)
    grouped = rows.groupby(x)[score]
    means, intervals = grouped.mean(), [mean_interval(values.to_numpy()) for _, values in grouped]
    axis.plot(means.index, means, transform=place, markersize=4, **look)
    low, high = zip(*intervals, strict=True) if intervals else ((), ())
    axis.vlines(list(means.index), low, high, transform=place, color=look["color"], linewidth=1, alpha=0.6)
    ends = np.array([(at, y) for at, *ys in zip(means.index, means, low, high, strict=True) for y in ys], dtype=float)
    axis.update_datalim(ends[np.isfinite(ends).all(axis=1)].reshape(-1, 2))  # what is shifted does not count by itself
    axis.autoscale_view()


def paired_differences(
    rows: pd.DataFrame, arm: str, baseline: str, score: str = "AS", block: str = "block", between: str = "arm"
) -> Figure:
    """score(arm) - score(baseline) of every item as a point, one row per block, with the mean and its 95% t-interval.

    between: the column that tells the two apart. The number of items above 0 stands at the right.
    """
    wide = rows.pivot_table(index=[block, "item"], columns=between, values=score, sort=False)
    gains = (wide[arm] - wide[baseline]).rename("gain").reset_index()
    blocks = list(dict.fromkeys(gains[block]))
    figure, axes = plt.subplots(figsize=(6, 0.55 * len(blocks) + 0.8))
    axes.axvline(0, color="0.7", linewidth=1)
    for place, name in enumerate(blocks):
        own = np.sort(gains[gains[block] == name].gain)
        apart = 0.07 * (np.arange(len(own)) % 5 - 2)  # neighbours do not hide one another
        axes.scatter(own, place + apart, color="0.55", s=10)
    common = {"data": gains, "x": "gain", "y": block, "order": blocks, "ax": axes}
    sns.pointplot(
        **common, errorbar=mean_interval, color="black", linestyle="none", markers="D", markersize=5, capsize=0.2
    )
    for place, name in enumerate(blocks):
        own = gains[gains[block] == name].gain
        note = f"{(own > 0).sum()} of {len(own)} above 0"
        axes.annotate(note, (1.01, place), xycoords=("axes fraction", "data"), va="center")
    axes.set(xlabel=f"{LABELS.get(score, score)}: {LABELS.get(arm, arm)} - {LABELS.get(baseline, baseline)}", ylabel="")
    return figure


def success_curves(matches: pd.DataFrame, loose: float, strict: float, block: str = "block") -> Figure:
    """Share of images whose best match lies above tau, over tau: training images solid, controls dashed, by arm.

    matches: a row per image with its "similarity", "arm", "of" ("training" or "controls") and its block, a panel each. The
    two thresholds of A-ESR are vertical lines.
    """
    blocks = list(dict.fromkeys(matches[block]))
    figure, axes = plt.subplots(
        1, len(blocks), figsize=(2.3 * len(blocks) + 1.2, 2.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], blocks, strict=True):
        for tau, style in ((loose, ":"), (strict, "-.")):
            axis.axvline(tau, color="0.7", linestyle=style, linewidth=1)
        for arm in known_arms(matches):
            for of, style in (("training", "-"), ("controls", "--")):
                shown = matches[(matches[block] == name) & (matches.arm == arm) & (matches.of == of)]
                values = np.sort(shown.similarity.to_numpy())
                above = 1 - np.arange(len(values) + 1) / max(len(values), 1)
                axis.step([-1, *values], above, where="post", color=ARM_COLOURS[arm], linestyle=style)
        axis.set(title=name, xlabel=r"threshold $\tau$", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].set_ylabel(r"share of images above $\tau$")
    lines = [Line2D([], [], color=ARM_COLOURS[arm]) for arm in known_arms(matches)]
    lines += [Line2D([], [], color="0.3", linestyle=style) for style in ("-", "--")]
    names = [ARM_LABELS[arm] for arm in known_arms(matches)] + ["training images", "controls"]
    figure.legend(lines, names, loc="outside right upper")
    return figure


def method_drawing(pictures: dict[str, np.ndarray], phi: float, notes: list[str]) -> Figure:
    """The paper's Fig. 2 with pictures of a run: theta and theta' -> Eq. 13 -> generated -> clique -> extracted.

    pictures: "base", "tuned", "generated", "clique", "extracted" and, for comparison, "training", uint8 [n >= 4, h, w, 3]
    each (four are shown); phi: the similarity from which on images were linked; notes: a text for each extracted one.
    """
    eq_13 = r"$\epsilon_{\theta'}^c+(w'-1)(\epsilon_{\theta'}^c-\epsilon_\theta)+k\epsilon_\theta$"
    titles = {
        "base": r"base $\theta$, no caption",
        "tuned": r"fine-tuned $\theta'$, caption $c$",
        "generated": f"FineXtract\n{eq_13}",
        "clique": "of one clique\n" + rf"sim $\geq \phi={phi:.2f}$",
        "extracted": r"extracted $\hat X$" + "\n(similarity)",
        "training": "training images\nmost like these",
    }
    places = {"base": (0, 0.55), "tuned": (0, 0.0), "generated": (1, 0.28), "clique": (2, 0.28)}
    places |= {"extracted": (3, 0.55), "training": (3, 0.0)}
    figure = plt.figure(figsize=(8.5, 3.2))
    for name, (column, bottom) in places.items():
        axes = figure.add_axes((column * 0.26, bottom, 0.19, 0.38))
        tiles = pictures[name][:4]
        axes.imshow(np.concatenate([np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)]))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(titles[name])
        height, width = tiles.shape[1:3]
        for number, note in enumerate(notes[:4] if name == "extracted" else []):
            add_note(axes, number % 2 * width, (number // 2 + 1) * height, note)
    for start, end in (
        ((0.2, 0.7), (0.25, 0.52)),
        ((0.2, 0.2), (0.25, 0.42)),
        ((0.46, 0.47), (0.51, 0.47)),
        ((0.72, 0.52), (0.77, 0.7)),
    ):
        arrow = FancyArrowPatch(start, end, transform=figure.transFigure, arrowstyle="-|>", mutation_scale=14)
        figure.add_artist(arrow)
    return figure


def complete(name: str, profile: str = COMPLETE) -> Image | str:
    """A figure of the complete run as the repository shows it, for a notebook; a sentence where there is none yet."""
    path = SHIPPED_FIGURES / f"{name}-{profile}.png"
    return (
        Image(path)
        if path.exists()
        else f"{path.name}: there is no complete run (fx.reproduce --profile {profile}) yet"
    )


def save(figure: Figure, name: str, profile: str) -> Path:
    """Save as figures/<name>-<profile>.png, note its steps (fx.provenance), and say where."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    path = FIGURES / f"{name}-{profile}.png"
    figure.savefig(path)
    provenance.note(path, FIGURES.parent / "data/results" / profile)
    return path


def progress_rows(
    rows: dict[str, np.ndarray],
    similarities: dict[str, np.ndarray],
    marks: dict[str, float],
    title: str = "",
    width: float = 0.62,
) -> Figure:
    """Labelled rows of pictures and, beside them, the similarities of the pictures of a row: dots, and a bar at their mean.

    similarities: of neighbouring rows, numbers of up to 1; marks: values to compare with, by name, as lines through these
    rows. `width` is the printed width of a picture in inches.
    """
    columns, names = max(map(len, rows.values())), list(rows)
    left, across, beside, under = 1.3, columns * width, 2.2, 0.6
    wide, high = left + across + beside + 0.8, under + len(rows) * width + 0.4
    figure = plt.figure(figsize=(wide, high))
    bottom = {name: under + (len(rows) - 1 - place) * width for place, name in enumerate(names)}
    for name, pictures in rows.items():
        axes = figure.add_axes((left / wide, bottom[name] / high, across / wide, 0.94 * width / high))
        blank = np.full((columns - len(pictures), *pictures.shape[1:]), 255, np.uint8)
        show_row(axes, np.concatenate([pictures, blank]), name)
    lowest, highest = bottom[list(similarities)[-1]], bottom[next(iter(similarities))] + width
    span = ((left + across + 0.3) / wide, lowest / high, beside / wide, (highest - lowest) / high)
    _dots_and_means(figure.add_axes(span), list(similarities.values()), marks)
    figure.text((left + across / 2) / wide, 1 - 0.2 / high, title, ha="center", fontsize=10)
    return figure


def _dots_and_means(axes: Axes, rows: list[np.ndarray], marks: dict[str, float]) -> None:
    """Per row, from the top, values as dots, their mean as a bar with its number at the right; marks as broken lines."""
    for place, values in enumerate(rows):
        axes.plot(values, np.full(len(values), place), "o", color="0.65", markersize=3.5)
        axes.plot([values.mean()], [place], "|", color="black", markersize=22, markeredgewidth=2)
        axes.text(1.03, place, f"{values.mean():.2f}", va="center", transform=axes.get_yaxis_transform())
    for (name, value), style in zip(marks.items(), ("--", ":", "-."), strict=False):
        axes.axvline(value, color="tab:blue", linestyle=style, linewidth=1.2, label=name)
    axes.set(
        xlim=(-0.1, 1), ylim=(len(rows) - 0.5, -0.5), yticks=[], xlabel="similarity to the nearest\ntraining image"
    )
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, fontsize=8)


def training_phases(phases: dict[str, pd.DataFrame], panels: dict[str, tuple[str, float, str]], window=5) -> Figure:
    """Logged quantities over the pictures seen, one line per phase of a training.

    phases: by name, each with the column `pictures` (all that were seen, earlier phases included) and the quantities.
    panels: title -> (column, the number of pictures where the panel begins, scale of y), means over `window` rows. A dashed
    line shows where a phase after the first begins.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.5), squeeze=False, layout="constrained")
    for axis, (title, (column, start, scale)) in zip(axes[0], panels.items(), strict=True):
        for number, (name, log) in enumerate(phases.items()):
            smooth = log[column].rolling(window, min_periods=1).mean()
            late = log.pictures >= start
            axis.plot(log.pictures[late] / 1e6, smooth[late], label=name, color=("0.45", "tab:blue")[number % 2])
            if number:
                axis.axvline(log.pictures.iloc[0] / 1e6, color="black", linestyle="--", linewidth=0.8)
        axis.set(title=title, xlabel="million pictures seen", yscale=scale)
    axes[0, 0].legend(fontsize=8)
    return figure


def forest(differences: pd.DataFrame, by: list[str], panel: str = "score", xlabel: str = "difference") -> Figure:
    """Forest plots side by side: the rows of tables.paired_difference with their 95% intervals, a panel per score.

    by: the columns that name a row; every value of the column `panel` has the same rows, else ValueError. A marker is
    filled where the interval excludes 0, hollow where it does not or where there is none (a single item).
    """
    panels = {name: rows.reset_index() for name, rows in differences.groupby(panel, sort=False)}
    named = [rows[by].to_numpy().tolist() for rows in panels.values()]
    if any(names != named[0] for names in named):
        raise ValueError(
            f"the panels {', '.join(map(str, panels))} do not have the same rows, named by {', '.join(by)}"
        )
    labels = [" · ".join(LABELS.get(word, str(word)) for word in names) for names in named[0]]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.3 * len(panels) + 1.5, 0.23 * len(labels) + 0.8), sharey=True, squeeze=False
    )
    for axis, (name, rows) in zip(axes[0], panels.items(), strict=True):
        axis.axvline(0, color="0.7", linewidth=1)
        axis.hlines(rows.index, rows.low, rows.high, color="black", linewidth=1)
        filled = (rows.low > 0) | (rows.high < 0)
        axis.scatter(
            rows.difference, rows.index, s=22, color=np.where(filled, "black", "white"), edgecolor="black", zorder=3
        )
        axis.set(title=LABELS.get(name, str(name)), xlabel=xlabel)
        axis.locator_params(axis="x", nbins=4)
    axes[0, 0].set(yticks=range(len(labels)), yticklabels=labels)
    axes[0, 0].invert_yaxis()
    return figure


def tradeoff(rows: pd.DataFrame, xs: list[str], y: str, name: str, kind: str) -> Figure:
    """A numbered point per `name`, the mean over items of `y` over that of each x, with 95% t-intervals; a panel per x.

    rows: one per item and name; kind: a column that gives the points their colour. What the numbers stand for is listed at
    the side, in order of appearance.
    """
    names, kinds = list(dict.fromkeys(rows[name])), list(dict.fromkeys(rows[kind]))
    colours = dict(zip(kinds, sns.color_palette("colorblind", len(kinds)), strict=True))
    figure, axes = plt.subplots(
        1, len(xs), figsize=(3.1 * len(xs) + 2.2, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, x in zip(axes[0], xs, strict=True):
        for number, which in enumerate(names, 1):
            own = rows[rows[name] == which]
            colour, place = colours[own[kind].iloc[0]], (own[x].mean(), own[y].mean())
            axis.plot(mean_interval(own[x].to_numpy()), [place[1]] * 2, color=colour, linewidth=0.8, alpha=0.6)
            axis.plot([place[0]] * 2, mean_interval(own[y].to_numpy()), color=colour, linewidth=0.8, alpha=0.6)
            axis.scatter(*place, s=90, color="white", edgecolor=colour, zorder=3)
            axis.annotate(str(number), place, ha="center", va="center", fontsize=7, zorder=4)
        axis.set_xlabel(LABELS.get(x, x))
    axes[0, 0].set_ylabel(LABELS.get(y, y))
    of = {which: rows[rows[name] == which][kind].iloc[0] for which in names}
    handles = [
        Line2D([], [], color=colours[of[which]], marker="o", markerfacecolor="white", linestyle="") for which in names
    ]
    figure.legend(handles, [f"{n} {which}" for n, which in enumerate(names, 1)], loc="outside right upper")
    return figure


def picture_table(
    rows: dict[str, np.ndarray], columns: list[str], under: dict[str, list[str]] | None = None, width: float = 0.85
) -> Figure:
    """Rows of pictures uint8 [n, h, w, 3] under common column titles; `width` is the printed width of a picture in inches.

    under: for some of the rows a text below each picture.
    """
    figure = picture_rows(rows, width=width)
    figure.set_figheight(len(rows) * (width + (0.2 if under else 0.05)) + 0.4)
    for axis, (label, pictures) in zip(figure.axes, rows.items(), strict=True):
        step = axis.get_images()[0].get_array().shape[1] / len(columns)
        centres = (np.arange(len(columns)) + 0.5) * step
        if notes := (under or {}).get(label):
            axis.set_xticks(centres[: len(notes)], notes, fontsize=8)
            axis.tick_params(length=0, pad=2)
        if axis is figure.axes[0]:
            for centre, title in zip(centres, columns, strict=True):
                axis.text(centre, -0.06 * pictures.shape[1], title, ha="center", va="bottom", fontsize=8)
    return figure
