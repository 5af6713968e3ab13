"""The six workloads. Each takes a stand, runs once, checks every result, and gives its figures."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from streamflow.cli.bench_machine import cores
from streamflow.cli.bench_stand import BALLAST, Figures, Stand, Window, WrongResult, check, in_flight, quantile
from streamflow.cli.evidence import History, examine, read_history, read_lines
from streamflow.core.events import RunCompleted
from streamflow.logs.open import open_log

IN_FLIGHT_MAX: Final = 200
STARTS_IN_FLIGHT_MAX: Final = 500
"""Starts under way while runs are only parked: enough that the worker and not the round trip is measured."""

PARKED_SECONDS: Final = 3600.0
RESTORED: Final = "restored_records_per_second"
RESTORED_LINE: Final = re.compile(r"^(\S+ \S+) INFO .* restored (\d+) records in ([\d.]+) s$", re.MULTILINE)
"""What a worker writes when a restore that is worth a line has ended: when, how many records, how long it took."""
RESTORED_MIN: Final = 50_000
"""Records without which the rate says more about how partitions are handed out than about the restore."""

STARTS_PER_SECOND: Final = 400
"""How fast the runs that wait for a common moment are started at the least; the moment is set by it."""
STARTS_LEAD_SECONDS: Final = 5.0
"""What is added to that, lest one slow second of a busy machine (a start is many fsyncs) spoil the measurement."""


async def latency(stand: Stand) -> Figures:
    """One run at a time, from start to result."""
    warm_up, runs, steps = stand.count(20), stand.count(200), 10
    taken: list[float] = []
    window = Window(stand)
    for number in range(warm_up + runs):
        if number == warm_up:
            window = Window(stand)
        began = time.perf_counter()
        found = await stand.run("sequential", steps, BALLAST)
        taken.append((time.perf_counter() - began) * 1000)
        check(found, list(range(steps)), f"run {number}")
    measured = taken[warm_up:]
    return {
        "start_to_result_p50_ms": quantile(measured, 0.5),
        "start_to_result_p99_ms": quantile(measured, 0.99),
        "start_to_result_max_ms": max(measured),
        **window.close(),
    }


async def throughput(stand: Stand) -> Figures:
    """Many runs of few sequential steps, a limited number of them at a time."""
    runs, steps = stand.count(2000), 5

    async def one(number: int) -> None:
        check(await stand.run("sequential", steps, BALLAST), list(range(steps)), f"run {number}")

    window = Window(stand)
    await in_flight(IN_FLIGHT_MAX, runs, one)
    used = window.close()
    return {
        "steps_per_second": runs * steps / used["seconds"],
        "worker_cpu_us_per_step": used["worker_cpu_seconds"] * 1e6 / (runs * steps),
        **used,
    }


async def fan_out(stand: Stand) -> Figures:
    """Some runs at once, each with many steps side by side."""
    runs, steps = stand.count(50), 100

    async def one(number: int) -> None:
        check(await stand.run("parallel", steps, BALLAST), list(range(steps)), f"run {number}")

    window = Window(stand)
    await in_flight(runs, runs, one)
    used = window.close()
    return {"steps_per_second": runs * steps / used["seconds"], **used}


async def parked(stand: Stand) -> Figures:
    """Many runs go to sleep for long; the clock stops when the last sleep is in the log."""
    runs = stand.count(10_000)
    memory, disk = stand.worker.memory_bytes(), stand.disk_bytes()

    async def one(number: int) -> None:
        await stand.client.start("parked", PARKED_SECONDS, BALLAST)

    window = Window(stand)
    await in_flight(STARTS_IN_FLIGHT_MAX, runs, one)
    used = window.close()
    # A start is answered when its first turn is durable, and that turn holds the sleep. The log has to confirm it;
    # while it does not, the clock goes on.
    history = await _read(stand)
    while (asleep := sum(bool(run.timers) for run in history.runs.values())) < runs:
        stand.workers.check()
        history = await _read(stand)
        used["seconds"] = window.seconds
    check(asleep, runs, "runs asleep")
    grown, disk = stand.worker.memory_bytes() - memory, stand.disk_bytes() - disk
    empty = await _ready_again(stand)
    restored = restored_per_second(stand.worker.output.read_text(errors="replace"))
    kept = await _ready_again(stand)
    return {
        **used,
        "worker_memory_growth_bytes": float(grown),
        "worker_memory_bytes_per_run": grown / runs,
        "disk_bytes_per_run": disk / runs,
        "ready_without_state_seconds": empty,
        "ready_with_state_seconds": kept,
        **({} if restored is None else {RESTORED: restored}),
    }


def restored_per_second(written: str) -> float | None:
    """Records per second between the first and the last that any process of a worker restored, by what it wrote.

    None where too few were. Processes and partitions work side by side; what lies between a hand-over and the next
    restore counts as well.
    """
    records, first, last = 0, float("inf"), 0.0
    for at, count, seconds in RESTORED_LINE.findall(written):
        end = datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp()  # noqa: DTZ007 - local, and only compared
        records, first, last = records + int(count), min(first, end - float(seconds)), max(last, end)
    return records / (last - first) if records >= RESTORED_MIN else None


async def _ready_again(stand: Stand) -> float:
    """Stop the worker, start one with a process for each core on a folder of their own; seconds until it is ready.

    The first process may have opened partitions that the others then take over: that is part of a start.
    """
    await stand.worker.stop()
    began = time.perf_counter()
    stand.restart(state="restored", processes=cores())
    await stand.client.list(limit=1)  # every partition has answered
    return time.perf_counter() - began


async def timers(stand: Stand) -> Figures:
    """Many runs sleep until one common moment: how late they are, by the log's time and as the client sees it."""
    runs = stand.count(2000)
    due_s = float(math.ceil(time.time() + STARTS_LEAD_SECONDS + runs / STARTS_PER_SECOND))
    due = datetime.fromtimestamp(due_s, UTC)
    recorded: list[float] = []
    seen: list[float] = []
    accepted: list[float] = []

    async def one(number: int) -> None:
        handle = await stand.client.start("alarm", due, BALLAST)
        accepted.append(time.time())
        recorded.append(float(await handle.result()))
        seen.append((time.time() - due_s) * 1000)

    window = Window(stand)
    await in_flight(runs, runs, one)
    used = window.close()
    if max(accepted) >= due_s:
        raise WrongResult(
            f"the starts took {max(accepted) - due_s:.1f} s longer than planned: this machine is too busy"
        )
    if min(recorded) < 0:
        raise WrongResult(f"a timer fired {-min(recorded):.0f} ms early")
    return {
        "lateness_p50_ms": quantile(recorded, 0.5),
        "lateness_p99_ms": quantile(recorded, 0.99),
        "lateness_max_ms": max(recorded),
        "result_seen_p50_ms": quantile(seen, 0.5),
        "result_seen_p99_ms": quantile(seen, 0.99),
        **used,
    }


