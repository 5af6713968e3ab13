"""The product broken on purpose, one plausible mistake at a time.

Each mutation says how it is found: the number of the invariant in streamflow/sim/rules.py that it breaks, "outcome" for
a run that returns the wrong thing, "refused" for a client that is refused or told wrong, "endless" for a run that never
ends; and how many seeds, from 0 on, were enough when that was last looked at: the search begins with the last of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from msgspec.structs import replace

import streamflow as sf
import streamflow.worker.worker
from streamflow.core import partition, replay
from streamflow.core.commands import Command, SignalWorkflow
from streamflow.core.derive import effects_since
from streamflow.core.effects import Effect, SetTimer, StartAttempt, TimerRecord
from streamflow.core.events import (
    Claim,
    RunTerminated,
    StepAttemptFailed,
    StepCompleted,
    StepDue,
    StepScheduled,
    Turn,
)
from streamflow.core.inputs import Inputs
from streamflow.core.machines import run as run_machine
from streamflow.core.machines import step
from streamflow.core.machines.run import Run
from streamflow.core.machines.table import next_state
from streamflow.core.partition import Decided, Partition
from streamflow.core.reading import ReadingRule
from streamflow.core.replay import Execution
from streamflow.logs.base import TIMERS, Log, Outgoing
from streamflow.worker import intake, outbox, processor, rederive, restore
from streamflow.worker.ending import error_of
from streamflow.worker.intake import Intake
from streamflow.worker.processor import Processor
from streamflow.worker.restore import Restorer
from streamflow.worker.state import Entry, PartitionRow, PartitionState, change_of
from streamflow.worker.statuses import Statuses
from streamflow.worker.timers import TimerService
from streamflow.workflow.order import OrderedFuture
from tests.sim.mutating import Patch, both, mutation, swap

# -- one owner: the claim and the reading rule -----------------------------------------------------------------------


@mutation("1", "2", "3", seeds=1)
def skip_the_claim() -> Patch:
    """Who takes over goes on where the last owner stopped, under its term."""

    async def take_over(self: Processor) -> None:
        restorer = Restorer(self.state, self.partition)
        await restorer.run(self.log)
        restorer.parts.drop()
        self.clock.advance_to(restorer.at)
        self._next_offset = restorer.offset
        self.core = Partition(self, self.code_of, term=restorer.rule.term, consumed=restorer.consumed)
        self.core.at, self.core.seq = max(restorer.at, self.clock.now_ms()), restorer.rule.seq
        await self._publish_again()

    return swap(Processor, "_take_over", take_over)


@mutation("1", "2", "3", "4", seeds=1)
def reuse_a_term() -> Patch:
    """A claim of the term that the last owner had."""

    def claim(term: int, owner: str, at: int) -> Claim:
        return Claim(term=max(1, term - 1), owner=owner, at=at)

    return swap(processor, "Claim", claim)


@mutation("1", "2", "4", seeds=1)
def accept_a_gap() -> Patch:
    """What follows a lost record counts."""

    def accepts(self: ReadingRule, record: Any) -> bool:
        if isinstance(record, Claim):
            if self.started and record.term <= self.term:
                return False
            self.term, self.seq = record.term, 0
        elif self.started and (record.term != self.term or record.seq <= self.seq):
            return False
        else:
            self.seq = record.seq
        self.started = True
        return True

    return swap(ReadingRule, "accepts", accepts)


@mutation("1", "4", "endless", "CorruptLog", seeds=5)
def accept_a_repeat() -> Patch:
    """A record that the log has twice counts twice."""
    usual = ReadingRule.accepts

    def accepts(self: ReadingRule, record: Any) -> bool:
        if not isinstance(record, Claim) and self.started and (record.term, record.seq) == (self.term, self.seq):
            return True
        return usual(self, record)

    return swap(ReadingRule, "accepts", accepts)


@mutation("1", "2", "4", "endless", "CorruptLog", seeds=2)
def accept_old_terms() -> Patch:
    """What a deposed owner still writes counts."""
    usual = ReadingRule.accepts

    def accepts(self: ReadingRule, record: Any) -> bool:
        if not isinstance(record, Claim) and self.started and record.term < self.term:
            return True
        return usual(self, record)

    return swap(ReadingRule, "accepts", accepts)


@mutation("1", "2", "4", seeds=1)
def take_a_failed_append_for_a_good_one() -> Patch:
    """The owner does not look at what became of its append."""
    usual = Processor._acknowledged

    def acknowledged(self: Processor, future: Any) -> None:
        if error_of(future) is not None:
            future = self._loop.create_future()
            future.set_result(0)
        usual(self, future)

    return swap(Processor, "_acknowledged", acknowledged)


@mutation("1", "4", "7", seeds=1)
def restore_one_record_less() -> Patch:
    """A store that is opened again is taken for one record older than it is."""
    usual = Restorer.__init__

    def init(self: Restorer, *args: Any, **options: Any) -> None:
        usual(self, *args, **options)
        self.rule.seq = max(0, self.rule.seq - 1)

    return swap(Restorer, "__init__", init)


@mutation("1", "4", seeds=8)
def forget_the_time_of_the_log() -> Patch:
    """Who takes over goes by its own clock alone."""
    usual = Restorer.run

    async def run(self: Restorer, log: Any) -> None:
        await usual(self, log)
        self.at = 0

    return swap(Restorer, "run", run)


# -- durable first ---------------------------------------------------------------------------------------------------


@mutation("2", seeds=1)
def run_steps_before_the_acknowledgement() -> Patch:
    """An attempt begins as soon as its turn is decided."""
    usual = Processor._hand_over

    def hand_over(self: Processor, decided: Decided) -> None:
        usual(self, decided)
        for item in decided.turns:
            self._perform_local(item.turn.workflow_id, item.effects)

    return swap(Processor, "_hand_over", hand_over)


@mutation("2", seeds=1)
def publish_before_the_acknowledgement() -> Patch:
    """Timers, statuses and replies leave as soon as their turn is decided."""
    usual = Processor._hand_over

    def hand_over(self: Processor, decided: Decided) -> None:
        usual(self, decided)
        records = [each for item in decided.turns for each in self._outgoing(item.effects, item.turn.workflow_id)]
        self.log.publish(records)

    return swap(Processor, "_hand_over", hand_over)


@mutation("2", "refused", "endless", seeds=7)
def answer_before_the_acknowledgement() -> Patch:
    """A command that changes nothing is answered at once, though what it found is not durable yet."""

    def answer(self: Processor, answers: list[Outgoing]) -> None:
        self._publish(answers, None)

    return swap(Processor, "_answer_when_durable", answer)


# -- the outbox ------------------------------------------------------------------------------------------------------


@mutation("7", "endless", seeds=1)
def derive_nothing_again() -> Patch:
    """Who takes over takes everything for published."""

    async def again(log: Log, partition: int, state: PartitionState, end: int, outgoing_of: Any) -> int:
        await log.published_offset(partition)
        await log.publish([], published=(partition, end))
        return end

    return swap(processor, "publish_again", again)


@mutation("7", "endless", seeds=1)
def derive_again_behind_the_first_turn() -> Patch:
    """Of each run the first turn whose effects may be missing is left out."""
    usual = effects_since

    def since(turns: Sequence[Turn], first: int) -> Any:
        return usual(turns, first + 1)

    return swap(rederive, "effects_since", since)


@mutation("7", "endless", seeds=6)
def move_the_published_offset_first() -> Patch:
    """The offset up to which all is published goes out before what it stands for."""

    async def again(log: Log, partition: int, state: PartitionState, end: int, outgoing_of: Any) -> int:
        offset = await log.published_offset(partition)
        await log.publish([], published=(partition, end))
        first_turns = await restore.first_turns_since(log, partition, offset, end)
        for workflow_id, first in first_turns.items():
            await log.publish(outgoing_of(rederive._derived(state, workflow_id, first), workflow_id))
        return end

    return swap(processor, "publish_again", again)


@mutation("7", "endless", seeds=1)
def drop_a_timer_now_and_then() -> Patch:
    """An entry of the outbox is lost."""
    usual, calls = outbox.outgoing, 0

    def outgoing(*args: Any, **options: Any) -> list[Outgoing]:
        nonlocal calls
        calls += 1
        return [each for each in usual(*args, **options) if each.topic != TIMERS or calls % 7]

    return swap(processor, "outgoing", outgoing)


@mutation("7", seeds=2)
def lose_tombstones() -> Patch:
    """Timers that are over stay on their topic."""
    usual = outbox.outgoing

    def outgoing(*args: Any, **options: Any) -> list[Outgoing]:
        return [each for each in usual(*args, **options) if each.topic != TIMERS or each.value is not None]

    return swap(processor, "outgoing", outgoing)


@mutation("7", seeds=295)
def leave_late_statuses() -> Patch:
    """What an earlier owner published late stays the last word."""

    async def run(self: Statuses) -> None: ...

    return swap(Statuses, "run", run)


# -- commands --------------------------------------------------------------------------------------------------------


@mutation("1", "4", seeds=1)
def forget_what_was_consumed() -> Patch:
    """The offset of the commands that turns hold does not reach the store."""

    def row(self: Restorer) -> PartitionRow:
        return PartitionRow(self.rule.term, self.rule.seq, self.rule.started, 0, self.at)

    return swap(Restorer, "row", row)


@mutation("3", seeds=7)
def apply_a_command_twice() -> Patch:
    """A command that comes again is applied again."""
    usual = Inputs.command

    def command(self: Inputs, execution: Execution, command: Command) -> Any:
        known, execution.run.commands = execution.run.commands, {}
        verdict = usual(self, execution, command)
        execution.run.commands = known
        return verdict

    return swap(Inputs, "command", command)


@mutation("3", seeds=14)
def forget_applied_commands_on_replay() -> Patch:
    """Who loads a run from its turns does not know the commands in them."""
    usual = Run.fold

    def fold(self: Run, turn: Turn) -> list[Effect]:
        effects = usual(self, turn)
        self.commands = {}
        return effects

    return swap(Run, "fold", fold)


@mutation("1", "2", "3", "7", "endless", seeds=4)
def keep_what_is_of_another_partition() -> Patch:
    """A command on the wrong partition is applied there."""

    def home(workflow_id: str, partitions: int) -> int:
        return here[-1]

    here: list[int] = []
    usual = Intake.sort

    def sort(self: Intake, records: Any) -> Any:
        here.append(self.partition)
        return usual(self, records)

    return both(swap(Intake, "sort", sort), swap(intake, "partition_of", home))


# -- runs and steps --------------------------------------------------------------------------------------------------


@mutation("endless", seeds=1)
def forget_open_attempts() -> Patch:
    """Who takes over does not run again what ran."""
    return swap(PartitionState, "needing_attention", lambda self: [])


@mutation("4", seeds=1)
def restore_without_open_attempts() -> Patch:
    """A restored state does not say which runs have attempts to run again."""
    usual = change_of

    def changed(*args: Any, **options: Any) -> Any:
        return replace(usual(*args, **options), attention=False)

    return swap(restore, "change_of", changed)


@mutation("3", "endless", seeds=4)
def keep_the_attempt_number() -> Patch:
    """A step that is tried again has the number of the attempt that failed."""
    usual = step.evolve

    def evolve(found: step.Step, event: Any, workflow_id: str, run: int) -> list[Effect]:
        effects = usual(found, event, workflow_id, run)
        if not isinstance(event, StepAttemptFailed):
            return effects
        found.attempt -= 1
        return [SetTimer(found.timer(workflow_id, run))]

    return swap(step, "evolve", evolve)


@mutation("3", seeds=13)
def begin_again_what_may_run_once() -> Patch:
    """Who takes over runs what ran at its owner's death, also where it must fail it."""
    return mock.patch.object(partition, "StepState", SimpleNamespace(STARTED=None))


