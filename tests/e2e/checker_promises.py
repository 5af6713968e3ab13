"""The promises about time, order and what is left at the end: more parts of `checker.py`, as functions of the facts.

Nothing is early by more than the clocks allow: processes and brokers share one machine, whose wall clock may be set
back by microseconds between two looks at it, and milliseconds are what is left of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

from tests.e2e.checker_history import EARLY, LOST, REORDERED, UNEXPLAINED, WRONG, History, RunFacts, Violation
from tests.e2e.checker_topics import Reading, Record, Topics, Value

CLOCK_MS: Final = 2
"""By so much two looks at one machine's clock may disagree."""
BEGUN_MS: Final = 100
"""By so much the first line of a step's code may come behind its begin, on a busy machine."""
RESENT_MS: Final = 4_000
"""A client sends again what is not answered after 5 s: a record that is in the log sooner is the first one."""
SETTLED_MS: Final = 10_000
"""What was deleted so shortly before the end may not have been told to other topics yet."""
AFTERMATH_MS: Final = 20_000
"""How long after a fault what it broke may be complained of: sessions end, and requests that wait for an answer."""
CANCELLED: Final = ("CancelledError", "TimeoutError")
"""What the code of a step sees when its time is over."""

Lines = Mapping[tuple[str, int], Sequence[Value]]
"""What the code of each step told, in the order of time."""


@dataclass(frozen=True)
class Policies:
    """What the app of the soak says about its steps, in ms: told by it, so that the checker need not read its code."""

    timeouts: Mapping[str, int] = field(default_factory=dict)
    """By the name of the step."""
    initial: float = 0.0
    factor: float = 1.0
    max_delay: float = 0.0
    jitter: float = 0.0
    retention: int | None = None

    def backoff_min(self, attempt: int) -> float:
        """The shortest delay between that attempt's failure and the next one."""
        return min(self.initial * self.factor ** (attempt - 1), self.max_delay) * (1 - self.jitter)


# ------------------------------------------------------------------------------------------------ the order of signals


def signals_in_order(history: History, topics: Topics, journal: Sequence[Value]) -> Iterator[Violation]:
    """Signals come in the order of the commands topic, and there they are as their sender sent them."""
    first: dict[tuple[str, str], Record] = {}
    for record in topics.commands:
        body = {} if record.value is None else record.value["body"]
        if body.get("kind") == "SignalWorkflow" and record.value is not None:
            first.setdefault((record.value["workflow_id"], body["name"]), record)
    for run in history.runs.values():
        offsets = [first[run.id, name].offset for name in run.signals if (run.id, name) in first]
        if offsets != sorted(offsets):
            yield Violation(REORDERED, f"run {run.id}: its signals came in the order of the offsets {offsets}")
        earlier: dict[str, int] = {}
        for index, name in enumerate(run.signals):
            if index in run.taken and earlier.get(name, index) < index:
                yield Violation(REORDERED, f"run {run.id}: signal {index} {name} is taken before an earlier {name}")
            if index not in run.taken:
                earlier.setdefault(name, index)
    yield from _as_sent(history, first, journal)


def _as_sent(
    history: History, first: Mapping[tuple[str, str], Record], journal: Sequence[Value]
) -> Iterator[Violation]:
    """Two signals to one run: if one was answered, or is known to be in the log, as sent, before the other was sent."""
    sent: dict[str, dict[str, Value]] = {}
    answered: dict[str, set[str]] = {}
    lives: dict[tuple[str, str], set[int]] = {}
    for line in journal:
        if line["what"] == "sending":
            lives.setdefault((line["id"], line["command"]), set()).add(line["life"])
    for line in journal:
        if line["what"] == "accepted":
            answered.setdefault(line["id"], set()).add(line["command"])
        if line["what"] != "sending" or line["command"] in sent.get(line["id"], {}):
            continue
        run, name = history.runs.get(line["id"]), line["command"]
        order = {} if run is None else {signal: index for index, signal in reversed([*enumerate(run.signals)])}
        for before, begun in sent.setdefault(line["id"], {}).items():
            one, other = first.get((line["id"], before)), first.get((line["id"], name))
            was_first = before in answered.get(line["id"], ()) or (
                lives[line["id"], before] == {line["life"]}  # else it is not known whose record came first
                and one is not None
                and one.at - begun["at"] < RESENT_MS
            )
            if not was_first:
                continue
            if before in order and name in order and order[before] > order[name]:
                yield Violation(
                    REORDERED, f"run {line['id']}: signal {name} came before {before}, which was sent first"
                )
            elif one is not None and other is not None and one.offset > other.offset:
                yield Violation(REORDERED, f"run {line['id']}: {name} is in the log before {before}, sent first")
        sent[line["id"]][name] = line


