"""The app of the soak: workflows made of every kind of wait, whose steps tell a file what they did.

A workflow plays a program, which is data; `expected` says what it returns, in plain Python that knows nothing of the
engine. Each process has an effects file of its own, one line of JSON when a step's code begins and one when it ends,
so that the checker has a witness that does not ask the engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import streamflow as sf

Program: TypeAlias = list[Any]
"""[kind, argument, …], as JSON."""

APP_VARIABLE: Final = "STREAMFLOW_SOAK_APP"
"""The environment variable with the app's name: each soak has topics of its own."""
EFFECTS_VARIABLE: Final = "STREAMFLOW_SOAK_EFFECTS"
"""The environment variable with the folder of the effects files; without it nothing is written."""
PROGRESS_VARIABLE: Final = "STREAMFLOW_SOAK_PROGRESS"
"""The environment variable with the file in which the recorder says how far it is."""

QUEUE: Final = "soak"
FOREVER: Final = 3_600.0
"""Seconds that no run of a soak sees pass: something else ends it."""
OVERRUN_SECONDS: Final = 0.3
INTERRUPTED: Final = "interrupted"

RETENTION_SECONDS: Final = 60.0
"""For how long closed runs are kept: long beyond what keeps a client from looking, and short beside the soak, so that
their records go while faults come."""
TRIM_RECORDS, TRIM_SECONDS = 300, 10.0
"""After so many records a history is trimmed where it pays, which is looked at so often."""

BACKOFF_SECONDS, BACKOFF_FACTOR, BACKOFF_SECONDS_MAX, JITTER = 0.05, 1.5, 1.0, 0.5

app = sf.App(
    os.environ.get(APP_VARIABLE, "soak"),
    retry=sf.Retry(
        max_attempts=50, initial=BACKOFF_SECONDS, factor=BACKOFF_FACTOR, max_delay=BACKOFF_SECONDS_MAX, jitter=JITTER
    ),
)


class Broken(Exception):
    """What a step raises that shall fail, or be tried again."""


# --------------------------------------------------------------------------------------------------------- the witness


