"""The paper's tables as typed in data/paper: every cell against the paper's text, and the claims that its prose makes.

Numbers elsewhere in these tests than in LINES are those of the prose, with the place where the paper says them.
"""

import itertools
import re
from pathlib import Path

import pandas as pd
import pytest

PAPER = Path(__file__).parents[1] / "data" / "paper"
RATES = ["A-ESR_0.7", "A-ESR_0.6"]
FOUR_SCORES = ["AS", "A-ESR_0.6", "DINO", "CLIP-IQA"]

# table: its columns, those that name a row and the others
TABLES = {
    1: (["dataset", "method", "arm"], ["AS", *RATES]),
    2: (["base_model", "arm"], ["AS", "A-ESR_0.6"]),
    3: (["defense"], ["AS", "A-ESR_0.6"]),
    4: (["method", "arm"], ["AS", *RATES]),
    5: (["training_caption"], ["extracted_3_words", "extracted_7_words"]),
    6: (["method", "arm"], ["memory_MB", "seconds_per_image"]),
    7: (["checkpoint"], ["base_model", "method", "N0"]),
    8: (["data", "arm"], FOUR_SCORES),
    9: (["artists", "arm"], FOUR_SCORES),
    10: (["defense", "images"], ["DINO", "CLIP-IQA"]),
    11: (["prompt"], ["training_caption", "extracted_7_words"]),
}

# The tables as they stand in the second text rendering, without the headings of columns and the prose beside Table 3.
# The columns of Tables 5 and 11 stand below each other.
LINES = {
    1: """\
Style-Driven Generation: WikiArt Dataset
Metrics and Settings DreamBooth LoRA
Direct Text2img+Clustering 0.317 0.00 0.01 0.299 0.00 0.00
CFG+Clustering 0.396 0.03 0.11 0.357 0.00 0.01
FineXtract 0.449 0.06 0.22 0.376 0.01 0.05
Object-Driven Generation: DreamBooth Dataset
Metrics and Settings DreamBooth LoRA
Direct Text2img+Clustering 0.418 0.03 0.11 0.347 0.00 0.02
CFG+Clustering 0.528 0.15 0.36 0.379 0.01 0.05
FineXtract 0.557 0.25 0.45 0.466 0.04 0.18
""",
    2: """\
SD (V1.4) SDXL (V1.0) AltDiffusion
Direct Text2img+Clustering 0.341 0.03 0.335 0.05 0.282 0.00
CFG+Clustering 0.434 0.23 0.360 0.10 0.364 0.03
FineXtract 0.501 0.35 0.467 0.25 0.388 0.05
""",
    3: """\
No Defense 0.501 0.35
Cutout 0.397 0.08
RandAugment 0.267 0.03
""",
    4: """\
Metrics and Settings DreamBooth LoRA
Direct Text2img+Clustering 0.362 0.00 0.00 0.270 0.00 0.00
CFG+Clustering 0.468 0.04 0.20 0.338 0.00 0.04
FineXtract 0.533 0.13 0.38 0.371 0.02 0.11
""",
    5: """\
art style of Post Impressionism vincent
attributed impressionism vincent
plein impressionism vincent demonstrating! fantastic :))
art style of Fauvism henri matisse
henri paintings matisse
donneinarte hemingway henri matisse throughout fineart paintings
art style of High Renaissance leonardo da vinci
leonardo confident paintings
leonardo onda elengrembrandt pre picasso artwork
art style of Impressionism claude monet
suggestions impressionism monet
cassini gustave monet impressionist monet etosuggesti
""",
    6: """\
Metrics and Settings DreamBooth LoRA
FineXtract 15812 34 15894 3.6
CFG 12096 34 12226 3.6
""",
    7: """\
sd-dreambooth-library/mau-cat SD (V1.5) DreamBooth 5
sd-dreambooth-library/the-witcher-game-ciri SD (V1.5) DreamBooth 5
sd-dreambooth-library/mr-potato-head SD (V1.5) DreamBooth 6
Norod78/SDXL-YarnArtStyle-LoRA SDXL (V1.0) Lora 14
Norod78/pokirl-sdxl SDXL (V1.0) Lora 22
Norod78/SDXL-PringlesTube-Lora SDXL (V1.0) Lora 138
""",
    8: """\
CFG+Clustering 0.525 0.45
Separated Data FineXtract 0.572 0.55 0.533 0.697
CFG+Clustering 0.457 0.08
Mixed Data FineXtract 0.480 0.18 0.266 0.447
""",
    9: """\
CFG+Clustering 0.396 0.11
1 Artist Per Class FineXtract 0.449 0.22 0.458 0.525
CFG+Clustering 0.390 0.20
2 Artist Per Class FineXtract 0.436 0.20 0.387 0.441
CFG+Clustering 0.353 0.15
5 Artist Per Class FineXtract 0.388 0.23 0.343 0.478
""",
    10: """\
Source Images Generated Images
No Defense N.A. 0.568 0.458 0.525
CutOut N.A. 0.507 0.460 0.487
RandAugment N.A. 0.522 0.435 0.479
""",
    11: """\
Extended Prompt
An insight into the Post-Impressionist
style with expressive, emotional brush-
work and rich colors, inspired by the
unique techniques of Vincent van Gogh.
vangogh impressionism class impressionist
paintings acqu
Exploring the art style of Fauvism,
characterized by vivid, bold colors and
dynamic brushstrokes, as seen in the
works of Henri Matisse.
henri matisse whose explores whose colourful
stures
An exploration of the High Renais-
sance style, marked by balance, realism,
and anatomical accuracy, capturing the
essence of Leonardo da Vinci’s art.
cws inaccurate anatomy leonardo deus aron onda
A look at Impressionism, noted for soft,
light-filled scenes and gentle brush-
strokes, inspired by the atmospheric
beauty in Claude Monet’s paintings.
impressionism wgleagues monet het commence
Excessively Extended Prompt
A deeper look into Post-Impressionism,
emphasizing Vincent van Gogh’s ex-
pressive, emotional brushwork and con-
trasting colors. His techniques convey
a personal, intense view of the world,
moving beyond the lighter tones of Im-
pressionism.
post impressionism vincent gogh pcdimonet op-
posite vangogh
In-depth exploration of Fauvism’s vivid
colors and bold, expressive brushstrokes
that bring emotions to life, heavily in-
spired by the renowned techniques of
Henri Matisse. His approach captures
the vibrant essence of Fauvism, using
striking colors to convey feeling.
congratulations adrian edgar forum awaits muro-
main destination
An insightful exploration into the High
Renaissance, highlighting the balance,
anatomical realism, and idealism of
Leonardo da Vinci’s creations. This
style embodies the Renaissance’s fo-
cus on perfection, with meticulously
detailed compositions and harmonious
proportions.
retains vehicles marriott alcatraspberries tues-
daythoughts shua
A detailed depiction of Impression-
ism, capturing transient beauty with
soft brushstrokes and delicate light, in-
fluenced by Claude Monet’s signature
style. His work portrays nature in har-
monious, gentle colors that evoke calm-
ness.
impressionism excellent depiction effectively ar-
ranged unexrepresented explained
""",
}

