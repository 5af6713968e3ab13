"""What is let go or said to be done too early, and snapshots that lack something: see mutants.py.

Of some only who takes over next can tell: the worker must die at the right moment, and its store may be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast
from unittest import mock
from weakref import WeakKeyDictionary

from msgspec.structs import replace

from streamflow.codec.avro import decode_history, encode_history
from streamflow.codec.turns import for_snapshot
from streamflow.core.effects import Effect, StepTask
from streamflow.core.events import (
    Event,
    SignalReceived,
    StepAttemptFailed,
    StepCompleted,
    StepDue,
    TimerSet,
    Turn,
)
from streamflow.core.partition import Decided
from streamflow.logs.base import COMMANDS, HISTORY, Log, Outgoing
from streamflow.logs.writing import Writing
from streamflow.sim.cluster import Cluster
from streamflow.sim.log import SimLog
from streamflow.sim.programs import observer
from streamflow.worker import rederive, trimming
from streamflow.worker.executor import Attempt, AttemptOutcome, Executor
from streamflow.worker.processor import Processor
from streamflow.worker.queues import QueueReader, StepKey, Taken
from streamflow.worker.tasks import answer_to
from streamflow.worker.trimming import Snapshot, Trimmer
from tests.sim.mutating import Patch, both, mutation, swap

# -- the cut ---------------------------------------------------------------------------------------------------------


def _cutting(more: Callable[[Trimmer, str, int], int]) -> Patch:
    """What is cut off ends where `more` says, which is told the trimmer, the topic and where it should end."""
    begin = Trimmer.__init__

    class Cutting:
        def __init__(self, trimmer: Trimmer) -> None:
            self._trimmer, self._log = trimmer, trimmer.log

        def __getattr__(self, name: str) -> Any:
            return getattr(self._log, name)

        async def trim(self, topic: str, partition: int, before: int) -> int:
            return await self._log.trim(topic, partition, more(self._trimmer, topic, before))

    def init(self: Trimmer, processor: Processor) -> None:
        begin(self, processor)
        self.log = cast("Log", Cutting(self))

    return swap(Trimmer, "__init__", init)


@mutation("1", "4", seeds=1)
def cut_one_record_too_far() -> Patch:
    """The first record that must stay goes, too."""
    return _cutting(lambda trimmer, topic, before: before + (topic == HISTORY))


@mutation("1", "4", seeds=1)
def cut_at_the_end() -> Patch:
    """All that is applied goes, also what came while runs were copied forward."""
    return _cutting(lambda trimmer, topic, before: trimmer.state.applied_offset if topic == HISTORY else before)


@mutation("1", "4", "CorruptLog", seeds=2)
def cut_before_the_copies_are_durable() -> Patch:
    """Nobody waits for the snapshots."""
    usual = Processor.copy_forward

    async def copy_forward(self: Trimmer, start: int, cut: int) -> None:
        while rows := self.state.oldest(start, before=cut, limit=self.limits.snapshot_runs_at_once):
            start = rows[-1][0] + 1
            found = [self._snapshot(workflow_id) for _, workflow_id in rows]
            snapshots = [each for each in found if each is not None]
            if snapshots:
                usual(self.processor, snapshots)

    return swap(Trimmer, "_copy_forward", copy_forward)


@mutation("7", seeds=227)
def cut_before_all_is_published() -> Patch:
    """What follows from the head may be under way when that goes."""

    async def publish_up_to(self: Trimmer, cut: int) -> None: ...

    return swap(Trimmer, "_publish_up_to", publish_up_to)


@mutation("4", "CorruptLog", seeds=1)
def forget_the_last_of_the_runs() -> Patch:
    """Of those that must be copied one is not."""
    usual = Trimmer._copy_forward

    async def copy_forward(self: Trimmer, start: int, cut: int) -> None:
        rows = self.state.oldest(start, before=cut, limit=1_000)
        await usual(self, start, rows[-1][0] if rows else cut)

    return swap(Trimmer, "_copy_forward", copy_forward)


@mutation("6", seeds=2)
def delete_commands_that_are_not_consumed() -> Patch:
    """Old commands go, whether a turn holds them or not."""

    def end(trimmer: Trimmer, topic: str, before: int) -> int:
        return trimmer.processor.core.next_command + 1 if topic == COMMANDS else before

    return _cutting(end)


@mutation("6", seeds=1)
def delete_commands_whose_turns_are_not_durable() -> Patch:
    """What is decided counts for consumed."""

    async def trim_by_age(self: Trimmer) -> None:
        before = self.processor.core.consumed
        if before > await self.log.start_offset(COMMANDS, self.partition):
            await self.log.trim(COMMANDS, self.partition, before)

    return swap(Trimmer, "_trim_by_age", trim_by_age)


# -- snapshots -------------------------------------------------------------------------------------------------------


def _lacking(left: Callable[[Turn], Turn]) -> Patch:
    """Snapshots whose turns are as `left` leaves them."""

    def lacking(turns: Iterable[bytes], *, bytes_max: int) -> list[bytes]:
        kept = [encode_history(left(cast("Turn", decode_history(value)))) for value in turns]
        return for_snapshot(kept, bytes_max=bytes_max)

    return swap(trimming, "for_snapshot", lacking)


def _without(*gone: type[Event]) -> Patch:
    return _lacking(lambda turn: replace(turn, events=[each for each in turn.events if not isinstance(each, gone)]))


@mutation("4", "CorruptLog", seeds=5)
def copy_no_signals() -> Patch:
    """A copied run has received none."""
    return _without(SignalReceived)


@mutation("4", "CorruptLog", seeds=1)
def copy_no_timers() -> Patch:
    """A copied run sleeps for nothing."""
    return _without(TimerSet)


@mutation("4", "CorruptLog", seeds=1)
def copy_no_failed_attempts() -> Patch:
    """The attempts of a copied run are counted anew."""
    return _without(StepAttemptFailed, StepDue)


@mutation("4", seeds=1)
def copy_no_commands() -> Patch:
    """A copied run does not know which commands it has applied."""
    return _lacking(lambda turn: replace(turn, commands=[]))


@mutation("4", "CorruptLog", seeds=2)
def copy_no_turn_that_is_under_way() -> Patch:
    """A copied run is as it was when its last turn was applied."""
    usual = Trimmer._snapshot

    def snapshot(self: Trimmer, workflow_id: str) -> Snapshot | None:
        with mock.patch.object(self.processor, "under_way", return_value=[]):
            return usual(self, workflow_id)

    return swap(Trimmer, "_snapshot", snapshot)


# -- what is published -----------------------------------------------------------------------------------------------


@mutation("7", seeds=1)
def move_the_offset_before_what_it_stands_for() -> Patch:
    """The published offset goes out beside its records, not behind them."""
    usual = Processor._send

    def send(self: Processor, records: list[Outgoing], published: int | None) -> Any:
        if published is not None and records:
            self.log.publish([], published=(self.partition, published))
        return usual(self, records, published)

    return swap(Processor, "_send", send)


@mutation("7", seeds=7)
def move_the_offset_past_a_failed_publish() -> Patch:
    """What failed before does not hold up the published offset."""
    return swap(Writing, "void", lambda self, mark: None)


@mutation("7", seeds=15)
def derive_no_tombstone_again() -> Patch:
    """Of a run that is gone nothing is published any more."""
    usual = rederive._derived

    def derived(state: Any, workflow_id: str, first: int) -> list[Effect]:
        return usual(state, workflow_id, first) if state.turns(workflow_id) else []

    return swap(rederive, "_derived", derived)


# -- queues ----------------------------------------------------------------------------------------------------------


@mutation("6", seeds=2)
def commit_an_attempt_before_its_answer_is_there() -> Patch:
    """An attempt is done with when its code has ended."""

    def report(
        self: QueueReader, task: StepTask, key: StepKey, taken: Taken, info: Any, outcome: AttemptOutcome
    ) -> None:
        taken.ended = True
        answer = answer_to(task, outcome, now=self.clock.now_ms(), partitions=self.log.partitions)
        self._send(answer, partial(self._answered_now, key, taken))
        self._close(taken.offset)

    return swap(QueueReader, "_report", report)


@mutation("6", seeds=2)
def commit_an_attempt_when_it_begins() -> Patch:
    """What is taken is committed."""
    return mock.patch.object(QueueReader, "below", property(lambda self: self._next))


# -- the later lives of an id ----------------------------------------------------------------------------------------


def _in_later_lives(start: Callable[[Executor, Attempt], None]) -> Patch:
    """Attempts of ids that were cleaned up before begin by `start`."""
    deleted: WeakKeyDictionary[Cluster, set[str]] = WeakKeyDictionary()
    usual, start_usually = Processor._hand_over, Executor.start

    def hand_over(self: Processor, decided: Decided) -> None:
        assert isinstance(self.log, SimLog), self.log
        gone = {item.turn.workflow_id for item in decided.turns if item.deleted}
        deleted.setdefault(self.log._cluster, set()).update(gone)
        usual(self, decided)

    def begin(self: Executor, attempt: Attempt) -> None:
        owner = attempt.key.owner
        log = owner.log if isinstance(owner, Processor) else None
        known = deleted.get(log._cluster, set()) if isinstance(log, SimLog) else set()
        (start if attempt.info.workflow_id in known else start_usually)(self, attempt)

    return both(swap(Processor, "_hand_over", hand_over), swap(Executor, "start", begin))


@mutation("2", seeds=1)
def complete_a_step_of_a_later_life_without_running_it() -> Patch:
    """Where the id was cleaned up before, steps are reported as done, and were never called."""

    def start(self: Executor, attempt: Attempt) -> None:
        info = attempt.info
        done = StepCompleted(number=info.number, attempt=info.attempt, result=b"null")
        self._loop.call_soon(attempt.report, info, done)

    return _in_later_lives(start)


@mutation("3", seeds=1)
def call_a_step_of_a_later_life_again_and_again() -> Patch:
    """Where the id was cleaned up before, steps begin three times."""
    usual = Executor.start

    def start(self: Executor, attempt: Attempt) -> None:
        observer.get()(attempt.info)
        observer.get()(attempt.info)
        usual(self, attempt)

    return _in_later_lives(start)
