"""fx.plots: what each figure holds, read back from the figure itself."""

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from fx import plots
from fx.metrics import mean_interval
from fx.paths import COMPLETE
from fx.sampling import ARMS


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def tiles(n: int, seed: int = 0, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (n, height, width, 3), np.uint8)


def shown(axes) -> np.ndarray:
    """The one image on a pair of axes."""
    (image,) = axes.images
    return np.asarray(image.get_array())


def test_show_row_puts_pictures_side_by_side_with_a_white_gap():
    _, axes = plt.subplots()
    pictures = tiles(3)
    plots.show_row(axes, pictures, "training", gap=2)
    row = shown(axes)
    assert row.shape == (6, 3 * (8 + 2), 3)
    for number, picture in enumerate(pictures):
        assert np.array_equal(row[:, number * 10 : number * 10 + 8], picture)
        assert (row[:, number * 10 + 8 : number * 10 + 10] == 255).all()
    assert axes.get_ylabel() == "training"
    assert not len(axes.get_xticks())
    assert not len(axes.get_yticks())
    assert not any(spine.get_visible() for spine in axes.spines.values())


def test_picture_rows_has_a_labelled_row_per_entry_and_fills_short_ones_with_white():
    rows = {"training": tiles(4), "direct": tiles(2, seed=1), "cfg": tiles(4, seed=2)}
    figure = plots.picture_rows(rows, "mimooh", width=0.5)
    assert [axes.get_ylabel() for axes in figure.axes] == list(rows)
    for axes, pictures in zip(figure.axes, rows.values(), strict=True):
        row = shown(axes)
        assert row.shape == (6, 4 * 10, 3)
        for number, picture in enumerate(pictures):
            assert np.array_equal(row[:, number * 10 : number * 10 + 8], picture)
        assert (row[:, len(pictures) * 10 :] == 255).all()
    assert figure.get_suptitle() == "mimooh"
    figure.canvas.draw()
    tops = [axes.get_position().y0 for axes in figure.axes]
    assert tops == sorted(tops, reverse=True), "rows from top to bottom in the order given"
    wider = plots.picture_rows(rows, width=1.0)
    assert wider.get_figwidth() - figure.get_figwidth() == pytest.approx(4 * 0.5)


def test_notes_stand_inside_their_pictures():
    rows = {"training": tiles(3), "cfg": tiles(2, seed=1)}
    figure = plots.picture_rows(rows, notes={"cfg": ["a", "b"]})
    first, second = figure.axes
    assert not first.texts
    assert [text.get_text() for text in second.texts] == ["a", "b"]
    for number, text in enumerate(second.texts):
        x, y = text.get_position()
        assert number * 10 <= x < number * 10 + 8
        assert 0 <= y < 6


def test_stars_mark_the_thresholds_a_similarity_is_above():
    assert plots.marked(np.array([0.5, 0.501, 0.7, 0.71, -0.2]), 0.5, 0.7) == [
        "0.50",
        "0.50*",
        "0.70*",
        "0.71**",
        "-0.20",
    ]


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_captioned_grid_shows_each_picture_under_its_caption(n, rows):
    pictures = tiles(n)
    captions = [f"picture {number} of a rather long caption" for number in range(n)]
    figure = plots.captioned_grid(pictures, captions, columns=3)
    assert len(figure.axes) == rows * 3
    used = [axes for axes in figure.axes if axes.images]
    assert len(used) == n
    for axes, picture, caption in zip(used, pictures, captions, strict=True):
        assert np.array_equal(shown(axes), picture)
        assert axes.get_title().replace("\n", " ") == caption
    assert not any(axes.axison for axes in figure.axes)


@pytest.mark.parametrize("window", [1, 7, 30])
def test_loss_curves_are_running_means_at_the_step_of_their_last_value(window):
    draw = np.random.default_rng(0)
    losses = {"mimooh": draw.random(40).astype(np.float32), "zazou": draw.random(55).astype(np.float32)}
    (axes,) = plots.loss_curves(losses, window=window).axes
    assert [line.get_label() for line in axes.lines] == list(losses)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(losses)
    for line, values in zip(axes.lines, losses.values(), strict=True):
        expected = pd.Series(values, index=np.arange(1, len(values) + 1)).rolling(window).mean().dropna()
        np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-6)
        np.testing.assert_array_equal(line.get_xdata(), expected.index)
    assert str(window) in axes.get_ylabel()
    assert "step" in axes.get_xlabel()


