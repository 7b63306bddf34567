"""The paper's tables as typed in data/paper: their structure, and the claims that the paper's prose makes about them.

No number of a table is repeated here. Numbers in these tests are those of the prose, with the place where the paper
says them.
"""

import itertools
import re
from pathlib import Path

import pandas as pd
import pytest

PAPER = Path(__file__).parents[1] / "data" / "paper"
ARMS = ["direct", "cfg", "finextract"]
METHODS = ["dreambooth", "lora"]
DEFENSES = ["none", "cutout", "randaugment"]
RATES = ["A-ESR_0.7", "A-ESR_0.6"]
DECIMALS = {"AS": 3, "DINO": 3, "CLIP-IQA": 3, "A-ESR_0.7": 2, "A-ESR_0.6": 2}

# table: the key columns with the values whose product is its rows (None: any text), and its other columns
TABLES = {
    1: ({"dataset": ["style", "object"], "method": METHODS, "arm": ARMS}, ["AS", *RATES]),
    2: ({"base_model": ["sd-v1.4", "sdxl-v1.0", "altdiffusion"], "arm": ARMS}, ["AS", "A-ESR_0.6"]),
    3: ({"defense": DEFENSES}, ["AS", "A-ESR_0.6"]),
    4: ({"method": METHODS, "arm": ARMS}, ["AS", *RATES]),
    5: ({"training_caption": None}, ["extracted_3_words", "extracted_7_words"]),
    6: ({"method": METHODS, "arm": ["finextract", "cfg"]}, ["memory_MB", "seconds_per_image"]),
    7: ({"checkpoint": None}, ["base_model", "method", "N0"]),
    8: ({"data": ["separated", "mixed"], "arm": ["cfg", "finextract"]}, ["AS", "A-ESR_0.6", "DINO", "CLIP-IQA"]),
    9: ({"artists": ["1", "2", "5"], "arm": ["cfg", "finextract"]}, ["AS", "A-ESR_0.6", "DINO", "CLIP-IQA"]),
    10: ({"defense": DEFENSES, "images": ["source", "generated"]}, ["DINO", "CLIP-IQA"]),
    11: ({"prompt": None}, ["training_caption", "extracted_7_words"]),
}

# (table, column) -> number of cells that README.md says are empty
EMPTY = {
    (1, "AS"): 2,
    (1, "A-ESR_0.7"): 2,
    (1, "A-ESR_0.6"): 2,
    (10, "DINO"): 3,
    (11, "training_caption"): 1,
    (11, "extracted_7_words"): 1,
}


def table(number: int, **options) -> pd.DataFrame:
    """Table `number` of the paper, as pandas reads it."""
    return pd.read_csv(PAPER / f"table{number:02d}.csv", **options)


def printed(number: int) -> pd.DataFrame:
    """Table `number` with every cell as the text that stands in the file; an empty cell is ''."""
    return table(number, dtype=str, keep_default_na=False)


def arms_side_by_side(number: int, score: str) -> pd.DataFrame:
    """`score` of table `number`: one row per block, one column per arm; blocks with a lost value are left out."""
    keys = [key for key in TABLES[number][0] if key != "arm"]
    return table(number).pivot(index=keys, columns="arm", values=score).dropna()


def words(text: str) -> set[str]:
    """The lower-case words of a caption."""
    return set(re.findall(r"\w+", text.lower()))


def recovered(row: pd.Series) -> float:
    """Share of the extracted words, 0..1, that occur in the training caption."""
    found = words(row.extracted_7_words)
    return len(found & words(row.training_caption)) / len(found)


# structure


def test_there_is_one_file_per_table_and_the_readme_names_each():
    files = sorted(path.name for path in PAPER.glob("*.csv"))
    assert files == [f"table{number:02d}.csv" for number in sorted(TABLES)]
    named = set(re.findall(r"table\d\d\.csv", (PAPER / "README.md").read_text(encoding="utf-8")))
    assert named == set(files)


@pytest.mark.parametrize("number", TABLES)
def test_columns(number):
    keys, values = TABLES[number]
    assert list(printed(number).columns) == [*keys, *values]


@pytest.mark.parametrize("number", [n for n, (keys, _) in TABLES.items() if None not in keys.values()])
def test_every_combination_of_keys_has_exactly_one_row(number):
    keys = TABLES[number][0]
    rows = list(printed(number)[list(keys)].itertuples(index=False, name=None))
    assert sorted(rows) == sorted(itertools.product(*keys.values()))


