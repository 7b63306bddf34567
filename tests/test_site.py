"""The site: its pages, the equations beside docstrings, what the interactive page shows, and the built HTML itself."""

import ast
import json
import re
import sys
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pandas as pd
import pytest
from browser import browse, complaints, needs_browser, overhangs, requests_of_the_page
from docutils.core import publish_parts
from filelock import FileLock

from fx import site
from fx.paths import COMPLETE, NOTEBOOKS, ROOT, SHIPPED_TABLES

sys.path.insert(0, str(ROOT / "docs"))

import docstrings

TABLES = SHIPPED_TABLES / COMPLETE
pytestmark = pytest.mark.xdist_group("site")  # two workers would wait for one another's building of it
MAIN_PAGES = ("index", "results", "play", "notebooks/03-extraction", "auditors")


# equations


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Eq. 6: guidance", [6]),
        ("the k of Eq. 13 where Eq. 12 holds, Eq. 13 again", [13, 12]),
        ("AS and A-ESR of Eq. 1 and 2", [1, 2]),
        ("Eq. 14 to 16", [14, 15, 16]),
        ("DreamBooth's loss (Ruiz et al., 2023, Eq. 2)", []),
        ("no equation, Sec. 4.1", []),
    ],
)
def test_the_papers_equations_are_told_from_those_of_others(text, found):
    assert docstrings.cited(text) == found


def test_a_docstring_ends_with_the_equations_that_it_cites():
    lines = ["Eq. 6 and 99: guidance."]
    docstrings.process(None, "function", "f", None, None, lines)
    assert lines[0] == "Eq. 6 and 99: guidance."
    assert [line for line in lines if "qquad" in line] == [f"   {docstrings.EQUATIONS[6]} \\qquad (\\text{{Eq. }}6)"]


@pytest.mark.parametrize("path", sorted((ROOT / "fx").rglob("*.py")), ids=lambda path: path.stem)
def test_every_equation_that_a_docstring_cites_is_written_out_or_known_not_to_be(path):
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
    texts = [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)]
    asked = {number for text in texts for number in docstrings.cited(text)}
    assert asked <= {*docstrings.EQUATIONS, 5, 7, 9, 10, 11, 14, 16, 20}


def html_of(text: str) -> str:
    """A docstring as Sphinx would show it, warnings being errors."""
    lines = "\n".join(docstrings.as_rst(text))
    return publish_parts(lines, writer="html5", settings_overrides={"halt_level": 2, "report_level": 2})["body"]


def test_prose_code_lists_and_tables_of_a_docstring_come_out_as_such():
    found = html_of(
        "A `name` of |x| * y_, n_ more.\n\n    code(here)\n\none: first\n    goes on\ntwo: second\n\n- a\n  b\n- c\n\n"
        "| a | b |\n|---|---|\n| 1 | `x` |"
    )
    assert '<span class="docutils literal">name</span> of |x| * y_, n_ more.' in found
    assert re.search(r"<pre[^>]*>code\(here\)</pre>", found)
    items = [" ".join(re.sub("<[^>]+>", "", item).split()) for item in re.findall(r"<li>(.*?)</li>", found, re.DOTALL)]
    assert items == ["one: first goes on", "two: second", "a b", "c"]
    cells = re.findall(r"<t([hd])[^>]*>(.*?)</t\1>", found, re.DOTALL)
    assert [(kind, re.sub("<[^>]+>", "", text).strip()) for kind, text in cells] == [
        ("h", "a"),
        ("h", "b"),
        ("d", "1"),
        ("d", "x"),
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "fx").rglob("*.py")), ids=lambda path: path.stem)
def test_every_docstring_is_shown_without_a_complaint(path):
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            html_of(text)


# the interactive page


def test_the_interactive_page_shows_the_numbers_of_the_committed_tables():
    data, scores = site.play_data(), pd.read_csv(TABLES / "play-scales.csv")
    shown = [
        (entry["w"], entry["AS"], entry["strict"], entry["loose"]) for item in data["items"] for entry in item["scales"]
    ]
    assert shown == list(
        scores[["guidance_scale", "AS", "A-ESR_strict", "A-ESR_loose"]].itertuples(index=False, name=None)
    )
    assert all(item["chosen"] in [entry["w"] for entry in item["scales"]] for item in data["items"])
    assert all(len(entry["matches"]) == item["shown"] for item in data["items"] for entry in item["scales"])


def test_at_the_demos_scales_the_page_agrees_with_the_demo():
    demo, scores = pd.read_csv(TABLES / "demo.csv"), pd.read_csv(TABLES / "play-scales.csv")
    for item, arm, w in (
        ("style/marko-j-kolehmainen", "direct", 1.0),
        ("style/marko-j-kolehmainen", "finextract", 5.0),
    ):
        mine = scores[(scores["item"] == item) & (scores.guidance_scale == w)].AS.item()
        assert mine == pytest.approx(demo[(demo["item"] == item) & (demo.arm == arm)].AS.item(), abs=5e-4)


