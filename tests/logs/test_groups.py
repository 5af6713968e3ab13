"""The one rule that gives partitions to members, and a member's view of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamflow.logs.groups import Share, assign

_names = st.sets(st.sampled_from("abcdefgh"), min_size=1)
_holders = st.dictionaries(st.integers(0, 11), st.sampled_from("abcdefghxyz"))


def test_nobody_gets_nothing() -> None:
    assert assign(4, [], {0: "a"}) == {}


@given(st.integers(1, 12), _names, _holders)
def test_shares_are_even_complete_and_keep_what_is_held(
    partitions: int, members: set[str], holders: dict[int, str]
) -> None:
    plan = assign(partitions, members, holders)
    assert sorted(plan) == list(range(partitions))
    shares = [list(plan.values()).count(name) for name in members]
    assert max(shares) - min(shares) <= 1
    for name in members:
        held = {p for p, holder in holders.items() if holder == name and p < partitions}
        planned = {p for p, owner in plan.items() if owner == name}
        assert held <= planned or planned <= held, "no swaps: a member either gains or loses"


@given(st.integers(1, 12), _names, _holders, st.data())
def test_a_plan_carried_out_in_any_order_stays_the_plan(
    partitions: int, members: set[str], holders: dict[int, str], data: st.DataObject
) -> None:
    held = {p: name for p, name in holders.items() if p < partitions and name in members}
    for _ in range(4 * partitions):
        plan = assign(partitions, members, held)
        moves = [p for p in range(partitions) if held.get(p) != plan[p]]
        if not moves:
            break
        partition = data.draw(st.sampled_from(moves))
        if partition in held:
            del held[partition]  # its holder has stopped it
        else:
            held[partition] = plan[partition]
    assert held == assign(partitions, members, held)


def test_a_partition_that_was_taken_comes_back_only_after_release() -> None:
    share = Share()
    assert share.update({0, 1}, {0, 1}) and share.take() == {0, 1}
    assert share.update({0, 1}, {0}) and share.shown == {0} and not share.strays({0, 1})
    assert not share.update({0, 1}, {0, 1}), "still being stopped"
    share.release(1)
    assert share.update({0, 1}, {0, 1}) and share.shown == {0, 1}


def test_a_partition_that_came_and_went_unseen_is_given_up_at_once() -> None:
    share = Share()
    assert share.update({0, 1}, {0, 1}) and share.update({0, 1}, {0})
    assert share.strays({0, 1}) == {1} and not share.stopping
    assert share.update({0, 1}, {0, 1}), "or shown again, where the plan changes before that"


def test_releasing_what_is_shown_takes_it_out_at_once() -> None:
    share = Share()
    share.update({0, 1}, {0, 1})
    share.release(0)
    assert share.shown == {1} and not share.stopping
