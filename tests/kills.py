"""A run that is killed again and again, or whose disk is full, ends as one that nothing disturbed.

    PYTHONPATH=. python tests/kills.py [--kills N] [--seed N] [CASE ...]

Each case is done once undisturbed, then in another work area where it is killed (SIGKILL) at random moments before it is
let finish: `fine-tune`, `adapter` (a LoRA), `generate`, `extract`, `search` (a caption), `audit` (the command) and
`reproduce` (a notebook by papermill). After every kill each finished step must be whole (`fx.runs verify`), and at the end
be the very folder that was there first, so that nothing finished was done again; all files but the manifests, which tell
the time, must be byte by byte those of the undisturbed run. The tests run a short form of it (tests/test_kills.py).
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from fx import audit, finetune, results, runs, sampling
from fx.caption_search import CaptionSearch
from fx.evaluation import Score
from fx.extraction import Extract
from fx.finetune import FineTune, TrainingItem
from fx.sampling import Generate

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("locks", "hashes", "logs", "scratch")  # what lies in a work area and is no finished step
COMMANDS = {
    "audit": [
        *(
            sys.executable,
            "-m",
            "fx.audit",
            "--report",
            "{area}/report.html",
            "--images",
            "20",
            "--recovery-steps",
            "2",
        ),
        *("--change", "steps_per_image=10 sampling_steps=4"),
    ],
    "reproduce": [sys.executable, "-m", "fx.reproduce", "03", "--profile", "smoke"],
}


# what is done


def fine_tuned(base: str, pictures: str) -> FineTune:
    return FineTune((TrainingItem(pictures, "a dog"),), base=base, steps_per_image=20, batch_size=2)


def adapted(base: str, pictures: str) -> FineTune:
    return replace(fine_tuned(base, pictures), method="lora", rank=2, alpha=2)


def generated(base: str, pictures: str) -> Generate:
    return Generate(fine_tuned(base, pictures), "finextract", 3.0, n_generated=48, steps=6)


def scored(base: str, pictures: str) -> Score:
    return Score(Extract(generated(base, pictures), 4), judge="")


def searched(base: str, pictures: str) -> CaptionSearch:
    return CaptionSearch(fine_tuned(base, pictures), objective="coverage", most=3)


SPECS: dict[str, Callable] = {"fine-tune": fine_tuned, "adapter": adapted}
SPECS |= {"generate": generated, "extract": scored, "search": searched}
CASES = (*SPECS, *COMMANDS)
ENDED = (0, audit.FOUND)  # exit codes of what came to its end


def do(case: str, area: Path, base: str, pictures: str) -> None:
    """Complete a step in a work area, keeping what is unfinished every half second."""
    results.RUNS = area
    finetune.SAVE_EVERY = 0.5
    sampling.BLOCK = 4
    torch.set_num_threads(1)
    with open(area.parent / f"{area.name}.log", "a") as log, contextlib.redirect_stderr(log):
        results.run([SPECS[case](base, pictures)])


# what is compared


def finished(area: Path) -> dict[str, int]:
    """Every finished step, by its place, and the inode of its manifest: another one if it was done again."""
    places = [path for path in area.glob("*/*/" + results.MANIFEST) if path.parts[-3] not in BESIDE]
    return {str(path.parent.relative_to(area)): path.stat().st_ino for path in places if ".part-" not in path.parts[-2]}


def kept(area: Path) -> dict[str, str]:
    """SHA-256 of every file of every finished step, and of every table; without the manifests."""
    steps = [file for place in finished(area) for file in (area / place).rglob("*") if file.is_file()]
    tables = [*area.glob("outputs/data/results/**/*.csv")]
    files = [file for file in steps + tables if file.name != results.MANIFEST]
    return {str(file.relative_to(area)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# how it is killed


@dataclass
class Outcome:
    """What came of a case: how often it was killed, in how many of them a step was unfinished, what was compared."""

    kills: int = 0
    in_the_middle: int = 0
    steps: int = 0
    files: int = 0


class Runner:
    """Begins a case in another process, where it can be waited for or killed."""

    def __init__(self, case: str, base: str, pictures: str):
        self.case, self.base, self.pictures = case, base, pictures
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["kills"])

    def begin(self, area: Path):
        """A process with `wait(seconds)` and `kill()`."""
        if self.case in SPECS:
            arguments = (self.case, area, self.base, self.pictures)
            process = self.context.Process(target=do, args=arguments)
            process.start()
            return process
        own = {"FX_RUNS": str(area), "FX_OUTPUTS": str(area / "outputs"), "OMP_NUM_THREADS": "1"}
        for report in area.glob("report.*"):
            report.unlink()  # a finished one would not be overwritten
        command = [word.format(area=area) for word in COMMANDS[self.case]]
        log = open(area.parent / f"{area.name}.log", "ab")  # noqa: SIM115, the process has it
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=log, stderr=log)


def ended(process, seconds: float | None) -> bool:
    """Whether it ended by itself within this time; AssertionError if it failed."""
    if isinstance(process, subprocess.Popen):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        code = process.poll()
    else:
        process.join(seconds)
        code = process.exitcode
    assert code in (None, *ENDED), f"it failed with {code}"
    return code is not None


def kill(process, all_of_it: bool) -> None:
    """SIGKILL to the process, and to those it started where asked; the others end when they notice, and are waited for."""
    family = psutil.Process(process.pid).children(recursive=True)
    for one in [*(family if all_of_it else []), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait() if isinstance(process, subprocess.Popen) else process.join()
    _, alive = psutil.wait_procs(family, timeout=60)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def disturb(case: str, kills: int, folder: Path, base: str, pictures: str, rng: random.Random) -> Outcome:
    """Do a case undisturbed and killed `kills` times, and compare; AssertionError where they differ."""
    runner, outcome = Runner(case, base, pictures), Outcome()
    undisturbed, area = folder / case / "undisturbed", folder / case / "area"
    area.mkdir(parents=True)
    began = time.monotonic()
    assert ended(runner.begin(area), None)
    took = time.monotonic() - began
    area.rename(undisturbed)  # done in one place: a checkpoint that a command makes has its place in its address
    area.mkdir()
    seen = {}
    while outcome.kills < kills:
        process = runner.begin(area)
        if ended(process, rng.uniform(0, took)):
            shutil.rmtree(area)  # it has come to its end: from the beginning again
            area.mkdir()
            seen = {}
            continue
        kill(process, all_of_it=rng.random() < 0.5)
        outcome.kills += 1
        outcome.in_the_middle += bool(list(area.glob("*/*.part-*")))
        now = finished(area)
        again = [place for place, inode in seen.items() if now.get(place) != inode]
        assert not again, f"finished and then done again: {again}"
        seen = now
        assert not (faults := broken(area)), f"kept although unfinished: {faults}"
    assert ended(runner.begin(area), None)
    now = finished(area)
    assert all(now[place] == inode for place, inode in seen.items()), "finished and then done again"
    different = differences(undisturbed, area)
    assert not different, f"not what an undisturbed run makes: {different[:5]}"
    assert not list(area.glob("*/*.set-aside-*"))
    outcome.steps, outcome.files = len(now), len(kept(area))
    return outcome


def fill(case: str, folder: Path, base: str, pictures: str, megabytes: int = 1) -> Outcome | None:
    """Do a case undisturbed and on a disk that is full before it ends and is freed then, and compare.

    None where this system lets nobody mount a disk of its own.
    """
    undisturbed, area, copied = places = [folder / f"full-{case}" / name for name in ("undisturbed", "area", "copied")]
    for place in (undisturbed, area):
        place.mkdir(parents=True)
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(area)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return None
    words = shlex.join(str(word) for word in [sys.executable, __file__, "--fill", case, *places, base, pictures])
    script = f"mount -t tmpfs -o size={megabytes}m tmpfs {shlex.quote(str(area))} && exec {words}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "No space left on device" in done.stderr
    assert not (different := differences(undisturbed, copied)), f"not what an undisturbed run makes: {different[:5]}"
    return Outcome(steps=len(finished(copied)), files=len(kept(copied)))


def fill_and_free(case: str, undisturbed: Path, area: Path, copied: Path, base: str, pictures: str) -> None:
    """Where `area` is a small disk: do a case beside it, on it until it is full, and again when it is large; copy that."""

    def fails_in(place: Path) -> bool:
        process = multiprocessing.get_context("fork").Process(target=do, args=(case, place, base, pictures))
        process.start()
        process.join()
        return process.exitcode != 0

    assert not fails_in(undisturbed)
    assert fails_in(area), "the disk was not full"
    subprocess.run(["mount", "-o", "remount,size=1g", str(area)], check=True)
    assert not fails_in(area)
    shutil.copytree(area, copied, symlinks=True)


def differences(one: Path, other: Path) -> list[str]:
    """Files of finished steps and tables that two work areas do not both have, byte by byte."""
    wanted, found = kept(one), kept(other)
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def broken(area: Path) -> list[str]:
    """Finished steps that are not what their manifest says."""
    before, results.RUNS = results.RUNS, area
    try:
        return [
            f"{place}: {fault}" for place in map(area.__truediv__, finished(area)) if (fault := runs.fault_of(place))
        ]
    finally:
        results.RUNS = before


# the world


def world(folder: Path) -> tuple[str, str]:
    """A tiny random base model and four pictures, and where they lie."""
    import tiny

    tiny.save("sd1", folder / "base")
    (pictures := folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((6, 6, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    return str(folder / "base"), str(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", nargs="*", choices=[*CASES, []], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--kills", type=int, default=20, help="how often each case is killed (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fill", nargs=6, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.fill:
        return fill_and_free(asked.fill[0], *map(Path, asked.fill[1:4]), *asked.fill[4:])
    with tempfile.TemporaryDirectory() as folder:
        base, pictures = world(Path(folder) / "world")
        for case in asked.case or CASES:
            began = time.monotonic()
            found = disturb(case, asked.kills, Path(folder), base, pictures, random.Random(f"{asked.seed} {case}"))
            print(
                f"{case}: killed {found.kills} times, {found.in_the_middle} of them with a step unfinished; {found.steps} "
                f"steps, {found.files} files identical ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
        if not asked.case:
            full = fill("extract", Path(folder), base, pictures)
            print(
                f"a full disk: {full.files} files identical"
                if full
                else "a full disk: not tried, nothing can be mounted"
            )


if __name__ == "__main__":
    main()
