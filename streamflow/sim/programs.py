"""Random workflows, and what they may return: a program is data that one workflow plays and the oracle judges.

Most parts of a program have an outcome that does not depend on the order in which the world lets things happen, so the
oracle is a few lines of plain Python that know nothing of the engine; where the order decides, any of some outcomes is
right.
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
QUEUE: Final = "far"
LARGE: Final = 450_000
"""Bytes of a large argument: three of them do not fit one record."""
RETENTION_SECONDS: Final = 100.0
"""Longer than a command can be late: one that comes after its run was forgotten would begin the run anew."""

app = sf.App("sim")

observer: ContextVar[Callable[[sf.StepInfo], None]] = ContextVar("observer")
"""Who is told that an attempt begins."""


class Broken(Exception):
    """What a step raises that shall fail, or try again."""


def _attempt(value: int, failures: int) -> int:
    """The end of an attempt: the first few fail, and the others give twice the value."""
    attempt = sf.step_info().attempt
    if attempt <= failures:
        raise Broken(f"attempt {attempt} of {failures} that fail")
    return 2 * value


@app.step(retry=RETRY)
async def work(value: int, seconds: float, failures: int) -> int:
    """Take a while, fail a few times first, and give twice the value."""
    observer.get()(sf.step_info())
    await asyncio.sleep(seconds)
    return _attempt(value, failures)


@app.step(retry=RETRY, queue=QUEUE)
async def far_work(value: int, seconds: float, failures: int) -> int:
    """As `work`, wherever the queue is served."""
    observer.get()(sf.step_info())
    await asyncio.sleep(seconds)
    return _attempt(value, failures)


@app.step(retry=RETRY)
def plain_work(value: int, failures: int) -> int:
    """As `work`, in a thread."""
    observer.get()(sf.step_info())
    return _attempt(value, failures)


@app.step(retry=sf.Retry.never)
async def fail(value: int, seconds: float) -> int:
    """Take a while, and fail for good."""
    observer.get()(sf.step_info())
    await asyncio.sleep(seconds)
    raise Broken(f"{value} is wrong")


@app.step(at_most_once=True)
async def once(value: int, seconds: float) -> int:
    """Take a while; begun once at most, so that it fails where its worker dies."""
    observer.get()(sf.step_info())
    await asyncio.sleep(seconds)
    return value


@app.step(retry=RETRY)
async def echo(value: str) -> str:
    """Give back what comes in."""
    observer.get()(sf.step_info())
    return value


@app.step(retry=RETRY)
async def do(what: str) -> None:
    """Do what is undone later."""
    observer.get()(sf.step_info())


@app.step(retry=RETRY)
async def undo(what: str, seconds: float) -> None:
    """Undo it."""
    observer.get()(sf.step_info())
    await asyncio.sleep(seconds)


@app.workflow
async def play(program: Program) -> Any:
    """Play the program; its outcome is the run's result."""
    return await _play(program)


@app.workflow(retention=RETENTION_SECONDS)
async def play_briefly(program: Program) -> Any:
    """As `play`; the run is forgotten soon after its end."""
    return await _play(program)


async def _play(program: Program) -> Any:
    kind, *rest = program
    match kind:
        case "work":
            return await work(*rest)
        case "far":
            return await far_work(*rest)
        case "plain":
            return await plain_work(*rest)
        case "later":
            delay, *call = rest
            return await work.options(delay=delay)(*call)
        case "fail":
            return await _failure(fail(*rest))
        case "slow":  # each of two attempts takes too long
            retry = sf.Retry(max_attempts=2, initial=0.05)
            return await _failure(work.options(timeout=rest[0], retry=retry)(0, 1e6, 0))
        case "once":
            try:
                return await once(*rest)
            except sf.StepFailed:
                return "cut off"
        case "sleep":
            await asyncio.sleep(rest[0])
            return "slept"
        case "signals":
            return [await sf.wait_signal(rest[0]) for _ in range(rest[1])]
        case "hurried" | "deaf":  # a signal that may come too late; one that nobody sends
            try:
                return await sf.wait_signal(rest[0], timeout=rest[1])
            except TimeoutError:
                return "timeout"
        case "bounded":
            try:
                async with asyncio.timeout(rest[0]):
                    await work(0, 1e6, 0)
            except TimeoutError:
                return "timeout"
            return "in time"
        case "now":
            before = sf.now()
            await asyncio.sleep(rest[0])
            return (sf.now() - before).total_seconds() >= rest[0]
        case "chance":  # drawn alike in each replay, or the step's arguments would differ
            sf.progress({"drawn": sf.random().random()})
            drawn = str(sf.uuid4())
            return await echo(drawn) == drawn
        case "large":
            parts = await asyncio.gather(*(echo(letter * LARGE) for letter in "abcd"[: rest[0]]))
            return sum(map(len, parts))
    return await _play_together(kind, rest)


