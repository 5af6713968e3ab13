"""What a program asks of the engine: each step, timer and signal, how often and how long, read off the program alone.

The parts of a program have no place in a history that could be looked up, so what is asked is counted: a run may ask
for each thing as often as its program does, and when it completes it has asked for all that no other part cut short.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from math import ceil
from typing import Any, Final, TypeAlias

from streamflow.sim.programs import LARGE, Program

Ask: TypeAlias = tuple[Any, ...]
"""("sleep" or "timeout", milliseconds), ("signal", name), or ("step", name, delay in milliseconds, *arguments)."""

DRAWN: Final[Ask] = ("step", "echo", None, "drawn")
"""A step whose argument the run draws."""
ENDLESS: Final = (0, 1e6, 0)
"""The arguments of a step that takes longer than anybody waits."""


def asks(program: Program) -> Counter[Ask]:
    """All that it may ask for, in one run."""
    return Counter(ask for ask, _ in _asks(program, certain=True))


def certain(program: Program) -> Counter[Ask]:
    """What it must have asked for when it completes."""
    return Counter(ask for ask, is_certain in _asks(program, certain=True) if is_certain)


def fired(program: Program, result: Any) -> Counter[Ask]:
    """The timers that must have fired when it completes with that result, which it allows."""
    return Counter(_fired(program, result))


def slow(program: Program) -> list[float]:
    """How long, in seconds, an attempt may take of those steps that always take longer, in any order."""
    kind, *rest = program
    if kind == "slow":
        return [rest[0]]
    return [seconds for part in _parts(program) for seconds in slow(part)]


def shows_progress(program: Program) -> bool:
    """Whether it reports any."""
    return program[0] == "chance" or any(map(shows_progress, _parts(program)))


def scheduled(name: str, args: bytes, delay_ms: int | None) -> Ask:
    """The call of a step as the history has it."""
    return ("step", name, delay_ms, *json.loads(args))


def milliseconds(seconds: float) -> int:
    """As the log counts: rounded up, so that nothing is early."""
    return ceil(seconds * 1000)


def _step(name: str, *args: Any, delay: float | None = None) -> Ask:
    return ("step", name, None if delay is None else milliseconds(delay), *args)


def _parts(program: Program) -> list[Program]:
    kind, *rest = program
    match kind:
        case "sequence" | "gather" | "group" | "race":
            parts: list[Program] = rest[0]
            return parts
        case "guarded":
            return [rest[0]]
    return []


def _asks(program: Program, *, certain: bool) -> Iterator[tuple[Ask, bool]]:
    """Each ask, and whether it is made if the program completes."""
    kind, *rest = program
    for ask in _own(kind, rest):
        yield ask, certain
    for part in _parts(program):
        yield from _asks(part, certain=certain and kind not in ("group", "race"))


def _own(kind: str, rest: list[Any]) -> Iterator[Ask]:
    """What a part asks for beside its own parts."""
    match kind:
        case "work":
            yield _step("work", *rest)
        case "far":
            yield _step("far_work", *rest)
        case "plain":
            yield _step("plain_work", *rest)
        case "later":
            yield _step("work", *rest[1:], delay=rest[0])
        case "fail" | "once":
            yield _step(kind, *rest)
        case "slow":
            yield _step("work", *ENDLESS)
        case "bounded":
            yield from (("timeout", milliseconds(rest[0])), _step("work", *ENDLESS))
        case "sleep" | "now":
            yield "sleep", milliseconds(rest[0])
        case "signals":
            yield from [("signal", rest[0])] * rest[1]
        case "hurried" | "deaf":
            yield from (("timeout", milliseconds(rest[1])), ("signal", rest[0]))
        case "chance":
            yield DRAWN
        case "large":
            yield from (_step("echo", letter * LARGE) for letter in "abcd"[: rest[0]])
        case "group":
            yield _step("fail", 0, rest[1])
        case "guarded":
            yield from (_step("do", rest[1]), _step("undo", rest[1], rest[2]))
        case "line":
            for value in rest[0]:
                yield from (_step("work", value, rest[1], 0), _step("work", 2 * value, 0.0, 0))
        case "completed" | "shielded":
            for value, seconds in rest[0]:
                yield _step("work", value, seconds, 0)
                if kind == "shielded":
                    yield _step("work", 2 * value, 0.0, 0)


def _fired(program: Program, result: Any) -> Iterator[Ask]:
    kind, *rest = program
    match kind:
        case "sleep" | "now":
            yield "sleep", milliseconds(rest[0])
        case "bounded":
            yield "timeout", milliseconds(rest[0])
        case "hurried" | "deaf" if result == "timeout":
            yield "timeout", milliseconds(rest[1])
        case "sequence" | "gather":
            for part, each in zip(rest[0], result, strict=True):
                yield from _fired(part, each)
        case "guarded":
            yield from _fired(rest[0], result)