# ------------------------------------------------------------------------------------------------------ never too early


def starts_in_time(history: History, topics: Topics, journal: Sequence[Value], lines: Lines) -> Iterator[Violation]:
    """A delayed run does not begin, and a limited one is not ended, before what its client asked for has passed."""
    asked = {
        record.value["workflow_id"]: record.value["sent_at"]
        for record in reversed(topics.commands)
        if record.value is not None and record.value["body"]["kind"] == "StartWorkflow"
    }
    first_line: dict[str, int] = {}
    for (workflow_id, _), told in lines.items():
        first_line[workflow_id] = min(told[0]["at"], first_line.get(workflow_id, told[0]["at"]))
    for line in journal:
        run = history.runs.get(line.get("id", ""))
        if line["what"] != "intend" or run is None or run.created is None or run.id not in asked:
            continue
        if line.get("delay") is not None:
            due = asked[run.id] + round(1000 * line["delay"]) - CLOCK_MS
            begun = [
                ("is to begin", run.created["start_at"] or 0),
                *([] if run.started_at is None else [("began", min(run.started_at.at, run.started_at.turn_at))]),
                *([("ran code", first_line[run.id])] if run.id in first_line else []),
            ]
            for what, at in begun:
                if at < due:
                    yield Violation(EARLY, f"run {run.id}: it {what} {due - at} ms before its delay had passed")
        if line.get("timeout") is not None:
            due = asked[run.id] + round(1000 * line["timeout"]) - CLOCK_MS
            if (run.created["deadline_at"] or 0) < due:
                yield Violation(EARLY, f"run {run.id}: its deadline is before its timeout has passed")


def timeouts_in_time(
    history: History, lines: Lines, faults: Sequence[Value], policies: Policies
) -> Iterator[Violation]:
    """An attempt is not cut off before its timeout: by what is recorded, and by what its code saw."""
    for run in history.runs.values():
        for number, step in run.steps.items():
            limit = policies.timeouts.get(step.event["name"])
            cut_off = [*step.failures.values(), *([] if step.outcome is None else [step.outcome])]
            if limit is None:
                continue
            for event, where in cut_off:
                if not event["kind"].endswith("Failed") or not event["error"]["type"].endswith("TimeoutError"):
                    continue
                name = f"run {run.id}: step {number} {step.event['name']}, attempt {event['attempt']}"
                took = min(where.at, where.turn_at) - event["started_at"]
                if event["started_at"] and took < limit - CLOCK_MS:
                    yield Violation(EARLY, f"{name} was given up after {took} of {limit} ms")
                pid = _owner(history, run, where.offset)
                mine = [
                    x for x in lines.get((run.id, number), ()) if (x["attempt"], x["pid"]) == (event["attempt"], pid)
                ]
                began = max((x["at"] for x in mine if x["what"] == "began"), default=None)
                ended = [x["at"] for x in mine if x["what"] == "failed" and x["error"] in CANCELLED]
                saw = None if began is None else min((at - began for at in ended if at >= began), default=None)
                if began is None or saw is None or saw >= limit - BEGUN_MS:
                    continue
                # A process that was paused between the begin of the attempt and of its code has less of it left.
                if not _overlaps(faults, began - limit, began + saw, ("worker",)):
                    yield Violation(EARLY, f"{name}: its code was cut off after {saw} of {limit} ms")


