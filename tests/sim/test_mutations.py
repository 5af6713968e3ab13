"""The product broken on purpose: the simulator must find each of these within a few seeds.

A mutation that survives is a hole in the simulator, to be closed before the mutation is taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final
from unittest import mock

import pytest

import streamflow.worker.worker
from streamflow.core.events import Claim
from streamflow.core.machines.run import Run
from streamflow.core.partition import Decided
from streamflow.core.reading import ReadingRule
from streamflow.logs.base import TIMERS, Outgoing
from streamflow.sim.search import play
from streamflow.worker import outbox, processor
from streamflow.worker.processor import Processor
from streamflow.worker.restore import Restorer
from streamflow.worker.state import PartitionRow, PartitionState
from streamflow.worker.statuses import Statuses

SEEDS: Final = 100
Mutation = Callable[[], Any]


def accept_a_gap() -> Any:
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

    return mock.patch.object(ReadingRule, "accepts", accepts)


def accept_old_terms() -> Any:
    usual = ReadingRule.accepts

    def accepts(self: ReadingRule, record: Any) -> bool:
        if not isinstance(record, Claim) and self.started and record.term < self.term:
            return True
        return usual(self, record)

    return mock.patch.object(ReadingRule, "accepts", accepts)


def run_steps_before_the_acknowledgement() -> Any:
    usual = Processor._hand_over

    def hand_over(self: Processor, decided: Decided) -> None:
        usual(self, decided)
        for item in decided.turns:
            self._perform_local(item.turn.workflow_id, item.effects)

    return mock.patch.object(Processor, "_hand_over", hand_over)


def publish_before_the_acknowledgement() -> Any:
    usual = Processor._hand_over

    def hand_over(self: Processor, decided: Decided) -> None:
        usual(self, decided)
        records = [each for item in decided.turns for each in self._outgoing(item.effects, item.turn.workflow_id)]
        self.log.publish(records)

    return mock.patch.object(Processor, "_hand_over", hand_over)


def fire_timers_early() -> Any:
    def fire_at_of(value: bytes) -> int:
        return max(0, outbox.fire_at_of(value) - 400)

    both = ExitStack()
    both.enter_context(mock.patch.object(streamflow.worker.worker, "fire_at_of", fire_at_of))
    both.enter_context(mock.patch.object(Run, "timer_due_at", return_value=0))
    return both


def reuse_a_term() -> Any:
    def claim(term: int, owner: str, at: int) -> Claim:
        return Claim(term=max(1, term - 1), owner=owner, at=at)

    return mock.patch.object(processor, "Claim", claim)


def derive_nothing_again() -> Any:
    async def again(self: Processor) -> None:
        await self.log.published_offset(self.partition)
        await self.log.publish([], published=(self.partition, self._next_offset))

    return mock.patch.object(Processor, "_publish_again", again)


def drop_a_timer_now_and_then() -> Any:
    usual, calls = outbox.outgoing, 0

    def outgoing(*args: Any, **options: Any) -> list[Outgoing]:
        nonlocal calls
        calls += 1
        return [each for each in usual(*args, **options) if each.topic != TIMERS or calls % 7]

    return mock.patch.object(processor, "outgoing", outgoing)


def forget_what_was_consumed() -> Any:
    def row(self: Restorer) -> PartitionRow:
        return PartitionRow(self.rule.term, self.rule.seq, self.rule.started, 0, self.at)

    return mock.patch.object(Restorer, "row", row)


def forget_open_attempts() -> Any:
    return mock.patch.object(PartitionState, "needing_attention", return_value=[])


def take_a_failed_append_for_a_good_one() -> Any:
    usual = Processor._acknowledged

    def acknowledged(self: Processor, future: Any) -> None:
        if future.exception() is not None:
            future = self._loop.create_future()
            future.set_result(0)
        usual(self, future)

    return mock.patch.object(Processor, "_acknowledged", acknowledged)


def restore_one_record_less() -> Any:
    usual = Restorer.__init__

    def init(self: Restorer, *args: Any, **options: Any) -> None:
        usual(self, *args, **options)
        self.rule.seq = max(0, self.rule.seq - 1)

    return mock.patch.object(Restorer, "__init__", init)


def leave_late_statuses() -> Any:
    async def run(self: Statuses) -> None: ...

    return mock.patch.object(Statuses, "run", run)


MUTATIONS: Final[list[Mutation]] = [
    accept_a_gap,
    accept_old_terms,
    run_steps_before_the_acknowledgement,
    publish_before_the_acknowledgement,
    fire_timers_early,
    reuse_a_term,
    derive_nothing_again,
    drop_a_timer_now_and_then,
    forget_what_was_consumed,
    forget_open_attempts,
    take_a_failed_append_for_a_good_one,
    restore_one_record_less,
    leave_late_statuses,
]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_is_found(mutation: Mutation):
    with mutation():
        found = next((verdict for seed in range(SEEDS) if (verdict := play(seed)).failure is not None), None)
    assert found is not None, f"survived {SEEDS} seeds"
