"""Each adapter of the log, for the tests that all must pass. A new one is one more `make_…`."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.logs.support import KafkaPlace, Place, sqlite_url

_numbers = itertools.count()


def make_memory(path: Path) -> Place:
    return Place(f"memory://contract-{next(_numbers)}")


def make_sqlite(path: Path) -> Place:
    return Place(sqlite_url(path / "log.db"))


@pytest.fixture(params=["memory", "sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    match request.param:
        case "memory":
            return make_memory(tmp_path)
        case "sqlite":
            return make_sqlite(tmp_path)
        case _:
            return KafkaPlace(request.getfixturevalue("kafka"))
