"""The store of a partition: its layout, and that it is the fold of the history, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamflow.codec.avro import encode_history
from streamflow.core.commands import CancelWorkflow, CleanupWorkflow, SignalWorkflow, StartWorkflow, TerminateWorkflow
from streamflow.core.events import RunCompleted, RunCreated, RunDeleted, RunStarted, StepCompleted, StepScheduled, Turn
from streamflow.core.machines.run import Run
from streamflow.logs.base import HISTORY
from streamflow.store.base import Store
from streamflow.store.memory import MemoryStore
from streamflow.store.rocks import open_rocks
from streamflow.worker.restore import Restorer
from streamflow.worker.state import Change, PartitionRow, PartitionState, change_of, turns_prefix
from tests.worker import flows
from tests.worker.harness import World, dump, run, settle, world


@pytest.fixture(params=["memory", "rocks"])
def store(request: pytest.FixtureRequest, tmp_path: Path):
    made: Store = (
        MemoryStore() if request.param == "memory" else open_rocks(tmp_path / "s", identity="i", log_start=0, log_end=9)
    )
    yield made
    made.close()


def turn_of(workflow_id: str, number: int, *events: Any, at: int = 0) -> Turn:
    return Turn(workflow_id=workflow_id, turn=number, term=1, seq=number, at=at, consumed=0, events=list(events))


def created(run: int = 1) -> RunCreated:
    return RunCreated(workflow="w", args=b"[]", run=run)


SCHEDULED = StepScheduled(number=0, name="work", args=b"[]", fingerprint=0)


def changes(run: Run, *turns: Turn) -> list[Change]:
    made = []
    for turn in turns:
        run.fold(turn)
        made.append(change_of(run, turn, encode_history(turn), offset=turn.seq))
    return made


def test_ids_that_begin_alike_or_hold_a_nul_do_not_touch_each_other(store: Store):
    state = PartitionState(store)
    ids = ["a", "a\0", "a\0b", "ab", "é", "a" * 255, "\x02a"]
    for place, workflow_id in enumerate(ids):
        state.apply(
            changes(
                Run(workflow_id=workflow_id), turn_of(workflow_id, 1, created()), turn_of(workflow_id, 2, RunStarted())
            ),
            PartitionRow(term=1),
            applied_offset=place + 1,
        )
    assert [[turn.workflow_id for turn in state.turns(workflow_id)] for workflow_id in ids] == [[i] * 2 for i in ids]
    assert {status.workflow_id for status in state.runs(descending=False, after=None)} == set(ids)
    state.apply(
        changes(
            _folded(state, "a"),
            turn_of("a", 3, RunCompleted(result=b"1")),
            turn_of("a", 4, RunDeleted()),
        ),
        PartitionRow(term=1),
        applied_offset=9,
    )
    assert state.turns("a") == [] and state.summary("a") is None and state.status("a") is None
    assert all(len(state.turns(workflow_id)) == 2 for workflow_id in ids[1:])
    assert {key for key in dump(store) if key.startswith((turns_prefix("a"), b"Sa", b"Aa"))} <= {
        key for key in dump(store) if key[1:] in [i.encode() for i in ids[1:]]
    }


def _folded(state: PartitionState, workflow_id: str) -> Run:
    run = Run(workflow_id=workflow_id)
    for turn in state.current_turns(workflow_id):
        run.fold(turn)
    return run


def test_a_run_that_goes_and_comes_back_in_one_batch_is_there(store: Store):
    state, run = PartitionState(store), Run(workflow_id="a")
    first = changes(
        run, turn_of("a", 1, created(), RunStarted(), at=5), turn_of("a", 2, RunCompleted(result=b"1"), at=6)
    )
    gone = changes(run, turn_of("a", 3, RunDeleted(), at=7))
    again = changes(Run(workflow_id="a"), turn_of("a", 1, created(), at=5))
    state.apply(first, PartitionRow(), applied_offset=1)
    state.apply([*gone, *again], PartitionRow(), applied_offset=2)
    assert [turn.turn for turn in state.turns("a")] == [1]
    assert [status.created_at for status in state.runs(descending=False, after=None)] == [5]
    state.apply(changes(_folded(state, "a"), turn_of("a", 2, RunStarted())), PartitionRow(), applied_offset=3)
    assert [turn.turn for turn in state.current_turns("a")] == [1, 2]


def test_a_run_that_begins_anew_stands_once_in_the_order_of_creation(store: Store):
    state, run = PartitionState(store), Run(workflow_id="a")
    state.apply(changes(run, turn_of("a", 1, created(), at=5)), PartitionRow(), applied_offset=1)
    state.apply(changes(Run(workflow_id="b"), turn_of("b", 1, created(), at=6)), PartitionRow(), applied_offset=2)
    state.apply(
        changes(
            run,
            turn_of("a", 2, RunStarted()),
            turn_of("a", 3, RunCompleted(result=b"1")),
            turn_of("a", 4, created(2), at=7),
        ),
        PartitionRow(),
        applied_offset=3,
    )
    assert [status.workflow_id for status in state.runs(descending=False, after=None)] == ["b", "a"]
    assert [status.workflow_id for status in state.runs(descending=True, after=None)] == ["a", "b"]
    assert [status.workflow_id for status in state.runs(descending=False, after=(6, "b"))] == ["a"]
    assert [status.workflow_id for status in state.runs(descending=True, after=(7, "a"))] == ["b"]
    assert list(state.runs(descending=True, after=(-1, ""))) == []
    assert [turn.turn for turn in state.current_turns("a")] == [4] and len(state.turns("a")) == 4
    summary = state.summary("a")
    assert summary is not None and summary.first_turn == 4 and summary.status.run == 2


def test_a_deleted_run_leaves_nothing(store: Store):
    state, run = PartitionState(store), Run(workflow_id="a")
    empty = dump(store)
    state.apply(
        changes(run, turn_of("a", 1, created(), RunStarted(), SCHEDULED)), PartitionRow(term=3), applied_offset=1
    )
    assert state.needing_attention() == ["a"]
    state.apply(
        changes(run, turn_of("a", 2, RunCompleted(result=b"1")), turn_of("a", 3, RunDeleted())),
        PartitionRow(term=3),
        applied_offset=2,
    )
    assert dump(store).keys() - empty.keys() == {b"P"}
    assert state.row() == PartitionRow(term=3) and state.applied_offset == 2
    assert state.needing_attention() == []


def test_a_row_that_is_there_is_not_written_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("streamflow.worker.state.ATTENDED_MAX", 2)
    written: list[bytes] = []

    class Seen(MemoryStore):
        def write(self, puts: Any, deletes: Any = (), *, applied_offset: int) -> None:
            written.extend(key for key in puts if key.startswith(b"A"))
            super().write(puts, deletes, applied_offset=applied_offset)

    state = PartitionState(Seen())
    runs = {workflow_id: Run(workflow_id=workflow_id) for workflow_id in "abc"}

    def apply(workflow_id: str, number: int, *events: Any) -> list[bytes]:
        written.clear()
        turn = turn_of(workflow_id, number, *events)
        state.apply(changes(runs[workflow_id], turn), PartitionRow(), applied_offset=state.applied_offset + 1)
        return list(written)

    done = StepCompleted(number=0, attempt=1, result=b"1")
    again = StepScheduled(number=1, name="work", args=b"[]", fingerprint=0)
    assert apply("a", 1, created(), RunStarted(), SCHEDULED) == [b"Aa"]
    assert apply("a", 2, done, again) == []
    assert apply("a", 3, StepCompleted(number=1, attempt=1, result=b"1")) == []
    assert state.needing_attention() == []
    assert apply("a", 4, StepScheduled(number=2, name="work", args=b"[]", fingerprint=0)) == [b"Aa"]
    assert apply("b", 1, created(), RunStarted(), SCHEDULED) == [b"Ab"]
    assert apply("c", 1, created(), RunStarted(), SCHEDULED) == [b"Ac"]  # as many are known as may be: all forgotten
    assert apply("b", 2, done, again) == [b"Ab"]
    assert state.needing_attention() == ["a", "b", "c"]


def test_a_new_store_stands_at_the_beginning(store: Store):
    state = PartitionState(store)
    assert (state.row(), state.applied_offset) == (PartitionRow(), 0)
    assert not state.turns("x") and not state.current_turns("x") and not state.needing_attention()


def test_a_run_needs_attention_while_it_has_open_attempts_or_is_blocked():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "line", b"[1]")
            assert it.processor.state.needing_attention() == ["w"]
            it.executor.complete("w", 0)
            await settle()
            assert it.processor.state.needing_attention() == []
            await it.start("p", "listens")
            assert it.processor.state.needing_attention() == []

    run(test())


# ------------------------------------------------------------------------------------------- live state equals the fold

IDS = ["a", "ab", "a\0b"]
ACTIONS = st.one_of(
    st.tuples(
        st.just("start"),
        st.sampled_from(IDS),
        st.sampled_from(["line", "brief", "fan", "listens", "mixed", "sleeps", "careful"]),
    ),
    st.tuples(st.just("restart"), st.sampled_from(IDS), st.sampled_from(["line", "brief", "listens"])),
    st.tuples(st.just("signal"), st.sampled_from(IDS), st.sampled_from([b"1", b"null"])),
    st.tuples(st.sampled_from(["cancel", "terminate", "cleanup", "force"]), st.sampled_from(IDS)),
    st.tuples(st.sampled_from(["complete", "fail", "retry"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["fire", "garbage", "die", "forget"])),
)
ARGS = {"line": b"[2]", "fan": b"[3]", "sleeps": b"[9.5]"}


async def act(it: World, action: tuple[Any, ...]) -> None:
    match action:
        case ("start", workflow_id, workflow):
            await it.start(workflow_id, workflow, ARGS.get(workflow, b"[]"))
        case ("restart", workflow_id, workflow):
            await it.send(
                workflow_id, StartWorkflow(workflow=workflow, args=ARGS.get(workflow, b"[]"), if_exists="restart")
            )
        case ("signal", workflow_id, value):
            await it.send(workflow_id, SignalWorkflow(name="s", value=value))
        case ("cancel", workflow_id):
            await it.send(workflow_id, CancelWorkflow())
        case ("terminate", workflow_id):
            await it.send(workflow_id, TerminateWorkflow(reason="enough"))
        case ("cleanup" | "force", workflow_id):
            await it.send(workflow_id, CleanupWorkflow(force=action[0] == "force"))
        case ("complete" | "fail" | "retry", nth):
            if it.executor.attempts:
                key = list(it.executor.attempts)[nth % len(it.executor.attempts)]
                again = action[0] == "retry" and not it.executor.attempts[key].at_most_once
                if action[0] == "complete":
                    it.executor.complete(*key)
                else:
                    it.executor.fail(*key, retry_at=it.clock.at_ms + 100 if again else None)
        case ("fire",):
            if timers := await it.timers():
                await it.fire(timers[0])
        case ("garbage",):
            await it.send_raw(b"garbage")
        case ("die",):
            await it.begin_again()
        case ("forget",):
            await it.begin_again(store=MemoryStore())
    it.clock.at_ms += 1
    await settle()
    assert it.task is not None and not it.task.done()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, max_size=30), batch=st.integers(1, 40), live=st.sampled_from([0, 1, 2048]))
def test_the_live_store_equals_the_fold_of_its_history_byte_for_byte(
    actions: list[tuple[Any, ...]], batch: int, live: int
):
    async def test():
        async with world(flows.app, live_runs_max=live) as it:
            for action in actions:
                await act(it, action)
            records = await it.records(HISTORY)
            folded = PartitionState(MemoryStore())
            for start in range(0, len(records), batch):
                # A new one each time: it resumes from what the store says, as after a crash.
                restorer = Restorer(folded, 0)
                assert restorer.offset == records[start].offset
                restorer.fold(records[start : start + batch])
            assert dump(folded.store) == dump(it.store)
            assert folded.applied_offset == it.store.applied_offset == len(records)
            assert folded.needing_attention() == it.processor.state.needing_attention()

    run(test())
