"""The protocol of the fence, explored whole within bounds; and the product's reading rule on every log of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from streamflow.codec.avro import encode_history
from streamflow.core.events import Claim, HistoryRecord, RunCreated, RunStarted, Turn
from streamflow.core.reading import ReadingRule
from streamflow.logs.base import Record
from streamflow.store.memory import MemoryStore
from streamflow.worker.restore import Restorer
from streamflow.worker.state import PartitionState
from tests.model.explore import Explored, explore
from tests.model.fence import Bounds, Model
from tests.model.logs import FRESH, Entry, Node

EXPLORED: Final = {
    "two owners, all faults": (Bounds(lives=2, batches=(2, 1), window=2, copies=1, torn=1, trims=1), 43_918, 11),
    "two owners, deep pipelines": (Bounds(lives=2, batches=(2, 1, 1), window=3, torn=1), 60_162, 11),
    "three owners, two cuts": (Bounds(lives=3, batches=(1, 1), window=2, trims=2), 30_055, 14),
    "three owners, larger batches": (Bounds(lives=3, batches=(2, 1), window=2, trims=1), 35_196, 13),
    "three owners, torn batches": (Bounds(lives=3, batches=(2,), window=1, copies=1, torn=1, trims=1), 42_813, 12),
    "two owners, headless batches": (Bounds(lives=2, batches=(3, 1), window=2, torn=1, headless=1), 11_732, 10),
    "four owners": (Bounds(lives=4, batches=(1,), window=1, trims=1), 4_789, 13),
}
"""Bounds, and how many states there are and how many steps the farthest is away: other numbers are another model."""


@cache
def explored(which: str) -> tuple[Model, Explored]:
    """Each exploration is made once, however many tests look at it."""
    model = Model(EXPLORED[which][0])
    return model, explore(model)


def untrimmed(model: Model) -> Iterator[Node]:
    """The logs of which nothing is gone."""
    return (node for node in model.logs.nodes if node.start == 0)


@pytest.mark.parametrize("which", EXPLORED)
def test_every_property_holds_in_every_state(which):
    _, seen = explored(which)
    assert seen.violation is None, f"\n{seen.trace}"
    assert (seen.states, seen.depth) == EXPLORED[which][1:], f"{seen.transitions:,} transitions, {seen.logs:,} logs"


@pytest.mark.parametrize("which", EXPLORED)
def test_the_readme_says_how_much_was_explored(which):
    bounds, seen = EXPLORED[which][0], explored(which)[1]
    batches = ", ".join(map(str, bounds.batches))
    row = (
        f"| {which} | {bounds.lives} | {batches}; {bounds.window} "
        f"| {bounds.copies} / {bounds.torn} / {bounds.headless} / {bounds.trims} "
        f"| {seen.states:,} | {seen.transitions:,} | {seen.logs:,} | {seen.depth} |"
    )
    assert row in (Path(__file__).parent / "README.md").read_text(encoding="utf-8").splitlines()


def test_what_the_protocol_is_for_does_happen():
    """None of the properties holds merely because nothing ever went wrong."""
    seen: dict[str, int] = {}
    for node in explored("two owners, all faults")[0].logs.nodes:
        before, entry = node.parent, node.entry
        if before is None or entry is None:
            continue
        term, following = before.readers[0]
        if node.counts:
            what = "an owner follows another" if not entry.seq and before.end else "a record counts"
        elif not entry.seq:
            what = "a second claim of a term" if entry.term == term else "an old claim"
        elif entry.term < term:
            what = "a record of an old owner"
        elif following is None:
            what = "a record behind a gap"
        else:
            what = "a gap" if entry.seq > following else "a repeat"
        seen[what] = seen.get(what, 0) + 1
    assert set(seen) == {
        "a record counts",
        "an owner follows another",
        "a second claim of a term",
        "an old claim",
        "a record of an old owner",
        "a record behind a gap",
        "a gap",
        "a repeat",
    }


# -- what the eager model leaves out makes no difference -------------------------------------------------------------


def reached(model: Model) -> tuple[set[tuple[Entry, ...]], set[tuple[tuple[Entry, ...], int, int, int]]]:
    """All logs, and all that was ever acted on with the log up to there; owners named in the order of their records."""

    def named(entries: list[Entry]) -> tuple[tuple[Entry, ...], dict[int, int]]:
        names: dict[int, int] = {}
        return tuple(each._replace(life=names.setdefault(each.life, len(names))) for each in entries), names

    logs = {named([entry for _, entry, _ in node.entries()])[0] for node in model.logs.nodes}
    acts = set()
    for number, life, first, last in model.acts:
        entries = model.logs.nodes[number].entries()
        [offset] = [offset for offset, entry, counts in entries if counts and entry.life == life and entry.seq == last]
        before, names = named([entry for _, entry, _ in entries[: offset + 1]])
        acts.add((before, names[life], first, last))
    return logs, acts


@pytest.mark.parametrize("bounds", [Bounds(2, (2, 1), 2), Bounds(3, (1,), 1)], ids=["two", "three"])
def test_sending_late_hearing_late_and_crashing_lead_nowhere_else(bounds):
    eager, slow = Model(bounds), Model(replace(bounds, eager=False))
    few, many = explore(eager), explore(slow)
    assert many.violation is None, f"\n{many.trace}"
    assert many.states > 10 * few.states
    assert reached(eager) == reached(slow)


def test_owners_whose_batches_land_in_order_are_some_of_those_whose_do_not():
    some, all_ = Model(Bounds(2, (2, 1), 2, torn=1, ordered=True)), Model(Bounds(2, (2, 1), 2, torn=1))
    assert explore(some).violation is None and explore(all_).violation is None
    (logs, acts), (more_logs, more_acts) = reached(some), reached(all_)
    assert logs < more_logs and acts < more_acts


# -- the product's reading rule --------------------------------------------------------------------------------------


def record(entry: Entry) -> HistoryRecord:
    """What an owner of the product would have written."""
    if not entry.seq:
        return Claim(term=entry.term, owner=str(entry.life), at=0)
    return Turn(workflow_id="w", turn=1, term=entry.term, seq=entry.seq, at=0, consumed=0, events=[])


def counts_by_definition(entries: list[Entry], offset: int) -> bool:
    """Design.md's sentence, word by word, for a log of which nothing is gone; slow, and without any memory.

    "A record counts only if its term is the newest claimed one and its seq is exactly the last one plus one. A repeat
    is dropped; after a gap nothing of that term counts any more, until a newer claim."
    """
    term, seq = entries[offset][1:]
    claimed = [each.term for each in entries[:offset] if not each.seq]
    if not seq:
        return all(term > earlier for earlier in claimed)
    if not claimed or term != max(claimed):
        return False
    claim = next(at for at, each in enumerate(entries) if each.term == term and not each.seq)
    newest = 0
    for each in [each.seq for each in entries[claim + 1 : offset] if each.term == term and each.seq]:
        if each > newest + 1:
            return False
        newest = max(newest, each)
    return seq == newest + 1


@pytest.mark.parametrize("which", EXPLORED)
def test_the_products_rule_agrees_on_every_log_wherever_its_reader_began(which):
    model, _ = explored(which)
    readers: dict[int, set[tuple[int, int, bool]]] = {}
    compared = 0
    for node in model.logs.nodes:  # a log comes after those that it extends
        if node.parent is None or node.entry is None:
            # Whoever read what is gone, as a store keeps it, and whoever begins here.
            whole = node.readers[0]
            following = 2**62 + 1 if whole.following is None else whole.following
            old = (whole.term, following - 1, True) if whole != FRESH else (0, 0, False)
            readers[node.number] = {old, (0, 0, False)}
            continue
        after = set()
        for term, seq, started in readers[node.parent.number]:
            rule = ReadingRule(term=term, seq=seq, started=started)
            assert rule.accepts(record(node.entry)) is node.counts, node.entries()
            assert rule.gap is (node.readers[0].following is None)
            after.add((rule.term, rule.seq, rule.started))
            compared += 1
        readers[node.number] = after
    assert compared >= len(model.logs.nodes) - len([node for node in model.logs.nodes if node.parent is None])


def test_the_models_rule_is_the_sentence_of_the_design():
    nodes = [node for node in untrimmed(explored("two owners, all faults")[0]) if node.entry is not None]
    for node in nodes:
        entries = [entry for _, entry, _ in node.entries()]
        assert counts_by_definition(entries, node.end - 1) is node.counts, entries
    assert len(nodes) > 10_000


def turn_of(entry: Entry) -> HistoryRecord:
    """As `record`, but seq 1 and 2 are one turn in two parts: the batch of two that an owner of the model appends."""
    if not entry.seq:
        return record(entry)
    created, started = RunCreated(workflow="x", args=b"[]"), RunStarted()
    part, last = (0, True) if entry.seq > 2 else (entry.seq - 1, entry.seq == 2)
    return Turn(
        workflow_id=f"{entry.life}/{max(2, entry.seq)}", turn=1, term=entry.term, seq=entry.seq, at=0, consumed=0,
        events=[created, started] if entry.seq > 2 else [(created, started)[part]], part=part, last=last,
    )  # fmt: skip


def test_the_products_restore_finds_whole_turns_wherever_its_store_stopped():
    model = Model(Bounds(2, (2, 1), 2, torn=1, headless=1))
    assert explore(model).violation is None
    parted = 0
    for node in untrimmed(model):
        entries = node.entries()
        history = [Record(offset, b"", encode_history(turn_of(entry))) for offset, entry, _ in entries]
        counting = [entry for _, entry, counts in entries if counts and entry.seq]
        whole = {f"{entry.life}/{entry.seq}" for entry in counting if entry.seq > 1}
        stores = []
        for cut in range(len(history) + 1):
            state = PartitionState(MemoryStore())
            Restorer(state, 0).fold(history[:cut])
            parted += state.applied_offset < cut
            # Another life, which has nothing but the store.
            Restorer(state, 0).fold(history[state.applied_offset :])
            stores.append(dict(state.store.scan(b"")))
            assert {name for name in ("0/2", "0/3", "1/2", "1/3") if state.current_turns(name)} == whole, entries
        assert all(store == stores[0] for store in stores), entries
    assert parted > 100