@mutation("3", seeds=2)
def record_no_start() -> Patch:
    """A step that may run once begins without its start in the log."""
    usual = step.Step.begin

    def begin(self: step.Step, workflow_id: str, run: int) -> list[Effect]:
        return usual(replace(self, at_most_once=False), workflow_id, run)

    return swap(step.Step, "begin", begin)


@mutation("2", seeds=3)
def start_delayed_steps_at_once() -> Patch:
    """The delay of a step is not waited for."""
    usual = step.create

    def create(event: StepScheduled, workflow_id: str, run: int, at: int) -> Any:
        found, effects = usual(event, workflow_id, run, at)
        return found, [*effects, *([] if event.start_at is None else [StartAttempt(run, event.number, 1)])]

    def start(self: Processor, *args: Any) -> None:
        with mock.patch.object(step.Step, "accepts", return_value=True):
            start_usually(self, *args)

    start_usually = Processor._start
    return both(swap(step, "create", create), swap(Processor, "_start", start))


@mutation("5", seeds=148)
def forget_the_delay_when_taking_over() -> Patch:
    """Who takes over takes the steps that wait for their next attempt for due."""
    usual = Partition._resume

    def resume(self: Partition, execution: Execution) -> None:
        usual(self, execution)
        for found in list(execution.run.decisions.values()):
            if isinstance(found, step.Step) and found.awaits_timer(found.attempt):
                execution.take(StepDue(number=found.number, attempt=found.attempt))

    return swap(Partition, "_resume", resume)