@pytest.mark.parametrize("number", TABLES)
def test_only_the_cells_named_as_lost_are_empty(number):
    text = printed(number)
    empty = {(number, column): int((text[column] == "").sum()) for column in text if (text[column] == "").any()}
    assert empty == {place: count for place, count in EMPTY.items() if place[0] == number}


@pytest.mark.parametrize("number", TABLES)
def test_scores_keep_the_papers_digits_and_lie_between_0_and_1(number):
    text = printed(number)
    for column in text.columns.intersection(list(DECIMALS)):
        filled = text.loc[text[column] != "", column]
        assert filled.str.fullmatch(rf"[01]\.\d{{{DECIMALS[column]}}}").all(), column
        assert filled.astype(float).between(0, 1).all(), column


@pytest.mark.parametrize("number", TABLES)
def test_no_cell_has_debris(number):
    for text in printed(number).to_numpy().ravel():
        assert text == " ".join(text.split())
        assert not re.search(r"[|$\\<>*]|\w- ", text), text


@pytest.mark.parametrize("number", [1, 4])
def test_no_more_images_pass_the_stricter_threshold(number):
    scores = table(number).dropna()
    assert (scores["A-ESR_0.7"] <= scores["A-ESR_0.6"]).all()


@pytest.mark.parametrize(("number", "limits"), [(5, [3, 7]), (11, [7])])
def test_extracted_captions_keep_to_their_word_limit(number, limits):
    text = printed(number)
    for limit in limits:
        assert text[f"extracted_{limit}_words"].str.split().str.len().max() <= limit


@pytest.mark.parametrize("number", [8, 9])
def test_scores_of_the_fine_tuned_model_are_the_same_for_both_arms(number):
    for score in ["DINO", "CLIP-IQA"]:
        blocks = arms_side_by_side(number, score)
        assert (blocks.cfg == blocks.finextract).all(), score


def test_caption_tables_have_four_artists():
    """App. A.5: "four classes of the WikiArt dataset"; Table 11 expands the same four captions twice."""
    assert len(printed(5)) == 4
    assert printed(11).prompt.value_counts().to_dict() == {"extended": 4, "excessively extended": 4}


def test_real_world_checkpoints_are_repositories_with_known_methods():
    rows = printed(7)
    assert rows.checkpoint.str.fullmatch(r"[\w.-]+/[\w.-]+").all()
    assert rows.checkpoint.is_unique
    assert set(rows.method) == set(METHODS)
    assert set(rows.base_model) == {"sd-v1.5", "sdxl-v1.0"}


# settings that the paper reports in two tables


def test_one_artist_per_class_is_the_style_dreambooth_block():
    first, ninth = table(1), table(9)
    block = first[(first.dataset == "style") & (first.method == "dreambooth") & (first.arm != "direct")]
    columns = ["arm", "AS", "A-ESR_0.6"]
    pd.testing.assert_frame_equal(
        block[columns].reset_index(drop=True), ninth.loc[ninth.artists == 1, columns].reset_index(drop=True)
    )


def test_no_defense_is_the_sd_row_of_the_generalization_table():
    second, third = table(2), table(3)
    undefended = third[third.defense == "none"].iloc[0]
    sd = second[(second.base_model == "sd-v1.4") & (second.arm == "finextract")].iloc[0]
    assert (sd.AS, sd["A-ESR_0.6"]) == (undefended.AS, undefended["A-ESR_0.6"])


def test_generated_images_without_defense_are_those_of_one_artist_per_class():
    ninth, tenth = table(9), table(10)
    generated = tenth[(tenth.defense == "none") & (tenth.images == "generated")].iloc[0]
    one_artist = ninth[ninth.artists == 1].iloc[0]
    assert (generated.DINO, generated["CLIP-IQA"]) == (one_artist.DINO, one_artist["CLIP-IQA"])


# claims of the prose


@pytest.mark.parametrize("number", [1, 2, 4, 8, 9])
def test_finextract_has_the_highest_as_of_every_block(number):
    """Table 1's caption; Sec. 5.2 (consistent across models); Sec. 5.5; App. G.1, G.2 (still outperforms)."""
    blocks = arms_side_by_side(number, "AS")
    assert len(blocks) >= 2
    assert blocks.drop(columns="finextract").lt(blocks.finextract, axis=0).all(axis=None)


