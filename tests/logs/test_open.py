"""URLs of logs: what they may say, and what is refused by name."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamflow.errors import InvalidUrl
from streamflow.logs import open_log
from streamflow.logs.open import parse
from tests.logs.support import ROOT, Place, on_loop


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("sqlite:///orders.db", "orders.db"),
        ("sqlite:///data/orders.db", "data/orders.db"),
        ("sqlite:////var/x.db", "/var/x.db"),
        ("sqlite:///a%20b%3Fc%23.db", "a b?c#.db"),
        ("memory://", ""),
        ("memory://name", "name"),
        ("memory:///name", "name"),
    ],
)
def test_paths_and_names(url: str, place: str) -> None:
    assert parse(url).place == place


def test_options() -> None:
    url = parse("sqlite:///x.db?synchronous=NORMAL&partitions=8&max_mib=100")
    assert (url.synchronous, url.partitions, url.max_mib) == ("normal", 8, 100)
    assert (parse("sqlite:///x.db").synchronous, parse("sqlite:///x.db", 6).partitions) == ("full", 6)
    assert parse("memory://x?partitions=6", 6).partitions == 6


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgres://x", "must start with sqlite://, memory:// or kafka://, found 'postgres://x'"),
        ("orders.db", "must start with"),
        ("sqlite:orders.db", "must start with"),
        ("sqlite://orders.db", "write sqlite:///orders.db (three slashes)"),
        ("sqlite://[a.db", "a bracket in a path is written %5B or %5D"),
        ("sqlite:///", "names no file"),
        ("sqlite:///data/", "names no file"),
        ("sqlite:///:memory:", "is memory://"),
        ("sqlite:///a#b.db", "write # in a path as %23"),
        ("sqlite:///x.db?sync=full", "unknown option 'sync': known are partitions, synchronous, max_mib"),
        ("memory://x?synchronous=full", "unknown option 'synchronous': known are partitions"),
        ("sqlite:///x.db?synchronous=on", "must be one of full, normal, off, found 'on'"),
        ("sqlite:///x.db?partitions=0", "partitions must be a whole number above 0, found '0'"),
        ("sqlite:///x.db?partitions=many", "found 'many'"),
        ("sqlite:///x.db?partitions=257", "partitions must be 1 to 256, found 257"),
        ("sqlite:///x.db?max_mib=", "max_mib must be a whole number above 0, found ''"),
    ],
)
def test_wrong_urls_are_refused_by_name(url: str, text: str) -> None:
    with pytest.raises(InvalidUrl) as caught:
        asyncio.run(open_log(url, app="shop"))
    assert text in str(caught.value)


def test_url_and_argument_must_agree() -> None:
    with pytest.raises(InvalidUrl, match="the URL says partitions=3, the caller 4"):
        parse("sqlite:///x.db?partitions=3", 4)


def test_app_names_are_checked() -> None:
    with pytest.raises(ValueError, match="app name must match"):
        asyncio.run(open_log("memory://", app="Shop!"))


@on_loop
async def test_memory_logs_last_until_their_last_handle_is_closed() -> None:
    place, other = Place("memory://test-lasting"), Place("memory://test-lasting")
    log = await place.open()
    await log.append(0, 0, [(b"k", b"v")])
    again = await other.open()
    await place.close()
    assert await again.end_offset("history", 0) == 1
    await other.close()
    new = await place.open()
    assert await new.end_offset("history", 0) == 0
    await place.close()


@on_loop
async def test_relative_paths_are_relative_to_the_current_directory(tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        place = Place("sqlite:///orders.db?partitions=2")
        assert (await place.open()).partitions == 2
        assert (tmp_path / "orders.db").exists()
        await place.close()
    finally:
        os.chdir(before)


def test_importing_the_port_loads_no_adapter() -> None:
    code = "import sys, streamflow.logs, streamflow.logs.base; print('sqlite3' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
