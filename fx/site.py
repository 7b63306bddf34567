"""The site: the pages of docs/, the notebooks as they were executed, the summary and the API as HTML in runs/site.

    make site                        # or: python -m fx.site

Nothing is executed and nothing is fetched: the notebooks' committed outputs are shown, and all that the pages load comes
with them.
"""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd

from fx import command, demo, play, settings
from fx.datasets import load_item, open_image
from fx.paths import COMPLETE, NOTEBOOKS, ROOT, SHIPPED_FIGURES, SHIPPED_TABLES
from fx.results import RUNS
from fx.similarity import copy_thresholds

PAGES = ROOT / "docs"
# what the site shows as pages of its own
MOVED = {"../data/results/mini/summary.md": "results.md", "../tests/SUPPORTED.md": "supported.md"}
MOVED |= {"../CONTRIBUTING.md": "contributing.md", "../data/paper/README.md": "paper.md"}
END = re.compile(r"(?<=[a-z)])(?<!\bApp)(?<!\bSec)(?<!\bEq)(?<!\bFig)[:.](?:\s|$)")  # of a sentence
IN = re.compile(r"\[(\d\d)\]\((notebooks/[^)]+)\), In \[(\d+)\]")  # a cell that the summary names
HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
SOURCE, BUILT = RUNS / "site-source", RUNS / "site"


def assemble(source: Path) -> None:
    """Put together what Sphinx reads: pages, notebooks, figures, tables, and a page for each module."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(PAGES, source, ignore=shutil.ignore_patterns("__pycache__"))
    for page in source.glob("*.md"):
        page.write_text(moved(page.read_text()))
    shutil.copytree(NOTEBOOKS, source / "notebooks", ignore=shutil.ignore_patterns("params", ".*"))
    (source / "figures").mkdir()
    for figure in SHIPPED_FIGURES.glob(f"*-{COMPLETE}.png"):
        shutil.copy(figure, source / "figures")
    summary = (SHIPPED_TABLES / COMPLETE / "summary.md").read_text()
    (source / "results.md").write_text(led_to_headings(summary.replace("../../../", ""), source))
    supported = (ROOT / "tests/SUPPORTED.md").read_text()
    (source / "supported.md").write_text(f"# What is proven for which family\n\n{supported}")
    (source / "contributing.md").write_text((ROOT / "CONTRIBUTING.md").read_text())
    shutil.copy(ROOT / "CITATION.cff", source)
    (source / "paper.md").write_text((ROOT / "data/paper/README.md").read_text())
    names = sorted(path.stem for path in (ROOT / "fx").glob("*.py") if path.stem != "__init__")
    (source / "api").mkdir()
    for name in names:
        page = f"fx.{name}\n{'=' * len(f'fx.{name}')}\n\n.. automodule:: fx.{name}\n"
        (source / f"api/fx.{name}.rst").write_text(page)
    (source / "api.md").write_text(api_page(names))
    data = json.dumps(play_data(), separators=(",", ":"))
    (source / "_static/play-data.js").write_text(f"window.PLAY = {data};\n")
    for figure in SHIPPED_FIGURES.glob(f"play-*-{COMPLETE}.png"):
        shutil.copy(figure, source / "_static")


def moved(text: str) -> str:
    """A page of docs/ with its links as they are on the site, which has the other folders beside the pages."""
    for before, after in MOVED.items():
        text = text.replace(f"]({before})", f"]({after})")
    return text.replace("](../", "](")


def led_to_headings(summary: str, source: Path) -> str:
    """The summary with links to the headings under which its cells stand, each of which gets a target in `source`.

    The pages of the notebooks do not show the numbers of their cells.
    """
    for number, name, count in sorted(set(IN.findall(summary))):
        notebook = nbformat.read(source / name, 4)
        add_target(notebook, int(count), f"notebook-{number}-in-{count}")
        nbformat.write(notebook, source / name)
    return IN.sub(r"[\1](\2#notebook-\1-in-\3)", summary)


def add_target(notebook: nbformat.NotebookNode, count: int, label: str) -> None:
    """Write MyST's target `label` above the last heading that stands before the cell In [count]."""
    end = next(n for n, cell in enumerate(notebook.cells) if cell.get("execution_count") == count)
    for cell in reversed(notebook.cells[:end]):
        headings = list(HEADING.finditer(cell.source)) if cell.cell_type == "markdown" else []
        if headings:
            place = headings[-1].start()
            cell.source = f"{cell.source[:place]}({label})=\n{cell.source[place:]}"
            return


