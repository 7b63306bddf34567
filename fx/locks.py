"""One process at a time, on one machine and on several that share a folder.

A file lock ends with its process, however that ends, but on some network file systems it is not seen from other machines.
So whoever holds one also leaves a *claim* beside it, a small file that says who it is and is touched every few seconds. A
machine that gets the lock and finds a fresh claim of another one knows that locks do not reach from there, says so and
waits; a claim that has not been touched for a while is that of a machine that is gone. Whether it is fresh is judged by
the clock of the file system alone, so clocks that differ do no harm.
"""

import contextlib
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock

HOST = platform.node()
BEAT = 10.0  # seconds between touches of a claim
STALE = 60.0  # seconds without one, after which its machine counts as gone


def is_held(path: Path) -> bool:
    """Whether some process holds the lock at `path`, as far as that can be seen from here."""
    if path.exists():
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return True
        lock.release()
    return bool(_of_another_machine(path))


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock at `path`; a warning that names `what` is being computed if it has to be waited for."""
    path.parent.mkdir(exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        warnings.warn(f"another process or thread is computing {what}; waiting until it is finished", stacklevel=5)
        lock.acquire(poll_interval=0.2)
    try:
        with _claimed(path, what):
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def _claimed(path: Path, what: str) -> Iterator[None]:
    claim, told = _claim_of(path), False
    while not _take(claim):
        if not (owner := _of_another_machine(path)):
            claim.unlink(missing_ok=True)  # of a machine that is gone, or of a process of this one that has ended
            continue
        if not told:
            why = f"and its lock is not seen from {HOST}: locks do not cross machines on this file system"
            until = f"waiting until it is finished, or has not been heard of for {STALE:.0f} seconds"
            warnings.warn(f"{owner} is computing {what}, {why}; {until}", stacklevel=6)
        told = True
        time.sleep(0.2)
    over = threading.Event()
    beat = threading.Thread(target=_keep_touching, args=(claim, over), daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        with contextlib.suppress(OSError):
            claim.unlink(missing_ok=True)


def _claim_of(path: Path) -> Path:
    return path.with_suffix(".claim")


def _take(claim: Path) -> bool:
    """Create the claim, unless there is one: only one of several machines succeeds."""
    own = claim.with_name(f".{claim.name}-{HOST}-{os.getpid()}-{threading.get_ident()}")
    own.write_text(f"{HOST}\n{os.getpid()}\n")
    try:
        os.link(own, claim)  # with its content at once: an empty one would look like nobody's
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with claim.open("x") as file:
                file.write(own.read_text())
        except FileExistsError:
            return False
    finally:
        own.unlink(missing_ok=True)
    return True


def _of_another_machine(path: Path) -> str:
    """The machine that has a fresh claim, if it is another one than this; else ""."""
    claim = _claim_of(path)
    try:
        owner, touched = claim.read_text().partition("\n")[0], claim.stat().st_mtime
    except (OSError, ValueError):
        return ""
    fresh = owner != HOST and _now(path.parent) - touched < STALE
    return (owner or "a machine that has just begun") if fresh else ""


def _now(folder: Path) -> float:
    """The time by the clock that stamps files in this folder."""
    probe = folder / f".now-{HOST}-{os.getpid()}-{threading.get_ident()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _keep_touching(claim: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            claim.touch()
