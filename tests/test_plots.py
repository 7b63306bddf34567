"""fx.plots and fx.clique_plots: what each figure holds, read back from the figure itself."""

import itertools

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch
from PIL import Image
from scipy import stats

from fx import clique_plots, plots
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


def t_interval(values: pd.Series) -> tuple[float, float]:
    """Student's interval of the mean, 95%."""
    reach = stats.t.isf(0.025, len(values) - 1) * values.std() / len(values) ** 0.5
    return values.mean() - reach, values.mean() + reach


def interval_of(heights: np.ndarray) -> tuple[float, float]:
    return np.nanmin(heights), np.nanmax(heights)


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
    ends = {(to_rgb(bar.get_color()), round(np.nanmean(bar.get_xdata()))): interval_of(bar.get_ydata()) for bar in bars}
    for arm in ("direct", "cfg", "finextract"):
        for place, block in enumerate(("style", "object")):
            expected = t_interval(rows[(rows.block == block) & (rows.arm == arm)].AS)
            assert ends[to_rgb(plots.ARM_COLOURS[arm]), place] == pytest.approx(expected)


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
    assert [axes.get_title() for axes in figure.axes] == ["DreamBooth", "LoRA"]
    for axes, lower in zip(figure.axes, (0.0, -0.05), strict=True):
        drawn = {to_rgb(line.get_color()): line for line in axes.lines if len(line.get_xdata())}
        assert len(drawn) == 3
        for arm in ("cfg", "finextract"):
            line = drawn[to_rgb(plots.ARM_COLOURS[arm])]
            assert list(line.get_xdata()) == [1.5, 3.0]
            assert list(line.get_ydata()) == pytest.approx([heights[arm, w] + lower for w in (1.5, 3.0)])
        assert list(drawn[to_rgb(plots.ARM_COLOURS["direct"])].get_ydata()) == pytest.approx([0.1 + lower] * 2)
        bars = {to_rgb(bar.get_colors()[0]): bar for bar in axes.collections}
        assert len(bars) == 2, "an interval for each guided arm"
        for arm, w in heights:
            if arm != "direct":
                ends = {segment[0, 0]: segment[:, 1] for segment in bars[to_rgb(plots.ARM_COLOURS[arm])].get_segments()}
                assert ends[w] == pytest.approx(t_interval(heights[arm, w] + lower + pd.Series([-0.02, 0.02])))
        places = [line.get_transform().transform((2.0, 0.3))[0] for line in drawn.values()][-2:]
        assert abs(places[0] - places[1]) > 1, "side by side"
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert left < 1.5 < 3.0 < right < 6
        assert bottom < 0.0 < 0.7 < top < 1
        assert axes.get_xlabel() == "guidance scale $w'$"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["direct", "CFG", "FineXtract"]
    styles = [(line.get_linestyle(), line.get_marker()) for line in axes.get_legend().get_lines()]
    assert styles[0] == ("--", "None")
    assert len({marker for style, marker in styles[1:] if style == "-"}) == 2, "told apart without colours"
    assert figure.axes[0].get_legend() is None


def test_score_curves_over_a_quantity_that_every_arm_has_shows_direct_as_a_curve_too():
    rows = pd.DataFrame(
        [{"arm": arm, "n_training": n, "item": item, "method": "lora", "AS": n / 100 + (arm == "cfg")}
         for arm in ("direct", "cfg") for n in (5, 10, 50) for item in "ab"]
    )  # fmt: skip
    axes = plots.score_curves(rows, "n_training", log=True).axes[0]
    drawn = {to_rgb(line.get_color()): list(line.get_ydata()) for line in axes.lines if len(line.get_xdata())}
    for arm, above in (("direct", 0), ("cfg", 1)):
        assert drawn[to_rgb(plots.ARM_COLOURS[arm])] == pytest.approx([0.05 + above, 0.1 + above, 0.5 + above])
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "10", "50"]


