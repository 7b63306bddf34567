"""The package's docstrings, plain prose with a little Markdown, as Sphinx reads them, with the paper's equations below.

Read by conf.py: `process` is called for every docstring that autodoc shows.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

EQUATIONS: dict[int, str] = yaml.safe_load(Path(__file__).with_name("equations.yaml").read_text())
CITED = re.compile(r"(?<!\d{4}, )\bEqs?\. (\d+)(?:( to |, | and )(\d+))?")


def cited(text: str) -> list[int]:
    """The numbers of the paper's equations that a docstring names, in order; "Eq. 14 to 16" names three.

    Those of another paper, as in "(Ruiz et al., 2023, Eq. 2)", do not count.
    """
    found = []
    for first, between, last in CITED.findall(text):
        numbers = range(int(first), int(last) + 1) if between == " to " else [first, *([last] if last else [])]
        found += [int(number) for number in numbers]
    return list(dict.fromkeys(found))


def process(app, what, name, obj, options, lines: list[str]) -> None:
    """Replace the lines of a docstring, in place."""
    text = "\n".join(lines)
    lines[:] = [*as_rst(text), *written_out(cited(text))]


def written_out(numbers: list[int]) -> Iterator[str]:
    """The equations of these numbers, as far as they are known, as lines of reStructuredText."""
    for number in numbers:
        if number in EQUATIONS:
            yield from ("", ".. math::", "", f"   {EQUATIONS[number]} \\qquad (\\text{{Eq. }}{number})", "")


def as_rst(text: str) -> Iterator[str]:
    """A docstring as lines of reStructuredText: indented blocks are code, hanging ones items, tables tables."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            yield from ("::", "", *lines, "")
        elif len(lines) > 2 and re.fullmatch(r"[|\-: ]+", lines[1]):
            yield from _table(lines)
        elif lines[0].startswith("- ") or any(line.startswith(" ") for line in lines):
            yield from _items(lines)
        else:
            yield from (*map(_inline, lines), "")


def _inline(text: str) -> str:
    """Code spans in Sphinx's way, and nothing else with a meaning."""
    parts = re.split(r"`([^`]+)`", text)
    plain = [re.sub(r"([*|\\])", r"\\\1", part) for part in parts[::2]]
    plain = [re.sub(r"(\w)_(?!\w)", r"\1\\_", part) for part in plain]
    spans = [f"``{part}``" for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*spans, ""], strict=True))


def _items(lines: list[str]) -> Iterator[str]:
    """A list: a line at the margin begins an item, indented ones go on with it. Before a list its lead-in, if it has one."""
    marked = any(line.startswith("- ") for line in lines)
    in_list = False
    for line in lines:
        begins = line.startswith("- ") if marked else not line.startswith(" ")
        if begins:
            if not in_list:
                yield ""
            yield f"- {_inline(line.removeprefix('- '))}"
            in_list = True
        else:
            yield f"  {_inline(line.strip())}" if in_list else _inline(line)
    yield ""


def _table(lines: list[str]) -> Iterator[str]:
    """A Markdown table with a head."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    yield from (".. list-table::", "   :header-rows: 1", "")
    for row in [rows[0], *rows[2:]]:
        for number, cell in enumerate(row):
            yield f"   {'*' if number == 0 else ' '} - {_inline(cell)}"
    yield ""
