"""What is shown of a run while it goes on: its state, its progress, and what it waits for.

A status is held against a fold that is written here once more, of what little it shows: the product's own fold made the
status. It may come late, and a turn's number may come again once its run was deleted, so what each turn has to show is
kept by the instant at which its run was created.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeAlias

from streamflow.codec.avro import decode_status
from streamflow.core.events import (
    Event,
    ProgressSet,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunDeleted,
    RunFailed,
    RunStarted,
    RunTerminated,
    SignalAwaited,
    SignalTaken,
    SignalWaitCancelled,
    StepAttemptFailed,
    StepCancelled,
    StepCompleted,
    StepDue,
    StepFailed,
    StepScheduled,
    TimerCancelled,
    TimerFired,
    TimerSet,
    Turn,
)
from streamflow.logs.base import STATUS
from streamflow.projections.views import RunStatus
from streamflow.sim import asked
from streamflow.sim.cluster import Cluster
from streamflow.sim.rules import STATES, Violated

ENDS: Final = {kind: state for state, kind in STATES.items()}
LISTED_MAX: Final = 10
"""What a run waits for is shown up to so many entries, and then how many more there are."""
INSTANT_DIGITS_MIN: Final = 12
DATE: Final = re.compile(r"\d{4}-\d\d-\d\dT\S+Z")

Position: TypeAlias = tuple[int, int, int]
"""Where a status stands among those of its id: when its run was created, which run it is, and its turn."""


class Wait(NamedTuple):
    """Something that a run waits for, as it must be named: a person who reads it finds all of these words in it."""

    words: tuple[str, ...]
    until: int | None = None
    """The instant up to which it waits at most, in milliseconds."""
    attempt: int = 1


@dataclass(frozen=True)
class Shown:
    """What a turn leaves to be shown."""

    state: str
    progress: bytes | None = None
    waits: tuple[Wait, ...] = ()


@dataclass
class _Life:
    created_at: int
    run: int
    shows_progress: bool
    now: Shown
    waits: dict[int, Wait] = field(default_factory=dict)


class Statuses:
    """All statuses of one world, as they land and as clients get them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._lives: dict[str, _Life] = {}
        self._shown: dict[tuple[str, Position], Shown] = {}
        self.landed: dict[str, list[tuple[int, Position | None]]] = {}
        """By id, the offset and the position of each status that landed; None is a tombstone."""
        cluster.landed.append(self._landed)

    # -- the fold ----------------------------------------------------------------------------------------------------

    def turn(self, turn: Turn, events: Sequence[Event]) -> None:
        """A valid turn: what is shown after it."""
        workflow_id = turn.workflow_id
        for event in events:
            if isinstance(event, RunCreated):
                waits = () if event.start_at is None else (Wait(("start",), event.start_at),)
                shows = asked.shows_progress(json.loads(event.args)[0])
                self._lives[workflow_id] = _Life(turn.at, event.run, shows, Shown("scheduled", None, waits))
            elif isinstance(event, RunDeleted):
                self._lives.pop(workflow_id, None)
            elif (life := self._lives.get(workflow_id)) is not None:
                _fold(life, event)
        if (life := self._lives.get(workflow_id)) is not None:
            if life.now.state == "running":
                life.now = replace(life.now, waits=tuple(life.waits.values()))
            self._shown[workflow_id, (life.created_at, life.run, turn.turn)] = life.now

    # -- what is held against it -------------------------------------------------------------------------------------

    def _landed(self, topic: str, partition: int, offset: int) -> None:
        if topic != STATUS:
            return
        record = self.cluster.stream(topic, partition).records[-1]
        landed = self.landed.setdefault(record.key.decode(), [])
        if record.value is None:
            landed.append((offset, None))
            return
        status = decode_status(record.value)
        position = (status.created_at, status.run, status.turn)
        landed.append((offset, position))
        progress = None if status.progress is None else json.loads(status.progress)
        self._judge(status.workflow_id, position, status.state, progress, status.waiting_on)

    def current(self, workflow_id: str) -> Shown | None:
        """What is to be shown of a run now; None if there is none."""
        life = self._lives.get(workflow_id)
        return None if life is None else life.now

    def seen(self, status: RunStatus) -> Position:
        """7. A client was shown this: what some turn of the run leaves to be shown. Raises `Violated`."""
        assert status.created_at is not None, status
        position = (round(status.created_at.timestamp() * 1000), status.run, status.turn)
        self._judge(status.id, position, status.state, status.progress, status.waiting_on)
        return position

    def _judge(self, workflow_id: str, position: Position, state: str, progress: Any, waiting_on: list[str]) -> None:
        """7. State, progress and what is waited for are those of the turn."""
        where = f"run {workflow_id}: a status of turn {position[2]}"
        shown = self._shown.get((workflow_id, position))
        if shown is None:
            raise Violated(f"{where} is of no valid turn of a run that began at {position[0]} (2)")
        if state != shown.state:
            raise Violated(f"{where} says {state}, after it the run is {shown.state} (7)")
        if progress != (None if shown.progress is None else json.loads(shown.progress)):
            raise Violated(f"{where} shows progress {progress}, after it it is {shown.progress!r} (7)")
        listed, waits = waiting_on[:LISTED_MAX], shown.waits
        more = len(waits) - LISTED_MAX
        if len(listed) != min(len(waits), LISTED_MAX) or (more > 0) != (len(waiting_on) > LISTED_MAX):
            raise Violated(f"{where} says that it waits for {waiting_on}, it waits for {waits} (7)")
        if more > 0 and str(more) not in waiting_on[LISTED_MAX].split():
            raise Violated(f"{where} says {waiting_on[LISTED_MAX]!r} of {more} things that it waits for (7)")
        for text, wait in zip(listed, waits[:LISTED_MAX], strict=True):
            if not _names(text, wait):
                raise Violated(f"{where} says that it waits for {text!r}, it waits for {wait} (7)")


