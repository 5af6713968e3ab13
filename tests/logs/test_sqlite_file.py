"""What a SQLite log says of files that it cannot use, and that it never touches those that are not ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from streamflow.errors import CorruptLog, InvalidArguments, StreamflowError, Unavailable
from streamflow.logs.base import HISTORY
from tests.logs.support import Child, Place, on_loop, sqlite_url


async def refusal(path: Path) -> StreamflowError:
    """The error with which opening `path` fails, having changed no byte in its directory."""
    before = (
        {each: each.read_bytes() for each in path.parent.iterdir() if each.is_file()} if path.parent.is_dir() else {}
    )
    place = Place(sqlite_url(path))
    with pytest.raises(StreamflowError) as caught:
        await place.open()
    assert str(path) in str(caught.value)
    if path.parent.is_dir():
        # An empty -wal or -shm beside a foreign WAL file is SQLite's way of reading it; the file itself must stay.
        after = {each: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
        assert {each: text for each, text in after.items() if each in before} == before
    return caught.value


async def make_log(path: Path, records: int = 0) -> None:
    place = Place(sqlite_url(path))
    log = await place.open()
    for number in range(records):
        await log.append(0, number, [(b"k", b"x" * 1_000)])
    await place.close()


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


@on_loop
async def test_a_file_that_is_not_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 100)
    error = await refusal(path)
    assert isinstance(error, CorruptLog)
    assert "is not a SQLite file (it starts with b'dear diary, dear')" in str(error)
    assert str(error).endswith("name another file")


@pytest.mark.parametrize("mode", ["delete", "wal"])
@on_loop
async def test_another_programs_sqlite_file(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "photos.db"
    change(path, f"PRAGMA journal_mode={mode}", "CREATE TABLE photos(name)", "INSERT INTO photos VALUES ('beach')")
    error = await refusal(path)
    assert isinstance(error, CorruptLog)
    assert "is another program's SQLite file" in str(error)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM photos").fetchall() == [("beach",)]
        assert db.execute("PRAGMA journal_mode").fetchone() == (mode,)


@on_loop
async def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    await make_log(path, records=50)
    whole = path.stat().st_size
    os.truncate(path, whole // 2)
    error = await refusal(path)
    assert isinstance(error, CorruptLog)
    assert f"is truncated: {whole:,} bytes expected, {whole // 2:,} found" in str(error)
    os.truncate(path, 60)
    assert "is truncated" in str(await refusal(path))


@on_loop
async def test_a_file_of_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    await make_log(path)
    change(path, "PRAGMA user_version=7")
    error = await refusal(path)
    assert isinstance(error, InvalidArguments)
    assert "has schema version 7, this streamflow knows 2: upgrade streamflow" in str(error)


@on_loop
async def test_a_file_of_an_older_version(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    await make_log(path)
    change(path, "PRAGMA user_version=1")
    error = await refusal(path)
    assert isinstance(error, InvalidArguments)
    assert "has schema version 1, this streamflow needs 2: let its runs end under the version that wrote it" in str(
        error
    )


@on_loop
async def test_what_a_crash_left_below_the_start_is_seen_by_nobody_and_swept_by_the_next_trim(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    await make_log(path, records=50)
    change(path, "UPDATE streams SET first = 40 WHERE next = 50")
    place = Place(sqlite_url(path))
    log = await place.open()
    assert [record.offset for record in await log.read(HISTORY, 0, 0)] == list(range(40, 50))
    await log.trim(HISTORY, 0, 0)
    await place.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM records").fetchone() == (10,)


@on_loop
async def test_an_errand_that_fails_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    await make_log(path)
    change(path, "DROP TABLE marks")
    place = Place(sqlite_url(path))
    log = await place.open()
    asked = asyncio.ensure_future(log.offset_at(HISTORY, 0, 1))
    await asyncio.sleep(0)
    assert await log.append(0, 0, [(b"k", b"v")]) == 0
    with pytest.raises(CorruptLog, match="no such table: marks"):
        await asked
    assert await log.append(0, 1, [(b"k", b"v")]) == 1
    await place.close()


@on_loop
async def test_damage_found_while_reading_is_corrupt_and_stays_visible(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    await make_log(path, records=200)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(b"\xee" * 40_000)
    place = Place(sqlite_url(path))
    log = await place.open()
    with pytest.raises(CorruptLog, match=r"damaged \(SQLITE_CORRUPT.*: stop its workers and restore"):
        await log.read(HISTORY, 0, 0, limit=1_000)
    await place.close()


@on_loop
async def test_damage_found_while_writing_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    await make_log(path)
    place = Place(sqlite_url(path))
    log = await place.open()
    change(path, "DROP TABLE records")
    with pytest.raises(CorruptLog, match="damaged"):
        await log.append(0, 0, [(b"k", b"v")])
    await place.close()


@on_loop
async def test_an_empty_file_and_an_empty_database_become_logs(tmp_path: Path) -> None:
    empty, cut_short = tmp_path / "empty.db", tmp_path / "cut-short.db"
    empty.touch()
    change(cut_short, "PRAGMA journal_mode=wal")
    for path in (empty, cut_short):
        await make_log(path, records=1)
        assert path.read_bytes()[68:72] == b"sflw"


@on_loop
async def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    error = await refusal(tmp_path / "missing" / "log.db")
    assert isinstance(error, Unavailable)
    assert str(error).endswith(f"create it (mkdir -p {tmp_path / 'missing'})")


@on_loop
async def test_a_directory_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "log.db").mkdir()
    error = await refusal(tmp_path / "log.db")
    assert isinstance(error, InvalidArguments)
    assert "is a directory" in str(error)


def read_only_directory(path: Path) -> None:
    path.chmod(0o777)
    path.parent.chmod(0o555)


def read_only_file(path: Path) -> None:
    path.chmod(0o444)
    path.parent.chmod(0o777)


@pytest.mark.parametrize("protect", [read_only_directory, read_only_file])
@on_loop
async def test_places_that_may_not_be_written(protect: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as directory:  # not tmp_path: nobody else may enter that
        os.chmod(directory, 0o755)
        path = Path(directory) / "sub" / "log.db"
        path.parent.mkdir()
        await make_log(path)
        protect(path)
        # Rights do not bind root, so another user tries.
        child = await Child.start("opener", sqlite_url(path), TEST_UID="65534" if os.getuid() == 0 else "")
        assert await child.end() == 0
        path.parent.chmod(0o755)
    what = "directory" if protect is read_only_directory else "file"
    assert child.lines[0].startswith("refused Unavailable")
    assert f"{what} " in child.lines[0] and "is not writable for this user: change its rights" in child.lines[0]


@on_loop
async def test_two_apps_and_their_identities_live_in_one_file(tmp_path: Path) -> None:
    place = Place(sqlite_url(tmp_path / "log.db"))
    shop, billing = await place.open("shop"), await place.open("billing")
    identities = shop.identity, billing.identity
    assert identities[0].split("/")[0] == identities[1].split("/")[0]
    await place.close()
    again = Place(place.url)
    assert ((await again.open("shop")).identity, (await again.open("billing")).identity) == identities
    await again.close()
    (tmp_path / "log.db").unlink()
    other = Place(place.url)
    assert (await other.open("shop")).identity != identities[0]
    await other.close()