async def _play_together(kind: str, rest: list[Any]) -> Any:
    """What is made of other parts."""
    match kind:
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
        case "race":  # the first to end; the others are cancelled
            tasks = [asyncio.ensure_future(_play(part)) for part in rest[0]]
            done, slower = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in slower:
                task.cancel()
            return next(task.result() for task in tasks if task in done)
        case "line":  # one makes, another takes
            return await _line(*rest)
        case "completed":  # steps and other coroutines, which asyncio puts into a set
            calls = [
                work(value, seconds, 0) if number % 2 else _play(["work", value, seconds, 0])
                for number, (value, seconds) in enumerate(rest[0])
            ]
            return sorted([await call for call in asyncio.as_completed(calls)])
        case "shielded":  # what is done is a set: in which order it is gone through decides what is called next
            shields = [asyncio.shield(work(value, seconds, 0)) for value, seconds in rest[0]]
            ended, _ = await asyncio.wait(shields)
            return sorted([await work(shield.result(), 0.0, 0) for shield in ended])
        case "guarded":  # what was begun is undone, whatever ends it (the rules look for it)
            try:
                await do(rest[1])
                return await _play(rest[0])
            finally:
                await undo(rest[1], rest[2])
    raise ValueError(f"unknown part {kind!r}")


async def _failure(call: Any) -> str:
    try:
        await call
    except sf.StepFailed as error:
        return f"failed: {error.error.type.rpartition('.')[2]}"
    return "it held"


async def _line(values: list[int], seconds: float) -> list[int]:
    line: asyncio.Queue[int | None] = asyncio.Queue(maxsize=1)

    async def make() -> None:
        for value in values:
            await line.put(await work(value, seconds, 0))
        await line.put(None)

    making = asyncio.ensure_future(make())
    taken: list[int] = []
    while (value := await line.get()) is not None:
        taken.append(await work(value, 0.0, 0))
    await making
    return taken


# ------------------------------------------------------------------------------------------------------- the oracle


def allows(program: Program, found: Any) -> bool:
    """The oracle: whether the program may return this, whatever happened on the way."""
    kind, *rest = program
    match kind:
        case "sequence" | "gather":
            return isinstance(found, list) and len(found) == len(rest[0]) and all(map(allows, rest[0], found))
        case "guarded":
            return allows(rest[0], found)
        case "race":
            return any(allows(part, found) for part in rest[0])
        case "once":
            return found in (rest[0], "cut off")
        case "hurried":
            return found in (f"1 of {rest[0]}", "timeout")
    return bool(found == _expected(kind, rest))


def _expected(kind: str, rest: list[Any]) -> Any:
    match kind:
        case "work" | "far" | "plain":
            return 2 * rest[0]
        case "later":
            return 2 * rest[1]
        case "fail":
            return "failed: Broken"
        case "slow":
            return "failed: TimeoutError"
        case "sleep":
            return "slept"
        case "signals":
            return [f"{number} of {rest[0]}" for number in range(1, rest[1] + 1)]
        case "deaf" | "bounded":
            return "timeout"
        case "group":
            return "group failed"
        case "line":
            return [4 * value for value in rest[0]]
        case "completed":
            return sorted(2 * value for value, _ in rest[0])
        case "shielded":
            return sorted(4 * value for value, _ in rest[0])
        case "now" | "chance":
            return True
        case "large":
            return rest[0] * LARGE
    raise ValueError(f"unknown part {kind!r}")


