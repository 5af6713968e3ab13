"""The writer thread: groups, disks that are full, locks that stay, loops that are gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamflow.errors import Fenced, Unavailable
from streamflow.logs import open_log, sqlite, sqlite_file, sqlite_writer
from streamflow.logs.base import COMMANDS, HISTORY, STATUS, TIMERS, Log, Outgoing
from tests.logs.support import ROOT, Place, eventually, on_loop, sqlite_url


@contextlib.contextmanager
def inspecting(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


def wal_commits(path: Path) -> int:
    """How many transactions the write-ahead log holds: frames that carry the size of the database end one."""
    wal = path.with_name(path.name + "-wal").read_bytes()
    page = int.from_bytes(wal[8:12], "big")
    frames = range(32, len(wal), 24 + page)
    return sum(wal[frame + 4 : frame + 8] != bytes(4) for frame in frames)


def telling(begun: threading.Event, function: Callable[..., None]) -> Callable[..., None]:
    """The function, which says that it has been called."""

    def tell(*args: object) -> None:
        begun.set()
        function(*args)

    return tell


@on_loop
async def test_what_waits_together_is_one_transaction_over_all_partitions_and_topics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.db"
    place = Place(sqlite_url(path))
    log = await place.open()
    with inspecting(path) as db:
        db.execute("BEGIN IMMEDIATE")  # all that follows queues up behind this
        writing = threading.Event()
        monkeypatch.setattr(log._writer, "_write", telling(writing, log._writer._write))  # type: ignore[attr-defined]
        blocked = log.append(0, 0, [(b"k", b"first")])
        assert await asyncio.to_thread(writing.wait, 30), "the thread has taken it, alone: nothing more was queued"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(blocked), 0.05)
        waiting: list[asyncio.Future[int]] = [
            log.append(partition, int(partition == 0), [(b"k", b"v")] * 10) for partition in range(4)
        ]
        published = [log.publish([Outgoing(topic, 2, b"k", b"v")], published=(2, 5)) for topic in (COMMANDS, STATUS)]
        before = wal_commits(path)
        db.execute("ROLLBACK")
        await asyncio.gather(blocked, *waiting, *published)
    assert wal_commits(path) - before == 2, "the one that was blocked, and everything behind it"
    await place.close()


@on_loop
async def test_groups_larger_than_a_statement_are_still_one_transaction(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    place = Place(sqlite_url(path))
    log = await place.open()
    before = wal_commits(path)
    await log.append(0, 0, [(b"k", b"%d" % number) for number in range(1_500)])
    assert wal_commits(path) - before == 1
    await place.close()


@on_loop
async def test_foreign_records_fence_only_their_partition_in_a_large_group(tmp_path: Path) -> None:
    place = Place(sqlite_url(tmp_path / "log.db"))
    log, other = await place.open(), await place.open()
    await other.append(3, 0, [(b"k", b"foreign")])
    many = [log.append(0, 400 * n, [(b"k", b"v")] * 400) for n in range(4)]
    lost = [log.append(3, 0, [(b"k", b"v")]), log.append(3, 1, [(b"k", b"v")])]
    assert await asyncio.gather(*many) == [0, 400, 800, 1200]
    assert [type(each) for each in await asyncio.gather(*lost, return_exceptions=True)] == [Fenced, Fenced]
    assert await log.end_offset(HISTORY, 0) == 1600 and await log.end_offset(HISTORY, 3) == 1
    await place.close()


@on_loop
async def test_offsets_are_not_used_again_after_records_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    place = Place(sqlite_url(path))
    log = await place.open()
    await log.append(0, 0, [(b"k", b"v")] * 5)
    await log.publish([Outgoing(TIMERS, 0, b"t", None)])
    with inspecting(path) as db:
        db.execute("DELETE FROM records")
        db.execute("DELETE FROM latest")
    assert await log.append(0, 5, [(b"k", b"v")]) == 5
    await log.publish([Outgoing(TIMERS, 0, b"t", b"v")])
    assert [record.offset for record in await log.read(TIMERS, 0, 0)] == [1]
    await place.close()


# ------------------------------------------------------------------------------------------------------- full disks


@on_loop
async def test_a_full_log_refuses_the_group_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    place = Place(sqlite_url(path, max_mib=1))
    log = await place.open()
    end, error = await fill(log, 100_000)
    assert "no room to write (SQLITE_FULL" in str(error) and "nothing of this was written; free disk" in str(error)
    assert 5 <= end <= 10
    appended = log.append(1, 0, [(b"k", b"x" * 900_000)])
    published = log.publish([Outgoing(STATUS, 1, b"k", b"x" * 900_000)])
    outcomes = await asyncio.gather(appended, published, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
    assert await log.end_offset(HISTORY, 0) == end
    assert await log.end_offset(HISTORY, 1) == await log.end_offset(STATUS, 1) == 0
    with inspecting(path) as db:
        db.execute("DELETE FROM records")
    assert await log.append(0, end, [(b"k", b"x" * 100_000)]) == end
    await place.close()


@on_loop
async def test_a_full_disk_refuses_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        place = Place(sqlite_url(disk / "log.db"))
        log = await place.open()
        member = await log.join("one")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1_500_000))
        end, error = await fill(log, 50_000)
        assert "SQLITE_FULL" in str(error) or "SQLITE_IOERR" in str(error)
        assert await anext(member.assignments()) == {0, 1, 2, 3}, "a full disk takes nobody's partitions"
        assert await log.end_offset(HISTORY, 0) == end
        ballast.unlink()
        assert await log.append(0, end, [(b"k", b"x" * 50_000)]) == end
        await place.close()
        again = Place(place.url)
        assert await (await again.open()).end_offset(HISTORY, 0) == end + 1
        await again.close()


async def fill(log: Log, size: int) -> tuple[int, Unavailable]:
    """Append records of this size until there is no room; the end of partition 0 then, and the error."""
    end = 0
    while True:
        try:
            end = await log.append(0, end, [(b"k", b"x" * size)]) + 1
        except Unavailable as error:
            return end, error


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where the tests may mount one."""
    disk = path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes the right to mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ------------------------------------------------------------------------------------------- locks, loops, threads


