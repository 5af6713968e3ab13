"""Shared by the tests of the log: running a test on its own event loop, waiting for facts, places for logs."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from confluent_kafka.admin import AdminClient

from streamflow.logs import open_log
from streamflow.logs.base import Log, Membership, Outgoing, Record
from streamflow.sim.cluster import Cluster, Weather
from streamflow.sim.log import open_sim
from streamflow.sim.world import World

TEST_SECONDS: Final = 60
"""A test that hangs fails after this, wherever it runs."""
STEPS_MAX: Final = 1_000_000
"""What a simulated test may take."""

ROOT: Final = Path(__file__).parents[2]


class Place:
    """Where a test keeps a log: opens handles to it and closes them all at the end."""

    refuses_without_trace = True
    """Whether an append that is fenced leaves nothing in the log."""
    knows_names = True
    """Whether the log refuses a second member of one name."""
    reads_whole = True
    """Whether a read gives all that is there, up to its limit; one from afar may give a part."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.opened: list[Log] = []

    def app(self, name: str) -> str:
        """What the test's app is called on this log."""
        return name

    async def open(self, app: str = "shop", *, create: bool = True, partitions: int | None = None) -> Log:
        log = await open_log(self.url, app=app, create=create, partitions=partitions)
        self.opened.append(log)
        return log

    async def failing(self, app: str = "shop") -> tuple[Log, list[Outgoing]] | None:
        """A handle of one partition, and records that it fails to publish; None where nothing can fail."""
        if not self.url.startswith("sqlite:"):
            return None
        self.url += "&max_mib=1" if "?" in self.url else "?max_mib=1"
        return await self.open(app, partitions=1), [Outgoing("status", 0, b"k%d" % n, b"x" * 900_000) for n in range(3)]

    async def read(self, log: Log, topic: str, partition: int, offset: int, *, limit: int = 1000) -> list[Record]:
        """All records from the offset on, up to the limit: in one read, if this log can do that."""
        found = await log.read(topic, partition, offset, limit=limit)
        while not self.reads_whole and found and len(found) < limit:
            if not (more := await log.read(topic, partition, found[-1].offset + 1, limit=limit - len(found))):
                break
            found += more
        assert len(found) <= limit
        return found

    async def close(self) -> None:
        for log in reversed(self.opened):
            await log.close()

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        """Run the test on an event loop where this log lives."""
        asyncio.run(test)


class SimPlace(Place):
    """Apps of one simulated cluster, on virtual time; the test and all handles are in one process."""

    refuses_without_trace = False
    knows_names = False

    def __init__(self, seed: int, weather: Weather) -> None:
        super().__init__("sim://")
        self.world = World(seed)
        self._process = self.world.process("test")
        self._apps: dict[str, Cluster] = {}
        self._weather = weather
        self.reads_whole = not weather.partial

    async def open(self, app: str = "shop", *, create: bool = True, partitions: int | None = None) -> Log:
        log = await open_sim(self._apps, self._process, app=app, create=create, partitions=partitions)
        self._apps[app].weather = self._weather
        self.world.leap_to = lambda: None  # there are records on the timers that are none
        self.opened.append(log)
        return log

    async def failing(self, app: str = "shop") -> tuple[Log, list[Outgoing]] | None:
        log = await self.open(app, partitions=1)
        self._apps[app].leaderless.add(("status", 0))
        return log, [Outgoing("status", 0, b"k", b"v")]

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        task = self._process.run(test)
        try:
            self.world.run(task.done, seconds=2 * TEST_SECONDS, steps=STEPS_MAX)
            task.result()
            assert self._process.loop.failures == []
        finally:
            self.world.close()


