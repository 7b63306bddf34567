"""What every committed notebook must be: executed, and laid out like the others (CONTRIBUTING.md).

Each check takes a notebook and gives its faults, one sentence each; test_notebooks.py asks for none.
"""

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser

from nbformat import NotebookNode

from fx.paths import ROOT

LONGEST_TABLE = 30  # rows that a person reads; more belong into a pivot or a figure
SMALLEST_FONT = 7  # points
FOLDED = {"source_hidden": True, "outputs_hidden": True}
DETAILS = re.compile(r"<details>\s*<summary>Solution.*?</summary>.*</details>", re.DOTALL)
COMPLETE_RUN, OWN_RUN, EXERCISES = "The complete run", "Your own run", "Exercises"
COMMITTED = {"tables.complete", "plots.complete"}  # what shows a committed table or figure


# cells


def code(cell: NotebookNode) -> bool:
    return cell.cell_type == "code"


def is_solution(cell: NotebookNode) -> bool:
    return "solution" in cell.metadata.get("tags", [])


def calls(node: ast.AST) -> set[str]:
    """The functions that are called anywhere in a piece of code, as they are written."""
    return {ast.unparse(found.func) for found in ast.walk(node) if isinstance(found, ast.Call)}


def shows_committed(cell: NotebookNode) -> bool:
    return code(cell) and bool(calls(ast.parse(cell.source)) & COMMITTED)


def bundles(cell: NotebookNode) -> list[dict]:
    """What a cell displays, a dictionary of MIME types each."""
    return [output.data for output in cell.outputs if output.output_type in ("display_data", "execute_result")]


class _Rows(HTMLParser):
    """The rows of the tables in a piece of HTML, lists of cells."""

    def __init__(self):
        super().__init__()
        self.rows: list[list[str]] = []
        self._open = False

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data.strip()


def table_rows(html: str) -> list[list[str]]:
    """The rows of all tables in a piece of HTML, headings included."""
    (reader := _Rows()).feed(html)
    return reader.rows


def prose(cell: NotebookNode) -> str:
    """A markdown cell's text without its headings."""
    return re.sub(r"^#+ .*$", "", cell.source, flags=re.MULTILINE).strip() if not code(cell) else ""


def sections(notebook: NotebookNode) -> list[str]:
    """For each cell the last heading "## …" in it or before it, without what follows a colon; "" before the first."""
    found, current = [], ""
    for cell in notebook.cells:
        if not code(cell):
            for heading in re.findall(r"^## (.+)$", cell.source, re.MULTILINE):
                current = heading.partition(":")[0].strip()
        found.append(current)
    return found


# executed


def execution_faults(notebook: NotebookNode) -> Iterator[str]:
    """Whether all cells were run, once, in order, without an error, and left what they must."""
    cells = [cell for cell in notebook.cells if code(cell)]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)) or not cells:
        yield "it is not executed from top to bottom: python -m fx.reproduce --in-place"
    for number, cell in enumerate(cells, 1):
        kinds = [output.output_type for output in cell.outputs]
        if "error" in kinds:
            yield f"code cell {number} ended in an error"
        if any(output.get("name") == "stderr" for output in cell.outputs):
            yield f"code cell {number} keeps what was written to the standard error"
        if any(output.get("execution_count", cell.execution_count) != cell.execution_count for output in cell.outputs):
            yield f"code cell {number} has the output of another execution"
        if any(
            re.search(r"PosixPath|WindowsPath", str(output.get("data", output.get("text")))) for output in cell.outputs
        ):
            yield f"code cell {number} shows a path of the machine on which it was executed"
        if must_print(cell.source) and not any(output.get("name") == "stdout" for output in cell.outputs):
            yield f"code cell {number} prints, but no output is stored"
        if must_display(cell.source) and not {"execute_result", "display_data"} & set(kinds):
            yield f"code cell {number} ends in a value, but no output is stored"


def must_print(source: str) -> bool:
    return any(isinstance(s, ast.Expr) and calls(s.value) & {"print"} for s in ast.parse(source).body)


def must_display(source: str) -> bool:
    """Whether a cell certainly ends in a value that is shown: a table or figure of the complete run, or no call at all."""
    body = ast.parse(source).body
    if not body or not isinstance(body[-1], ast.Expr) or source.rstrip().endswith(";"):
        return False
    return not isinstance(body[-1].value, ast.Call) or ast.unparse(body[-1].value.func) in COMMITTED


def version_faults(notebook: NotebookNode) -> Iterator[str]:
    """Whether it was executed with the pinned versions, by what its first cell printed."""
    first = next(cell for cell in notebook.cells if code(cell))
    printed = "".join(output.get("text", "") for output in first.outputs)
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    found = {name: version for name, version in re.findall(r"([\w-]+) (\d[\w.]*)", printed) if name in pins}
    if not found:
        yield "its first code cell does not print results.environment_summary()"
    for name, version in found.items():
        if version != pins[name]:
            yield f"it was executed with {name} {version}, pinned is {pins[name]}"


# laid out