def test_score_curves_of_other_lines_than_arms_have_colours_and_markers_of_their_own():
    captions = ["its own", "none", "another's"]
    rows = pd.DataFrame(
        [{"caption": caption, "guidance_scale": w, "item": item, "method": "lora", "AS": number + w / 10}
         for number, caption in enumerate(captions) for w in (1.0, 3.0) for item in "ab"]
    )  # fmt: skip
    axes = plots.score_curves(rows, "guidance_scale", lines="caption").axes[0]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == captions
    by_colour = {to_rgb(line.get_color()): list(line.get_ydata()) for line in axes.lines if len(line.get_xdata())}
    assert len(by_colour) == 3
    for number, line in enumerate(legend.get_lines()):
        assert by_colour[to_rgb(line.get_color())] == pytest.approx([number + 0.1, number + 0.3])
    assert len({line.get_marker() for line in legend.get_lines()}) == 3


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


def test_progress_rows_put_the_similarities_beside_their_pictures():
    rows = {"training": tiles(3), "base": tiles(4, 1), "200 per image": tiles(4, 2), "nearest": tiles(4, 3)}
    near = {"base": np.array([0.1, 0.2, 0.3, 0.0]), "200 per image": np.array([0.5, 0.7])}
    marks = {"controls": 0.4, "loose": 0.54}
    figure = plots.progress_rows(rows, near, marks, "a dog")
    *left, right = figure.axes
    assert [axes.get_ylabel() for axes in left] == list(rows)
    for axes, pictures in zip(left, rows.values(), strict=True):
        assert np.array_equal(shown(axes)[:, :8], pictures[0])
        assert shown(axes).shape[1] == 4 * 10
    for place, (name, values) in enumerate(near.items()):
        dots, mean = right.lines[2 * place : 2 * place + 2]
        np.testing.assert_array_equal(dots.get_xdata(), values)
        assert mean.get_xdata()[0] == pytest.approx(values.mean())
        assert right.texts[place].get_text() == f"{values.mean():.2f}"
        # the dots stand at the height of their pictures
        height = right.transData.transform((0, place))[1]
        box = left[list(rows).index(name)].get_window_extent()
        assert height == pytest.approx((box.y0 + box.y1) / 2, abs=0.05 * box.height)
    assert {line.get_label(): line.get_xdata()[0] for line in right.lines[4:]} == marks
    assert "similarity" in right.get_xlabel()
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(marks)
    assert "a dog" in [text.get_text() for text in figure.texts]


def test_training_phases_share_one_axis_of_pictures_and_mark_where_the_next_begins():
    first = pd.DataFrame({"pictures": np.arange(1, 11) * 100_000, "loss": np.linspace(1, 0.1, 10), "lr": 0.4})
    second = pd.DataFrame({"pictures": 1_000_000 + np.arange(1, 6) * 200_000, "loss": 0.05, "lr": 0.2})
    panels = {"all": ("loss", 0, "log"), "late": ("loss", 600_000, "linear"), "rate": ("lr", 0, "linear")}
    figure = plots.training_phases({"batch 32": first, "batch 64": second}, panels, window=3)
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear"]
    for axes, (column, start, _) in zip(figure.axes, panels.values(), strict=True):
        one, two, began = axes.lines
        kept = first[first.pictures >= start]
        np.testing.assert_allclose(one.get_xdata(), kept.pictures / 1e6)
        np.testing.assert_allclose(one.get_ydata(), first[column].rolling(3, min_periods=1).mean()[kept.index])
        np.testing.assert_allclose(two.get_xdata(), second.pictures / 1e6)
        assert began.get_xdata()[0] == pytest.approx(1.2)
        assert "million pictures" in axes.get_xlabel()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["batch 32", "batch 64"]


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


def differences() -> pd.DataFrame:
    """Two scores of three comparisons, as tables.paired_difference gives them; the last is of a single item."""
    rows = [
        ("style", "cfg", 0.2, 0.1, 0.3, "AS"),
        ("style", "finextract", -0.1, -0.3, 0.1, "AS"),
        ("object", "cfg", 0.3, np.nan, np.nan, "AS"),
        ("style", "cfg", 0.0, -0.2, 0.2, "A-ESR_strict"),
        ("style", "finextract", -0.4, -0.5, -0.3, "A-ESR_strict"),
        ("object", "cfg", 0.1, np.nan, np.nan, "A-ESR_strict"),
    ]
    table = pd.DataFrame(rows, columns=["dataset", "arm", "difference", "low", "high", "score"])
    return table.set_axis(range(10, 16))  # an index of its own, as after concat and a selection


