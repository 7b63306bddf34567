"""Write tests/SUPPORTED.md: which family can be loaded from what, as far as a test proves it.

    python tests/supported.py

A row is a test of test_checkpoints.py or test_families.py that runs once per family; a family is ticked where it ran and
passed. One that is skipped, or only collected, proves nothing.
"""

import re
import subprocess
import sys
from pathlib import Path

from tiny import FAMILIES

HERE = Path(__file__).parent
PAGE = HERE / "SUPPORTED.md"
NAMES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x (v)",
    "sdxl": "SDXL",
    "alt": "AltDiffusion",
    "sd3": "Stable Diffusion 3 (flow)",
    "flux": "FLUX.1 (flow)",
}
ROWS = {
    "test_direct_and_cfg_are_what_the_stock_pipeline_samples": "sampled as the library's own pipeline does",
    "test_a_whole_diffusers_folder": "fine-tuned: diffusers folder",
    "test_a_folder_with_the_network_only": "fine-tuned: folder with the network only",
    "test_a_single_file": "fine-tuned: single-file safetensors",
    "test_a_lora_in_diffusers_layout": "LoRA, diffusers' layout",
    "test_a_lora_in_kohya_layout": "LoRA, kohya's layout",
    "test_a_lora_in_peft_layout": "LoRA, peft's layout",
}


PASSED: set[str] = set()  # the tests that ran and passed so far in this session; conftest.py keeps it


def ran() -> set[str]:
    """The names of the tests of the two files, with parameters, that run and pass; ValueError if one fails."""
    files = [str(HERE / name) for name in ("test_checkpoints.py", "test_families.py")]
    options = ["-q", "-rp", "-o", "addopts=", "-p", "no:cacheprovider", "-k", " or ".join(ROWS)]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        raise ValueError(f"a test failed, so that nothing is proven:\n{done.stdout[-2000:]}")
    return {line.removeprefix("PASSED ") for line in done.stdout.splitlines() if line.startswith("PASSED ")}


def rows_run(tests: set[str]) -> set[str]:
    """The rows of which a test is among these."""
    return {row for row in ROWS for test in tests if f"::{row}[" in test}


def stale(tests: set[str]) -> bool:
    """Whether the page says something else than these tests prove; False as long as they do not cover all of its rows."""
    return rows_run(tests) == ROWS.keys() and PAGE.read_text() != page(tests)


def page(tests: set[str]) -> str:
    """The table in Markdown, of tests that ran and passed."""
    proven: dict[str, set[str]] = {}
    for line in tests:
        if found := re.search(r"::(\w+)\[(.+)\]", line):
            proven.setdefault(found[1], set()).update(set(found[2].split("-")) & set(FAMILIES))
    lines = ["| | " + " | ".join(NAMES.values()) + " |", "|---" * (len(NAMES) + 1) + "|"]
    for test, words in ROWS.items():
        if proven.get(test):
            marks = ["yes" if family in proven[test] else "" for family in NAMES]
            lines.append(f"| {words} | " + " | ".join(marks) + " |")
    head = (
        "Written by `python tests/supported.py` from the tests that prove it; do not edit. An empty cell is untested: "
        "neither promised nor refused. `python -m fx.inspect FILE --base MODEL` tries to load yours and says why if it does "
        "not.\n\n"
    )
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(ran()))
    print(PAGE.read_text())
