"""How commands end: exit codes, one line for what was wrong, one for an interruption; and that all of them do so."""

import importlib
import re
import subprocess
import sys

import pytest

from fx import command
from fx.paths import ROOT

COMMANDS = [path for path in sorted((ROOT / "fx").glob("*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (None, None, ""),
        (2, 2, ""),
        (ValueError("no such arm"), "fx.x: no such arm", ""),
        (FileNotFoundError("no file"), "fx.x: no file", ""),
        (PermissionError(13, "not allowed", "/place"), "fx.x: [Errno 13] not allowed: '/place'", ""),
        (
            KeyboardInterrupt(),
            130,
            "fx.x: interrupted; what is finished is kept, and the same command goes on from there",
        ),
    ],
)
def test_a_command_ends_in_one_line(outcome, code, said, capsys):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as ended:
        command.run("fx.x", main)
    assert ended.value.code == code
    assert capsys.readouterr().err.strip() == said


def test_a_defect_shows_where_it_is():
    with pytest.raises(ZeroDivisionError):
        command.run("fx.x", lambda: 1 // 0)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_ends_so(path):
    ending = path.read_text().partition('if __name__ == "__main__":\n')[2].strip()
    assert re.fullmatch(rf'command\.run\("fx\.{path.stem}", \w+\)', ending)


@pytest.mark.parametrize("words", [["fx.runs", "--help"], ["fx.inspect", "nothing-there"]])
def test_commands_say_what_they_do_and_what_is_wrong_without_a_traceback(words):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == ("--help" in words)
    assert len(done.stdout or done.stderr) > 20


@pytest.mark.parametrize("path", [path for path in COMMANDS if path.stem != "plan"], ids=lambda path: path.stem)
def test_every_command_has_a_help_and_asking_for_it_does_nothing_else(path, capsys):
    """fx.plan is called by fx.reproduce, and says so."""
    main = re.search(r", (\w+)\)\s*$", path.read_text())[1]
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(f"fx.{path.stem}"), main)(["--help"])
    assert ended.value.code == 0
    assert f"usage: python -m fx.{path.stem} " in capsys.readouterr().out
