"""Every committed notebook is true to the committed tables and figures: what it stored of them is what they hold today."""

import ast
import base64
import contextlib
import io
import re
from collections.abc import Iterator

import IPython.display
import matplotlib.pyplot as plt
import pandas as pd
from IPython.core.formatters import DisplayFormatter
from layout import COMMITTED, COMPLETE_RUN, bundles, calls, code, is_solution, sections, shows_committed, table_rows
from nbformat import NotebookNode

MISSING = re.compile(r"([\w-]+)(?:-mini\.png|\.csv): there is no complete run")

# methods that change what they belong to
CHANGING = {"append", "extend", "update", "insert", "add", "sort", "setdefault"}


def bound(statement: ast.stmt) -> set[str]:
    """The names that a statement defines or changes."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= read_in(node.value)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            found |= read_in(node.func.value)
    return found


def read_in(node: ast.AST) -> set[str]:
    """All names that a piece of code reads."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def stored_in(node: ast.AST) -> set[str]:
    """All names that a piece of code gives a value, those of its arguments included."""
    arguments = {node.arg for node in ast.walk(node) if isinstance(node, ast.arg)}
    return arguments | {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def used(statement: ast.stmt) -> set[str]:
    """The names that a statement needs from outside: not those of its own loops, comprehensions and functions."""
    parts = [statement]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):  # x = f(x) needs x
        parts = [part for part in ast.iter_child_nodes(statement) if not isinstance(part, ast.Name)]
        parts += [part for part in ast.iter_child_nodes(statement) if isinstance(getattr(part, "ctx", None), ast.Load)]
    changed = [node.target for node in ast.walk(statement) if isinstance(node, ast.AugAssign)]
    needs = {target.id for target in changed if isinstance(target, ast.Name)}
    return needs.union(*(read_in(part) - stored_in(part) for part in parts))


def replaced(statement: ast.stmt) -> set[str]:
    """The names whose former value is gone after a statement."""
    if isinstance(statement, ast.Assign):
        targets = [n for t in statement.targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
        return {n.id for n in targets if isinstance(n, ast.Name)}
    return bound(statement) if isinstance(statement, ast.FunctionDef | ast.Import | ast.ImportFrom) else set()


def needed(before: list[ast.stmt], own: list[ast.stmt]) -> list[ast.stmt]:
    """Of the statements before a cell those that its own depend on, and the settings of pandas."""
    names, chosen = set(), []
    for statement in reversed([*before, *own]):
        of_cell = len(chosen) < len(own)
        if of_cell or bound(statement) & names or "pd.set_option" in calls(statement):
            names = (names - replaced(statement)) | used(statement)
            chosen.append(statement)
    return chosen[len(own) :][::-1]


def displayed(statements: list[ast.stmt], silent: bool, names: dict) -> tuple[str, list[dict]]:
    """What a cell prints and displays when it is run in these names."""
    shown: list[dict] = []

    def show(*values, **_) -> None:
        shown.extend(DisplayFormatter().format(value)[0] for value in values)

    last = statements[-1] if isinstance(statements[-1], ast.Expr) and not silent else None
    body = statements[:-1] if last else statements
    printed, known = io.StringIO(), IPython.display.display
    names["display"] = IPython.display.display = show
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            if last and (value := eval(compile(ast.Expression(last.value), "cell", "eval"), names)) is not None:
                show(value)
    finally:
        IPython.display.display = known
    return printed.getvalue(), shown


def content(data: dict) -> object:
    """What of a displayed value is compared: a picture's bytes, a table's cells, or its text; None for a drawn figure."""
    plain = data.get("text/plain", "")
    if re.match(r"(<Figure|Figure\(|<seaborn|.*(<Axes|<matplotlib))", plain):
        return None
    if "image/png" in data:
        return base64.b64decode(data["image/png"]) if isinstance(data["image/png"], str) else data["image/png"]
    if "text/html" in data:
        return table_rows(data["text/html"])
    return data.get("text/markdown", data.get("text/latex", plain))


def committed_faults(notebook: NotebookNode) -> Iterator[str]:
    """Whether each cell that shows committed tables or figures stored what they hold today, or that there is none yet.

    Such a cell is run once more with what it depends on. Call it where `results.run` is refused: a cell that calls
    `tables.complete`, and any in the section of the complete run, must do without. Others, which compare what they have
    of the complete run with the reader's own, are passed over, and so are solutions.
    """
    before: list[ast.stmt] = []
    shown: set[str] = set()  # names that stand for committed content
    for index, (cell, section) in enumerate(zip(notebook.cells, sections(notebook), strict=True)):
        if not code(cell):
            continue
        own = ast.parse(cell.source).body
        alone = shows_committed(cell) or section == COMPLETE_RUN
        if not is_solution(cell) and (shows_committed(cell) or any(shown & used(statement) for statement in own)):
            yield from cell_faults(f"cell {index}", cell, needed(before, own), own, alone)
        for statement in own:
            committed = bool(calls(statement) & COMMITTED or shown & used(statement))
            shown = shown | bound(statement) if committed else shown - replaced(statement)
        before += own


def cell_faults(where: str, cell: NotebookNode, before: list, own: list, alone: bool) -> Iterator[str]:
    """`committed_faults` of one cell: its own statements, those before that they depend on, whether these must do."""
    names: dict = {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(ast.Module(before, []), "before", "exec"), names)
        printed, expected = displayed(own, cell.source.rstrip().endswith(";"), names)
    except Exception as error:
        if alone:
            yield f"{where} shows the complete run and depends on this run ({error}): show it in a cell of its own"
        return
    finally:
        pd.reset_option("display")
        plt.close("all")
    for data in expected:
        for name in MISSING.findall(data.get("text/plain", "")):
            yield f"{where} shows {name}, which is not committed"
    if printed != "".join(output.text for output in cell.outputs if output.get("name") == "stdout"):
        yield f"{where} has stored another text than it prints of the committed tables"
    stored, today = (
        [found for data in part if (found := content(data)) is not None] for part in (bundles(cell), expected)
    )
    if stored != today:
        yield f"{where} has stored another table or figure than the committed one"
