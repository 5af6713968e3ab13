"""Lock files: who lives, whoever looks, and whatever happens to the files."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamflow.errors import InvalidArguments
from streamflow.logs import sqlite_locks
from streamflow.logs.sqlite_locks import MemberFiles
from tests.logs.support import ROOT


@pytest.fixture
def members(tmp_path: Path) -> Iterator[tuple[MemberFiles, MemberFiles]]:
    one, two = (MemberFiles("sqlite:///x.db", tmp_path / "x.db.workers" / "shop", name) for name in ("one", "two"))
    one.enter()
    two.enter()
    yield one, two
    one.leave()
    two.leave()


def test_members_see_each_other_until_they_leave(members: tuple[MemberFiles, MemberFiles], tmp_path: Path) -> None:
    one, two = members
    assert one.alive() == two.alive() == {"one", "two"}
    two.leave()
    assert one.alive() == {"one"}
    one.leave()
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_dead_are_removed(members: tuple[MemberFiles, MemberFiles], tmp_path: Path) -> None:
    one, _ = members
    dead = tmp_path / "x.db.workers" / "shop" / "dead.lock"
    dead.write_text(f"{time.monotonic() + 100}")
    assert one.alive() == {"one", "two"}
    assert not dead.exists()


def test_who_holds_its_lock_but_lets_its_lease_run_out_is_not_alive(
    members: tuple[MemberFiles, MemberFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = members
    later = time.monotonic() + sqlite_locks.LEASE_SECONDS + 0.1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    one.renew()
    assert one.alive() == {"one"}
    assert two.alive() == {"one", "two"}, "whoever looks is alive"
    two.renew()
    assert one.alive() == {"one", "two"}


def test_a_name_is_taken_while_its_process_lives(
    members: tuple[MemberFiles, MemberFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_locks, "LOCK_PAUSE_SECONDS", 0.0)
    again = MemberFiles("sqlite:///x.db", tmp_path / "x.db.workers" / "shop", "one")
    with pytest.raises(
        InvalidArguments, match=r"sqlite:///x\.db: a worker named 'one' is running already: give this one"
    ):
        again.enter()
    again.leave()
    members[0].leave()
    again.enter()
    assert members[1].alive() == {"one", "two"}
    again.leave()


def test_a_removed_file_is_made_again_at_the_next_renewal(
    members: tuple[MemberFiles, MemberFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = members
    (tmp_path / "x.db.workers" / "shop" / "one.lock").unlink()
    assert two.alive() == {"two"}
    later = time.monotonic() + sqlite_locks.RENEW_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    one.renew()
    assert two.alive() == {"one", "two"}


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    # A worker dies while a step process that it forked lives on, until the end of its stdin.
    code = f"""
import os, sys
from pathlib import Path
from streamflow.logs.sqlite_locks import MemberFiles
MemberFiles("x", Path({str(tmp_path / "workers")!r}), "parent").enter()
if os.fork():
    os._exit(0)
print("forked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"forked\n"
        parent.wait()
        looker = MemberFiles("x", tmp_path / "workers", "looker")
        looker.enter()
        assert looker.alive() == {"looker"}
        looker.leave()
