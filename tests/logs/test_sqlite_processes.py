"""Several processes on one SQLite file: wake-ups, membership under SIGKILL and SIGSTOP, crashes in the middle."""

from __future__ import annotations

import os
import signal
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from streamflow.logs import sqlite_membership
from streamflow.logs.base import COMMANDS, HISTORY, Log, Outgoing
from streamflow.logs.sqlite_locks import LEASE_SECONDS
from streamflow.logs.sqlite_stuck import continue_stopped_writer, write_lock_holder
from tests.logs.support import Assigned, Child, Place, eventually, on_loop, sqlite_url


@asynccontextmanager
async def log_and_child(url: str, verb: str, argument: str) -> AsyncIterator[tuple[Log, Child]]:
    """A log that is open here, and a process that does `verb` with it; the block ends both."""
    place = Place(url)
    log = await place.open()
    child = await Child.start(verb, url, argument)
    try:
        yield log, child
    finally:
        await child.kill()
        await place.close()


@on_loop
async def test_a_commit_wakes_followers_in_other_processes(tmp_path: Path) -> None:
    async with log_and_child(sqlite_url(tmp_path / "log.db"), "follower", COMMANDS) as (log, child):
        await child.says("following 0")
        for number in range(100):
            await log.publish([Outgoing(COMMANDS, 0, b"k", b"%d" % time.monotonic_ns())])
            await child.line(number + 1)
    late_ms = statistics.median(int(line.split()[1]) for line in child.lines[1:]) / 1e6
    assert late_ms < 100, f"a wake-up, not the safety poll of 250 ms: {late_ms} ms from before the append"


@on_loop
async def test_a_killed_member_is_replaced_long_before_its_lease_ends(tmp_path: Path) -> None:
    async with log_and_child(sqlite_url(tmp_path / "log.db"), "member", "victim") as (log, child):
        await child.says("assigned 0 1 2 3")
        survivor = Assigned(await log.join("survivor"))
        await child.says("assigned 0 1")
        child.write("append 0")
        await child.says("appended 1")
        child.signal(signal.SIGKILL)
        killed = time.monotonic()
        await survivor.becomes(0, 1, 2, 3)
        assert time.monotonic() - killed < LEASE_SECONDS - 1.5, "its lock tells, not its lease, renewed every second"
        assert await log.append(0, 1, [(b"survivor", b"v")]) == 1
    assert not (tmp_path / "log.db.workers").exists(), "no lock file is left"


@on_loop
async def test_a_stopped_member_loses_its_partitions_after_its_lease_and_is_fenced(tmp_path: Path) -> None:
    async with log_and_child(sqlite_url(tmp_path / "log.db"), "member", "stuck") as (log, child):
        await child.says("assigned 0 1 2 3")
        child.write("append 0")
        await child.says("appended 1")
        survivor = Assigned(await log.join("survivor"))
        await survivor.becomes()
        await child.says("assigned 0 1")
        child.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        await survivor.becomes(0, 1, 2, 3)
        assert time.monotonic() - stopped > LEASE_SECONDS - 3, "its lease, renewed every second, lasts on"
        assert await log.append(0, 1, [(b"survivor", b"claim")]) == 1
        child.signal(signal.SIGCONT)
        child.write("append 0")
        await child.says("failed Fenced")
        await child.says("assigned")
        await survivor.becomes(0, 1)


@on_loop
async def test_a_blocked_event_loop_keeps_its_partitions(tmp_path: Path) -> None:
    async with log_and_child(sqlite_url(tmp_path / "log.db"), "member", "blocked") as (log, child):
        await child.says("assigned 0 1 2 3")
        survivor = Assigned(await log.join("survivor"))
        await child.says("assigned 0 1")
        child.write(f"block {LEASE_SECONDS + 1}")
        await child.says("blocked")
        assert survivor.seen == [frozenset()]
        child.write("append 0")
        await child.says("appended 1")