def _owner(history: History, run: RunFacts, offset: int) -> int:
    claims = [claim for claim in history.partitions[run.partition].claims if claim.offset < offset]
    return claims[-1].pid if claims else -1


def _overlaps(faults: Iterable[Value], begin: int, end: int, groups: tuple[str, ...], after: int = 0) -> bool:
    return any(
        fault["group"] in groups and fault["began"] <= end and fault["ended"] + after >= begin for fault in faults
    )


def backoffs_in_time(history: History, lines: Lines, policies: Policies) -> Iterator[Violation]:
    """The next attempt is not before the shortest delay of the retry policy has passed since the code failed."""
    for run in history.runs.values():
        for number, step in run.steps.items():
            told = lines.get((run.id, number), ())
            for attempt, (event, where) in step.failures.items():
                failed = [x["at"] for x in told if x["attempt"] == attempt and x["what"] == "failed"]
                failed_at = min([at for at in failed if at <= where.at], default=None)
                if failed_at is None:
                    continue
                name = f"run {run.id}: step {number} {step.event['name']}, attempt {attempt + 1}"
                due = failed_at + policies.backoff_min(attempt) - CLOCK_MS
                if event["retry_at"] < due:
                    yield Violation(EARLY, f"{name} is due {due - event['retry_at']:.0f} ms before its backoff is over")
                next_at = min([x["at"] for x in told if x["attempt"] == attempt + 1], default=None)
                if next_at is not None and next_at < due:
                    yield Violation(EARLY, f"{name} began {due - next_at:.0f} ms before its backoff was over")


def retentions_in_time(history: History, policies: Policies) -> Iterator[Violation]:
    """A closed run is deleted no sooner than its retention has passed."""
    for run in history.runs.values():
        if policies.retention is None or run.closed_at is None:
            continue
        kept_until = min(run.closed_at.at, run.closed_at.turn_at) + policies.retention - CLOCK_MS
        if run.delete_at is not None and run.delete_at < kept_until:
            yield Violation(EARLY, f"run {run.id}: it is to be deleted {kept_until - run.delete_at} ms too soon")
        if run.deleted_at is not None and min(run.deleted_at.at, run.deleted_at.turn_at) < kept_until:
            yield Violation(EARLY, f"run {run.id}: it was deleted before its retention had passed")
        if run.deleted_at is not None and run.delete_at is None:
            yield Violation(EARLY, f"run {run.id}: it was deleted, and nobody asked for it")


# ---------------------------------------------------------------------------------------------- what is left at the end


def timers_left(history: History, topics: Topics) -> Iterator[Violation]:
    """Of each timer the last record counts, as compaction leaves it; a closed run has but that of its deletion.

    What an owner sent before it lost its partition may arrive behind its successor's tombstone. Nobody looks for that:
    it is dropped when it is due.
    """
    last: dict[tuple[int, bytes], Record] = {}
    dropped: set[tuple[int, bytes]] = set()
    for record in topics.timers:
        last[record.partition, record.key] = record
        if record.value is None:
            dropped.add((record.partition, record.key))
    ended_at = max([record.at for record in topics.history], default=0)
    for record in last.values():
        timer = record.value
        if timer is None:
            continue
        run = history.runs.get(timer["workflow_id"])
        name = f"run {timer['workflow_id']}: its {timer['kind']} timer {timer['number']}"
        if run is None or run.created is None:
            yield Violation(WRONG, f"{name} is on the topic, and there is no such run")
        elif timer["kind"] == "retention":
            if run.deleted_at is not None and run.deleted_at.at + SETTLED_MS < ended_at:
                yield Violation(WRONG, f"{name} is left, and the run was deleted")
            elif run.deleted_at is None and timer["fire_at"] != run.delete_at:
                yield Violation(WRONG, f"{name} says {timer['fire_at']}, its history {run.delete_at}")
        elif run.closed_at is not None:
            came_late = (record.partition, record.key) in dropped and timer["fire_at"] > ended_at
            if not came_late:
                yield Violation(WRONG, f"{name} is left, and the run is {run.state}")
    for run in history.runs.values():
        is_left = run.delete_at is not None and run.deleted_at is None
        if is_left and not any(
            record.value is not None and (record.value["workflow_id"], record.value["kind"]) == (run.id, "retention")
            for record in last.values()
        ):
            yield Violation(LOST, f"run {run.id}: it waits for its deletion, and has no timer")


