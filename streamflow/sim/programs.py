"""Random workflows, and what they must return: a program is data that one workflow plays and the oracle evaluates.

Every part of a program has an outcome that does not depend on the order in which the world lets things happen, so the
oracle is a few lines of plain Python that know nothing of the engine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, TypeAlias

import streamflow as sf

Program: TypeAlias = list[Any]
"""[kind, argument, …], as JSON."""

DEPTH_MAX: Final = 3
WIDTH_MAX: Final = 4
LENGTH_MAX: Final = 4
SLEEPS: Final = (0.01, 0.5, 3.0, 20.0, 600.0, 86_400.0)
RETRY: Final = sf.Retry(max_attempts=50, initial=0.05, factor=1.5, max_delay=2.0)

app = sf.App("sim")

observer: ContextVar[Callable[[sf.StepInfo], None]] = ContextVar("observer")
"""Who is told that an attempt begins."""


class Broken(Exception):
    """What a step raises that shall fail, or try again."""


@app.step(retry=RETRY)
async def work(value: int, seconds: float, failures: int) -> int:
    """Take a while, fail a few times first, and give twice the value."""
    observer.get()(sf.step_info())
    await asyncio.sleep(seconds)
    if sf.step_info().attempt <= failures:
        raise Broken(f"attempt {sf.step_info().attempt} of {failures} that fail")
    return 2 * value


@app.step(retry=sf.Retry.never)
async def fail(value: int, seconds: float) -> int:
    """Take a while, and fail for good."""
    observer.get()(sf.step_info())
    await asyncio.sleep(seconds)
    raise Broken(f"{value} is wrong")


@app.workflow
async def play(program: Program) -> Any:
    """Play the program; its outcome is the run's result."""
    return await _play(program)


async def _play(program: Program) -> Any:
    kind, *rest = program
    match kind:
        case "work":
            return await work(*rest)
        case "later":
            delay, *call = rest
            return await work.options(delay=delay)(*call)
        case "fail":
            try:
                return await fail(*rest)
            except sf.StepFailed as error:
                return f"failed: {error.error.type.rpartition('.')[2]}"
        case "sleep":
            await asyncio.sleep(rest[0])
            return "slept"
        case "signal":
            return await sf.wait_signal(rest[0])
        case "deaf":  # a signal that nobody sends
            try:
                return await sf.wait_signal(rest[0], timeout=rest[1])
            except TimeoutError:
                return "timeout"
        case "sequence":
            return [await _play(part) for part in rest[0]]
        case "gather":
            return list(await asyncio.gather(*map(_play, rest[0])))
        case "group":  # one member fails at last; the others are cancelled if they are slower
            outcome = "group held"
            try:
                async with asyncio.TaskGroup() as group:
                    for part in rest[0]:
                        group.create_task(_play(part))
                    await fail(0, rest[1])
            except* sf.StepFailed:
                outcome = "group failed"
            return outcome
        case "bounded":
            try:
                async with asyncio.timeout(rest[0]):
                    await work(0, 1e6, 0)
            except TimeoutError:
                return "timeout"
            return "in time"
        case "guarded":  # what was begun is undone, whatever ends it
            try:
                return await _play(rest[0])
            finally:
                await work(rest[1], rest[2], 0)
        case "now":
            before = sf.now()
            await asyncio.sleep(rest[0])
            return (sf.now() - before).total_seconds() >= rest[0]
    raise ValueError(f"unknown part {kind!r}")


def expected(program: Program) -> Any:
    """The oracle: what the program returns, whatever happened on the way."""
    kind, *rest = program
    match kind:
        case "work":
            return 2 * rest[0]
        case "later":
            return 2 * rest[1]
        case "fail":
            return "failed: Broken"
        case "sleep":
            return "slept"
        case "signal":
            return f"value of {rest[0]}"
        case "deaf" | "bounded":
            return "timeout"
        case "sequence" | "gather":
            return [expected(part) for part in rest[0]]
        case "group":
            return "group failed"
        case "guarded":
            return expected(rest[0])
        case "now":
            return True
    raise ValueError(f"unknown part {kind!r}")


def signals(program: Program) -> list[str]:
    """The names of the signals that the program must get in order to end."""
    kind, *rest = program
    if kind == "signal":
        return [rest[0]]
    if kind == "guarded":
        return signals(rest[0])
    if kind in ("sequence", "gather"):
        return [name for part in rest[0] for name in signals(part)]
    return []


def make(chance: random.Random, depth: int = 0, prefix: str = "") -> Program:
    """A random program."""
    leaves = ("work", "work", "work", "later", "fail", "sleep", "signal", "deaf", "bounded", "now")
    kind = chance.choice(
        leaves if depth == DEPTH_MAX else ("sequence", "gather", "group", "guarded", "sequence", *leaves[:4])
    )
    if depth == 0:
        kind = "sequence"
    match kind:
        case "work":
            return ["work", chance.randrange(100), _short(chance), chance.choice((0, 0, 0, 1, 3))]
        case "later":
            return ["later", chance.choice(SLEEPS[:4]), chance.randrange(100), _short(chance), 0]
        case "fail":
            return ["fail", chance.randrange(100), _short(chance)]
        case "sleep" | "now":
            return [kind, chance.choice(SLEEPS)]
        case "signal":
            return ["signal", f"{prefix or 'top'}"]
        case "deaf":
            return ["deaf", f"never{prefix}", chance.choice(SLEEPS[:5])]
        case "bounded":
            return ["bounded", chance.choice(SLEEPS[:4])]
        case "guarded":
            return ["guarded", make(chance, depth + 1, f"{prefix}-g"), chance.randrange(100), _short(chance)]
        case "group":
            parts = [_tame(chance) for _ in range(chance.randint(0, WIDTH_MAX))]
            return ["group", parts, _short(chance)]
    parts = [make(chance, depth + 1, f"{prefix}-{number}") for number in range(chance.randint(1, LENGTH_MAX))]
    return [kind, parts]


def _tame(chance: random.Random) -> Program:
    """A part that cannot fail by itself, whether it is cancelled or not."""
    if chance.random() < 0.3:
        return ["sleep", chance.choice(SLEEPS)]
    return ["work", chance.randrange(100), _short(chance), 0]


def _short(chance: random.Random) -> float:
    return chance.choice((0.0, 0.01, 0.2, 2.0))