def signals(program: Program) -> list[tuple[str, str]]:
    """The signals that the program must get in order to end, by name and value, in the order of sending."""
    kind, *rest = program
    match kind:
        case "signals":
            return [(rest[0], f"{number} of {rest[0]}") for number in range(1, rest[1] + 1)]
        case "hurried":
            return [(rest[0], f"1 of {rest[0]}")]
        case "guarded":
            return signals(rest[0])
        case "sequence" | "gather":
            return [signal for part in rest[0] for signal in signals(part)]
    return []


def hangs(program: Program) -> bool:
    """Whether a step of it ends only when it is cancelled, which takes a command."""
    kind, *rest = program
    if kind == "bounded":
        return True
    if kind == "guarded":
        return hangs(rest[0])
    return kind in ("sequence", "gather") and any(map(hangs, rest[0]))


# ---------------------------------------------------------------------------------------------------------- chance

LEAVES: Final = (
    *("work", "work", "work", "far", "far", "plain", "later", "fail", "slow", "once", "sleep", "signals", "hurried"),
    *("deaf", "bounded", "now", "chance", "line", "race", "completed", "shielded"),
)
BRANCHES: Final = ("sequence", "sequence", "gather", "group", "guarded")
LARGE_SHARE: Final = 0.02


def make(chance: random.Random, depth: int = 0, prefix: str = "top") -> Program:
    """A random program."""
    leaf = depth == DEPTH_MAX or chance.random() < 0.45
    kind = "sequence" if depth == 0 else chance.choice(LEAVES if leaf else BRANCHES)
    if depth and chance.random() < LARGE_SHARE:
        return ["large", chance.randint(1, 4)]
    match kind:
        case "work" | "far":
            return [kind, chance.randrange(100), _short(chance), chance.choice((0, 0, 0, 1, 3))]
        case "plain":
            return ["plain", chance.randrange(100), chance.choice((0, 0, 1))]
        case "later":
            return ["later", chance.choice(SLEEPS[:4]), chance.randrange(100), _short(chance), 0]
        case "fail" | "once":
            return [kind, chance.randrange(100), _short(chance)]
        case "slow" | "bounded":
            return [kind, chance.choice(SLEEPS[:4])]
        case "sleep" | "now":
            return [kind, chance.choice(SLEEPS)]
        case "signals":
            return ["signals", prefix, chance.randint(1, 3)]
        case "hurried":
            return ["hurried", f"hurried-{prefix}", chance.choice(SLEEPS[1:4])]
        case "deaf":
            return ["deaf", f"never-{prefix}", chance.choice(SLEEPS[:5])]
        case "chance":
            return ["chance"]
        case "line":
            return ["line", [chance.randrange(100) for _ in range(chance.randint(0, 4))], _short(chance)]
        case "completed" | "shielded":
            return [kind, [[chance.randrange(100), _short(chance)] for _ in range(chance.randint(2, 4))]]
        case "race":
            return ["race", [_tame(chance) for _ in range(chance.randint(1, 3))]]
        case "guarded":
            return ["guarded", make(chance, depth + 1, f"{prefix}-g"), prefix, _short(chance)]
        case "group":
            return ["group", [_tame(chance) for _ in range(chance.randint(0, WIDTH_MAX))], _short(chance)]
    parts = [make(chance, depth + 1, f"{prefix}-{number}") for number in range(chance.randint(1, LENGTH_MAX))]
    return [kind, parts]


def _tame(chance: random.Random) -> Program:
    """A part that cannot fail by itself, whether it is cancelled or not."""
    match chance.choice(("work", "work", "far", "plain", "sleep")):
        case "sleep":
            return ["sleep", chance.choice(SLEEPS)]
        case "plain":
            return ["plain", chance.randrange(100), 0]
        case kind:
            return [kind, chance.randrange(100), _short(chance), 0]


def _short(chance: random.Random) -> float:
    return chance.choice((0.0, 0.01, 0.2, 2.0))