class KafkaPlace(Place):
    """Apps of its own on a broker that all tests share; they are deleted at the end."""

    refuses_without_trace = False
    knows_names = False

    def __init__(self, bootstrap: str) -> None:
        super().__init__(f"kafka://{bootstrap}")
        self._suffix = uuid.uuid4().hex[:8]
        self._apps: set[str] = set()

    def app(self, name: str) -> str:
        return f"{name}-{self._suffix}"

    async def open(self, app: str = "shop", *, create: bool = True, partitions: int | None = None) -> Log:
        if create and app not in self._apps:
            partitions = partitions or 4
            self._apps.add(app)
        return await super().open(self.app(app), create=create, partitions=partitions)

    async def failing(self, app: str = "shop") -> tuple[Log, list[Outgoing]] | None:
        await self.open(app, partitions=1)
        return await self.open(app, create=False), [Outgoing("steps.missing", 0, b"k", b"v")]

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self._delete)

    def _delete(self) -> None:
        admin = AdminClient({"bootstrap.servers": self.url.partition("://")[2]})
        mine = [topic for topic in admin.list_topics(timeout=10).topics if f"-{self._suffix}." in topic]
        for future in (admin.delete_topics(mine) if mine else {}).values():
            future.result()


def on_loop(test: Callable[..., Awaitable[None]], seconds: float = TEST_SECONDS) -> Callable[..., None]:
    """Run an async test on an event loop of its own; the `Place`s among its fixtures are closed on that loop."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        async def main() -> None:
            try:
                async with asyncio.timeout(seconds):
                    await test(**fixtures)
            finally:
                for fixture in fixtures.values():
                    if isinstance(fixture, Place):
                        await fixture.close()

        place = next((fixture for fixture in fixtures.values() if isinstance(fixture, Place)), None)
        asyncio.run(main()) if place is None else place.run(main())

    return run


async def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `condition` holds; fail after `seconds` of the event loop's time."""
    now = asyncio.get_running_loop().time
    deadline = now() + seconds
    while not condition():
        assert now() < deadline, f"not within {seconds} s: {condition}"
        await asyncio.sleep(0.002)  # tidy: the poll of a fact that another process makes true


class Assigned:
    """Reads a membership's assignments; `now` is the newest set."""

    def __init__(self, membership: Membership) -> None:
        self.now: frozenset[int] | None = None
        self.seen: list[frozenset[int]] = []
        self._task = asyncio.get_running_loop().create_task(self._read(membership))

    async def _read(self, membership: Membership) -> None:
        async for partitions in membership.assignments():
            self.now = partitions
            self.seen.append(partitions)

    async def becomes(self, *partitions: int) -> None:
        await eventually(lambda: self.now == frozenset(partitions))

    async def has(self, count: int) -> None:
        await eventually(lambda: self.now is not None and len(self.now) == count)

    async def ended(self) -> None:
        await self._task


class Child:
    """A process that runs a verb of tests/logs/child.py and talks in lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.reading = asyncio.get_running_loop().create_task(self._read())

    @staticmethod
    async def start(verb: str, url: str, argument: str = "", **environment: str) -> Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.logs.child", verb, url, argument,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT, env={**os.environ, **environment},
        )  # fmt: skip
        return Child(process)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            if line.endswith(b"\n"):  # else it was cut off by the death of its writer
                self.lines.append(line.decode().strip())

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def says(self, line: str, *, after: int = 0) -> None:
        """Wait until the child has printed `line`, as its `after`th or later."""
        await eventually(lambda: line in self.lines[after:])

    async def line(self, number: int) -> str:
        await eventually(lambda: len(self.lines) > number or self.reading.done())
        return self.lines[number]

    async def end(self) -> int:
        """Close its stdin, wait for its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = await self.process.wait()
        await self.reading
        return code

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.end()


async def take(batches: AsyncIterator[list[Record]], count: int) -> list[Record]:
    """The next `count` records of a follow, which is closed then."""
    records: list[Record] = []
    async for batch in batches:
        assert batch, "follow never gives an empty batch"
        records += batch
        if len(records) >= count:
            break
    await batches.aclose()  # type: ignore[attr-defined]
    return records


def sqlite_url(path: Path, **options: object) -> str:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"sqlite:///{path}" + (f"?{query}" if query else "")
