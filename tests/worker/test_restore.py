"""Restoring: the reading rule, parts, and resumption from wherever the last owner stopped."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.codec.avro import encode_history
from streamflow.core.events import (
    Claim,
    Event,
    HistoryRecord,
    RunCompleted,
    RunCreated,
    RunDeleted,
    RunSnapshot,
    RunStarted,
    SignalReceived,
    Turn,
)
from streamflow.core.reading import split
from streamflow.errors import CorruptLog
from streamflow.logs.base import HISTORY, Record
from streamflow.logs.open import open_log
from streamflow.store.memory import MemoryStore
from streamflow.worker import restore
from streamflow.worker.restore import Restorer
from streamflow.worker.state import PartitionState
from tests.worker.harness import dump, run


def claim(term: int, at: int = 0) -> Claim:
    return Claim(term=term, owner="o", at=at)


def turn(term: int, seq: int, number: int, *, workflow_id: str = "w", consumed: int = 0, at: int = 0) -> Turn:
    """The turn `number` of a run that starts in its first and hears a signal in each other."""
    events: list[Event] = (
        [RunCreated(workflow="x", args=b"[]"), RunStarted()]
        if number == 1
        else [SignalReceived(signal=number - 2, name="s", value=b"%d" % number)]
    )
    return Turn(workflow_id=workflow_id, turn=number, term=term, seq=seq, at=at, consumed=consumed, events=events)


def parts(term: int, seq: int, number: int) -> list[Turn]:
    """The turn with three signals in three parts."""
    events: list[Event] = [SignalReceived(signal=number - 2 + i, name="s", value=b"0") for i in range(3)]
    whole = Turn(workflow_id="w", turn=number, term=term, seq=seq, at=0, consumed=number, events=events)
    return split(whole, [10, 10, 10], bytes_max=10)


def records(history: list[HistoryRecord]) -> list[Record]:
    return [Record(offset, b"", encode_history(entry)) for offset, entry in enumerate(history)]


def fold(history: list[HistoryRecord], *cuts: int) -> PartitionState:
    """The state after the history, by a new restorer after each cut."""
    state = PartitionState(MemoryStore())
    found = records(history)
    for end in [*sorted(cuts), len(found)]:
        restorer = Restorer(state, 0)
        if found[restorer.offset : end]:
            restorer.fold(found[restorer.offset : end])
    return state


def numbers(state: PartitionState, workflow_id: str = "w") -> list[int]:
    return [found.turn for found in state.turns(workflow_id)]


def test_records_of_an_older_term_repeats_and_whatever_follows_a_gap_do_not_count():
    state = fold(
        [
            claim(1),
            turn(1, 1, 1),
            turn(1, 1, 1),
            claim(2),
            turn(1, 2, 2),
            turn(2, 1, 2, consumed=7, at=9),
            turn(2, 3, 4),
            turn(2, 2, 3),
            turn(2, 4, 5),
            claim(2),
        ]
    )
    assert numbers(state) == [1, 2]
    assert (state.row().term, state.row().consumed, state.row().at) == (2, 7, 9)
    assert state.applied_offset == 10


def test_a_newer_claim_ends_a_gap():
    assert numbers(fold([claim(1), turn(1, 1, 1), turn(1, 3, 3), claim(2), turn(2, 1, 2)])) == [1, 2]


def test_after_a_gap_nothing_counts_also_for_who_resumes_behind_it():
    history: list[HistoryRecord] = [claim(1), turn(1, 1, 1), turn(1, 3, 3), turn(1, 2, 2)]
    assert numbers(fold(history, 3)) == numbers(fold(history)) == [1]


def test_the_first_record_of_a_trimmed_log_counts():
    state = PartitionState(MemoryStore())
    restorer = Restorer(state, 0)
    restorer.fold([Record(70, b"", encode_history(turn(3, 41, 1))), Record(71, b"", encode_history(turn(3, 42, 2)))])
    assert numbers(state) == [1, 2] and (state.row().term, state.row().seq) == (3, 42)


def test_parts_are_joined_to_one_turn():
    state = fold([claim(1), turn(1, 1, 1), *parts(1, 2, 2)])
    assert numbers(state) == [1, 2] and len(state.turns("w")[1].events) == 3
    assert state.row().seq == 4


def test_parts_without_their_last_one_are_cut_off_by_a_claim():
    state = fold([claim(1), turn(1, 1, 1), *parts(1, 2, 2)[:2], claim(2), turn(2, 1, 2)])
    assert numbers(state) == [1, 2] and len(state.turns("w")[1].events) == 1


def test_parts_that_may_still_be_completed_are_read_again():
    history: list[HistoryRecord] = [claim(1), turn(1, 1, 1), *parts(1, 2, 2)[:2]]
    state = fold(history)
    assert state.applied_offset == 2 and state.row().seq == 1
    assert dump(fold([*history, parts(1, 2, 2)[2]], 2, 3, 4).store) == dump(fold([*history, parts(1, 2, 2)[2]]).store)


CHOICES = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.integers(-1, 2)),
        st.tuples(st.just("parts"), st.integers(1, 3)),
        st.tuples(st.just("claim"), st.integers(0, 2)),
        st.tuples(st.just("old"), st.integers(0, 1)),
    ),
    max_size=15,
)


@given(choices=CHOICES, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_whoever_resumes_anywhere_comes_to_the_same_store(choices: list[tuple[str, int]], cuts: list[int]):
    history: list[HistoryRecord] = [claim(1)]
    term, seq, number, gap = 1, 0, 0, False
    for kind, value in choices:
        match kind:
            case "turn":  # 0: the next one, else a repeat or a gap; the run goes on where the reading rule is
                valid = not gap and value == 0
                history.append(turn(term, seq + 1 + value, number + 1))
                gap = gap or value > 0
                seq, number = seq + valid, number + valid
            case "parts" if number:
                history += parts(term, seq + 1, number + 1)[:value]
                if not gap:
                    seq += value
                    # A run of this test has one signal per turn, so the whole turn ends it here.
                    if value == 3:
                        break
                    term, seq = term + 1, 0
                    history.append(claim(term))
            case "claim":
                history.append(claim(term + value))
                if value:
                    term, seq, gap = term + value, 0, False
            case "old" if term > 1:
                history.append(turn(term - 1, seq + 1, number + 1))
    whole = fold(history)
    resumed = fold(history, *[cut for cut in cuts if cut <= len(history)])
    assert dump(resumed.store) == dump(whole.store)
    assert resumed.applied_offset == whole.applied_offset


def test_what_a_newer_version_wrote_is_no_damage():
    newer = bytearray(encode_history(claim(2)))
    newer[2:10] = b"tomorrow"
    restorer = Restorer(PartitionState(MemoryStore()), 3)
    with pytest.raises(CorruptLog, match=r"partition 3, offset 7: .*[nN]ewer version .* upgrade this worker") as failed:
        restorer.fold([Record(7, b"", bytes(newer))])
    assert "copy" not in str(failed.value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "found a tombstone"),
        (b"garbage", "expected a claim or a turn"),
        (encode_history(turn(1, 2, 2, workflow_id="unknown")), "turn 2 of run unknown does not follow"),
        (
            encode_history(
                Turn(
                    workflow_id="w",
                    turn=2,
                    term=1,
                    seq=2,
                    at=0,
                    consumed=0,
                    events=[RunCreated(workflow="x", args=b"[]")],
                )
            ),
            "turn 2 of run w does not follow",
        ),
        (
            encode_history(RunSnapshot(workflow_id="w", turn=1, term=1, seq=2, at=0, consumed=0, turns=[])),
            "the snapshot of turn 1 of run w does not follow: expected a snapshot to hold turns up to 1, found []",
        ),
    ],
)
def test_what_no_owner_wrote_is_named_with_its_offset_and_what_to_do(value: bytes | None, why: str):
    state = PartitionState(MemoryStore())
    restorer = Restorer(state, 3)
    restorer.fold(records([claim(1), turn(1, 1, 1)]))
    before = dump(state.store)
    with pytest.raises(CorruptLog, match="history partition 3, offset 2: ") as error:
        restorer.fold([Record(2, b"", value)])
    assert why in str(error.value) and "find out who did" in str(error.value)
    assert dump(state.store) == before, "nothing of a corrupt batch is applied"


def test_a_long_restore_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(restore, "READ_LIMIT", 2)
    monkeypatch.setattr(restore, "FOLD_MAX", 1)
    monkeypatch.setattr(restore, "TOLD_MIN", 8)
    monkeypatch.setattr(restore, "RUNS_FOLDED_MAX", 0)
    ticks = iter([100.0, 100.6, 101.2, 101.3, 103.2, 103.5])

    async def test():
        log = await open_log("memory://restore?partitions=1", app="test")
        history: list[HistoryRecord] = [claim(1), *[turn(1, n, n) for n in range(1, 8)]]
        await log.append(0, 0, [(b"", encode_history(entry)) for entry in history])
        state = PartitionState(MemoryStore())
        with caplog.at_level(logging.INFO, logger="streamflow.worker"):
            await Restorer(state, 0, monotonic=lambda: next(ticks)).run(log)
        assert [record.getMessage() for record in caplog.records] == [
            "partition 0: restored 4 of 8 records (3/s)",
            "partition 0: restored 8 of 8 records (2/s)",
            "partition 0: restored 8 records in 3.500 s",
        ]
        assert numbers(state) == [1, 2, 3, 4, 5, 6, 7] and state.applied_offset == 8
        assert (await log.end_offset(HISTORY, 0)) == 8
        await log.close()

    run(test())


def test_offsets_that_nobody_can_read_do_not_hold_a_restore_up():
    class Gappy:
        async def end_offset(self, topic: str, partition: int) -> int:
            return 9

        async def start_offset(self, topic: str, partition: int) -> int:
            return 0

        async def read(self, topic: str, partition: int, offset: int, *, limit: int) -> list[Record]:
            return records([claim(1), turn(1, 1, 1)])[offset:]

    async def test():
        restorer = Restorer(PartitionState(MemoryStore()), 0)
        await restorer.run(Gappy())  # type: ignore[arg-type]
        assert restorer.offset == 9

    run(test())


def test_a_run_that_was_deleted_and_begins_again_counts_from_one():
    gone = Turn(workflow_id="w", turn=2, term=1, seq=2, at=0, consumed=0, events=[RunCompleted(result=b"1")])
    deleted = Turn(workflow_id="w", turn=3, term=1, seq=3, at=0, consumed=0, events=[RunDeleted()])
    history: list[HistoryRecord] = [claim(1), turn(1, 1, 1), gone, deleted, turn(1, 4, 1), turn(1, 5, 2)]
    for cut in range(len(history)):
        state = fold(history, cut)
        assert numbers(state) == [1, 2]
        assert [status.turn for status in state.runs(descending=False, after=None)] == [2]


def snapshot(seq: int, *turns: Turn) -> RunSnapshot:
    last = turns[-1]
    held = [encode_history(each) for each in turns]
    return RunSnapshot(workflow_id=last.workflow_id, turn=last.turn, term=1, seq=seq, at=40, consumed=30, turns=held)


def fold_trimmed(history: list[HistoryRecord], start: int, *ends: int) -> PartitionState:
    """The state after the history without what lies before `start`, by a new restorer after each end."""
    state = PartitionState(MemoryStore())
    found = records(history)
    for end in [*ends, len(found)]:
        restorer = Restorer(state, 0)
        restorer.trimmed = True
        restorer.offset = max(restorer.offset, start)
        if found[restorer.offset : end]:
            restorer.fold(found[restorer.offset : end])
    return state


def test_turns_whose_beginning_is_trimmed_wait_for_their_snapshot_or_the_end_of_their_run():
    ended = Turn(workflow_id="v", turn=3, term=1, seq=6, at=0, consumed=0, events=[RunCompleted(result=b"1")])
    gone = Turn(workflow_id="v", turn=4, term=1, seq=7, at=0, consumed=0, events=[RunDeleted()])
    again = Turn(
        workflow_id="u",
        turn=2,
        term=1,
        seq=8,
        at=9,
        consumed=0,
        events=[RunCompleted(result=b"1"), RunCreated(workflow="x", args=b"[]", run=2), RunStarted()],
    )
    history: list[HistoryRecord] = [
        claim(1),
        turn(1, 1, 1, workflow_id="w"),
        turn(1, 2, 1, workflow_id="v"),
        turn(1, 3, 1, workflow_id="u"),
        turn(1, 4, 2, workflow_id="w", consumed=20),
        turn(1, 5, 2, workflow_id="v"),
        ended,
        gone,
        again,
        snapshot(9, turn(1, 1, 1, workflow_id="w"), turn(1, 4, 2, workflow_id="w")),
        snapshot(10, again),
        turn(1, 11, 3, workflow_id="w"),
    ]
    whole = fold(history)
    assert whole.row().consumed == 30 and whole.row().at == 40
    for start in (4, 5, 6, 9):
        assert fold_trimmed(history[:9], start).headless() == ({"w"} if start == 4 else set())
        for end in range(start, len(history)):
            state = fold_trimmed(history, start, end)
            assert dump(state.store) == dump(whole.store)
            assert not state.headless()
    assert fold_trimmed(history[:7], 5).headless() == {"v"}
    assert numbers(whole) == [1, 2, 3] and numbers(whole, "u") == [2] and numbers(whole, "v") == []


def test_a_turn_without_its_beginning_is_corrupt_where_nothing_was_trimmed():
    with pytest.raises(CorruptLog, match="turn 2 of run w does not follow"):
        fold([claim(1), turn(1, 1, 2)])