async def recovery(stand: Stand) -> Figures:
    """Many runs with steps that leave a line; the worker is killed half-way and another one started."""
    runs, steps = stand.count(1000), 20

    async def one(number: int) -> None:
        check(await stand.run("lines", steps, BALLAST), list(range(steps)), f"run {number}")

    window = Window(stand)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(in_flight(runs, runs, one))
        await _wait_for_lines(stand.lines, runs * steps // 2, waiting)
        stand.worker.kill()
        killed_after = window.seconds
        stand.restart()
    used = window.close()
    history, lines = await _read(stand), read_lines(stand.lines)
    findings = examine(history, lines, with_ends=False)
    if not findings.all_well or findings.runs != findings.runs_completed:
        raise WrongResult(f"the log and the lines disagree: {findings}")
    return {
        "recovery_seconds": used["seconds"] - killed_after,
        "repeated_attempts": float(findings.repeated_attempts),
        "completed_steps_run_again": float(len(findings.run_again)),
        **used,
    }


async def _wait_for_lines(path: Path, wanted: int, working: asyncio.Task[None]) -> None:
    found = 0
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CREAT), "rb") as file:
        while found < wanted:
            if working.done():
                raise WrongResult(f"all runs were over when {found} of {wanted} lines were written")
            found += file.read().count(b"\n")
            await asyncio.sleep(0.005)


async def _read(stand: Stand) -> History:
    log = await open_log(stand.url, app=stand.app, create=False)
    try:
        history = await read_history(log)
    finally:
        await log.close()
    # The warm-up's runs are over; they are not what is looked for.
    for workflow_id in [each for each, run in history.runs.items() if run.workflow == "sequential"]:
        assert history.runs[workflow_id].closed is RunCompleted
        del history.runs[workflow_id]
    return history


class Figure(NamedTuple):
    """A figure that the table shows: its key, what it is, and its unit (`B` is shown as KiB or MiB)."""

    key: str
    label: str
    unit: str


class Workload(NamedTuple):
    """A workload: what it does in a line, and which of its figures count."""

    name: str
    title: str
    driver: Callable[[Stand], Awaitable[Figures]]
    figures: tuple[Figure, ...]


_PEAK: Final = Figure("worker_memory_peak_bytes", "peak memory of the worker", "B")

WORKLOADS: Final = {
    each.name: each
    for each in (
        Workload(
            "W1",
            "latency: one run at a time, 10 sequential steps",
            latency,
            (
                Figure("start_to_result_p50_ms", "start to result, p50", "ms"),
                Figure("start_to_result_p99_ms", "start to result, p99", "ms"),
            ),
        ),
        Workload(
            "W2",
            "throughput: 2,000 runs of 5 sequential steps, 200 in flight",
            throughput,
            (
                Figure("steps_per_second", "steps", "/s"),
                Figure("worker_cpu_us_per_step", "CPU of the worker per step", "µs"),
                _PEAK,
            ),
        ),
        Workload(
            "W3",
            "fan-out: 50 runs at once, 100 parallel steps each",
            fan_out,
            (Figure("steps_per_second", "steps", "/s"), _PEAK),
        ),
        Workload(
            "W4",
            "parked: 10,000 runs go to sleep for an hour",
            parked,
            (
                Figure("seconds", "until the last sleep is durable", "s"),
                Figure("worker_memory_bytes_per_run", "memory of the worker per run", "B"),
                Figure("disk_bytes_per_run", "disk per run", "B"),
                Figure("ready_without_state_seconds", "started again on an empty folder, until it answers", "s"),
                Figure("ready_with_state_seconds", "the same on the folder that it left", "s"),
                Figure(RESTORED, "records that it restores, from the first to the last", "/s"),
            ),
        ),
        Workload(
            "W5",
            "timers: 2,000 runs sleep until one moment",
            timers,
            (
                Figure("lateness_p50_ms", "wake-up late by, p50", "ms"),
                Figure("lateness_p99_ms", "wake-up late by, p99", "ms"),
                Figure("result_seen_p99_ms", "client has the result, p99", "ms"),
            ),
        ),
        Workload(
            "W6",
            "recovery: 1,000 runs of 20 steps, SIGKILL at half",
            recovery,
            (
                Figure("recovery_seconds", "from the kill until all completed", "s"),
                Figure("seconds", "in all", "s"),
                Figure("repeated_attempts", "attempts repeated", ""),
                Figure("completed_steps_run_again", "completed steps run again", ""),
                _PEAK,
            ),
        ),
    )
}