# The headings of the columns, those that name a row apart: of one block of the table, from the first rendering, since the
# second lost the indices of A-ESR; and the columns that they are in data/paper.
HEADINGS = {
    **dict.fromkeys((1, 4), "AS | A-ESR _{0.7} | A-ESR _{0.6}"),
    **dict.fromkeys((2, 3), "AS | A-ESR _{0.6}"),
    5: "Extracted Caption (≤ 3 words) | Extracted Caption (≤ 7 words)",
    6: "Memory Costs (MB) | Time Costs (s)",
    7: "SD Version | Fine-tuning Methods | # of Training Image",
    **dict.fromkeys((8, 9), "AS | A-ESR _{0.6} | DINO | Clip-IQA"),
    10: "DINO | Clip-IQA",
    11: "Training Caption | Extracted Caption (≤ 7 words)",
}
COLUMNS = {
    "AS": "AS",
    "A-ESR _{0.7}": "A-ESR_0.7",
    "A-ESR _{0.6}": "A-ESR_0.6",
    "DINO": "DINO",
    "Clip-IQA": "CLIP-IQA",
    "Training Caption": "training_caption",
    "Extracted Caption (≤ 3 words)": "extracted_3_words",
    "Extracted Caption (≤ 7 words)": "extracted_7_words",
    "Memory Costs (MB)": "memory_MB",
    "Time Costs (s)": "seconds_per_image",
    "SD Version": "base_model",
    "Fine-tuning Methods": "method",
    "# of Training Image": "N0",
}

