"""A page in a headless Chromium: what it shows, complains of and asks for, how wide it is, on how many sheets it prints."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: what a browser makes of a page was not looked at"
)


def run(address: str, *options: str, tmp_path: Path) -> subprocess.CompletedProcess:
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def browse(address: str, *options: str, tmp_path: Path) -> tuple[str, str]:
    """The page as a headless browser has it after its scripts ran, and what the browser wrote to its console."""
    found = run(address, *options, "--dump-dom", tmp_path=tmp_path)
    return found.stdout, found.stderr


def complaints(console: str) -> list[str]:
    """The lines of a console that speak of an error or of something refused."""
    return [line for line in console.splitlines() if "CONSOLE" in line and ("rror" in line or "Refused" in line)]


def requests_of_the_page(log: Path) -> set[str]:
    """The addresses that a page asked for, by the browser's log; what the browser asks for itself has no origin."""
    lines = (line.strip().rstrip(",") for line in log.read_text(errors="replace").splitlines())
    found = [json.loads(line).get("params", {}) for line in lines if re.match(r'\{.*"source":.*\}$', line)]
    assert found
    own = (None, "not an origin")
    return {p["url"] for p in found if str(p.get("url")).startswith("http") and p.get("initiator") not in own}


def overhangs(folder: Path, pages: list[str], width: int, tmp_path: Path) -> dict[str, int]:
    """By how many pixels each page of a folder is wider than a window of this width, beside its scroll bar."""
    frames = [
        f'<iframe style="border:0;width:{width}px;height:900px" src="{(folder / f"{page}.html").as_uri()}"></iframe>'
        for page in pages
    ]
    script = (
        "const page = f => f.document.documentElement;"
        "const sizes = f => [page(f).scrollWidth, page(f).clientWidth];"
        "onload = () => { document.title = JSON.stringify(Array.from(frames).map(sizes)) }"
    )
    outer = tmp_path / "frames.html"
    outer.write_text(f"<title></title>{''.join(frames)}<script>{script}</script>")
    dom, _ = browse(outer.as_uri(), "--allow-file-access-from-files", "--window-size=1600,1000", tmp_path=tmp_path)
    found = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    return {page: whole - window for page, (whole, window) in zip(pages, found, strict=True)}


def overhang(page: str, width: int, tmp_path: Path) -> int:
    """The same of the text of one page, which loads nothing."""
    (tmp_path / "page.html").write_text(page, "utf-8")
    return overhangs(tmp_path, ["page"], width, tmp_path)["page"]


def printed_pages(address: str, tmp_path: Path) -> int:
    """How many sheets the page is printed on."""
    target = tmp_path / "page.pdf"
    run(address, f"--print-to-pdf={target}", tmp_path=tmp_path)
    return len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))
