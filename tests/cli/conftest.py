"""A shop of our own, with one worker process that most tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli import driver
from tests.cli.driver import Process, Starter


class Shop(NamedTuple):
    """A folder with shop.py, and the settings that name its log and app."""

    folder: Path
    env: dict[str, str]


def make_shop(folder: Path) -> Shop:
    (folder / "shop.py").write_text(driver.SHOP)
    return Shop(folder, {"STREAMFLOW_URL": f"sqlite:///{folder}/shop.db", "STREAMFLOW_APP": "shop"})


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """A shop that nobody serves yet."""
    return make_shop(tmp_path)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop with a worker."""
    made = make_shop(tmp_path_factory.mktemp("shop"))
    worker = Process(made.folder, "worker", "shop:app", env=made.env)
    try:
        worker.wait_for("Serving app shop", stream="stderr")
        yield made
    finally:
        worker.close()


@pytest.fixture
def launch(shop: Shop) -> Iterator[Starter]:
    """Starts commands in the folder of `shop`, and ends those that are left."""
    started: list[Process] = []

    def start(*args: str) -> Process:
        started.append(Process(shop.folder, *args, env=shop.env))
        return started[-1]

    yield start
    for process in started:
        process.close()