# what the tables print: its word in data/paper
WORDS = {
    "Style-Driven Generation: WikiArt Dataset": "style",
    "Object-Driven Generation: DreamBooth Dataset": "object",
    "Metrics and Settings DreamBooth LoRA": "dreambooth lora",
    "SD (V1.4) SDXL (V1.0) AltDiffusion": "sd-v1.4 sdxl-v1.0 altdiffusion",
    "Source Images Generated Images": "source generated",
    "Direct Text2img+Clustering": "direct",
    "CFG+Clustering": "cfg",
    "CFG": "cfg",
    "FineXtract": "finextract",
    "No Defense": "none",
    "Cutout": "cutout",
    "CutOut": "cutout",
    "RandAugment": "randaugment",
    "Separated Data": "separated",
    "Mixed Data": "mixed",
    "Artist Per Class": "",
    "SD (V1.5)": "sd-v1.5",
    "SDXL (V1.0)": "sdxl-v1.0",
    "DreamBooth": "dreambooth",
    "Lora": "lora",
    "34": "3.4",  # Table 6: the first rendering has the decimal point
    "Extended Prompt": "extended",
    "Excessively Extended Prompt": "excessively extended",
}
PRINTED = re.compile(rf"(?<!\S)({'|'.join(map(re.escape, sorted(WORDS, key=len, reverse=True)))})(?!\S)")


def side_by_side(lines: list[str], n_scores: int) -> list[list[str]]:
    """Rows [section, block, arm, *scores] of a table whose blocks stand side by side; no section where it has none."""
    rows, section, blocks = [], [], []
    for first, *others in map(str.split, lines):
        if not others:
            section = [first]
        elif others[-1].isalpha():
            blocks = [first, *others]
        else:
            rows += [
                [*section, block, first, *others[i * n_scores : (i + 1) * n_scores]] for i, block in enumerate(blocks)
            ]
    return rows


def sharing_two_scores(lines: list[str]) -> list[list[str]]:
    """Rows [block, arm, *scores] of Tables 8 and 9, which print DINO and CLIP-IQA once for both arms of a block."""
    rows = []
    words_of = [line.split() for line in lines]
    for cfg, (block, *rest) in zip(words_of[::2], words_of[1::2], strict=True):
        rows += [[block, *cfg, *rest[-2:]], [block, *rest]]
    return rows


def captions(lines: list[str]) -> list[list[str]]:
    """Rows [prompt, training caption, extracted caption] of Table 11: a caption ends before a small letter."""
    rows = []
    text = "\n".join(lines).replace("-\n", "").replace("\n", " ")
    for prompt, section in re.findall(r"((?:excessively )?extended) ([A-Z].*?)(?= excessively extended|$)", text):
        rows += [[prompt, *row] for row in re.findall(r"([A-Z].+?\.) ([a-z ]+)(?: |$)", section)]
    return rows


def transcribed(number: int) -> list[tuple[str, ...]]:
    """The rows of LINES[number], sorted, in the words and the columns of data/paper; "N.A." is an empty cell."""
    lines = [PRINTED.sub(lambda found: WORDS[found[0]], line) for line in LINES[number].replace("’", "'").splitlines()]
    if number in (3, 7):
        rows = [line.split() for line in lines]
    elif number == 5:
        rows = zip(lines[::3], lines[1::3], lines[2::3], strict=True)
    elif number in (8, 9):
        rows = sharing_two_scores(lines)
    elif number == 11:
        rows = captions(lines)
    else:
        rows = side_by_side(lines, len(TABLES[number][1]))
    if number == 10:
        rows = [[defense, images, *scores] for images, defense, *scores in rows]
    return sorted(tuple("" if cell == "N.A." else cell for cell in row) for row in rows)


def table(number: int, **options) -> pd.DataFrame:
    """Table `number` of the paper, as pandas reads it."""
    return pd.read_csv(PAPER / f"table{number:02d}.csv", **options)


def printed(number: int) -> pd.DataFrame:
    """Table `number` with every cell as the text that stands in the file; an empty cell is ''."""
    return table(number, dtype=str, keep_default_na=False)


def sorted_rows(cells: pd.DataFrame) -> list[tuple[str, ...]]:
    """The rows of a table, sorted."""
    return sorted(cells.itertuples(index=False, name=None))


def arms_side_by_side(number: int, score: str) -> pd.DataFrame:
    """`score` of table `number`: one row per block, one column per arm."""
    keys = [key for key in TABLES[number][0] if key != "arm"]
    return table(number).pivot(index=keys, columns="arm", values=score)