@on_loop
async def test_a_lock_that_stays_is_unavailable_and_reads_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.2)
    path = tmp_path / "log.db"
    place = Place(sqlite_url(path))
    log = await place.open()
    await log.append(0, 0, [(b"k", b"v")])
    with inspecting(path) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match=r"locked by another process for 0.2 s \(SQLITE_BUSY.*fuser"):
            await log.append(0, 1, [(b"k", b"v")])
        assert len(await log.read(HISTORY, 0, 0)) == 1
        db.execute("ROLLBACK")
    assert await log.append(0, 1, [(b"k", b"v")]) == 1
    await place.close()


def test_a_loop_that_is_gone_hurts_nobody(tmp_path: Path) -> None:
    # The loop ends with an append under way, a member joined and a follower waiting; nothing was closed.
    code = f"""
import asyncio
from streamflow.logs import open_log
async def main():
    log = await open_log({sqlite_url(tmp_path / "log.db")!r}, app="shop")
    await log.join("one")
    follower = asyncio.create_task(anext(log.follow("commands", 0, 0)))
    await asyncio.sleep(0)
    log.append(0, 0, [(b"k", b"v")])
    return log
log = asyncio.run(main())
import threading
for thread in threading.enumerate():
    if thread.name.startswith("streamflow-writer"):
        log._writer.stop()
        thread.join()
"""
    found = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    with inspecting(tmp_path / "log.db") as db:
        assert db.execute("SELECT count(*) FROM records").fetchone() == (1,)