def api_page(names: list[str]) -> str:
    """The page that lists the modules, each with the first sentence of its docstring."""
    lines = [
        "# API reference",
        "",
        "From the docstrings; the equations are the paper's.",
        "",
        "| module | holds |",
        "|---|---|",
    ]
    for name in names:
        first = ast.get_docstring(ast.parse((ROOT / f"fx/{name}.py").read_text())).partition("\n\n")[0]
        sentence = END.split(" ".join(first.split()), maxsplit=1)[0]
        lines.append(f"| [fx.{name}](api/fx.{name}.rst) | {sentence.replace('|', chr(92) + '|')} |")
    tree = "\n".join(["```{toctree}", ":hidden:", "", *(f"api/fx.{name}" for name in names), "```"])
    return "\n".join([*lines, "", tree, ""])


def play_data() -> dict:
    """What the interactive page shows, from the committed tables of fx.play."""
    table = {
        name: pd.read_csv(SHIPPED_TABLES / COMPLETE / f"play-{name}.csv")
        for name in ("scales", "matches", "cliques", "pairs", "places")
    }
    chosen = settings.load()["dreambooth"]
    loose, strict = copy_thresholds(chosen.descriptor)
    items = [_item(item, table, chosen.finextract_scale) for item in demo.TYPICAL]
    cliques = table["cliques"]
    n = len(table["places"])
    small = load_item(demo.TYPICAL[1])
    shown = (table["scales"]["item"] == small.name) & (table["scales"].guidance_scale == chosen.finextract_scale)
    return {
        "loose": round(loose, 4),
        "strict": round(strict, 4),
        "items": items,
        "cliques": {
            "n": small.n_training,
            "end": round(float(table["scales"].phi_end[shown].item()), 4),
            "phi": sorted(set(cliques.phi)),
            "labels": [rows.sort_values("image").clique.tolist() for _, rows in cliques.groupby("phi")],
            "pairs": table["pairs"].values.tolist(),
            "places": table["places"][["x", "y"]].values.tolist(),
            "sheet": _sheet("cliques", -(-n // play.COLUMNS), play.COLUMNS),
        },
    }


def _item(item: str, table: dict[str, pd.DataFrame], chosen: float) -> dict:
    known = load_item(item)
    scores = table["scales"][table["scales"]["item"] == item]
    matches = table["matches"][table["matches"]["item"] == item]
    shown = matches["training image"].nunique()
    scales = [
        {
            "w": row["guidance_scale"],
            "AS": row["AS"],
            "strict": row["A-ESR_strict"],
            "loose": row["A-ESR_loose"],
            "matches": matches[matches.guidance_scale == row["guidance_scale"]].similarity.tolist(),
        }
        for row in scores.to_dict("records")
    ]
    sheet = _sheet(item.replace("/", "-"), len(scales) + 1, shown)
    title = f"“{known.caption}” ({known.n_training} drawings)"
    return {"title": title, "n": known.n_training, "shown": shown, "chosen": chosen, "scales": scales, "sheet": sheet}


def _sheet(name: str, rows: int, columns: int) -> dict:
    file = f"play-{name}-{COMPLETE}.png"
    side = open_image(SHIPPED_FIGURES / file).width // columns
    return {"file": f"_static/{file}", "rows": rows, "columns": columns, "side": side}


def build(source: Path = SOURCE, built: Path = BUILT) -> Path:
    """Assemble and build; the first page. ValueError with Sphinx's own words where it warns or fails."""
    assemble(source)
    shutil.rmtree(built, ignore_errors=True)
    words = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(source), str(built)]
    found = subprocess.run(words, capture_output=True, text=True)
    troubles = list(_troubles(found.stderr))
    if found.returncode or troubles:
        raise ValueError("the site was not built cleanly:\n" + "\n".join(troubles or [found.stderr]))
    return built / "index.html"


def _troubles(stderr: str) -> Iterator[str]:
    """Sphinx's warnings and errors."""
    for line in stderr.splitlines():
        if "WARNING" in line or "ERROR" in line:
            yield line.strip()


def main(words: list[str] | None = None) -> None:
    """Build the site and say where it is."""
    about = "Build the pages, the notebooks and the API as HTML in runs/site. Nothing is executed or fetched."
    argparse.ArgumentParser("python -m fx.site", description=about).parse_args(words)
    print(build())


if __name__ == "__main__":
    command.run("fx.site", main)
