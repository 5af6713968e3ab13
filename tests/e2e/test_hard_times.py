"""The machine misbehaves: no room on the disk, no right to write, a clock that is set back, steps that never return."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

import streamflow as sf
from streamflow.client import Client
from streamflow.codec.avro import decode_history
from streamflow.core.events import Turn
from streamflow.logs.base import HISTORY
from streamflow.logs.open import open_log
from streamflow.worker import Worker
from streamflow.worker.clock import Clock
from streamflow.worker.host import ProcessHost

app = sf.App("hard-times", retry=sf.Retry.never)
NEVER = asyncio.Event


@app.step
async def swallow(text: str) -> str:
    return text


@app.step(timeout=0.2)
async def never_returns() -> None:
    await NEVER().wait()


@app.step(timeout=0.2)
async def refuses_to_end() -> None:
    for _ in range(2):  # its timeout's cancellation; the second one is that of the end of the test
        with suppress(asyncio.CancelledError):
            await NEVER().wait()


@app.step(timeout=0.2)
def never_returns_in_a_thread() -> None:
    time.sleep(30)  # a daemon thread: nobody waits for it


@app.workflow
async def fill(text: str) -> int:
    return len(await swallow(text))


@app.workflow
async def survives(step: str) -> str:
    steps = {"async": never_returns, "stubborn": refuses_to_end, "thread": never_returns_in_a_thread}
    try:
        await steps[step]()
    except sf.StepFailed as failed:
        return failed.error.type
    return "returned"


@app.workflow
async def naps(times: int) -> list[datetime]:
    woken = [sf.now()]
    for _ in range(times):
        await asyncio.sleep(0.2)
        woken.append(sf.now())
    return woken


async def fill_up(client: sf.Client) -> list[sf.Handle[int]]:
    """Start runs until the log has no room; the handles of those that were accepted.

    Either the client finds no room for its command, or the worker none for the turn: then no answer comes.
    """
    accepted: list[sf.Handle[int]] = []
    for index in range(1000):
        starting = asyncio.ensure_future(client.start(fill, "x" * 20_000, id=f"fill-{index}"))
        done, _ = await asyncio.wait((starting,), timeout=15)
        if not done:
            starting.cancel()
            return accepted
        if isinstance(error := starting.exception(), sf.Unavailable):
            assert "no room" in str(error)
            return accepted
        accepted.append(await starting)
    raise AssertionError("it never was full")


def test_a_full_disk_acknowledges_nothing_and_all_goes_on_when_there_is_room(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"sqlite:///{tmp_path}/log.db"
        async with app.serve(f"{url}?max_mib=2") as client:
            accepted = await fill_up(client)
        assert accepted
        async with app.serve(url) as client:
            for handle in accepted:
                assert await client.handle(handle.id).result(timeout=60) == 20_000
            assert await (await client.start(fill, "more")).result(timeout=60) == 4

    asyncio.run(main())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root; max_mib covers the same errors without")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_the_same_process_goes_on_when_a_really_full_disk_has_room_again(small_disk: Path, tmp_path: Path) -> None:
    async def main() -> None:
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(2_000_000))
        async with app.serve(f"sqlite:///{small_disk}/log.db", state_dir=tmp_path / "state") as client:
            accepted = await fill_up(client)
            ballast.unlink()
            for handle in accepted:
                assert await handle.result(timeout=60) == 20_000
            assert await (await client.start(fill, "more")).result(timeout=60) == 4

    asyncio.run(main())


def test_a_directory_that_cannot_be_written_is_said_to_be_so(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(sf.Unavailable, match=r"does not exist: create it \(mkdir -p"):
            async with app.serve(f"sqlite:///{tmp_path}/missing/log.db"):
                raise AssertionError("it must not open")
        with pytest.raises(sf.Unavailable, match="/proc"):
            async with app.serve("sqlite:////proc/log.db"):  # read-only for root, too
                raise AssertionError("it must not open")

    asyncio.run(main())


@pytest.mark.parametrize("step", ["async", "stubborn", "thread"])
def test_a_step_that_never_returns_fails_by_its_timeout_and_holds_nothing_up(tmp_path: Path, step: str) -> None:
    async def main() -> None:
        async with app.serve(f"sqlite:///{tmp_path}/log.db") as client:
            assert await (await client.start(survives, step)).result(timeout=20) == "TimeoutError"
            assert await (await client.start(fill, "next")).result(timeout=20) == 4

    asyncio.run(main())


class WallClock:
    """A wall clock that can be set."""

    def __init__(self) -> None:
        self.offset_ns = 0

    def __call__(self) -> int:
        return time.time_ns() + self.offset_ns


@asynccontextmanager
async def serving(url: str, wall: WallClock) -> AsyncIterator[sf.Client]:
    log = await open_log(url, app=app.name)
    host = ProcessHost(log.state_dir)
    host.clock = Clock(wall=wall)
    worker = Worker(app, log, host=host)
    try:
        await worker.start()
        async with Client(log, app) as client:
            yield client
    finally:
        await worker.stop()
        await log.close()


def test_a_clock_that_is_set_back_delays_no_timer_and_makes_no_time_run_backwards(tmp_path: Path) -> None:
    hour_ns = 3600 * 10**9

    async def main() -> None:
        url = f"sqlite:///{tmp_path}/log.db"
        wall = WallClock()
        async with serving(url, wall) as client:
            handle = await client.start(naps, 5, id="napper")
            async for status in handle.watch():
                if status.turn >= 3:
                    break
            wall.offset_ns = -hour_ns
            woken = await handle.result(timeout=20)
            assert all((late - early).total_seconds() >= 0.2 for early, late in pairwise(woken))
            assert (woken[-1] - woken[0]).total_seconds() < 60
        # A worker whose clock is an hour behind from the start: the log's newest instant counts.
        async with serving(url, wall) as client:
            again = await (await client.start(naps, 1)).result(timeout=20)
            assert again[0] >= woken[-1]
        log = await open_log(url, app=app.name)
        for partition in range(log.partitions):
            records = [decode_history(record.value or b"") for record in await log.read(HISTORY, partition, 0)]
            instants = [record.at for record in records if isinstance(record, Turn)]
            assert instants == sorted(instants)
        await log.close()

    asyncio.run(main())