def test_loss_curves_of_fewer_steps_than_the_window_show_the_mean_of_all():
    (axes,) = plots.loss_curves({"short": np.array([1.0, 2, 3, 6]), "long": np.arange(6.0)}, window=50).axes
    short, long = axes.lines
    assert (short.get_xdata().tolist(), short.get_ydata().tolist()) == ([4], [3.0])
    np.testing.assert_allclose(long.get_ydata(), [1.5, 2.5, 3.5])
    assert "4" in axes.get_ylabel()


def scored() -> pd.DataFrame:
    """Five items in each of two blocks for three arms, in an order that is not that of the legend."""
    draw = np.random.default_rng(0)
    levels = {"finextract": 0.6, "direct": 0.3, "cfg": 0.5}
    rows = [
        {"block": block, "arm": arm, "item": item, "AS": level + draw.normal(0, 0.02), "half": level / 2}
        for block in ("style", "object")
        for arm, level in levels.items()
        for item in range(5)
    ]
    return pd.DataFrame(rows)


def means(axes) -> dict[str, list[float]]:
    """Per colour of a marked line the heights of its markers, block by block."""
    lines = [line for line in axes.lines if line.get_marker() not in ("", "None", None) and len(line.get_ydata()) == 2]
    return {to_rgb(line.get_color()): list(line.get_ydata()) for line in lines}