def test_the_cliques_of_the_page_are_cliques_of_its_pairs_and_none_could_be_joined_whole():
    cliques = site.play_data()["cliques"]
    alike = {(int(i), int(j)): similarity for i, j, similarity in cliques["pairs"]}
    for phi, labels in zip(cliques["phi"], cliques["labels"], strict=True):
        groups: dict[int, list[int]] = {}
        for image, label in enumerate(labels):
            groups.setdefault(label, []).append(image)
        alone = groups.pop(0, [])
        for group in groups.values():
            assert all(alike[pair] >= phi - 1e-4 for pair in combinations(group, 2))
        sizes = [len(groups[label]) for label in sorted(groups)]
        assert sizes == sorted(sizes, reverse=True)
        assert not any(alike[pair] >= phi + 1e-4 for pair in combinations(alone, 2))
        for image in alone:  # or the clique would not have been a largest one
            for group in groups.values():
                assert not all(alike[min(image, k), max(image, k)] >= phi + 1e-4 for k in group)


def test_where_the_paper_s_rule_ends_there_are_for_the_first_time_as_many_cliques_as_training_images():
    """Its steps are .01, those of the page .02: of the two entries around it the second has enough, the first too few."""
    cliques = site.play_data()["cliques"]
    counts = [len({label for label in labels if label}) + labels.count(0) for labels in cliques["labels"]]
    first = next(number for number, phi in enumerate(cliques["phi"]) if phi >= cliques["end"] - 1e-9)
    assert counts[first] >= cliques["n"]
    assert cliques["phi"][0] < cliques["end"]