def layout_faults(notebook: NotebookNode, number: str) -> Iterator[str]:
    """Whether it has the layout of CONTRIBUTING.md; number: the two digits that its title begins with."""
    yield from beginning_faults(notebook, number)
    yield from run_faults(notebook)
    yield from exercise_faults(notebook)
    yield from reading_faults(notebook)
    last = notebook.cells[-1]
    asserts = [node for node in ast.walk(ast.parse(last.source)) if isinstance(node, ast.Assert)] if code(last) else []
    if not any(re.search(r"\b(exists|is_file)\(", ast.unparse(node)) for node in asserts):
        yield "its last cell does not assert that the promised files exist"


def beginning_faults(notebook: NotebookNode, number: str) -> Iterator[str]:
    """Title, question, what will be seen and how long it takes to read; then imports and versions, then parameters."""
    first = [index for index, cell in enumerate(notebook.cells) if code(cell)][:2]
    before = "\n".join(cell.source for cell in notebook.cells[: first[0]])
    if not before.startswith(f"# {number} · "):
        yield f'its first line is not a title "# {number} · …"'
    for sentence in ("You will see", "minutes"):
        if sentence not in before:
            yield f'"{sentence}" does not stand above its first code cell'
    if not calls(ast.parse(notebook.cells[first[0]].source)) & {"results.environment_summary"}:
        yield "its first code cell does not print the versions"
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        yield "it has a cell of another run's parameters"
    if "parameters" not in notebook.cells[first[1]].metadata.get("tags", []):
        yield "its second code cell is not tagged parameters"


def run_faults(notebook: NotebookNode) -> Iterator[str]:
    """The complete run before the reader's own, and what follows from each table and figure under it."""
    where = sections(notebook)
    shown = [index for index, cell in enumerate(notebook.cells) if shows_committed(cell)]
    shown = [index for index in shown if where[index] != EXERCISES]
    if not shown and COMPLETE_RUN not in where:
        return
    places = [where.index(name) if name in where else -1 for name in (COMPLETE_RUN, OWN_RUN, EXERCISES)]
    if -1 in places[:2] or places != sorted(places):
        yield f'it has no "## {COMPLETE_RUN}" followed by "## {OWN_RUN}" and "## {EXERCISES}"'
        return
    for index in shown:
        if not places[0] <= index < places[1]:
            yield f"cell {index} shows the complete run outside of its section"
        under = notebook.cells[index + 1]
        if not prose(under) and "print(" not in under.source:
            yield f"no sentence under cell {index}, written or printed, says what follows from it"
    if not any(places[0] < index < places[1] for index in shown):
        yield f'"{COMPLETE_RUN}" shows no committed table or figure'
    beginning = prose(notebook.cells[places[1]]) or prose(notebook.cells[places[1] + 1])
    if not re.search(r"\b(small|few|less|only)", beginning):
        yield f'"{OWN_RUN}" does not begin by saying that it is smaller'


def exercise_faults(notebook: NotebookNode) -> Iterator[str]:
    """Three exercises at the end, a folded solution under each."""
    where = sections(notebook)
    if EXERCISES not in where:
        yield f'it has no "## {EXERCISES}"'
        return
    start = where.index(EXERCISES)
    if where[start:] != [EXERCISES] * (len(where) - start):
        yield f'"{EXERCISES}" is not its last section'
    solutions = [index for index, cell in enumerate(notebook.cells) if is_solution(cell)]
    first = [index for index in solutions if index - 1 not in solutions]
    if len(first) != 3:
        yield f"it has {len(first)} exercises with a solution, not 3"
    for index in first:
        if index <= start or not prose(notebook.cells[index - 1]):
            yield f"the solution in cell {index} does not stand under its exercise"
    for index in solutions:
        cell = notebook.cells[index]
        folded = cell.metadata.get("jupyter") == FOLDED if code(cell) else DETAILS.fullmatch(cell.source.strip())
        if not folded or "hide-cell" not in cell.metadata.tags:
            yield f"the solution in cell {index} is not folded"
    for index in range(start, len(where) - 1):
        if code(notebook.cells[index]) and not is_solution(notebook.cells[index]):
            yield f"cell {index} stands among the exercises and is no solution"


def reading_faults(notebook: NotebookNode) -> Iterator[str]:
    """What a reader needs: prose between the code, a sentence at each picture, tables and letters of a size to read."""
    cells = [cell for cell in notebook.cells if not is_solution(cell)]
    for three in zip(cells, cells[1:], cells[2:], strict=False):
        if all(map(code, three)):
            yield f"no prose between three code cells: {three[0].source[:40]!r} …"
    for cell, (before, after) in zip(cells, zip([None, *cells], [*cells[1:], None], strict=False), strict=False):
        if not code(cell):
            continue
        if any("image/png" in data for data in bundles(cell)) and not any(prose(c) for c in (before, after) if c):
            yield f"a picture without a sentence on what to look at: {cell.source[:40]!r} …"
        for data in bundles(cell):
            if (rows := len(table_rows(data.get("text/html", "")))) > LONGEST_TABLE:
                yield f"a table of {rows} rows: {cell.source[:40]!r} …"
        for size in re.findall(r"font_?size['\"]?\s*[=:]\s*(\d+\.?\d*)", cell.source):
            if float(size) < SMALLEST_FONT:
                yield f"letters of {size} points: {cell.source[:40]!r} …"
