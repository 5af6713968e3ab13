"""Whether a run asks for what its program says, waits as long as it says, and tries as often as it says.

The rules of rules.py hold a history against itself: a timer fires when the history says that it is due. Here the
history is held against the program (`asked.py`), the retry policies and the plan of whoever started the run, so that a
delay that the product gets wrong before it writes it down is found.

What can be relied on: a turn's time is that which the code saw, so delays are exact, rounded up to milliseconds. A
worker's clock never goes back, and the log's time is never ahead of its owner's; it may jump on. Only the world's time
tells how long something took, and it tells so of what a process measures by its monotonic clock.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import streamflow as sf
from streamflow.core.events import (
    CancelRequested,
    Event,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunDeleted,
    RunFailed,
    RunTerminated,
    SignalAwaited,
    SignalReceived,
    SignalTaken,
    SignalWaitCancelled,
    StepAttemptFailed,
    StepCompleted,
    StepDue,
    StepFailed,
    StepScheduled,
    TimerFired,
    TimerSet,
    Turn,
)
from streamflow.sim import asked, programs
from streamflow.sim.asked import Ask
from streamflow.sim.driver import Plan
from streamflow.sim.programs import Program
from streamflow.sim.rules import DRIFT_MAX, Violated
from streamflow.sim.world import World

ROUNDED_MS: Final = 1
"""An instant is rounded up to a millisecond: twice, where a delay is added to one."""
SLOW_ATTEMPTS: Final = 2
"""How often a step is tried that takes too long each time (programs.py)."""
SLOW_INITIAL: Final = 0.05


@dataclass
class Called:
    """A step of a run as its program calls it."""

    name: str
    is_slow: bool
    """Whether it never ends by itself: it times out, or waits until it is cancelled."""
    failures: int
    """How many attempts fail before one does not."""
    queue: str | None
    opened: float
    """When its attempt could begin, in the world's time."""
    opened_at: int
    """The same as the log has it, in milliseconds."""


@dataclass
class Life:
    """One run, and what of its program is not asked for yet."""

    program: Program
    left: Counter[Ask]
    slow: list[float]
    steps: dict[int, Called] = field(default_factory=dict)
    timers: dict[int, Ask] = field(default_factory=dict)
    fired: Counter[Ask] = field(default_factory=Counter)
    waits: dict[int, str] = field(default_factory=dict)
    """The open waits for signals, by number."""
    mail: dict[int, str] = field(default_factory=dict)
    """The signals that no wait has taken."""
    unwinds: bool = False


def bounds_ms(attempt: int, *, initial: float, factor: float, most: float, jitter: float) -> tuple[float, float]:
    """The least and the most, in milliseconds, between the failure of `attempt` and the next: the formula of the API,
    written here once more.
    """
    base = min(initial * factor ** (attempt - 1), most) * 1000
    return base * (1 - jitter), base * (1 + jitter)