@cache
def _file(folder: str, pid: int) -> int:
    return os.open(Path(folder) / f"{pid}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def tell(what: str, **more: object) -> None:
    """Append a line about the running attempt: one write, which a kill cuts at the end of a page at most."""
    folder = os.environ.get(EFFECTS_VARIABLE)
    if folder is None:
        return
    info, pid = sf.step_info(), os.getpid()
    line = {
        "what": what,
        "id": info.workflow_id,
        "number": info.number,
        "attempt": info.attempt,
        "step": info.step,
        "at": time.time_ns() // 1_000_000,
        "pid": pid,
        **more,
    }
    os.write(_file(folder, pid), (json.dumps(line) + "\n").encode())


@contextmanager
def told(result: object = None) -> Generator[None, None, None]:
    """Tell when the attempt in the block begins, and how it ends; killed in between, it leaves only its begin."""
    tell("began")
    try:
        yield
    except BaseException as error:
        tell("failed", error=type(error).__name__)
        raise
    tell("ended", result=result)


# ----------------------------------------------------------------------------------------------------------- the steps


def _fail_first(failures: int) -> None:
    if sf.step_info().attempt <= failures:
        raise Broken(f"attempt {sf.step_info().attempt} of {failures} that fail")


@app.step
async def work(value: int, seconds: float, failures: int = 0) -> int:
    with told(2 * value):
        await asyncio.sleep(seconds)
        _fail_first(failures)
    return 2 * value


@app.step
def thread(value: int, seconds: float) -> int:
    with told(value + 1):
        time.sleep(seconds)
    return value + 1


@app.step(queue=QUEUE)
async def remote(value: int, seconds: float, failures: int = 0) -> int:
    with told(3 * value):
        await asyncio.sleep(seconds)
        _fail_first(failures)
    return 3 * value


@app.step(at_most_once=True)
async def once(value: int, seconds: float) -> int:
    with told(value):
        await asyncio.sleep(seconds)
    return value


@app.step(retry=sf.Retry.never)
async def fail(value: int) -> int:
    with told():
        raise Broken(f"{value} is wrong")


@app.step(retry=sf.Retry.never, timeout=OVERRUN_SECONDS)
async def overrun() -> None:
    with told():
        await asyncio.sleep(FOREVER)


@app.step
async def undo(value: int) -> int:
    with told(-value):
        await asyncio.sleep(0.01)
    return -value


# ------------------------------------------------------------------------------------------------------- the workflow


@app.workflow(retention=RETENTION_SECONDS)
async def play(program: Program) -> Any:
    """Play the program and undo, whatever ends it; its outcome is the run's result."""
    try:
        return await _play(program)
    finally:
        await undo(1)


async def _play(program: Program) -> Any:
    kind, *rest = program
    match kind:
        case "work":
            return await work(*rest)
        case "thread":
            return await thread(*rest)
        case "remote":
            return await remote(*rest)
        case "later":
            delay, *call = rest
            return await work.options(delay=delay)(*call)
        case "once":
            return await _or_why(once(*rest), {"streamflow.errors.StepInterrupted": INTERRUPTED})
        case "fail":
            return await _or_why(fail(*rest), {})
        case "overrun":
            return await _or_why(overrun(), {})
        case "sleep":
            await asyncio.sleep(rest[0])  # tidy: a durable timer, which is what is tested
            return "slept"
        case "signal":
            return await sf.wait_signal(rest[0])
        case "deaf":  # a signal that nobody sends
            try:
                return await sf.wait_signal(rest[0], timeout=rest[1])
            except TimeoutError:
                return "timeout"
        case "bounded":
            try:
                async with asyncio.timeout(rest[0]):
                    await work(0, FOREVER)
            except TimeoutError:
                return "timeout"
        case "sequence":
            return [await _play(part) for part in rest[0]]
        case "gather":
            return list(await asyncio.gather(*map(_play, rest[0])))
    raise ValueError(f"unknown part {kind!r}")


async def _or_why(call: Any, known: dict[str, str]) -> Any:
    try:
        return await call
    except sf.StepFailed as error:
        kind = error.error.type
        return known.get(kind, f"failed: {kind.rpartition('.')[2]}")


# --------------------------------------------------------------------------------------------------------- the oracle


def expected(program: Program) -> Any:
    """What the program returns, whatever happens on the way; {"any": […]} where a crash may show in it."""
    kind, *rest = program
    match kind:
        case "work":
            return 2 * rest[0]
        case "thread":
            return rest[0] + 1
        case "remote":
            return 3 * rest[0]
        case "later":
            return 2 * rest[1]
        case "once":
            return {"any": [rest[0], INTERRUPTED]}
        case "fail":
            return "failed: Broken"
        case "overrun":
            return "failed: TimeoutError"
        case "sleep":
            return "slept"
        case "signal":
            return signal_value(rest[0])
        case "deaf" | "bounded":
            return "timeout"
        case "sequence" | "gather":
            return [expected(part) for part in rest[0]]
    raise ValueError(f"unknown part {kind!r}")


def signal_value(name: str) -> str:
    """What the signal of that name carries."""
    return f"value of {name}"


def signals(program: Program) -> list[str]:
    """The names of the signals that the program must get in order to end."""
    kind, *rest = program
    if kind == "signal":
        return [rest[0]]
    return [name for part in rest[0] for name in signals(part)] if kind in ("sequence", "gather") else []


# ------------------------------------------------------------------------------------------------------ random programs

_LEAVES: Final = {
    "work": 6, "thread": 2, "remote": 4, "later": 2, "once": 3, "fail": 1, "overrun": 1, "sleep": 3, "signal": 3,
    "deaf": 1, "bounded": 1,
}  # fmt: skip


def make(chance: random.Random) -> Program:
    """A random program of some seconds."""
    parts: list[Program] = []
    for number in range(chance.randint(1, 4)):
        if chance.random() < 0.3:
            leaves = [_leaf(chance, f"s{number}-{each}") for each in range(chance.randint(2, 4))]
            parts.append(["gather", leaves])
        else:
            parts.append(_leaf(chance, f"s{number}"))
    return ["sequence", parts]


def _leaf(chance: random.Random, name: str) -> Program:
    kind = chance.choices(list(_LEAVES), list(_LEAVES.values()))[0]
    value, seconds = chance.randrange(100), chance.choice((0.0, 0.02, 0.2, 0.8))
    match kind:
        case "work" | "remote":
            return [kind, value, seconds, chance.choice((0, 0, 0, 1, 3))]
        case "thread" | "once":
            return [kind, value, seconds]
        case "later":
            return [kind, chance.choice((0.1, 1.0, 4.0)), value, seconds]
        case "fail":
            return [kind, value]
        case "sleep":
            return [kind, chance.choice((0.1, 1.0, 3.0, 6.0))]
        case "signal":
            return [kind, name]
        case "deaf":
            return [kind, f"never-{name}", chance.choice((0.1, 2.0))]
        case "bounded":
            return [kind, chance.choice((0.3, 2.0))]
    return [kind]
