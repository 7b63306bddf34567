"""Locks of one machine, and claims that reach where locks do not."""

import os
import threading
import time
import warnings
from pathlib import Path

import filelock
import pytest

from fx import locks


@pytest.fixture
def lock(tmp_path) -> Path:
    (tmp_path / "locks").mkdir()
    return tmp_path / "locks/step.lock"


def claim_of_another(lock: Path, age: float = 0.0) -> Path:
    """A claim that another machine has touched `age` seconds ago, by the clock of the file system."""
    claim = lock.with_suffix(".claim")
    claim.write_text("elsewhere\n17\n")
    now = claim.stat().st_mtime
    os.utime(claim, (now - age, now - age))
    return claim


def test_while_it_is_held_a_claim_names_the_holder_and_then_it_is_gone(lock):
    claim = lock.with_suffix(".claim")
    with locks.alone(lock, "a step"):
        assert claim.read_text().splitlines() == [locks.HOST, str(os.getpid())]
        assert locks.is_held(lock)
    assert not claim.exists()
    assert not locks.is_held(lock)
    with pytest.raises(KeyError), locks.alone(lock, "a step"):
        raise KeyError
    assert not claim.exists()


def test_a_claim_is_touched_as_long_as_it_is_held(lock, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with locks.alone(lock, "a step"):
        claim = lock.with_suffix(".claim")
        os.utime(claim, (0, 0))
        deadline = time.monotonic() + 30
        while claim.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_machine_that_the_lock_does_not_reach_is_waited_for_and_named(lock):
    claim = claim_of_another(lock, age=locks.STALE / 2)
    assert locks.is_held(lock)
    threading.Timer(0.3, claim.unlink).start()
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as told, locks.alone(lock, "a step"):
        assert time.monotonic() - began > 0.25
        assert lock.with_suffix(".claim").read_text().startswith(locks.HOST)
    assert [str(one.message).partition(":")[0] for one in told] == [
        f"elsewhere is computing a step, and its lock is not seen from {locks.HOST}"
    ]


def test_a_machine_that_is_gone_is_not_waited_for(lock):
    claim_of_another(lock, age=locks.STALE + 1)
    assert not locks.is_held(lock)
    with warnings.catch_warnings(), locks.alone(lock, "a step"):
        warnings.simplefilter("error")
        assert lock.with_suffix(".claim").read_text().startswith(locks.HOST)


def test_one_that_goes_while_it_is_waited_for_is_given_up(lock, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 1.0)
    claim_of_another(lock, age=0.5)
    with pytest.warns(UserWarning, match="elsewhere"), locks.alone(lock, "a step"):
        pass


@pytest.mark.parametrize("skew", [-3600, 3600])
def test_clocks_that_differ_do_no_harm(lock, monkeypatch, skew):
    """The file system's clock is an hour off this machine's: files are stamped by it, claims are judged by it."""
    monkeypatch.setattr(locks, "_now", lambda folder, now=locks._now: now(folder) + skew)
    claim = claim_of_another(lock)
    os.utime(claim, (claim.stat().st_mtime + skew,) * 2)
    assert locks.is_held(lock)
    os.utime(claim, (claim.stat().st_mtime - locks.STALE - 1,) * 2)
    assert not locks.is_held(lock)


def test_what_a_killed_process_of_this_machine_left_is_taken_over_at_once(lock):
    lock.with_suffix(".claim").write_text(f"{locks.HOST}\n{os.getpid()}\n")
    with warnings.catch_warnings(), locks.alone(lock, "a step"):
        warnings.simplefilter("error")
        assert locks.is_held(lock)


def test_a_damaged_claim_is_nobodys(lock):
    lock.with_suffix(".claim").write_bytes(b"\xff\xfe")
    assert not locks.is_held(lock)
    with locks.alone(lock, "a step"):
        assert lock.with_suffix(".claim").read_text().startswith(locks.HOST)


def test_a_claim_that_is_just_being_made_is_somebodys(lock):
    lock.with_suffix(".claim").touch()
    assert locks.is_held(lock)
    old = claim_of_another(lock, age=2 * locks.STALE)
    old.write_text("")
    os.utime(old, (1, 1))
    assert not locks.is_held(lock)


def test_without_links_a_claim_is_made_all_the_same(lock, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError("no links here")))
    with locks.alone(lock, "a step"):
        assert lock.with_suffix(".claim").read_text().startswith(f"{locks.HOST}\n{os.getpid()}\n")
        assert not locks._take(lock.with_suffix(".claim"))
    assert sorted(path.name for path in lock.parent.iterdir()) in ([], [lock.name])


def test_of_two_machines_that_claim_at_once_one_gets_it(lock):
    claim, got = lock.with_suffix(".claim"), []
    start = threading.Barrier(8)

    def claim_it() -> None:
        start.wait()
        got.append(locks._take(claim))

    threads = [threading.Thread(target=claim_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def test_another_process_of_this_machine_is_waited_for_by_its_lock(lock):
    held = filelock.FileLock(lock, thread_local=False)
    thread = threading.Thread(target=held.acquire)
    thread.start()
    thread.join()
    threading.Timer(0.3, held.release).start()
    with pytest.warns(UserWarning, match="another process or thread is computing a step"), locks.alone(lock, "a step"):
        pass