def _names(text: str, wait: Wait) -> bool:
    """Whether a person finds in the text what is waited for, until when, and which attempt it is; and nothing else."""
    words = text.replace("(", " ").replace(")", " ").split()
    until = [at for word in words if (at := _instant(word)) is not None]
    if not set(wait.words) <= set(words) or until != ([] if wait.until is None else [wait.until]):
        return False
    said = [words[index + 1] for index, word in enumerate(words[:-1]) if word == "attempt"]
    return said in ([str(wait.attempt)], [] if wait.attempt == 1 else [str(wait.attempt)])


def _instant(word: str) -> int | None:
    """The milliseconds that the word says: on the topic as they are, to clients as a date."""
    if word.isdecimal():
        return int(word) if len(word) >= INSTANT_DIGITS_MIN else None
    return round(datetime.fromisoformat(word).timestamp() * 1000) if DATE.fullmatch(word) else None


def _fold(life: _Life, event: Event) -> None:
    waits = life.waits
    match event:
        case RunStarted():
            life.now = replace(life.now, state="running", waits=())
        case ProgressSet(value=value):
            if not life.shows_progress:
                raise Violated(f"progress {value!r}, of a program that has none (7)")
            life.now = replace(life.now, progress=value)
        case RunCompleted() | RunFailed() | RunCancelled() | RunTerminated():
            life.now = replace(life.now, state=ENDS[type(event)], waits=())
        case StepScheduled(number=number, name=name, start_at=start_at):
            waits[number] = Wait(("step", name), start_at)  # where its attempt runs is not always said
        case StepDue(number=number):
            waits[number] = waits[number]._replace(until=None)
        case StepAttemptFailed(number=number, retry_at=retry_at):
            waits[number] = waits[number]._replace(until=retry_at, attempt=event.attempt + 1)
        case TimerSet(number=number, name=name, fire_at=fire_at):
            waits[number] = Wait((name,), fire_at)
        case SignalAwaited(number=number, name=name):
            waits[number] = Wait(("signal", name))
        case (
            StepCompleted(number=number)
            | StepFailed(number=number)
            | StepCancelled(number=number)
            | TimerFired(number=number)
            | TimerCancelled(number=number)
            | SignalTaken(number=number)
            | SignalWaitCancelled(number=number)
        ):
            waits.pop(number, None)