def test_forest_show_every_row_at_its_height_with_its_interval():
    figure = plots.forest(differences(), ["dataset", "arm"], xlabel="b - a")
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("AS", r"A-ESR, strict $\tau$")
    assert {first.get_xlabel(), second.get_xlabel()} == {"b - a"}
    assert [label.get_text() for label in first.get_yticklabels()] == [
        "artists · CFG",
        "artists · FineXtract",
        "objects · CFG",
    ]
    assert first.yaxis_inverted(), "the first row is at the top"
    for axes, score, filled in ((first, "AS", [0]), (second, "A-ESR_strict", [1])):
        rows = differences()[lambda table, score=score: table.score == score]
        bars, markers = axes.collections
        ends = {line[0, 1]: tuple(line[:, 0]) for line in bars.get_segments() if len(line)}
        assert ends == {place: (row.low, row.high) for place, row in enumerate(rows[:2].itertuples())}
        np.testing.assert_allclose(markers.get_offsets(), np.column_stack([rows.difference, range(3)]))
        dark = [place for place, colour in enumerate(markers.get_facecolors()) if to_rgb(colour) == to_rgb("black")]
        assert dark == filled, "filled where the interval excludes 0"
    figure.canvas.draw()


def test_forest_of_other_rows_are_refused_and_not_shifted():
    rows = differences()
    for table in (rows.iloc[:-1], rows.iloc[[0, 1, 2, 4, 3, 5]]):
        with pytest.raises(ValueError, match=r"AS, A-ESR_strict do not have the same rows, named by dataset, arm"):
            plots.forest(table, ["dataset", "arm"])


def alike(cliques: list[tuple[int, ...]], n: int) -> np.ndarray:
    """Similarities [n, n]: .6 to .9 inside a clique, the lower the numbers the higher, and 0 to .1 outside."""
    draw = np.random.default_rng(1).uniform(0, 0.1, (n, n))
    found = (draw + draw.T) / 2
    for clique in cliques:
        for i in clique:
            for j in clique:
                found[i, j] = 0.9 - 0.15 * (i + j) / n
    np.fill_diagonal(found, 1)
    return found


CLIQUES = [(7, 1, 4, 2), (0, 6, 3), (5, 8)]


def test_images_are_ordered_by_clique_then_by_similarity_to_it_and_the_rest_follow():
    ordered = clique_plots.ordered_by_clique(alike(CLIQUES, 11), CLIQUES)
    assert ordered == [(1, 2, 4, 7), (0, 3, 6), (5, 8), (9,), (10,)]


def test_clique_heatmaps_frame_the_cliques_on_the_diagonal_and_name_the_colours():
    panels = {"a": (alike(CLIQUES, 11), CLIQUES), "b": (alike([(2, 0, 1)], 4), [(2, 0, 1)])}
    figure = clique_plots.clique_heatmaps(panels, {"loose": 0.5, "strict": 0.75})
    first, second, bar = figure.axes
    assert (first.get_title(), second.get_title()) == ("a", "b")
    order = [1, 2, 4, 7, 0, 3, 6, 5, 8, 9, 10]
    np.testing.assert_array_equal(shown(first), alike(CLIQUES, 11)[np.ix_(order, order)])
    assert {image.get_clim() for axes in (first, second) for image in axes.images} == {(0, 1)}
    frames = {(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in first.patches}
    assert frames == {(-0.5, -0.5, 4, 4), (3.5, 3.5, 3, 3)}, "the pair is below the smallest clique framed"
    assert [(y, text.get_text()) for y, text in zip(first.get_yticks(), first.get_yticklabels(), strict=True)] == [
        (1.5, "1"),
        (5.0, "2"),
    ]
    assert "similarity" in bar.get_ylabel()
    named = {text.get_text(): text.xy[1] for text in bar.texts}
    assert named == {"loose": 0.5, "strict": 0.75}
    figure.canvas.draw()


@pytest.mark.parametrize("radii", [[1.0], [3.0, 3.0, 0.8, 0.8], [2.5] + [0.8] * 40, [0.8] * 60])
def test_discs_do_not_touch_and_stay_close(radii):
    radii = np.array(radii)
    places = clique_plots.disc_places(radii, gap=0.2)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) - radii[:, None] - radii[None]
    assert (apart[~np.eye(len(radii), dtype=bool)] >= 0.2 - 1e-9).all()
    np.testing.assert_array_equal(places[0], 0)
    assert np.ptp(places[:, 0]) * np.ptp(places[:, 1]) <= 6 * np.square(2 * radii + 0.2).sum(), "scattered"
    np.testing.assert_array_equal(places, clique_plots.disc_places(radii, gap=0.2))