@mutation("5", seeds=2)
def let_outcomes_into_a_terminated_run() -> Patch:
    """To terminate a run sets its state, and stops nothing."""

    def terminated(run: Run, event: Any, at: int) -> list[Effect]:
        run.state = next_state(run_machine.TRANSITIONS, run.state, event, who=run.workflow_id)
        run.closed_at, run.reason = at, event.reason
        return []

    return mock.patch.dict(run_machine.APPLY, {RunTerminated: terminated})


@mutation("4", seeds=30)
def replay_outcomes_by_their_number() -> Patch:
    """The outcomes of a gather come in the order of its arguments."""
    usual: Any = replay._of_current_run

    def of_current_run(turns: Sequence[Turn]) -> list[tuple[int, Any]]:
        events: list[tuple[int, Any]] = usual(turns)
        places = [place for place, (_, event) in enumerate(events) if isinstance(event, StepCompleted)]
        ordered = sorted((events[place] for place in places), key=lambda each: each[1].number)
        for place, event in zip(places, ordered, strict=True):
            events[place] = event
        return events

    return swap(replay, "_of_current_run", of_current_run)


@mutation("outcome", "4", seeds=2)
def replay_at_the_present_time() -> Patch:
    """Replayed code sees the time of the replay."""
    usual = Execution._settle

    def settle(self: Execution, at: int) -> None:
        usual(self, self.at)

    return swap(Execution, "_settle", settle)