def test_a_target_stands_above_the_last_heading_before_a_cell():
    text, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [
        text("# A"),
        code("1", execution_count=1),
        text("say\n\n## B\nmore"),
        code("#2", execution_count=2),
        text("## C"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    site.add_target(notebook, 2, "here")
    assert [cell.source for cell in notebook.cells] == ["# A", "1", "say\n\n(here)=\n## B\nmore", "#2", "## C"]
    site.add_target(notebook, 1, "there")
    assert notebook.cells[0].source == "(there)=\n# A"


# the built site


class _Page(HTMLParser):
    """What a page loads, where it leads, and what a reader without eyes is told."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.links, self.anchors, self.images, self.headings = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") not in ("next", "prev", "search", "index", "canonical"):
            self.loads.append(given.get("href", ""))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img":
            self.images.append(given)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="session")
def built(of_all) -> Path:
    """The site, built once for all workers that run side by side."""
    with FileLock(of_all / "site.lock"):
        if not (of_all / "site/html/index.html").is_file():
            site.build(of_all / "site/source", of_all / "site/html")
    return of_all / "site/html"


@pytest.fixture(scope="module")
def pages(built) -> dict[str, _Page]:
    return {path.relative_to(built).as_posix(): _Page(path.read_text()) for path in sorted(built.rglob("*.html"))}


@pytest.mark.long
def test_every_notebook_and_module_has_a_page(pages):
    assert {f"notebooks/{path.stem}.html" for path in NOTEBOOKS.glob("[0-9]*.ipynb")} <= pages.keys()
    assert {
        f"api/fx.{path.stem}.html" for path in (ROOT / "fx").glob("*.py") if path.stem != "__init__"
    } <= pages.keys()
    assert {f"{path.stem}.html" for path in site.PAGES.glob("*.md")} <= pages.keys()


@pytest.mark.long
def test_no_page_loads_anything_from_outside(pages, built):
    outside = {(name, load) for name, page in pages.items() for load in page.loads if re.match(r"(https?:)?//", load)}
    assert not outside
    for sheet in built.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text(errors="replace")), sheet


@pytest.mark.long
def test_every_link_within_the_site_leads_somewhere(pages, built):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link) or link.startswith("#"):
                continue
            target, anchor = urldefrag(unquote(link))
            path = (built / name).parent.joinpath(target).resolve()
            found = path.is_file() and (
                not anchor or path.suffix != ".html" or anchor in pages[path.relative_to(built).as_posix()].anchors
            )
            if not found:
                broken.append((name, link))
    assert not broken


@pytest.mark.long
def test_the_summary_leads_to_the_heading_of_each_table(pages, built):
    """Each row that names a cell has a link to a target, and right after it comes the heading above that cell."""
    summary = (TABLES / "summary.md").read_text()
    named = re.findall(r"/([^/]+\.ipynb)\), In \[(\d+)\] \|$", summary, re.MULTILINE)
    links = [link for link in pages["results.html"].links if "#notebook-" in link]
    assert len(links) == len(named) > 20
    for (name, number), link in zip(named, links, strict=True):
        target, label = urldefrag(link)
        assert label.endswith(f"-in-{number}")
        shown = re.search(rf'id="{label}".*?<h\d>(.*?)<a', (built / target).read_text(), re.DOTALL)[1]
        before = (NOTEBOOKS / name).read_text().partition(f'"execution_count": {number},')[0]
        written = re.findall(r'^ +"#+ (.*?)(?:\\n)?",?$', before, re.MULTILINE)[-1]
        assert re.split(r"[$<`*]", shown)[0].strip() == re.split(r"[$<`*]", written)[0].strip(), link


@pytest.mark.long
def test_pictures_have_a_text_and_headings_skip_no_level(pages):
    for name, page in pages.items():
        assert all("alt" in image for image in page.images), name
        if not name.startswith(("genindex", "search", "py-modindex", "_static")):
            levels = page.headings[page.headings.index(1) :] if 1 in page.headings else []
            assert levels, name
            steps = [b - a for a, b in pairwise(levels)]
            assert max(steps, default=0) <= 1, (name, levels)


@pytest.mark.long
def test_mathjax_comes_with_the_site(pages, built):
    own = [load for load in pages["index.html"].loads if "mathjax" in load.lower()]
    assert own
    assert all((built / urldefrag(load)[0].partition("?")[0]).is_file() for load in own)


@needs_browser
@pytest.mark.long
@pytest.mark.parametrize("page", MAIN_PAGES)
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_a_page_without_errors_and_without_a_request(built, tmp_path, page, width):
    log = tmp_path / "net.json"
    address = (built / f"{page}.html").as_uri()
    dom, console = browse(address, f"--window-size={width},900", f"--log-net-log={log}", tmp_path=tmp_path)
    assert "<h1" in dom
    assert not complaints(console)
    asked = requests_of_the_page(log)
    assert not asked


@needs_browser
@pytest.mark.long
def test_no_page_is_wider_than_a_phone(built, tmp_path):
    """The main ones, and those with the longest names and signatures."""
    pages = [
        *MAIN_PAGES,
        "api/fx.names_of_modules",
        "api/fx.clique_search",
        "api/fx.metrics",
        "genindex",
        "contributing",
    ]
    assert overhangs(built, pages, 390, tmp_path) == dict.fromkeys(pages, 0)


@needs_browser
def test_a_page_that_asks_for_something_is_noticed(tmp_path):
    page, log = tmp_path / "page.html", tmp_path / "net.json"
    page.write_text('<h1>a</h1><img src="https://fonts.gstatic.com/a.png" alt="">')
    browse(page.as_uri(), f"--log-net-log={log}", tmp_path=tmp_path)
    assert requests_of_the_page(log) == {"https://fonts.gstatic.com/a.png"}


@needs_browser
@pytest.mark.long
def test_moving_the_sliders_shows_the_numbers_of_the_tables(built, tmp_path):
    data = site.play_data()
    for number, item in enumerate(data["items"]):
        entry = item["scales"][-1]
        dom, _ = browse(f"{(built / 'play.html').as_uri()}#item={number}&w={entry['w']:g}&phi=0.5", tmp_path=tmp_path)
        assert f"AS {entry['AS']:.3f}," in dom
        assert dom.count("most similar extracted image") == item["shown"]
        phi = next(phi for phi in data["cliques"]["phi"] if phi >= 0.5)
        joined = sum(similarity >= phi for *_, similarity in data["cliques"]["pairs"])
        assert f"{joined} of {len(data['cliques']['pairs'])} pairs are joined" in dom


def test_the_list_of_modules_has_whole_sentences():
    """A full stop behind an abbreviation ends none."""
    page = site.api_page(["captions", "finetune", "guidance"])
    for line in page.splitlines():
        if line.startswith("| [fx."):
            assert line.count("(") == line.count(")"), line
            assert not re.search(r"\b(App|Sec|Eq|Fig) \|$", line), line
    assert "Captions from weights (App. A)" in page


def test_what_sphinx_complains_of_is_said(tmp_path, monkeypatch):
    source = tmp_path / "source"

    def wrong(folder):
        folder.mkdir()
        (folder / "conf.py").write_text("extensions = ['myst_parser']\n")
        (folder / "index.md").write_text("# Title\n\n[gone](nowhere.md)\n")

    monkeypatch.setattr(site, "assemble", wrong)
    with pytest.raises(ValueError, match=r"the site was not built cleanly:\n.*nowhere"):
        site.build(source, tmp_path / "html")


def test_the_data_of_the_page_is_a_script_so_that_it_opens_from_a_file(tmp_path):
    site.assemble(tmp_path / "source")
    text = (tmp_path / "source/_static/play-data.js").read_text()
    assert json.loads(text.removeprefix("window.PLAY = ").removesuffix(";\n"))["items"]