def words(text: str) -> set[str]:
    """The lower-case words of a caption."""
    return set(re.findall(r"\w+", text.lower()))


def recovered(row: pd.Series) -> float:
    """Share of the extracted words, 0..1, that occur in the training caption."""
    found = words(row.extracted_7_words)
    return len(found & words(row.training_caption)) / len(found)


# every cell, and structure


@pytest.mark.parametrize("number", TABLES)
def test_every_cell_is_the_papers(number):
    assert sorted_rows(printed(number)) == transcribed(number)


@pytest.mark.parametrize("number", TABLES)
def test_every_single_change_of_a_cell_is_noticed(number):
    cells = printed(number)
    for row, column in itertools.product(cells.index, cells.columns):
        changed = cells.copy()
        changed.loc[row, column] += "0"
        assert sorted_rows(changed) != transcribed(number), (row, column)


def test_there_is_one_file_per_table_and_the_readme_names_each():
    files = sorted(path.name for path in PAPER.glob("*.csv"))
    assert files == [f"table{number:02d}.csv" for number in sorted(TABLES)]
    named = set(re.findall(r"table\d\d\.csv", (PAPER / "README.md").read_text(encoding="utf-8")))
    assert named == set(files)


@pytest.mark.parametrize("number", TABLES)
def test_columns_are_those_of_the_papers_headings_in_their_order(number):
    keys, values = TABLES[number]
    assert list(printed(number).columns) == [*keys, *values]
    assert values == [COLUMNS[heading] for heading in HEADINGS[number].split(" | ")]


@pytest.mark.parametrize("number", [1, 4])
def test_no_more_images_pass_the_stricter_threshold(number):
    scores = table(number)
    assert (scores["A-ESR_0.7"] <= scores["A-ESR_0.6"]).all()


@pytest.mark.parametrize(("number", "limits"), [(5, [3, 7]), (11, [7])])
def test_extracted_captions_keep_to_their_word_limit(number, limits):
    text = printed(number)
    for limit in limits:
        assert text[f"extracted_{limit}_words"].str.split().str.len().max() <= limit


def test_caption_tables_have_four_artists():
    """App. A.5: "four classes of the WikiArt dataset"; Table 11 expands the same four captions twice."""
    assert len(printed(5)) == 4
    assert printed(11).prompt.value_counts().to_dict() == {"extended": 4, "excessively extended": 4}


def test_real_world_checkpoints_are_repositories_with_known_methods():
    rows = printed(7)
    assert rows.checkpoint.str.fullmatch(r"[\w.-]+/[\w.-]+").all()
    assert rows.checkpoint.is_unique
    assert set(rows.method) == {"dreambooth", "lora"}
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
    assert blocks.drop(columns="finextract").lt(blocks.finextract, axis=0).all(axis=None)


@pytest.mark.parametrize(("number", "score"), [(1, "A-ESR_0.7"), (1, "A-ESR_0.6"), (4, "A-ESR_0.7"), (4, "A-ESR_0.6")])
def test_finextract_has_the_highest_success_rate_of_every_block(number, score):
    """Captions of Tables 1 and 4: under all scenarios and metrics; consistently outperforms."""
    blocks = arms_side_by_side(number, score)
    assert (blocks.finextract > blocks[["direct", "cfg"]].max(axis=1)).all()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_cfg_has_a_higher_as_than_direct_sampling(number):
    """Not claimed in words, but CFG is the baseline to beat: it holds in every block."""
    blocks = arms_side_by_side(number, "AS")
    assert (blocks.cfg > blocks.direct).all()


def test_gain_in_table_1_is_about_002_to_005_and_more_with_lora_on_objects():
    """Sec. 5.1: "an improvement of approximately 0.02 to 0.05 in AS". Not so in one block: data/paper/README.md."""
    blocks = arms_side_by_side(1, "AS")
    gains = (blocks.finextract - blocks.cfg).round(3)
    assert gains.pop(("object", "lora")) == 0.087
    assert gains.round(2).between(0.02, 0.05).all()


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
    rows = table(11)
    lengths = rows.training_caption.str.len().groupby(rows.prompt).mean()
    shares = rows.apply(recovered, axis=1).groupby(rows.prompt).mean()
    assert lengths["excessively extended"] > lengths["extended"]
    assert shares["excessively extended"] < shares["extended"]
