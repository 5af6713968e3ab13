"""`worker --processes N`: real processes that share the partitions, are replaced when they die, and end together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

import streamflow as sf
from streamflow.cli import worker_fleet
from streamflow.logs import open_log
from tests.cli import driver
from tests.cli.conftest import Shop
from tests.cli.driver import Process

STOPPED_WITHIN_SECONDS = 15.0
PARTITIONS = 6


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """A shop whose log nobody serves yet."""
    name = f"fleet-{uuid.uuid4().hex[:8]}"
    (tmp_path / "shop.py").write_text(driver.SHOP.replace('App("shop")', f'App("{name}")'))
    if request.param == "sqlite":
        yield Shop(tmp_path, {"STREAMFLOW_URL": f"sqlite:///{tmp_path}/shop.db?partitions=6", "STREAMFLOW_APP": name})
        return
    address = request.getfixturevalue("kafka")
    yield Shop(tmp_path, {"STREAMFLOW_URL": f"kafka://{address}?partitions=6", "STREAMFLOW_APP": name})
    admin = AdminClient({"bootstrap.servers": address})
    mine = [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith(f"{name}.")]
    for future in admin.delete_topics(mine).values():
        future.result(10)


@pytest.fixture
def fleet(place: Shop) -> Iterator[Callable[..., Process]]:
    """Starts parents; those that are left are killed, which ends their workers."""
    started: list[Process] = []

    def start(*options: str) -> Process:
        started.append(Process(place.folder, "worker", "shop:app", "--json", *options, env=place.env))
        return started[-1]

    yield start
    for process in started:
        process.close()


def pids(parent: Process, count: int) -> list[int]:
    """The workers that have said that they serve, once there are so many."""
    give_up_at = time.monotonic() + driver.DEADLINE_SECONDS
    while True:
        found = [json.loads(line) for line in parent.stdout if line.startswith("{")]
        serving = [int(each["pid"]) for each in found if "processes" not in each]
        if len(serving) >= count:
            return serving
        assert time.monotonic() < give_up_at, parent.said
        time.sleep(0.02)  # tidy: another process's output has no event


def is_there(pid: int) -> bool:
    """Whether it runs: a dead one that its parent has not yet asked for is gone, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until_gone(numbers: list[int]) -> None:
    give_up_at = time.monotonic() + STOPPED_WITHIN_SECONDS
    while any(map(is_there, numbers)):
        assert time.monotonic() < give_up_at, numbers
        time.sleep(0.02)  # tidy: the end of a process that is not our child has no event


def add_everywhere(place: Shop) -> None:
    """Runs in each partition complete, so each has an owner."""

    async def test() -> None:
        log = await open_log(place.env["STREAMFLOW_URL"], app=place.env["STREAMFLOW_APP"], create=False)
        await log.close()
        assert log.partitions == PARTITIONS
        async with sf.connect(place.env["STREAMFLOW_URL"], app=place.env["STREAMFLOW_APP"]) as client:
            handles = [await client.start("add", number, 1) for number in range(4 * PARTITIONS)]
            results = await asyncio.gather(*(handle.result(timeout=driver.DEADLINE_SECONDS) for handle in handles))
            assert results == [number + 1 for number in range(4 * PARTITIONS)]

    asyncio.run(test())


def test_a_killed_worker_is_replaced_and_sigterm_ends_all(place: Shop, fleet: Callable[..., Process]):
    parent = fleet("--processes", "2")
    assert json.loads(parent.wait_for("processes"))["processes"] == 2
    first = pids(parent, 2)
    add_everywhere(place)
    assert sorted(each.name for each in place.folder.glob("*/slot-*")) == ["slot-0", "slot-1"]
    os.kill(first[0], signal.SIGKILL)
    said = parent.wait_for("was ended by SIGKILL", stream="stderr")
    assert f"(pid {first[0]})" in said and "starting another in 0.5 s" in said
    (third,) = pids(parent, 3)[2:]
    assert third not in first
    add_everywhere(place)
    assert sorted(each.name for each in place.folder.glob("*/slot-*")) == ["slot-0", "slot-1"]
    asked_at = time.monotonic()
    parent.send(signal.SIGTERM)
    assert parent.wait() == 0, parent.said
    assert time.monotonic() - asked_at < STOPPED_WITHIN_SECONDS
    assert not any(map(is_there, [*first, third]))
    assert parent.stderr[-1] == "Stopped all." and parent.stderr.count("Stopped.") == 2


def test_workers_end_with_a_parent_that_is_killed(place: Shop, fleet: Callable[..., Process]):
    parent = fleet("--processes", "2")
    workers = pids(parent, 2)
    parent.send(signal.SIGKILL)
    until_gone(workers)
    assert not any(map(is_there, workers))


# --------------------------------------------------------------------------------------------- on a log that is at hand


@pytest.fixture
def launched(shop: Shop) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*options: str) -> Process:
        started.append(Process(shop.folder, "worker", *options, env=shop.env))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_a_worker_that_cannot_live_ends_all(shop: Shop, launched: Callable[..., Process]):
    (shop.folder / "dying.py").write_text(
        "import os\nfrom shop import app\nif os.getpid() != int(os.environ.setdefault('PARENT', str(os.getpid()))):\n"
        "    raise SystemExit('cannot live')\n"
    )
    parent = launched("dying:app", "--processes", "2")
    assert parent.wait() == 1, parent.said
    deaths = [line for line in parent.stderr if line.startswith("Worker process") and "exit code 1" in line]
    assert any("5 deaths within 60 s, stopping all" in line for line in deaths)
    assert [line.rpartition("in ")[2] for line in deaths if "process 1 " in line][:4] == ["0.5 s", "1 s", "2 s", "4 s"]


def test_what_is_wrong_with_the_log_is_said_once(shop: Shop):
    ran = driver.run(
        shop.folder, "worker", "shop:app", "--processes", "2", "--url", "sqlite:///no/such/folder/x.db", env=shop.env
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("Error: ") and ran.stderr.count("\n") == 1


def test_a_second_signal_ends_a_fleet_whose_worker_blocks(
    shop: Shop, launched: Callable[..., Process], launch: driver.Starter
):
    parent = launched("shop:app", "--processes", "2", "--json")
    workers = pids(parent, 2)
    launch("start", "stuck", "--wait")
    parent.wait_for("holding the event loop", stream="stderr")
    parent.send(signal.SIGINT)
    parent.wait_for("a second signal exits at once", stream="stderr")
    parent.send(signal.SIGTERM)
    assert parent.process.wait(driver.DEADLINE_SECONDS) == 128 + signal.SIGTERM
    until_gone(workers)


@pytest.mark.parametrize(("options", "said"), [(["--processes", "0"], "--processes"), (["--processes", "257"], "256")])
def test_a_wrong_number(shop: Shop, options: list[str], said: str):
    ran = driver.run(shop.folder, "worker", "shop:app", *options, env=shop.env)
    assert ran.returncode == 2 and said in ran.stderr


# --------------------------------------------------------------------------------------------------- without processes


def test_pauses_grow_and_deaths_are_forgotten():
    member = worker_fleet._Member(1, [], {})
    assert [member.died(0.0) for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, None]
    calm = worker_fleet._Member(1, [], {})
    assert [calm.died(30.0 * number) for number in range(8)] == [0.5, *[1.0] * 7]


@pytest.mark.parametrize(
    ("code", "said"), [(3, "ended with exit code 3"), (-9, "was ended by SIGKILL"), (-99, "was ended by signal 99")]
)
def test_how_it_ended_in_words(code: int, said: str):
    assert worker_fleet._reason(code) == said