@on_loop
async def test_a_cancelled_caller_does_not_stop_the_write(tmp_path: Path) -> None:
    place = Place(sqlite_url(tmp_path / "log.db"))
    log = await place.open()
    log.append(0, 0, [(b"k", b"v")]).cancel()
    assert await log.append(0, 1, [(b"k", b"v")]) == 1
    await place.close()


@on_loop
async def test_a_cancelled_open_leaves_no_thread(tmp_path: Path) -> None:
    opening = asyncio.create_task(open_log(sqlite_url(tmp_path / "log.db"), app="shop"))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    place = Place(sqlite_url(tmp_path / "log.db"))
    assert await (await place.open()).append(0, 0, [(b"k", b"v")]) == 0
    await place.close()


@on_loop
async def test_too_much_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "PENDING_BYTES_MAX", 1_000)
    place = Place(sqlite_url(tmp_path / "log.db"))
    log = await place.open()
    first = log.append(0, 0, [(b"k", b"x" * 2_000)])
    with pytest.raises(Unavailable, match="2,001 bytes wait to be written, at most 1,000 may: await"):
        await log.append(0, 1, [(b"k", b"v")])
    assert await first == 0
    assert await log.append(0, 1, [(b"k", b"v")]) == 1
    await place.close()


# ------------------------------------------------------------------------------------------------------ maintenance


@on_loop
async def test_the_write_ahead_log_is_folded_back_without_an_idle_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_writer, "CHECKPOINT_BYTES_MAX", 500_000)
    path = tmp_path / "log.db"
    place = Place(sqlite_url(path, synchronous="off"))
    log = await place.open()
    for number in range(100):
        await log.append(0, number, [(b"k", b"x" * 50_000)])
    assert path.with_name("log.db-wal").stat().st_size < 2_000_000 < path.stat().st_size
    await place.close()


@on_loop
async def test_an_idle_writer_folds_the_write_ahead_log_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_writer, "CHECKPOINT_IDLE_BYTES", 100_000)
    path = tmp_path / "log.db"
    place = Place(sqlite_url(path))
    log = await place.open()
    await log.append(0, 0, [(b"k", b"x" * 900_000)])
    await eventually(lambda: path.stat().st_size > 900_000)
    await place.close()


@on_loop
async def test_old_tombstones_go_and_new_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.db"
    place = Place(sqlite_url(path))
    log = await place.open()
    await log.publish([Outgoing(TIMERS, 0, b"%d" % n, None if n else b"live") for n in range(3)])
    with inspecting(path) as db:
        db.execute("UPDATE latest SET dead_at = ? WHERE key = CAST('1' AS BLOB)", (int(time.time()) - 86_401,))
    await place.close()
    monkeypatch.setattr(sqlite_writer, "SWEEP_SECONDS", 0.01)
    again = Place(place.url)
    log = await again.open()
    with inspecting(path) as db:
        await eventually(lambda: db.execute("SELECT count(*) FROM latest").fetchone() == (2,))
    assert [record.key for record in await log.read(TIMERS, 0, 0)] == [b"0", b"2"]
    assert await log.end_offset(TIMERS, 0) == 3
    await again.close()


@on_loop
async def test_what_is_published_keeps_its_order_around_checkpoints(tmp_path: Path) -> None:
    """Small groups are committed by the loop, large ones by the thread: never one beside the other."""
    place = Place(sqlite_url(tmp_path / "log.db"))
    log = await place.open()
    published = []
    for number in range(60):
        large = [Outgoing(STATUS, 0, b"large", bytes(60_000))] * (1 + number % 3)
        small = [Outgoing(STATUS, 0, b"k%d" % (number % 7), b"%d" % number)]
        published += [log.publish(large), log.publish(small)]
        if number % 5 == 0:
            await asyncio.gather(*published)
    await asyncio.gather(*published)
    newest = {record.key: record.value for record in await log.read(STATUS, 0, 0)}
    assert {key: value for key, value in newest.items() if key != b"large"} == {
        b"k%d" % key: b"%d" % max(number for number in range(60) if number % 7 == key) for key in range(7)
    }
    await place.close()