@mutation("1", "5", "outcome", seeds=1)
def load_a_run_without_its_turns_under_way() -> Patch:
    """A run that comes back to memory knows only what is durable."""

    def turns(self: Processor, workflow_id: str) -> list[Turn]:
        return self.state.current_turns(workflow_id)

    return swap(Processor, "turns", turns)


@mutation("4", seeds=1)
def restore_a_wrong_first_turn() -> Patch:
    """The summary of a restored run says that its run began a turn earlier."""
    usual = change_of

    def changed(run: Run, turn: Turn, value: bytes, **options: Any) -> Any:
        first, run.first_turn = run.first_turn, max(0, run.first_turn - 1)
        try:
            return usual(run, turn, value, **options)
        finally:
            run.first_turn = first

    return swap(restore, "change_of", changed)


# -- signals ---------------------------------------------------------------------------------------------------------


@mutation("2", "endless", seeds=1)
def drop_a_signal_that_nobody_awaits_yet() -> Patch:
    """A signal that comes before its wait is lost."""
    usual = Inputs.command

    def command(self: Inputs, execution: Execution, command: Command) -> Any:
        body = command.body
        if isinstance(body, SignalWorkflow) and body.name not in execution.run.mailbox.waiting:
            return b"null"
        return usual(self, execution, command)

    return swap(Inputs, "command", command)


@mutation("5", "endless", seeds=1)
def wait_for_a_signal_for_ever() -> Patch:
    """The timeout of a wait is forgotten."""
    usual = sf.wait_signal

    async def wait_signal(name: str, type: Any = Any, timeout: Any = None) -> Any:
        return await usual(name, type)

    return swap(sf, "wait_signal", wait_signal)


# -- timers ----------------------------------------------------------------------------------------------------------


class Early(int):
    """An instant that is never in the future."""

    def __gt__(self, other: object) -> bool:
        return False


@mutation("5", seeds=10)
def fire_timers_early() -> Patch:
    """Timers are due 0.4 s before their time."""
    usual, due_at = TimerRecord.fire_at_of, Run.timer_due_at

    def fire_at_of(key: bytes) -> int:
        return max(0, usual(key) - 400)

    return both(
        mock.patch.object(TimerRecord, "fire_at_of", fire_at_of),
        swap(Run, "timer_due_at", lambda self, kind, number: Early(due_at(self, kind, number))),
    )


@mutation("endless", seeds=1)
def look_for_no_earlier_timer() -> Patch:
    """A timer that is due before all known ones is not looked for."""
    usual = TimerService._apply

    def apply(self: TimerService, records: Any) -> None:
        before = self._from
        usual(self, records)
        self._from = before

    return swap(TimerService, "_apply", apply)


# -- the store -------------------------------------------------------------------------------------------------------


@mutation("1", "4", "7", "CorruptLog", seeds=10)
def write_the_applied_offset_before_its_rows() -> Patch:
    """Two write batches where one must hold all."""
    usual = PartitionState.apply

    def apply(self: PartitionState, entries: Sequence[Entry], row: PartitionRow, *, applied_offset: int) -> None:
        self.store.write({}, (), applied_offset=applied_offset)
        usual(self, entries, row, applied_offset=applied_offset)

    return swap(PartitionState, "apply", apply)


@mutation("4", seeds=2)
def store_what_is_consumed_but_not_durable() -> Patch:
    """The store says consumed what later turns, still under way, consume."""
    usual = Processor._acknowledged

    def acknowledged(self: Processor, future: Any) -> None:
        if self._batches:
            row = self._batches[0].row
            self._batches[0].row = PartitionRow(row.term, row.seq, row.started, self.core.consumed, row.at)
        usual(self, future)

    return swap(Processor, "_acknowledged", acknowledged)


# -- workflow code ---------------------------------------------------------------------------------------------------


@mutation("4", seeds=4)
def go_through_coroutines_by_their_addresses() -> Patch:
    """asyncio.as_completed calls steps in another order on replay."""
    return mock.patch.object(asyncio.tasks, "set", set)


@mutation("4", seeds=4)
def go_through_futures_by_their_addresses() -> Patch:
    """What asyncio.wait gives back is in another order on replay."""
    return mock.patch.object(OrderedFuture, "__hash__", object.__hash__)