def test_scores_by_arm_shows_means_points_and_intervals_of_every_arm():
    rows = scored()
    (axes,) = plots.scores_by_arm(rows).axes
    drawn = means(axes)
    for arm in ("direct", "cfg", "finextract"):
        expected = [rows[(rows.block == block) & (rows.arm == arm)].AS.mean() for block in ("style", "object")]
        assert drawn[to_rgb(plots.ARM_COLOURS[arm])] == pytest.approx(expected)
    assert len(drawn) == 3
    points = np.concatenate([collection.get_offsets()[:, 1] for collection in axes.collections])
    np.testing.assert_allclose(np.sort(points), np.sort(rows.AS))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["direct", "CFG", "FineXtract"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["style", "object"]
    assert axes.get_ylabel() == "AS"
    bars = [line for line in axes.lines if len(line.get_ydata()) > 2]
    assert len(bars) == 6, "an interval for each arm in each block"
    for bar in bars:
        middle = np.nanmean(bar.get_ydata())
        assert min(abs(middle - mean) for pair in drawn.values() for mean in pair) < 0.02


def test_scores_by_arm_takes_other_scores_and_leaves_out_arms_that_were_not_run():
    rows = scored().rename(columns={"block": "dataset"})
    (axes,) = plots.scores_by_arm(rows[rows.arm != "cfg"], score="half", block="dataset").axes
    drawn = means(axes)
    assert drawn == {
        to_rgb(plots.ARM_COLOURS["direct"]): pytest.approx([0.15, 0.15]),
        to_rgb(plots.ARM_COLOURS["finextract"]): pytest.approx([0.3, 0.3]),
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["direct", "FineXtract"]
    assert axes.get_ylabel() == "half"


def test_score_curves_has_a_panel_per_method_a_line_per_guided_arm_and_direct_as_a_level():
    heights = {("cfg", 1.5): 0.2, ("cfg", 3.0): 0.3, ("finextract", 1.5): 0.4, ("finextract", 3.0): 0.6}
    heights[("direct", 1.0)] = 0.1
    rows = pd.DataFrame(
        {"method": method, "item": item, "arm": arm, "guidance_scale": w, "AS": height + spread + lower}
        for method, lower in (("dreambooth", 0.0), ("lora", -0.05))
        for (arm, w), height in heights.items()
        for item, spread in (("a", -0.02), ("b", 0.02))
    )
    figure = plots.score_curves(rows, "guidance_scale")
    assert [axes.get_title() for axes in figure.axes] == ["dreambooth", "lora"]
    for axes, lower in zip(figure.axes, (0.0, -0.05), strict=True):
        drawn = {to_rgb(line.get_color()): line for line in axes.lines if len(line.get_xdata())}
        assert len(drawn) == 3
        for arm in ("cfg", "finextract"):
            line = drawn[to_rgb(plots.ARM_COLOURS[arm])]
            assert list(line.get_xdata()) == [1.5, 3.0]
            assert list(line.get_ydata()) == pytest.approx([heights[arm, w] + lower for w in (1.5, 3.0)])
        assert list(drawn[to_rgb(plots.ARM_COLOURS["direct"])].get_ydata()) == pytest.approx([0.1 + lower] * 2)
        assert len(axes.collections) == 2, "an interval for each guided arm"
        assert axes.get_xlabel() == "guidance scale"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["CFG", "FineXtract", "direct"]
    assert figure.axes[0].get_legend() is None


def test_every_arm_that_can_be_sampled_has_a_colour_of_its_own_and_a_label():
    assert plots.ARM_COLOURS.keys() == plots.ARM_LABELS.keys() == ARMS.keys()
    assert len({to_rgb(colour) for colour in plots.ARM_COLOURS.values()}) == len(ARMS)


def test_known_arms_are_those_of_the_rows_in_the_order_of_the_colours():
    assert plots.known_arms(scored()) == ["direct", "cfg", "finextract"]
    every = pd.DataFrame({"arm": [*reversed(plots.ARM_COLOURS)] * 2})
    assert plots.known_arms(every) == list(plots.ARM_COLOURS)


def test_an_arm_without_a_colour_is_refused_and_not_left_out():
    rows = pd.concat([scored(), scored().assign(arm="magic"), scored().assign(arm="art")])
    message = r"no colour for the arm art, magic: add it to fx\.plots\.ARM_COLOURS and ARM_LABELS"
    for draw in (plots.known_arms, plots.scores_by_arm, lambda r: plots.score_curves(r, "item", block="block")):
        with pytest.raises(ValueError, match=message):
            draw(rows)


def test_a_figure_of_the_complete_run_is_the_committed_file_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "SHIPPED_FIGURES", tmp_path)
    monkeypatch.setattr(plots, "FIGURES", tmp_path / "elsewhere")  # where this run writes does not count
    said = plots.complete("table01")
    assert said == f"table01-{COMPLETE}.png: there is no complete run (fx.reproduce --profile {COMPLETE}) yet"
    assert "table01-paper.png: there is no complete run (fx.reproduce --profile paper)" in plots.complete(
        "table01", "paper"
    )
    for profile, seed in ((COMPLETE, 0), ("paper", 1)):
        Image.fromarray(tiles(1, seed)[0]).save(path := tmp_path / f"table01-{profile}.png")
        assert plots.complete("table01", profile).data == path.read_bytes()
    assert plots.complete("table01").data == (tmp_path / f"table01-{COMPLETE}.png").read_bytes()


def test_method_drawing_leads_from_both_models_to_the_extracted_centres():
    names = ["base", "tuned", "generated", "clique", "extracted", "training"]
    pictures = {name: tiles(5, seed, 8, 8) for seed, name in enumerate(names)}
    figure = plots.method_drawing(pictures, 0.375, ["0.8**", "0.7", "0.6", "0.5", "0.4"])
    assert len(figure.axes) == 6
    for axes, name in zip(figure.axes, names, strict=True):
        a, b, c, d = pictures[name][:4]
        assert np.array_equal(shown(axes), np.vstack([np.hstack([a, b]), np.hstack([c, d])])), name
    titles = [axes.get_title() for axes in figure.axes]
    symbols = [r"\theta", r"\theta'", r"w'-1", r"\phi=0.38", r"\hat X", "training"]
    assert all(symbol in title for symbol, title in zip(symbols, titles, strict=True))
    assert [text.get_text() for text in figure.axes[4].texts] == ["0.8**", "0.7", "0.6", "0.5"]
    base, tuned, generated, clique, extracted, training = (axes.get_position() for axes in figure.axes)
    assert base.y0 > tuned.y1
    assert extracted.y0 > training.y1
    assert (extracted.x0, extracted.x1) == (training.x0, training.x1)
    arrows = [artist for artist in figure.artists if isinstance(artist, FancyArrowPatch)]
    ways = [(base, generated), (tuned, generated), (generated, clique), (clique, extracted)]
    for arrow, (start, end) in zip(arrows, ways, strict=True):
        (x0, y0), (x1, y1) = arrow._posA_posB
        assert start.x1 <= x0 < x1 <= end.x0, "an arrow runs between two pictures and covers neither"
        assert start.y0 <= y0 <= start.y1
        assert end.y0 <= y1 <= end.y1
    figure.canvas.draw()  # the formulas are ones matplotlib can set


def test_save_writes_a_readable_picture_per_name_and_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FIGURES", tmp_path / "figures")
    figure = plots.picture_rows({"training": tiles(2)})
    path = plots.save(figure, "table01", "smoke")
    assert path == tmp_path / "figures/table01-smoke.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 1, "an empty picture"
    assert plots.save(figure, "table01", "mini") != path
    assert len(list((tmp_path / "figures").iterdir())) == 2


def compared(gains=(0.1, -0.02, 0.3), arm="finextract", baseline="cfg") -> pd.DataFrame:
    """Scores of two arms on the items of two blocks, of which the second gains 0.05 in each."""
    rows = []
    for block, found in (("b", gains), ("a", [0.05, 0.06])):
        for item, gain in enumerate(found):
            level = 0.2 + 0.1 * item
            rows += [{"block": block, "item": item, "arm": baseline, "AS": level}]
            rows += [{"block": block, "item": item, "arm": arm, "AS": level + gain}]
    return pd.DataFrame(rows)


def test_paired_differences_shows_every_item_with_mean_and_t_interval():
    figure = plots.paired_differences(compared(), "finextract", "cfg")
    (axes,) = figure.axes
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    points = [np.asarray(found.get_offsets()) for found in axes.collections if len(found.get_offsets())]
    assert sorted(np.concatenate(points)[:, 0]) == pytest.approx([-0.02, 0.05, 0.06, 0.1, 0.3])
    drawn = [np.asarray(line.get_xdata(), float) for line in axes.lines]
    ends = [(np.nanmin(x), np.nanmax(x)) for x in drawn if len(x) > 1]
    for gains in ([0.1, -0.02, 0.3], [0.05, 0.06]):
        assert any(end == pytest.approx(mean_interval(gains)) for end in ends)
    assert [text.get_text() for text in axes.texts] == ["2 of 3 above 0", "2 of 2 above 0"]
    assert axes.get_xlabel() == "AS: FineXtract - CFG"


def test_forest_draws_an_interval_per_row_filled_where_it_excludes_0():
    table = pd.DataFrame(
        {"difference": [0.1, -0.1, 0.02, 0.3], "low": [0.05, -0.2, -0.01, np.nan], "high": [0.15, -0.01, 0.05, np.nan]}
    )
    (axes,) = plots.forest(table, ["one", "two", "three", "single"]).axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in points] == [0.1, -0.1, 0.02, 0.3]
    assert [line.get_fillstyle() for line in points] == ["full", "full", "none", "none"]
    spans = [list(line.get_xdata()) for line in axes.lines[1:] if line.get_marker() != "o"]
    assert spans == [[0.05, 0.15], [-0.2, -0.01], [-0.01, 0.05]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two", "three", "single"]
    assert axes.yaxis_inverted(), "the first row is on top"
    left, right = plots.forest(table, ["one", "two"] * 2, "AS", ["cfg", "cfg", "direct", "direct"]).axes
    assert (left.get_title(), right.get_title()) == ("cfg", "direct")
    assert [line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"] == [0.02, 0.3]
    assert [line.get_ydata()[0] for line in right.lines if line.get_marker() == "o"] == [0, 1]


def test_success_curves_are_the_shares_above_every_threshold():
    rows = pd.DataFrame(
        {
            "block": "b",
            "arm": "cfg",
            "of": ["training"] * 4 + ["controls"] * 2,
            "similarity": [0.2, 0.9, 0.5, 0.6, 0.1, 0.3],
        }
    )
    figure = plots.success_curves(rows, 0.54, 0.745)
    (axes,) = figure.axes
    curves = {line.get_linestyle(): line for line in axes.lines if line.get_color() == plots.ARM_COLOURS["cfg"]}
    for style, values in (("-", [0.2, 0.9, 0.5, 0.6]), ("--", [0.1, 0.3])):
        x, y = (np.asarray(part) for part in curves[style].get_data())
        assert curves[style].get_drawstyle() == "steps-post"
        for tau in (-0.5, 0.0, 0.15, 0.25, 0.55, 0.7, 0.95):
            assert y[np.searchsorted(x, tau, side="right") - 1] == pytest.approx(np.mean(np.array(values) > tau))
    assert {line.get_xdata()[0] for line in axes.lines if line.get_color() == "0.7"} == {0.54, 0.745}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["CFG", "training images", "controls"]


def test_picture_table_titles_its_columns_once_and_writes_under_single_rows():
    rows = {"direct": tiles(3), "CFG": tiles(3, seed=1)}
    figure = plots.picture_table(rows, ["t = 961", "t = 481", "$x_0$"], under={"CFG": ["0.91", "0.75", "0.60"]})
    first, second = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == list(rows)
    assert [text.get_text() for text in first.texts] == ["t = 961", "t = 481", "$x_0$"]
    assert not second.texts
    step = shown(first).shape[1] / 3
    assert [text.get_position()[0] for text in first.texts] == [0.5 * step, 1.5 * step, 2.5 * step]
    assert not len(first.get_xticks())
    assert [label.get_text() for label in second.get_xticklabels()] == ["0.91", "0.75", "0.60"]
    assert list(second.get_xticks()) == [0.5 * step, 1.5 * step, 2.5 * step]
    sizes = [text.get_fontsize() for text in [*first.texts, *second.get_xticklabels()]]
    assert min(sizes) >= 7