@pytest.mark.parametrize("sizes", [[1, 1, 1], [26, 7, 5, 3, 2, 1, 1], [60, 2, 1]])
def test_pictures_of_a_graph_do_not_cover_one_another_and_cliques_stay_together(sizes):
    ends = np.cumsum([0, *sizes])
    cliques = [tuple(range(a, b)) for a, b in itertools.pairwise(ends)]
    places = clique_plots.node_places(alike(cliques, ends[-1]), cliques)
    gaps = np.abs(places[:, None] - places[None]).max(axis=-1)[~np.eye(len(places), dtype=bool)]
    assert gaps.min() > 2 * clique_plots.NODE + 0.12, "a bold frame stands out by .06"
    for clique in cliques:
        away = np.linalg.norm(places - places[list(clique)].mean(axis=0), axis=1)
        assert away[list(clique)].max() < np.delete(away, clique).min(), "no other picture stands among them"
    inner = np.linalg.norm(places[list(cliques[0])] - places[list(cliques[0])].mean(axis=0), axis=1)
    assert inner[0] <= inner[len(inner) // 2 :].min(), "the image most like the others stands inside"


def test_clique_graph_has_an_edge_where_images_are_alike_and_a_picture_at_every_node():
    pictures, similarity, phi = tiles(11, height=8), alike(CLIQUES, 11), 0.06
    (axes,) = clique_plots.clique_graph(pictures, similarity, phi, CLIQUES, [1, 0, 5, 9]).axes
    places = clique_plots.node_places(similarity, CLIQUES)
    assert len(axes.images) == 11
    for image, picture, (x, y) in zip(axes.images, pictures, places, strict=True):
        assert np.array_equal(image.get_array(), picture)
        left, right, bottom, top = image.get_extent()
        assert ((left + right) / 2, (bottom + top) / 2) == pytest.approx((x, y))
    nodes = {tuple(place.round(6)): number for number, place in enumerate(places)}
    drawn = [
        {frozenset(nodes[tuple(end.round(6))] for end in line) for line in c.get_segments()} for c in axes.collections
    ]
    wanted = {frozenset(pair) for pair in np.argwhere(np.triu(similarity >= phi, 1)).tolist()}
    inside = {pair for pair in wanted if any(pair <= set(clique) for clique in CLIQUES)}
    assert drawn == [wanted - inside, inside]
    assert inside
    assert wanted - inside
    grey, coloured = (collection.get_colors() for collection in axes.collections)
    assert len({tuple(colour) for colour in grey}) == 1
    assert len({tuple(colour[:3]) for colour in coloured}) == len(CLIQUES)
    frames = {
        number: (patch.get_linewidth(), to_rgb(patch.get_edgecolor())) for number, patch in enumerate(axes.patches)
    }
    assert {number for number, (width, _) in frames.items() if width > 2} == {1, 0, 5, 9}, "the centres"
    for clique in CLIQUES:
        assert len({frames[image][1] for image in clique}) == 1
    assert frames[9][1] == frames[10][1] == to_rgb(clique_plots.ALONE)
    assert [text.get_text() for text in axes.texts] == ["1: 4 images", "2: 3 images", "3: 2 images"]
    for image in range(11):
        assert axes.get_xlim()[0] < places[image, 0] < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < places[image, 1] < axes.get_ylim()[1]


def test_clique_drawing_leads_from_the_clique_over_its_centre_to_training_images():
    members, centre, training = tiles(11, 0), tiles(1, 1), tiles(2, 2)
    texts = ([f"A .{n}" for n in range(11)], ["A 0.83**"], ["A: 9 of 11", "B: 2 of 11"])
    figure = clique_plots.clique_drawing(
        (members, texts[0]), (centre, texts[1]), (training, texts[2]), "style/mimooh, clique 1", columns=8
    )
    assert figure.get_suptitle() == "style/mimooh, clique 1"
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "images of the clique",
        "its centre, extracted",
        "training images that they are most like",
    ]
    assert [len(part.axes) for part in figure.subfigs] == [2 * 8, 1, 3], "rows of eight, one and three"
    for part, pictures, own in zip(figure.subfigs, (members, centre, training), texts, strict=True):
        used = [axes for axes in part.axes if axes.images]
        assert [axes.get_xlabel() for axes in used] == own
        for axes, picture in zip(used, pictures, strict=True):
            assert np.array_equal(shown(axes), picture)
        assert not any(len(axes.get_xticks()) or len(axes.get_yticks()) for axes in part.axes)
        assert not any(spine.get_visible() for axes in part.axes for spine in axes.spines.values())
    figure.canvas.draw()
    left, middle, right = (part.bbox for part in figure.subfigs)
    assert left.x1 <= middle.x0 < middle.x1 <= right.x0
    for part in figure.subfigs[1:]:
        (arrow,) = [artist for artist in part.artists if isinstance(artist, FancyArrowPatch)]
        (x0, _), (x1, _) = arrow._posA_posB
        assert x0 < 0 < x1, "it points from the part before into this one"


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


