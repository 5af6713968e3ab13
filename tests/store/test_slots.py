"""State directories: one process each, and the old one again after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamflow.errors import Unavailable
from streamflow.store import slots
from streamflow.store.slots import lease_slot

HOLD = """
import sys
from pathlib import Path
from streamflow.store.slots import lease_slot
slot = lease_slot(Path(sys.argv[1]))
print(slot.path.name, flush=True)
sys.stdin.read()
"""


def holder(root: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_slots_are_taken_in_order_and_given_back(tmp_path: Path) -> None:
    root = tmp_path / "new" / "state"
    first, second = lease_slot(root), lease_slot(root)
    assert (first.path, second.path) == (root / "slot-0", root / "slot-1")
    first.close()
    first.close()
    with lease_slot(root) as again:
        assert again.path == root / "slot-0"
    second.close()


def test_a_killed_worker_gets_its_slot_back(tmp_path: Path) -> None:
    killed, name = holder(tmp_path)
    other, other_name = holder(tmp_path)
    try:
        assert (name, other_name) == ("slot-0", "slot-1")
        (tmp_path / name / "kept").touch()
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        with lease_slot(tmp_path) as slot:
            assert slot.path.name == "slot-0"
            assert (slot.path / "kept").exists()
    finally:
        end(killed)
        end(other)


def test_a_forked_child_does_not_keep_the_slot(tmp_path: Path) -> None:
    """A step process may outlive its killed worker; the worker's successor must get the slot all the same."""
    slot = lease_slot(tmp_path)
    reader, writer = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        writer.send("forked")
        signal.pause()
    try:
        assert reader.recv() == "forked"
        with lease_slot(tmp_path) as next_slot:
            assert next_slot.path.name == "slot-1", "the parent still holds it"
        slot.close()
        with lease_slot(tmp_path) as same_slot:
            assert same_slot.path.name == "slot-0"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_root_that_cannot_be_used_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"no state directory below .*/file: Not a directory.*writable local"):
        lease_slot(tmp_path / "file")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_root_says_what_to_do(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(Unavailable, match=r"Permission denied.*writable local"):
        lease_slot(tmp_path)


def test_slots_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "SLOTS_MAX", 1)
    with lease_slot(tmp_path), pytest.raises(Unavailable, match="all 1 slots"):
        lease_slot(tmp_path)