@pytest.mark.parametrize(("number", "score"), [(1, "A-ESR_0.7"), (1, "A-ESR_0.6"), (4, "A-ESR_0.7"), (4, "A-ESR_0.6")])
def test_finextract_has_the_highest_success_rate_of_every_block(number, score):
    """Captions of Tables 1 and 4: under all scenarios and metrics; consistently outperforms."""
    blocks = arms_side_by_side(number, score)
    assert len(blocks) >= 2
    assert (blocks.finextract > blocks[["direct", "cfg"]].max(axis=1)).all()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_cfg_has_a_higher_as_than_direct_sampling(number):
    """Not claimed in words, but CFG is the baseline to beat: it holds in every block, lost FineXtract rows included."""
    scores = table(number).set_index([*TABLES[number][0]]).AS.unstack("arm")
    assert (scores.cfg > scores.direct).all()


def test_gain_in_table_1_is_about_002_to_005():
    """Sec. 5.1: "an improvement of approximately 0.02 to 0.05 in AS"."""
    blocks = arms_side_by_side(1, "AS")
    assert (blocks.finextract - blocks.cfg).round(2).between(0.02, 0.05).all()


def test_gain_on_real_world_checkpoints_is_at_least_003():
    """Sec. 5.5: "increasing AS by at least 0.03"."""
    blocks = arms_side_by_side(4, "AS")
    assert (blocks.finextract - blocks.cfg >= 0.03).all()


@pytest.mark.parametrize("number", [1, 4])
def test_success_rate_doubles_in_most_cases(number):
    """Sec. 5.1 and 5.5: "doubling" the A-ESR "in most cases"."""
    blocks = pd.concat([arms_side_by_side(number, rate) for rate in RATES])
    assert ((blocks.finextract > 0) & (blocks.finextract >= 2 * blocks.cfg)).mean() > 0.5


def test_each_defense_lowers_extraction():
    """Sec. 5.4: the defenses "can partially defend"; RandAugment is the strong one."""
    scores = table(3).set_index("defense")
    assert (scores.loc["cutout"] < scores.loc["none"]).all()
    assert (scores.loc["randaugment"] < scores.loc["cutout"]).all()


def test_model_guidance_costs_memory_but_no_time():
    """App. B: "without slowing down the generation speed", while GPU memory increases."""
    time, memory = arms_side_by_side(6, "seconds_per_image"), arms_side_by_side(6, "memory_MB")
    assert (time.finextract == time.cfg).all()
    assert (memory.finextract > memory.cfg).all()


def test_numbers_of_training_images_of_the_named_checkpoints():
    """App. F: "The number of training images ranges from 5 to 138"."""
    assert (table(7).N0.min(), table(7).N0.max()) == (5, 138)


def test_mixing_the_datasets_lowers_every_score():
    """App. G.1: "mutual decreases" in fidelity, image quality and extraction rate."""
    scores = table(8).set_index(["data", "arm"])
    assert (scores.loc["mixed"] < scores.loc["separated"]).all(axis=None)


def test_more_artists_lower_as_and_fidelity():
    """App. G.2. What it says of A-ESR and CLIP-IQA does not hold in Table 9: data/paper/README.md."""
    for score in ["AS", "DINO"]:
        by_artists = arms_side_by_side(9, score).sort_index()
        assert by_artists.apply(lambda column: column.is_monotonic_decreasing and column.is_unique).all(), score


@pytest.mark.parametrize(("images", "cutout", "randaugment"), [("source", 0.061, 0.046), ("generated", 0.038, 0.046)])
def test_defenses_cost_as_much_image_quality_as_the_prose_says(images, cutout, randaugment):
    """App. I: CLIP-IQA falls by 6.1% and 4.6% (source images), 3.8% and 4.6% (generated images)."""
    quality = table(10).pivot(index="defense", columns="images", values="CLIP-IQA")[images]
    assert quality["none"] - quality["cutout"] == pytest.approx(cutout, abs=5e-4)
    assert quality["none"] - quality["randaugment"] == pytest.approx(randaugment, abs=5e-4)


def test_randaugment_lowers_fidelity():
    """App. I: "For RandAugment, the image fidelity also largely degrades"."""
    fidelity = table(10).dropna().set_index("defense").DINO
    assert fidelity.idxmin() == "randaugment"


def test_extracted_captions_name_something_of_the_training_caption():
    """App. A.5: "representative information can be extracted"."""
    for row in printed(5).itertuples():
        assert words(row.training_caption) & words(row.extracted_3_words), row
        assert words(row.training_caption) & words(row.extracted_7_words), row


def test_longer_captions_are_harder_to_extract():
    """App. J: "When the text length continue to increase, certain information becomes harder to extract"."""
    legible = table(11).dropna()
    lengths = legible.training_caption.str.len().groupby(legible.prompt).mean()
    shares = legible.apply(recovered, axis=1).groupby(legible.prompt).mean()
    assert lengths["excessively extended"] > lengths["extended"]
    assert shares["excessively extended"] < shares["extended"]
