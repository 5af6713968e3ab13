"""Wake-ups between processes: private directory, stale sockets, nothing lost when they cannot be had."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamflow.logs import sqlite
from streamflow.logs.base import COMMANDS, Outgoing, Record
from streamflow.logs.sqlite_wakeups import Wakeups
from tests.logs.support import Place, eventually, on_loop, sqlite_url, take


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Short, since a socket's path may have some 100 bytes only; ours, so that tests do not meet other processes.
    path = Path(tempfile.mkdtemp(prefix="sf"))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    shutil.rmtree(path)


def sockets_of(temporary: Path) -> Path:
    """The directory of the one file's sockets."""
    (found,) = temporary.glob("streamflow-*/*")
    return found


@pytest.fixture
def pair(temporary: Path) -> Iterator[tuple[Wakeups, Wakeups]]:
    identity = uuid.uuid4().hex
    one, two = Wakeups(identity), Wakeups(identity)
    yield one, two
    one.close()
    two.close()


def test_only_those_who_want_it_are_woken(pair: tuple[Wakeups, Wakeups]) -> None:
    ringer, listener = pair
    listener.want("7")
    listener.want("9")
    ringer.want("7")
    ringer.ring(["8"])
    assert listener.drain() == set()
    ringer.ring(["7", "8"])
    ringer.ring(["9"])
    assert listener.drain() == {"7", "9"}
    assert ringer.drain() == set(), "nobody wakes itself"
    listener.unwant("7")
    ringer.ring(["7"])
    assert listener.drain() == set()


def test_interests_that_come_and_go_quickly_are_seen(pair: tuple[Wakeups, Wakeups]) -> None:
    ringer, listener = pair
    for number in range(200):
        listener.want(str(number))
        ringer.ring([str(number)])
        assert listener.drain() == {str(number)}, "a cached listing of the directory must not hide a new link"
        listener.unwant(str(number))


def test_an_overflowing_queue_means_everything_rang(pair: tuple[Wakeups, Wakeups]) -> None:
    ringer, listener = pair
    listener.want("1")
    for _ in range(3_000):
        ringer.ring(["1"])
    assert listener.drain() is None


def test_what_dead_processes_leave_is_removed(pair: tuple[Wakeups, Wakeups], temporary: Path) -> None:
    ringer, dead = pair
    dead.want("1")
    bound = dead.listen()
    assert isinstance(bound, socket.socket)
    bound.close()  # as the kernel does
    directory = sockets_of(temporary)
    assert len(list(directory.iterdir())) == 2
    ringer.ring(["1"])
    assert list(directory.iterdir()) == []


def test_closing_removes_everything(temporary: Path) -> None:
    wakeups = Wakeups(uuid.uuid4().hex)
    wakeups.want("1")
    wakeups.close()
    wakeups.close()
    assert [path.name for path in temporary.glob("*/*")] == []


def test_the_directory_is_private(temporary: Path) -> None:
    Wakeups("0" * 32).close()
    (directory,) = temporary.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o777)
    assert not Wakeups("0" * 32).available, "another user may have put something there"
    directory.chmod(0o700)
    if os.getuid() == 0:
        os.chown(directory, 65534, -1)
        assert not Wakeups("0" * 32).available


def test_a_path_too_long_for_a_socket_means_no_wakeups(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = temporary / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    wakeups = Wakeups("0" * 32)
    assert not wakeups.available and wakeups.listen() is None
    wakeups.want("1")
    wakeups.ring(["1"])
    wakeups.restore()
    assert wakeups.drain() == set()


@pytest.mark.parametrize("without", ["AF_UNIX", "wake-ups of others"])
@on_loop
async def test_followers_get_everything_without_wakeups(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    place = Place(sqlite_url(tmp_path / "log.db"))
    if without == "AF_UNIX":
        monkeypatch.delattr(socket, "AF_UNIX")
    log, other = await place.open(), await place.open()
    if without == "wake-ups of others":
        monkeypatch.setattr(log._wakeups, "ring", lambda interests: None)  # type: ignore[attr-defined]
    batches = other.follow(COMMANDS, 0, 0)
    for number in range(3):
        waiting = asyncio.ensure_future(anext(batches))
        await log.publish([Outgoing(COMMANDS, 0, b"k", b"%d" % number)])
        assert await waiting == [Record(number, b"k", b"%d" % number)]
    await batches.aclose()  # type: ignore[attr-defined]
    await place.close()


@on_loop
async def test_sockets_that_a_cleaner_removed_come_back(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "SAFETY_POLL_SECONDS", 0.02)
    place = Place(sqlite_url(tmp_path / "log.db"))
    log, other = await place.open(), await place.open()
    follower = asyncio.create_task(take(other.follow(COMMANDS, 0, 0), 2))
    await eventually(lambda: len(list(temporary.glob("*/*/*"))) == 2)
    directory = sockets_of(temporary)
    for each in directory.iterdir():
        each.unlink()
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"found by the poll")])
    await eventually(lambda: len(list(directory.iterdir())) == 2)
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"v")])
    assert len(await follower) == 2
    await place.close()
