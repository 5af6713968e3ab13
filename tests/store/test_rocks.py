"""The RocksDB store over kills, power loss, foreign and damaged directories.

The writer is `python test_rocks.py PATH`: it writes `batch(n)` at offset n for ever. So the right contents at any
offset can be computed here.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from streamflow.errors import Unavailable
from streamflow.store import directory as store_directory
from streamflow.store import rocks_options
from streamflow.store.base import Store
from streamflow.store.rocks import RUNG_EVERY_BYTES, open_rocks


def batch(n: int) -> tuple[dict[bytes, bytes], list[bytes]]:
    puts = {b"summary%04d" % (n * 7919 % 499): b"%d:" % n + b"x" * 500, b"turn%08d" % n: b"y" * 300}
    return puts, [b"turn%08d" % (n - 50)]


def fold(end: int) -> list[tuple[bytes, bytes]]:
    state: dict[bytes, bytes] = {}
    for n in range(end):
        puts, deletes = batch(n)
        state.update(puts)
        for key in deletes:
            state.pop(key, None)
    return sorted(state.items())


def write(store: Store, batches: int) -> None:
    for n in range(store.applied_offset, store.applied_offset + batches):
        puts, deletes = batch(n)
        store.write(puts, deletes, applied_offset=n + 1)


def open_store(path: Path, identity: str = "log-a", log_start: int = 0, log_end: int = 1 << 40) -> Store:
    return open_rocks(path, identity=identity, log_start=log_start, log_end=log_end)


@pytest.fixture(autouse=True)
def _small_memtables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushes and compactions come with kilobytes of writes, not megabytes."""
    monkeypatch.setattr(rocks_options, "WRITE_BUFFER_BYTES", 128 << 10)


def start_writer(*args: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, __file__, *args], stdout=subprocess.PIPE, env=environment)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("killed") / "store"
    process = start_writer(str(path), "2000")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return path


@pytest.fixture
def filled(killed: Path, tmp_path: Path) -> tuple[Path, int]:
    """A store as a kill leaves it, with several sorted files and a full write-ahead log, and its applied offset."""
    shutil.copytree(killed, tmp_path / "store")
    return tmp_path / "store", 2000


def kill_after(path: Path, seconds: float) -> None:
    process = start_writer(str(path))
    assert process.stdout is not None
    process.stdout.readline()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.communicate()


def test_kill_leaves_the_exact_fold_again_and_again(tmp_path: Path) -> None:
    chance, path, last = random.Random(4711), tmp_path / "store", 0
    for _ in range(6):
        kill_after(path, chance.uniform(0.0, 0.3))
        store = open_store(path)
        assert store.wiped is None
        assert store.applied_offset >= last
        last = store.applied_offset
        assert list(store.scan(b"")) == fold(last)
        store.close()
    assert last > 0


def test_kill_loses_no_write_that_returned(filled: tuple[Path, int]) -> None:
    path, offset = filled
    store = open_store(path)
    assert store.applied_offset == offset
    assert list(store.scan(b"")) == fold(offset)
    store.close()