@on_loop
async def test_leaving_hands_over_to_another_process_without_waiting_for_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_membership, "CHECK_SECONDS", 3600.0)  # here only: the child looks as often as ever
    async with log_and_child(sqlite_url(tmp_path / "log.db"), "member", "other") as (log, child):
        await child.says("assigned 0 1 2 3")
        for _ in range(3):
            membership = await log.join("mine")
            mine = Assigned(membership)
            await mine.becomes()
            await child.says("assigned 0 1")  # it never releases the others, so this stays so, and we get nothing
            await membership.leave()
            await mine.ended()
        waiting = Assigned(await log.join("mine"))
        await waiting.becomes()
        child.write("leave")
        await child.says("left")
        await waiting.becomes(0, 1, 2, 3)


@on_loop
async def test_every_acknowledged_record_survives_a_kill_in_the_middle(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "log.db")
    child = await Child.start("appender", url, "victim")
    await eventually(lambda: len(child.lines) > 400)
    await child.kill()
    acknowledged = {(int(p), int(offset)) for _, p, offset in (line.split() for line in child.lines)}
    place = Place(url)
    log = await place.open()
    for partition in range(log.partitions):
        records = await log.read(HISTORY, partition, 0, limit=1_000_000)
        assert [record.offset for record in records] == list(range(await log.end_offset(HISTORY, partition)))
        assert [record.value for record in records] == [b"%d" % record.offset for record in records]
        assert {offset for p, offset in acknowledged if p == partition} <= {record.offset for record in records}
        assert await log.append(partition, len(records), [(b"next", b"v")]) == len(records)
    await place.close()
    db = sqlite3.connect(tmp_path / "log.db")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


@on_loop
async def test_many_processes_create_one_file_together(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "log.db")
    children = [await Child.start("opener", url) for _ in range(5)]
    assert [await child.end() for child in children] == [0] * 5
    assert len({line for child in children for line in child.lines}) == 1


@on_loop
async def test_two_processes_write_at_once_without_losing_or_repeating_an_offset(tmp_path: Path) -> None:
    async with log_and_child(sqlite_url(tmp_path / "log.db", synchronous="off"), "appender", "other") as (log, child):
        await eventually(lambda: len(child.lines) > 10)
        for number in range(200):
            await log.publish([Outgoing(COMMANDS, 0, b"k", b"%d" % number)])
        assert [record.value for record in await log.read(COMMANDS, 0, 0)] == [b"%d" % number for number in range(200)]


@on_loop
async def test_a_process_that_closes_the_log_does_not_take_it_from_one_that_opened_it_twice(tmp_path: Path) -> None:
    """Looking into the file other than through SQLite drops this process's locks; the other would think it is alone."""
    place = Place(sqlite_url(tmp_path / "log.db"))
    log = await place.open()
    await place.open()
    child = await Child.start("opener", place.url)
    assert await child.end() == 0
    assert await log.append(0, 0, [(b"k", b"v")]) == 0
    reader = await Child.start("follower", place.url, HISTORY)
    try:
        await reader.says("following 1")
    finally:
        await reader.kill()
        await place.close()


@on_loop
async def test_a_process_that_was_stopped_in_the_middle_of_a_write_does_not_stop_the_others_for_ever(
    tmp_path: Path,
) -> None:
    async with log_and_child(sqlite_url(tmp_path / "log.db"), "stuck", "other") as (log, child):
        await child.says("assigned 0 1 2 3")
        child.write("go")
        await child.says("writing")
        await log.join("mine")
        await child.says("written")
        await log.publish([Outgoing(COMMANDS, 0, b"k", b"v")])
        assert [record.value for record in await log.read(COMMANDS, 0, 0)] == [b"v"]


def test_the_holder_of_the_write_lock_is_found_among_the_locks(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    assert write_lock_holder(database) is None
    db = sqlite3.connect(database, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE t(x)")
        assert write_lock_holder(database) is None
        db.execute("BEGIN IMMEDIATE")
        assert write_lock_holder(database) == (os.getpid(), False)
        assert not continue_stopped_writer(database)
        db.execute("COMMIT")
        assert write_lock_holder(database) is None
    finally:
        db.close()