def trimmed(history: History, topics: Topics) -> Iterator[Violation]:
    """Who begins at the head of a log that was trimmed finds each run that is not deleted, and all of its turns."""
    if topics.history_left is None:
        return
    readings: dict[int, Reading] = {}
    found: dict[str, list[tuple[int, list[Value]]]] = {}
    for record in topics.history_left:
        reading = readings.setdefault(record.partition, Reading())
        value = record.value
        if value is None or not reading.counts(value) or value["kind"] in ("Claim", "Consumed"):
            continue
        whole = reading.whole(value)
        if whole is not None:
            _fold(found, whole)
    for run in history.runs.values():
        log = found.get(run.id)
        if run.deleted_at is not None:
            if log is not None:
                yield Violation(WRONG, f"run {run.id}: it was deleted, and is back for who begins at the head")
        elif log != run.log:
            turns = "none of its turns" if log is None else f"turns up to {log[-1][0]} or others"
            yield Violation(LOST, f"run {run.id}: who begins at the trimmed head finds {turns}, it has {run.turn}")


def _fold(found: dict[str, list[tuple[int, list[Value]]]], whole: Value) -> None:
    """What the log from its head on says of the run: from its first turn, or from a snapshot."""
    workflow_id = whole["workflow_id"]
    if whole["kind"] == "RunSnapshot":
        inner = Reading()
        turns = [turn for turn in map(inner.whole, whole["turns"]) if turn is not None]
        found[workflow_id] = [(turn["turn"], turn["events"]) for turn in turns]
        return
    log = found.setdefault(workflow_id, []) if whole["turn"] == 1 else found.get(workflow_id)
    if log is None:  # its beginning was cut off: its snapshot is still to come
        return
    log.append((whole["turn"], whole["events"]))
    if any(event["kind"] == "RunDeleted" for event in whole["events"]):
        del found[workflow_id]


# --------------------------------------------------------------------------------------------------- what workers said


class Allowed(NamedTuple):
    """A line at ERROR that a fault explains: who says it, how it begins, the groups that were hurt, and why."""

    logger: str
    text: str
    groups: tuple[str, ...]
    why: str


ALLOWED: Final[tuple[Allowed, ...]] = ()
"""Nothing as yet: what faults do to workers and brokers is foreseen, and said as a warning."""

_LINE: Final = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (ERROR|CRITICAL) +([\w.]+): (.*)")


def errors_explained(
    said: Mapping[str, str], faults: Sequence[Value], allowed: Sequence[Allowed] = ALLOWED
) -> Iterator[Violation]:
    """No process says anything at ERROR that no fault explains. `said` is what each wrote to its log, by name."""
    for name, text in said.items():
        for line in text.splitlines():
            if line.startswith("Traceback "):
                continue  # of the line before it, or of a process that ended: a death is told of its own
            if (found := _LINE.match(line)) is None:
                continue
            when, ms, level, logger, what = found.groups()
            at = round(datetime.fromisoformat(when).timestamp()) * 1000 + int(ms)
            if not any(
                logger == each.logger
                and what.startswith(each.text)
                and _overlaps(faults, at, at, each.groups, AFTERMATH_MS)
                for each in allowed
            ):
                yield Violation(UNEXPLAINED, f"{name} said at {level}: {logger}: {what[:300]}")
