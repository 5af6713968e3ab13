"""What every store promises, run against each adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow.store.base import Store
from streamflow.store.memory import MemoryStore, prefix_end
from streamflow.store.rocks import open_rocks


def make_memory(path: Path) -> Store:
    return MemoryStore()


def make_rocks(path: Path) -> Store:
    return open_rocks(path / "store", identity="log-a", log_start=0, log_end=1 << 40)


@pytest.fixture(params=[make_memory, make_rocks], ids=["memory", "rocks"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    make: Callable[[Path], Store] = request.param
    opened = make(tmp_path)
    yield opened
    opened.close()


def test_new_store_is_empty_at_offset_zero(store: Store) -> None:
    assert store.applied_offset == 0
    assert store.wiped is None
    assert list(store.scan(b"")) == []
    assert list(store.scan(b"", reverse=True)) == []
    assert store.get(b"a") is None


def test_write_puts_deletes_and_moves_the_offset(store: Store) -> None:
    store.write({b"a": b"1", b"b": b"2"}, applied_offset=1)
    store.write({b"a": b"3", b"c": b""}, [b"b", b"never-there"], applied_offset=7)
    assert store.applied_offset == 7
    assert (store.get(b"a"), store.get(b"b"), store.get(b"c")) == (b"3", None, b"")
    assert list(store.scan(b"")) == [(b"a", b"3"), (b"c", b"")]


def test_a_key_that_is_put_and_deleted_in_one_batch_is_gone(store: Store) -> None:
    store.write({b"a": b"1"}, [b"a"], applied_offset=1)
    assert store.get(b"a") is None


def test_the_offset_may_stand_but_never_goes_back(store: Store) -> None:
    store.write({}, applied_offset=5)
    store.write({b"a": b"1"}, applied_offset=5)
    with pytest.raises(AssertionError):
        store.write({b"a": b"2"}, applied_offset=4)
    assert store.get(b"a") == b"1"
    assert store.applied_offset == 5


@pytest.mark.parametrize("key", [b"", b"\0", b"\0x"])
def test_the_keys_of_the_store_itself_are_refused(store: Store, key: bytes) -> None:
    with pytest.raises(AssertionError):
        store.write({key: b"1"}, applied_offset=1)
    with pytest.raises(AssertionError):
        store.write({}, [key], applied_offset=1)
    assert store.applied_offset == 0


def test_scan_limits_and_starts(store: Store) -> None:
    store.write({b"a%d" % n: b"%d" % n for n in range(5)} | {b"b": b"", b"A": b""}, applied_offset=1)

    def keys(start: bytes | None = None, *, reverse: bool = False, limit: int | None = None) -> list[bytes]:
        return [key for key, _ in store.scan(b"a", start=start, reverse=reverse, limit=limit)]

    assert keys() == [b"a0", b"a1", b"a2", b"a3", b"a4"]
    assert keys(reverse=True) == [b"a4", b"a3", b"a2", b"a1", b"a0"]
    assert keys(b"a3") == [b"a3", b"a4"]
    assert keys(b"a3", reverse=True, limit=2) == [b"a3", b"a2"]
    assert keys(b"a2x", limit=1) == [b"a3"]
    assert keys(b"a2x", reverse=True, limit=1) == [b"a2"]
    assert keys(b"A", limit=1) == [b"a0"]
    assert keys(b"z") == []
    assert keys(b"z", reverse=True, limit=1) == [b"a4"]
    assert keys(b"A", reverse=True) == []
    assert keys(limit=0) == []


def test_scan_shows_the_store_as_it_was_when_asked(store: Store) -> None:
    store.write({b"a": b"1", b"b": b"1"}, applied_offset=1)
    forward, backward = store.scan(b""), store.scan(b"", reverse=True)
    store.write({b"c": b"2", b"b": b"2"}, [b"a"], applied_offset=2)
    assert list(forward) == [(b"a", b"1"), (b"b", b"1")]
    assert list(backward) == [(b"b", b"1"), (b"a", b"1")]


def test_close_with_a_scan_under_way_and_twice(store: Store) -> None:
    store.write({b"a": b"1", b"b": b"1"}, applied_offset=1)
    rows = store.scan(b"")
    next(rows)
    store.flush()
    store.close()
    store.close()
    with pytest.raises(AssertionError):
        store.write({}, applied_offset=2)
    with pytest.raises(AssertionError):
        store.get(b"a")


def test_many_keys_in_one_batch_stay_in_order(store: Store) -> None:
    store.write({b"%05d" % (n * 7919 % 10_000): b"" for n in range(0, 10_000, 2)}, applied_offset=1)
    store.write({b"%05d" % (n * 7919 % 10_000): b"" for n in range(1, 10_000, 2)}, applied_offset=2)
    assert [key for key, _ in store.scan(b"")] == [b"%05d" % n for n in range(10_000)]


short = st.binary(min_size=1, max_size=3).map(lambda b: bytes(x % 3 + (253 if x > 127 else 1) for x in b))
batches = st.lists(st.tuples(st.dictionaries(short, st.binary(max_size=2), max_size=5), st.lists(short, max_size=3)))


@settings(max_examples=60)
@given(batches, st.tuples(short | st.just(b""), short | st.none(), st.booleans(), st.none() | st.integers(0, 4)))
def test_adapters_agree_with_a_plain_dict(
    tmp_path_factory: pytest.TempPathFactory,
    writes: list[tuple[dict[bytes, bytes], list[bytes]]],
    scan: tuple[bytes, bytes | None, bool, int | None],
) -> None:
    prefix, start, reverse, limit = scan
    model: dict[bytes, bytes] = {}
    stores = [MemoryStore(), make_rocks(tmp_path_factory.mktemp("agree"))]
    for offset, (puts, deletes) in enumerate(writes, 1):
        model.update(puts)
        for key in deletes:
            model.pop(key, None)
        for each in stores:
            each.write(puts, deletes, applied_offset=offset)
    expected = sorted((pair for pair in model.items() if pair[0].startswith(prefix)), reverse=reverse)
    if start is not None:
        expected = [pair for pair in expected if (pair[0] <= start if reverse else pair[0] >= start)]
    for each in stores:
        assert list(each.scan(prefix, start=start, reverse=reverse, limit=limit)) == expected[:limit]
        assert {key: each.get(key) for key in model} == model
        each.close()


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"", None), (b"\xff\xff", None), (b"a", b"b"), (b"a\xff", b"b"), (b"\0", b"\1")]
)
def test_prefix_end(prefix: bytes, end: bytes | None) -> None:
    assert prefix_end(prefix) == end
