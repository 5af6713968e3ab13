"""The reading rule: which records of a history partition count; and turns in parts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from streamflow.core.events import Applied, Claim, RunSnapshot, SignalReceived, Turn
from streamflow.core.reading import APPLIED_BYTES, Assembler, ReadingRule, join, split, split_snapshot
from tests.core.scripted import turn


def claim(term: int, owner: str = "a") -> Claim:
    return Claim(term=term, owner=owner, at=0)


def record(term: int, seq: int) -> Turn:
    return Turn(workflow_id="w", turn=1, term=term, seq=seq, at=0, consumed=0, events=[])


def accepted(*records: Claim | Turn, rule: ReadingRule | None = None) -> list[bool]:
    reader = rule or ReadingRule()
    return [reader.accepts(each) for each in records]


CASES = {
    "records behind their claim count": ([claim(1), record(1, 1), record(1, 2)], "yyy"),
    "a repeat is dropped, and what follows it counts": ([claim(1), record(1, 1), record(1, 1), record(1, 2)], "yyny"),
    "a whole batch repeated is dropped": (
        [claim(1), record(1, 1), record(1, 2), record(1, 1), record(1, 2), record(1, 3)],
        "yyynny",
    ),
    "after a gap nothing of the term counts": ([claim(1), record(1, 1), record(1, 3), record(1, 4)], "yynn"),
    "what was missing does not close the gap": ([claim(1), record(1, 2), record(1, 1), record(1, 2)], "ynnn"),
    "a newer claim ends the gap": ([claim(1), record(1, 2), claim(2), record(2, 1)], "ynyy"),
    "the old owner's records behind a newer claim": (
        [claim(1), record(1, 1), claim(2), record(1, 2), record(2, 1), record(1, 3)],
        "yyynyn",
    ),
    "only the first claim of a term counts": ([claim(1), claim(2, "a"), claim(2, "b"), record(2, 1)], "yyny"),
    "a second claim of the term does not count its records anew": (
        [claim(1, "a"), record(1, 1), claim(1, "b"), record(1, 1), record(1, 2)],
        "yynny",
    ),
    "an older claim does not count": ([claim(3), claim(2), record(2, 1), record(3, 1)], "ynny"),
    "a term may be left out": ([claim(1), claim(9), record(9, 1)], "yyy"),
    "records of a term that nobody claimed": ([claim(1), record(2, 1), record(1, 1)], "yny"),
    "the head of a trimmed log is valid": (
        [record(4, 17), record(4, 18), record(4, 18), claim(5), record(5, 1)],
        "yynyy",
    ),
    "behind a trimmed head the rule holds": ([record(4, 17), record(3, 18), record(4, 19), record(4, 18)], "ynnn"),
}


@pytest.mark.parametrize(("records", "expected"), CASES.values(), ids=CASES)
def test_the_rule(records, expected):
    assert ["ny"[each] for each in accepted(*records)] == list(expected)


def test_a_snapshot_counts_as_any_record():
    snapshot = RunSnapshot(workflow_id="w", turn=1, term=1, seq=1, at=0, consumed=0, turns=[])
    reader = ReadingRule()
    assert [reader.accepts(each) for each in (claim(1), snapshot, snapshot, record(1, 2))] == [True, True, False, True]


def test_the_rule_says_whether_it_saw_a_gap():
    reader, gaps = ReadingRule(), []
    for each in (claim(1), record(1, 1), record(1, 3), record(1, 2), claim(2)):
        reader.accepts(each)
        gaps.append(reader.gap)
    assert gaps == [False, False, True, True, False]
    assert [reader.gap, reader.term, reader.seq] == [False, 2, 0]


OWNERS = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.integers(1, 4), st.integers(0, 1)),
        st.tuples(st.just("record"), st.integers(1, 4), st.integers(1, 5)),
    ),
    max_size=30,
)
"""Any mess that claims and records of several owners can make: interleaved, repeated, lost, out of order."""


@given(OWNERS, st.integers(0, 30))
@example([("claim", 1, 0), ("record", 1, 2), ("record", 1, 1)], 2)
def test_at_any_position_one_owner_is_valid_and_every_reader_agrees(log, restart):
    records = [claim(term, "ab"[n]) if kind == "claim" else record(term, n) for kind, term, n in log]
    whole, parted = ReadingRule(), ReadingRule()
    valid: list[tuple[int, int]] = []
    owner: dict[int, str] = {}
    for position, each in enumerate(records):
        if position == restart:  # it knows of what came before only what a store keeps
            parted = ReadingRule(term=parted.term, seq=parted.seq, started=parted.started)
        counts = whole.accepts(each)
        assert parted.accepts(each) is counts
        if counts and isinstance(each, Claim):
            assert each.term not in owner, "a term has one owner"
            owner[each.term] = each.owner
        if counts:
            valid.append((each.term, 0 if isinstance(each, Claim) else each.seq))
    for (term, seq), (next_term, next_seq) in itertools.pairwise(valid):
        assert (next_term > term and next_seq == 0) or (next_term, next_seq) == (term, seq + 1)


@given(st.data())
def test_of_two_owners_that_write_at_once_no_record_of_the_old_one_counts_behind_the_new_claim(data):
    old = [record(1, seq) for seq in range(1, 8)]
    new: list[Claim | Turn] = [claim(2), *(record(2, seq) for seq in range(1, 8))]
    log: list[Claim | Turn] = [claim(1)]
    while old or new:
        source: list[Turn] | list[Claim | Turn] = data.draw(st.sampled_from([each for each in (old, new) if each]))
        written = source.pop(0)
        log += [written] * data.draw(st.sampled_from([1, 1, 1, 2]))
    reader = ReadingRule()
    valid = [each for each in log if reader.accepts(each)]
    cut = valid.index(claim(2))
    assert all(each.term == 1 for each in valid[:cut])
    assert [each.seq for each in valid[cut + 1 :] if isinstance(each, Turn)] == list(range(1, 8))
    assert all(each.term == 2 for each in valid[cut:])


# -- parts -------------------------------------------------------------------------------------------------------------


def events(count: int) -> list[SignalReceived]:
    return [SignalReceived(signal=number, name="go") for number in range(count)]


@given(
    sizes=st.lists(st.integers(1, 50), max_size=12),
    commands=st.lists(st.text(max_size=20), max_size=8),
    bytes_max=st.integers(20, 100),
)
def test_a_turn_in_parts_is_whole_again_with_its_last_part(sizes, commands, bytes_max):
    whole = turn(*events(len(sizes)), number=4, commands=[Applied(command_id=each, reply_to=1) for each in commands])
    parts = split(whole, sizes, bytes_max=bytes_max)
    assert [part.seq for part in parts] == list(range(whole.seq, whole.seq + len(parts)))
    assert [part.part for part in parts] == list(range(len(parts)))
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assembler = Assembler()
    joined = [assembler.add(part) for part in parts]
    assert joined[:-1] == [None] * (len(parts) - 1)
    assert joined[-1] == replace(whole, seq=parts[-1].seq)
    assert assembler.parts == []

    size_of = dict(zip(range(len(sizes)), sizes, strict=True))
    for part in parts:
        filled = [size_of[event.signal] for event in part.events if isinstance(event, SignalReceived)]
        filled += [len(each.command_id.encode()) + APPLIED_BYTES for each in part.commands]
        assert sum(filled) <= bytes_max or len(filled) == 1


def test_a_turn_that_fits_is_its_only_part():
    whole = turn(*events(2))
    assert split(whole, [10, 10], bytes_max=20) == [whole]
    assert Assembler().add(whole) is whole


def test_thousands_of_commands_in_one_turn_do_not_make_a_part_too_large():
    whole = turn(*events(1), commands=[Applied(command_id=f"{n:036}") for n in range(2_000)])
    parts = split(whole, [10], bytes_max=10_000)
    assert len(parts) > 10 and max(len(part.commands) for part in parts) * (36 + APPLIED_BYTES) <= 10_000


def halves(number: int) -> list[Turn]:
    return split(turn(*events(2), number=number), [10, 10], bytes_max=10)


def test_parts_that_a_claim_cut_off_never_count():
    assembler = Assembler()
    first, last = halves(1)
    assert assembler.add(first) is None
    assembler.drop()
    assert assembler.add(last) is None
    assert [assembler.add(part) is None for part in halves(1)] == [True, False]


def test_a_first_part_forgets_what_came_before():
    assembler = Assembler()
    assembler.add(halves(1)[0])
    assert [assembler.add(part) is None for part in halves(2)] == [True, False]
    assembler.add(halves(3)[0])
    assert assembler.add(turn(number=4)) == turn(number=4)
    assert assembler.parts == []


def test_a_part_of_another_turn_is_no_continuation():
    assembler = Assembler()
    assembler.add(halves(1)[0])
    assert assembler.add(halves(2)[1]) is None
    assert assembler.parts == []


def snapshot(*turns: bytes, number: int = 4) -> RunSnapshot:
    return RunSnapshot(workflow_id="w", turn=number, term=1, seq=7, at=5, consumed=6, turns=list(turns))


@given(turns=st.lists(st.binary(min_size=1, max_size=30), max_size=12), bytes_max=st.integers(1, 60))
def test_a_snapshot_in_parts_is_whole_again_with_its_last_part(turns, bytes_max):
    whole = snapshot(*turns)
    parts = split_snapshot(whole, bytes_max=bytes_max)
    assert [part.seq for part in parts] == list(range(7, 7 + len(parts)))
    assert [(part.part, part.last) for part in parts] == [(n, n == len(parts) - 1) for n in range(len(parts))]
    assert all(sum(map(len, part.turns)) <= bytes_max or len(part.turns) == 1 for part in parts)
    assembler = Assembler()
    joined = [assembler.add(part) for part in parts]
    assert joined[:-1] == [None] * (len(parts) - 1)
    assert joined[-1] == replace(whole, seq=parts[-1].seq)
    assert assembler.parts == []


def test_a_part_of_a_turn_continues_no_snapshot_of_the_same_number():
    assembler = Assembler()
    assembler.add(split_snapshot(snapshot(b"a", b"b", number=1), bytes_max=1)[0])
    assert assembler.add(halves(1)[1]) is None
    assert assembler.parts == []


def test_joining_wants_all_parts():
    first, last = halves(1)
    for wrong in ([first], [last], [last, first]):
        with pytest.raises(AssertionError):
            join(wrong)
    with pytest.raises(AssertionError):
        split(turn(*events(2)), [1], bytes_max=10)
