"""Each adapter of the log, for the tests that all must pass. A new one is one more `make_…`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final

import pytest

from streamflow.sim.cluster import Weather
from tests.logs.support import KafkaPlace, Place, SimPlace, sqlite_url

_numbers = itertools.count()


def make_memory(path: Path) -> Place:
    return Place(f"memory://contract-{next(_numbers)}")


def make_sqlite(path: Path) -> Place:
    return Place(sqlite_url(path / "log.db"))


def make_sim(path: Path) -> Place:
    return SimPlace(1, Weather(partial=0.0))


MILD: Final = Weather(delay=0.01, spike=0.1, spike_seconds=0.5, partial=0.5, slow=0.1)
"""A cluster far away, on a busy network: late answers, and reads that give a part, but no failure."""


@pytest.fixture(
    params=["memory", "sqlite", "sim", "sim-1", "sim-2", "sim-3", pytest.param("kafka", marks=pytest.mark.kafka)]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A log of each kind; `sim-<seed>` is in mild weather."""
    match request.param.split("-"):
        case ["memory"]:
            return make_memory(tmp_path)
        case ["sqlite"]:
            return make_sqlite(tmp_path)
        case ["sim"]:
            return make_sim(tmp_path)
        case ["sim", seed]:
            return SimPlace(int(seed), MILD)
        case _:
            return KafkaPlace(request.getfixturevalue("kafka"))