def test_tradeoff_has_a_numbered_point_at_the_means_with_intervals_and_a_name_for_each():
    rows = pd.DataFrame(
        {
            "item": ["a", "b", "c"] * 2,
            "protection": ["none"] * 3 + ["cutout"] * 3,
            "kind": ["none"] * 3 + ["transform"] * 3,
            "AS": [0.5, 0.6, 0.7, 0.2, 0.3, 0.1],
            "fidelity": [0.8, 0.9, 0.7, 0.6, 0.6, 0.6],
            "quality": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        }
    )
    figure = plots.tradeoff(rows, ["fidelity", "quality"], "AS", "protection", "kind")
    for axis, x in zip(figure.axes, ("fidelity", "quality"), strict=True):
        assert axis.get_xlabel() == x
        for number, which in enumerate(("none", "cutout")):
            own = rows[rows.protection == which]
            place = (own[x].mean(), own.AS.mean())
            assert np.allclose(axis.collections[number].get_offsets()[0], place)
            assert axis.texts[number].get_text() == str(number + 1)
            assert np.allclose(axis.texts[number].xy, place)
            across, up = axis.lines[2 * number], axis.lines[2 * number + 1]
            assert np.allclose(across.get_xdata(), mean_interval(own[x].to_numpy()))
            assert np.allclose(across.get_ydata(), own.AS.mean())
            assert np.allclose(up.get_ydata(), mean_interval(own.AS.to_numpy()))
        edges = [tuple(points.get_edgecolor()[0]) for points in axis.collections]
        assert edges[0] != edges[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1 none", "2 cutout"]


def test_bars_of_few_items_do_not_stretch_the_axis_of_as_beyond_what_as_can_be():
    rows = pd.DataFrame(
        [{"arm": "cfg", "method": "m", "n": n, "AS": value} for n in (1, 2) for value in (0.3 - n / 20, 0.6 + n / 20)]
    )
    figure = plots.score_curves(rows, "n")
    assert figure.axes[0].get_ylim() == (-0.05, 1.05)
    above = rows.rename(columns={"AS": "AS above controls"})
    figure = plots.score_curves(above, "n", "AS above controls")
    assert figure.axes[0].get_ylim()[0] < -1, "a difference, all of them above 0"
    lower = plots.score_curves(
        rows.assign(AS=rows.AS - 0.5).rename(columns={"AS": "AS above controls"}), "n", "AS above controls"
    )
    assert lower.axes[0].get_ylim()[0] < -1, "a difference may be below 0"