class Timing:
    """The rules about what programs ask for, over the valid turns of one world."""

    def __init__(self, world: World, plans: Mapping[str, Plan]) -> None:
        self.world, self.plans = world, plans
        self.lives: dict[str, Life] = {}

    def turn(self, turn: Turn, events: list[Event]) -> None:
        """A valid turn, in the order of the log. Raises `Violated`."""
        where = f"run {turn.workflow_id}, turn {turn.turn}"
        for event in events:
            self._event(turn, event, where)
        life = self.lives.get(turn.workflow_id)
        if life is not None and life.mail and life.waits:
            self._mail(life, where)

    def _event(self, turn: Turn, event: Event, where: str) -> None:
        if isinstance(event, RunCreated):
            self.lives[turn.workflow_id] = self._created(turn, event, where)
            return
        life = self.lives.get(turn.workflow_id)
        if life is None:
            return
        match event:
            case TimerSet():
                self._timer(life, event, turn.at, where)
            case TimerFired(number=number):
                life.fired[life.timers[number]] += 1
            case StepScheduled():
                self._scheduled(life, event, turn.at, where)
            case StepDue(number=number):
                life.steps[number].opened, life.steps[number].opened_at = self.world.now, turn.at
            case StepAttemptFailed() | StepCompleted() | StepFailed():
                self._outcome(life, event, turn.at, where)
            case SignalAwaited(number=number, name=name):
                _take(life, ("signal", name), where)
                life.waits[number] = name
            case SignalReceived(signal=signal, name=name):
                life.mail[signal] = name
            case SignalTaken(number=number, signal=signal):
                if life.waits.pop(number, None) != life.mail.pop(signal, ""):
                    raise Violated(f"{where}: the wait {number} took the signal {signal}, which is not for it (3)")
            case SignalWaitCancelled(number=number):
                life.waits.pop(number, None)
            case CancelRequested():
                life.unwinds = True
            case RunCompleted(result=result):
                self._completed(life, result, where)
        if isinstance(event, RunCompleted | RunFailed | RunCancelled | RunTerminated | RunDeleted):
            self.lives.pop(turn.workflow_id, None)

    # -- the run itself ----------------------------------------------------------------------------------------------

    def _created(self, turn: Turn, created: RunCreated, where: str) -> Life:
        """5. It plays what was planned, begins as late as was asked, and has as long: by the plan, not by the command,
        which the product's client has written.
        """
        (program,) = json.loads(created.args)
        plan = self.plans.get(turn.workflow_id)
        # What both runs of an id may be is allowed twice.
        asked_for = [] if plan is None else [(plan.program, plan.delay, plan.timeout), (plan.second, 0.0, None)]
        delay = None if created.start_at is None else created.start_at - turn.at
        begins_at = max(created.start_at or 0, turn.at)
        timeout = None if created.deadline_at is None else created.deadline_at - begins_at
        if (program, delay, timeout) not in [
            (planned, round(delay * 1000) or None, None if timeout is None else round(timeout * 1000))
            for planned, delay, timeout in asked_for
        ]:
            raise Violated(f"{where}: it begins after {delay} ms and has {timeout} ms, planned was {plan} (5)")
        return Life(program=program, left=asked.asks(program), slow=asked.slow(program))

    def _completed(self, life: Life, result: bytes, where: str) -> None:
        """5. It is done: nothing was left out, and all that had to pass has passed."""
        if missing := asked.certain(life.program) - (asked.asks(life.program) - life.left):
            raise Violated(f"{where}: it completed, and never asked for {_some(missing)} (5)")
        if not programs.allows(life.program, found := json.loads(result)):
            return  # the client that waits for it says more
        if early := asked.fired(life.program, found) - life.fired:
            raise Violated(f"{where}: it completed, and {_some(early)} never fired (5)")

    def _mail(self, life: Life, where: str) -> None:
        """3. A wait takes a signal that is there, in the turn in which both are: so who waits with a timeout gets one
        only if there was none in time.
        """
        names = set(life.waits.values()) & set(life.mail.values())
        if names:
            raise Violated(f"{where}: it goes on waiting for a signal {min(names)!r}, which it has (3)")

    # -- timers ------------------------------------------------------------------------------------------------------

    def _timer(self, life: Life, event: TimerSet, at: int, where: str) -> None:
        """5. A sleep, or a timeout, is as long as the program says, to the millisecond."""
        delay = event.fire_at - at
        ask: Ask = (event.name, delay)
        if not life.left[ask]:
            ask = (event.name, delay - ROUNDED_MS)
        if not life.left[ask]:
            raise Violated(f"{where}: a {event.name} of {delay} ms, which its program does not ask for (any more) (5)")
        life.left[ask] -= 1
        life.timers[event.number] = ask

    # -- steps -------------------------------------------------------------------------------------------------------

    def _scheduled(self, life: Life, event: StepScheduled, at: int, where: str) -> None:
        """3, 5. It calls what its program calls, as often, and with that delay."""
        ask = asked.scheduled(event.name, event.args, None if event.start_at is None else event.start_at - at)
        if event.name == "echo" and not life.left[ask]:
            ask = asked.DRAWN
        _take(life, ask, where)
        name, args = event.name, ask[3:]
        is_slow = name == "work" and args == asked.ENDLESS
        failures = args[-1] if name in ("work", "far_work", "plain_work") else 0
        life.steps[event.number] = Called(name, is_slow, failures, event.queue, self.world.now, at)

    def _outcome(self, life: Life, event: StepAttemptFailed | StepCompleted | StepFailed, at: int, where: str) -> None:
        """3. A step ends as its code does, after as many attempts as fail and no more."""
        called, attempt = life.steps[event.number], event.attempt
        what = f"{where}: attempt {attempt} of step {event.number} ({called.name})"
        ends: tuple[type[Event], str | None]
        if called.is_slow:
            ends = (StepAttemptFailed if attempt < SLOW_ATTEMPTS else StepFailed), "TimeoutError"
            if attempt > SLOW_ATTEMPTS or not life.slow:
                raise Violated(f"{what} ends, and never can, or was never to begin (3)")
        elif called.name == "fail":
            ends = StepFailed, "Broken"
        elif called.name == "once" and isinstance(event, StepFailed):
            ends = StepFailed, "StepInterrupted"
        elif attempt <= called.failures:
            ends = StepAttemptFailed, "Broken"
        else:
            ends = StepCompleted, None
        last = 1 if called.name in ("fail", "once") else 1 + called.failures
        error = None if isinstance(event, StepCompleted) else event.error.type.rpartition(".")[2]
        if (type(event), error) != ends or (attempt > last and not called.is_slow):
            raise Violated(f"{what} ends with {type(event).__name__} ({error}), expected {ends} (3)")
        if called.is_slow:
            self._limit(life, called, what)
        if isinstance(event, StepAttemptFailed):
            self._backoff(called, event, at, what)

    def _limit(self, life: Life, called: Called, what: str) -> None:
        """5. An attempt is cut off when it has had its time, by the clock that processes measure it with."""
        self.world.marks["attempt cut off"] += 1
        had = (self.world.now - called.opened) * (1 + DRIFT_MAX)
        if had < min(life.slow):
            raise Violated(f"{what} was cut off after {had:.3f} s, its program gives it {min(life.slow)} s (5)")

    def _backoff(self, called: Called, event: StepAttemptFailed, at: int, what: str) -> None:
        """5. The next attempt comes as late as the policy of the step says, within its jitter."""
        self.world.marks["attempt to be tried again"] += 1
        retry = programs.RETRY
        if called.is_slow:
            retry = sf.Retry(max_attempts=SLOW_ATTEMPTS, initial=SLOW_INITIAL)
        least, most = bounds_ms(
            event.attempt,
            initial=float(retry.initial),  # type: ignore[arg-type]  # it keeps them in seconds
            factor=retry.factor,
            most=float(retry.max_delay),  # type: ignore[arg-type]
            jitter=retry.jitter,
        )
        # A report from a queue says how long to wait from when it is taken. Here, the turn follows the failure, and the
        # failure the beginning.
        failed_at = at if called.queue is not None else max(called.opened_at, event.started_at)
        if event.retry_at < failed_at + int(least) - ROUNDED_MS:
            raise Violated(
                f"{what} is tried again {event.retry_at - failed_at} ms after it began, its policy says "
                f"{least:.0f} ms (5)"
            )
        if event.retry_at > at + most + 2 * ROUNDED_MS:
            raise Violated(
                f"{what} is tried again {event.retry_at - at} ms later, its policy says {most:.0f} ms at most (5)"
            )


def _take(life: Life, ask: Ask, where: str) -> None:
    if not life.left[ask]:
        raise Violated(f"{where}: {_shown(ask)}, which its program does not ask for (any more) (5)")
    life.left[ask] -= 1


def _some(asks: Counter[Ask]) -> str:
    return ", ".join(map(_shown, list(asks)[:3]))


def _shown(ask: Ask) -> str:
    text: Any = str(ask)
    return f"{text[:100]}…" if len(text) > 100 else str(text)
