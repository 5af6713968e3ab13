"""The protocol broken on purpose: the exploration must find each of these, and show the shortest way to it.

What a mutation breaks is the reason for the rule that it takes away; README.md lists them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from streamflow.core.reading import ReadingRule
from tests.model.explore import explore
from tests.model.fence import Bounds, Model
from tests.model.logs import FRESH, Entry, Protocol, Reader, read
from tests.model.test_fence import record

BOUNDS: Final = Bounds(lives=2, batches=(1, 1), window=2, copies=1, trims=1)
TORN: Final = Bounds(lives=2, batches=(2, 1), window=2, torn=1)
HEADLESS: Final = Bounds(lives=2, batches=(2, 1), window=2, headless=1)

# -- the reading rule, wrong ------------------------------------------------------------------------------------------


def accept_a_gap(reader: Reader, entry: Entry) -> tuple[Reader, bool]:
    if entry.seq and entry.term == reader.term and entry.seq >= (reader.following or 0):
        return Reader(entry.term, entry.seq + 1), True
    return read(reader, entry)


def accept_older_terms(reader: Reader, entry: Entry) -> tuple[Reader, bool]:
    return (reader, True) if entry.seq and entry.term < reader.term else read(reader, entry)


def accept_repeats(reader: Reader, entry: Entry) -> tuple[Reader, bool]:
    repeats = entry.seq and entry.term == reader.term and entry.seq < (reader.following or 0)
    return (reader, True) if repeats else read(reader, entry)


def accept_second_claims(reader: Reader, entry: Entry) -> tuple[Reader, bool]:
    return (Reader(entry.term, 1), True) if not entry.seq and entry.term == reader.term else read(reader, entry)


def let_no_claim_end_a_gap(reader: Reader, entry: Entry) -> tuple[Reader, bool]:
    return (reader, False) if reader.following is None else read(reader, entry)


def forget_gaps(reader: Reader, entry: Entry) -> tuple[Reader, bool]:
    after, counts = read(reader, entry)
    return (reader if after.following is None else after), counts


READ: Final = {
    "a gap counts": (accept_a_gap, "the record that it was decided on does not"),
    "an older term counts": (accept_older_terms, "which the owner did not write"),
    "a repeat counts": (accept_repeats, "with the same term and seq"),
    "a second claim of a term counts": (accept_second_claims, "a claim whose term is not above"),
    "no claim ends a gap": (let_no_claim_end_a_gap, "nobody can own"),
}

MUTATIONS: Final = {
    **{which: (Protocol(read=rule), BOUNDS, why) for which, (rule, why) in READ.items()},
    "a claim has the newest term": (Protocol(term_above=0), BOUNDS, "nobody can own"),
    "the claim is not awaited": (Protocol(awaits_claim=False), BOUNDS, "which the owner did not write"),
    "acts before the answer": (Protocol(acts_on_answers=False), BOUNDS, "which is not in the log"),
    "an answer counts before an earlier one": (Protocol(in_order=False), BOUNDS, "does not count"),
    "a claim may be at any offset": (Protocol(checks_claim=False), BOUNDS, "acts on claim 1, and offset 1 does not"),
    "a batch may be at any offset": (Protocol(checks_offset=False), BOUNDS, "does not count"),
    "a missing offset is the right one": (Protocol(refuses_offsetless=False), BOUNDS, "does not count"),
    "one record answers for its batch": (Protocol(hears_every_record=False), TORN, "decided it on other records"),
    "the last record answers for its batch": (Protocol(hears_the_last=True), HEADLESS, "does not count"),
    "goes on blindly": (Protocol(goes_on="blindly"), BOUNDS, "decided it on other records"),
    "goes on in its term": (Protocol(goes_on="in its term"), BOUNDS, "the record that it was decided on does not"),
    "claims without reading to the end": (Protocol(reads_to_the_end=False), BOUNDS, "acts on claim 1, and offset 1"),
    "the head is cut anywhere": (Protocol(cuts_at_valid=False), BOUNDS, "for one reader, and not for another"),
    "a store forgets a gap": (
        Protocol(kept=lambda reader: reader if reader.following is not None else Reader(reader.term, 1)),
        BOUNDS,
        "for one reader, and not for another",
    ),
    "a store older than the head is used": (
        Protocol(wipes_stores=False),
        BOUNDS,
        "for one reader, and not for another",
    ),
}


@pytest.mark.parametrize("bounds", [BOUNDS, TORN, HEADLESS], ids=["copied", "torn", "headless"])
def test_the_protocol_itself_holds_within_the_same_bounds(bounds):
    seen = explore(Model(bounds))
    assert seen.violation is None, f"\n{seen.trace}"


@pytest.mark.parametrize("which", MUTATIONS)
def test_a_mutation_is_found(which):
    protocol, bounds, why = MUTATIONS[which]
    seen = explore(Model(bounds, protocol))
    assert seen.violation is not None, f"survived {seen.states:,} states"
    assert why in seen.violation, f"\n{seen.trace}"
    steps = seen.trace.splitlines()
    assert len(steps) == seen.depth + 1 <= 7, f"\n{seen.trace}"
    assert steps[-1] == f"=> {seen.violation}"


def test_only_a_batch_without_its_head_shows_that_the_last_record_cannot_answer_for_it():
    """Whole or cut off behind, a batch whose last record is where it should be is all there."""
    protocol, headless, why = MUTATIONS["the last record answers for its batch"]
    seen = explore(Model(replace(TORN, copies=1, trims=1), protocol))
    assert seen.violation is None, f"\n{seen.trace}"
    seen = explore(Model(headless, protocol))
    assert why in (seen.violation or "")
    assert "without its head" in seen.trace
    assert seen.trace in (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_way_to_a_violation_is_a_story():
    """What README.md shows: each step, and the log behind it; what does not count is in parentheses."""
    protocol, bounds, _ = MUTATIONS["goes on in its term"]
    trace = explore(Model(bounds, protocol)).trace
    assert [line.split("  ")[0] for line in trace.splitlines()] == [
        "a reads up to offset 0, and claims",
        "a's claim 1 lands; a hears 0",
        "a gives up waiting, reads back, goes on in its term",
        "a's 1.1 lands; a hears nothing",
        "a''s 1.2 lands; a' hears 2",
        "=> offset 2 counts, and the record that it was decided on does not",
    ]
    assert trace in (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


def test_a_gap_that_is_not_remembered_harms_nobody_if_no_reader_remembers_it():
    """Why a rule stands that no property needs: README.md, "What the rule could do without"."""
    seen = explore(Model(BOUNDS, Protocol(read=forget_gaps)))
    assert seen.violation is None, f"\n{seen.trace}"


@pytest.mark.parametrize("rule", [*(rule for rule, _ in READ.values()), forget_gaps], ids=lambda rule: rule.__name__)
def test_a_rule_that_is_wrong_differs_from_the_products_on_some_log(rule):
    model = Model(BOUNDS)
    assert explore(model).violation is None
    for node in model.logs.nodes:
        reader, product = FRESH, ReadingRule()
        for _, entry, _ in node.entries():
            reader, counts = rule(reader, entry)
            if product.accepts(record(entry)) is not counts:
                return
    pytest.fail("it would not have been noticed")
