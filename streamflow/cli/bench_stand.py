"""Where a measurement takes place: a fresh log, a worker process, a client in this process, and the clocks."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import streamflow as sf
from streamflow.cli.bench_app import APP_VARIABLE
from streamflow.cli.evidence import LINES_VARIABLE
from streamflow.cli.worker_process import WorkerProcess, Workers
from streamflow.errors import StreamflowError
from streamflow.logs.open import open_log

APP: Final = "streamflow.cli.bench_app:app"
BALLAST: Final = "0123456789" * 9
"""With the step's number and the JSON around it, about 100 bytes of input."""

MAX_PARALLEL_STEPS: Final = 1000

SECONDS_MAX: Final = 180.0
"""A repetition that takes longer hangs, and is ended."""

Figures = dict[str, float]
"""What one repetition measured, by name; names end in their unit."""


class WrongResult(StreamflowError):
    """A run returned something else than its code computes: what was measured is worth nothing."""


class NoResult(StreamflowError):
    """A repetition did not end: there is nothing to report but that."""


def check(found: object, expected: object, what: str) -> None:
    """Every result is checked."""
    if found != expected:
        raise WrongResult(f"{what}: expected {expected!r}, found {found!r}")


@dataclass
class Stand:
    """One fresh log with one worker on it. `scale` makes every count smaller (or larger)."""

    url: str
    app: str
    folder: Path
    scale: float
    workers: Workers
    profile: Path | None
    client: sf.Client
    worker: WorkerProcess

    @property
    def lines(self) -> Path:
        """Where the steps of `lines` write."""
        return self.folder / "lines.txt"

    def count(self, full: int) -> int:
        """`full`, scaled; at least 2, so that there always is something to measure."""
        return max(2, round(full * self.scale))

    async def run(self, workflow: str, *args: Any) -> Any:
        """Start a run and wait for its result."""
        handle = await self.client.start(workflow, *args)
        return await handle.result()

    def restart(self, *, state: str = "state", processes: int = 1) -> None:
        """Another worker on the same log; with another `state` it has to read all of it."""
        suffix = f"-again-{len(self.workers.all)}"
        self.worker = _start(self.workers, self.url, self.app, self.folder, self.profile, suffix, state, processes)

    def disk_bytes(self) -> int:
        """All files of the stand: the log, and the worker's state beside it."""
        return sum(each.stat().st_blocks * 512 for each in self.folder.rglob("*") if each.is_file())


@asynccontextmanager
async def stand(
    folder: Path, *, url: str | None, scale: float, workers: Workers, profile: Path | None
) -> AsyncIterator[Stand]:
    """A log, a worker that is ready, and a client; all of it gone behind the block, but for a log that `url` names."""
    app = "bench" if url is None else f"bench-{uuid4().hex[:12]}"
    place = url or f"sqlite:///{folder / 'bench.db'}"
    # Opened once before the worker is there: this creates the topics, so that the client need not wait for them.
    await (await open_log(place, app=app)).close()
    worker = _start(workers, place, app, folder, profile, "")
    made: Stand | None = None
    try:
        async with asyncio.timeout(SECONDS_MAX), asyncio.TaskGroup() as beside:
            watch = beside.create_task(workers.watch())
            async with sf.connect(place, app=app) as client:
                made = Stand(place, app, folder, scale, workers, profile, client, worker)
                # The first answer shows that the worker is ready, the others that its code is warm.
                for steps in range(20):
                    check(await made.run("sequential", steps, BALLAST), list(range(steps)), "warm-up")
                yield made
            watch.cancel()
            await made.worker.stop()
    except TimeoutError:
        last_words = made.worker.last_words() if made else worker.last_words()
        raise NoResult(f"not done after {SECONDS_MAX:.0f} s; the worker wrote:\n  {last_words}") from None
    finally:
        if place.startswith("kafka://"):
            await workers.stop()
            from streamflow.cli.bench_kafka import drop_topics

            await asyncio.to_thread(drop_topics, place, app)


def _start(
    workers: Workers,
    url: str,
    app: str,
    folder: Path,
    profile: Path | None,
    suffix: str,
    state: str = "state",
    processes: int = 1,
) -> WorkerProcess:
    return workers.start(
        APP,
        url,
        folder / f"worker{suffix}.log",
        "--state-dir",
        str(folder / state),
        "--max-parallel-steps",
        str(MAX_PARALLEL_STEPS),
        "--processes",
        str(1 if profile else processes),  # the profiler sees the process that it started, not those of a fleet
        variables={APP_VARIABLE: app, LINES_VARIABLE: str(folder / "lines.txt")},
        profile=None if profile is None else profile.with_name(f"{profile.stem}{suffix}{profile.suffix}"),
    )


class Window:
    """A measured stretch: the wall clock, and the processor time of the worker and of this process over it."""

    def __init__(self, at: Stand) -> None:
        self._stand = at
        self._worker = at.worker.cpu_seconds()
        self._client = time.process_time()
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the window opened."""
        return time.perf_counter() - self._began

    def close(self) -> Figures:
        """What was used. A worker that was started in between counts from its own beginning."""
        seconds = self.seconds
        worker = max(0.0, self._stand.worker.cpu_seconds() - self._worker)
        return {
            "seconds": seconds,
            "worker_cpu_seconds": worker,
            "worker_cpu_share": worker / seconds,
            "client_cpu_share": (time.process_time() - self._client) / seconds,
            "worker_memory_peak_bytes": float(self._stand.worker.memory_bytes_peak()),
        }


async def in_flight(limit: int, total: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Call `one` with 0, 1, … `total` - 1, up to `limit` at a time."""
    numbers = iter(range(total))

    async def lane() -> None:
        for number in numbers:
            await one(number)

    async with asyncio.TaskGroup() as lanes:
        for _ in range(min(limit, total)):
            lanes.create_task(lane())


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]