def test_power_loss_goes_back_to_the_sorted_files(filled: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another boot: the write-ahead log is not believed, however good it looks, and data and offset still agree."""
    path, offset = filled
    boot = path.parent / "boot_id"
    boot.write_text("another boot\n")
    monkeypatch.setattr(store_directory, "BOOT_ID", boot)
    store = open_store(path)
    assert store.wiped is None
    assert 0 < store.applied_offset < offset
    assert list(store.scan(b"")) == fold(store.applied_offset)
    write(store, 100)
    store.flush()
    store.close()
    boot.write_text("one more\n")
    store = open_store(path)
    assert list(store.scan(b"")) == fold(store.applied_offset)
    store.close()


def test_flush_survives_power_loss_without_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "store")
    write(store, 10)
    store.flush()
    write(store, 5)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    store.close()
    (tmp_path / "boot_id").write_text("another boot")
    monkeypatch.setattr(store_directory, "BOOT_ID", tmp_path / "boot_id")
    copy = open_store(tmp_path / "copy")
    assert copy.applied_offset == 10
    assert list(copy.scan(b"")) == fold(10)
    copy.close()


def test_reopening_keeps_everything(tmp_path: Path) -> None:
    for opened in range(3):
        store = open_store(tmp_path / "store")
        assert (store.wiped, store.applied_offset) == (None, opened * 300)
        write(store, 300)
        store.close()
    store = open_store(tmp_path / "store", log_start=900, log_end=900)
    assert store.wiped is None
    assert list(store.scan(b"")) == fold(900)
    store.close()


@pytest.mark.parametrize(
    ("identity", "log_start", "log_end", "reason"),
    [
        ("log-b", 0, 1000, "it belongs to log log-a, not to log-b"),
        ("log-a", 0, 9, "its applied offset 10 is past the log's end 9"),
        ("log-a", 11, 1000, "its applied offset 10 is before the log's start 11"),
    ],
)
def test_store_that_does_not_fit_the_log_is_wiped(
    tmp_path: Path, identity: str, log_start: int, log_end: int, reason: str
) -> None:
    store = open_store(tmp_path / "store")
    write(store, 10)
    store.close()
    store = open_store(tmp_path / "store", identity, log_start, log_end)
    assert (store.wiped, store.applied_offset, list(store.scan(b""))) == (reason, 0, [])
    write(store, 5)
    store.close()
    store = open_store(tmp_path / "store", identity)
    assert (store.wiped, store.applied_offset) == (None, 5)
    store.close()


def test_new_store_of_a_trimmed_log_is_not_called_wiped(tmp_path: Path) -> None:
    for _ in range(2):
        store = open_store(tmp_path / "store", log_start=500, log_end=600)
        assert (store.wiped, store.applied_offset) == (None, 0)
        store.close()


@pytest.mark.parametrize("version", [0, 2])
def test_other_format_is_wiped(tmp_path: Path, version: int) -> None:
    store = open_store(tmp_path / "store")
    write(store, 10)
    store.close()
    marker = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps(marker | {"format": version}))
    store = open_store(tmp_path / "store")
    assert store.wiped == f"it has store format {version}, this program writes 1"
    assert store.applied_offset == 0
    store.close()


@pytest.mark.parametrize("marker", [None, "", "{}", "[]", "\0\0", '{"format": 1, "identity": "log-a", "x": 1}'])
def test_missing_or_unreadable_marker_is_wiped(tmp_path: Path, marker: str | None) -> None:
    store = open_store(tmp_path / "store")
    write(store, 10)
    store.close()
    (tmp_path / "store" / "store.json").unlink()
    if marker is not None:
        (tmp_path / "store" / "store.json").write_text(marker)
    store = open_store(tmp_path / "store")
    assert store.wiped is not None
    assert store.wiped.startswith("store.json cannot be read")
    assert store.applied_offset == 0
    store.close()


def test_file_in_the_way_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("?")
    store = open_store(tmp_path / "store")
    assert store.wiped == "a regular file was in the way"
    store.close()


def test_wiping_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    path = tmp_path / "store"
    open_store(path).close()
    (path / "notes").touch()
    (path / "db" / "link").symlink_to(tmp_path / "elsewhere")
    store = open_store(path, "log-b")
    assert store.wiped
    store.close()
    shutil.rmtree(path / "db")
    (path / "db").symlink_to(tmp_path / "elsewhere")
    store = open_store(path, "log-c")
    assert store.wiped
    store.close()
    assert (tmp_path / "elsewhere" / "precious").exists()
    assert (path / "notes").exists()


def test_locked_store_is_unavailable_and_untouched(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    write(store, 10)
    for identity in ("log-a", "log-b"):
        with pytest.raises(Unavailable, match=f"{tmp_path}/store is open in another process"):
            open_store(tmp_path / "store", identity)
    write(store, 10)
    store.close()
    store = open_store(tmp_path / "store")
    assert list(store.scan(b"")) == fold(20)
    store.close()


def test_store_below_a_file_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"Not a directory.*make the directory writable"):
        open_store(tmp_path / "file" / "store")


def damage(file: Path, how: str, chance: random.Random) -> None:
    before = file.read_bytes()
    at = chance.randrange(len(before))
    after = {
        "truncate": before[:at],
        "empty": b"",
        "zero": before[:at] + bytes(len(before) - at),
        "garble": before[:at] + chance.randbytes(20) + before[at + 20 :],
        "flip": before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :],
    }[how]
    file.write_bytes(after)


def read_all(path: Path) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Offset and contents; opened once more when damage is found in use, which must then wipe."""
    for _ in range(2):
        store = open_store(path)
        try:
            return store.applied_offset, list(store.scan(b""))
        except Unavailable:
            continue
        finally:
            with suppress(Unavailable):
                store.close()
    raise AssertionError("damaged again after it was opened again")


@pytest.mark.parametrize("how", ["truncate", "empty", "zero", "garble", "flip"])
@pytest.mark.parametrize("what", ["MANIFEST-*", "CURRENT", "*.sst", "*.log", "OPTIONS-*", "IDENTITY", "rocksdict*"])
def test_damage_never_gives_wrong_contents(filled: tuple[Path, int], what: str, how: str) -> None:
    path, offset = filled
    chance = random.Random(f"{what} {how}")
    for turn in range(8 if what == "MANIFEST-*" else 3):
        copy = path.parent / f"copy-{turn}"
        shutil.copytree(path, copy)
        # A sorted file that was only just begun when it was copied has nothing to damage.
        full = [file for file in sorted((copy / "db").glob(what)) if file.stat().st_size]
        damage(chance.choice(full), how, chance)
        found, contents = read_all(copy)
        assert found <= offset
        assert contents == fold(found)


def test_manifest_cut_anywhere_never_leaves_a_hole(tmp_path: Path) -> None:
    """RocksDB itself accepts some of these, forgets sorted files, and replays the newer log on top."""
    store, path = open_store(tmp_path / "store"), tmp_path / "killed"
    for _ in range(3):  # too few files for a compaction
        write(store, 20)
        store.flush()
    write(store, 20)
    shutil.copytree(tmp_path / "store", path)
    store.close()
    manifest = next((path / "db").glob("MANIFEST-*"))
    reasons = set()
    for size in range(0, manifest.stat().st_size, 23):
        copy = path.parent / f"copy-{size}"
        shutil.copytree(path, copy)
        with (copy / "db" / manifest.name).open("r+b") as file:
            file.truncate(size)
        store = open_store(copy)
        reasons.add((store.wiped or "")[:26])
        assert list(store.scan(b"")) == fold(store.applied_offset)
        store.close()
    assert "a part in the middle is mi" in reasons, "the case that this test is for did not happen"


@pytest.mark.parametrize("what", ["CURRENT", "*.sst", "MANIFEST-*"])
def test_missing_files_are_wiped(filled: tuple[Path, int], what: str) -> None:
    path, _ = filled
    for file in (path / "db").glob(what):
        file.unlink()
    store = open_store(path)
    assert store.wiped
    assert store.applied_offset == 0
    store.close()


def test_damage_found_in_use_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = open_store(path)
    store.write({b"k%d" % n: random.Random(n).randbytes(500) for n in range(100)}, applied_offset=1)
    store.close()
    table = next((path / "db").glob("*.sst"))
    content = bytearray(table.read_bytes())
    content[10_000:40_000] = bytes(30_000)
    table.write_bytes(content)
    store = open_store(path)
    assert store.wiped is None, "the damaged block is not read by opening"
    with pytest.raises(Unavailable, match=r"is damaged: Corruption.*rebuilt from the log"):
        list(store.scan(b""))
    with suppress(Unavailable):
        store.close()
    store = open_store(path)
    assert store.wiped is not None
    assert store.wiped.startswith("damage was found while it was in use: Corruption")
    store.close()


def test_rungs_come_with_bytes_and_not_with_batches(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    for n in range(10_000):
        store.write({b"k": b"v" * 40}, applied_offset=n + 1)
    store.close()
    store = open_store(tmp_path / "store")
    assert (store.wiped, store.applied_offset) == (None, 10_000)
    assert vars(store)["_rung"] <= 10_000 * 200 // RUNG_EVERY_BYTES + 1
    store.close()


def run_writer(path: Path, batches: int | None) -> None:
    """Write until killed, or kill ourselves after `batches`."""
    rocks_options.WRITE_BUFFER_BYTES = 128 << 10  # type: ignore[misc]
    store = open_store(path)
    print("open", flush=True)
    for done in count():
        if done == batches:
            os.kill(os.getpid(), signal.SIGKILL)
        write(store, 1)


if __name__ == "__main__":
    run_writer(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
