"""Signals: the oldest wait takes the oldest signal of its name, and each is taken once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.core.events import SignalAwaited, SignalReceived, SignalTaken, SignalWaitCancelled
from streamflow.core.machines import signal
from streamflow.core.machines.signal import TRANSITIONS, Mailbox, Wait, WaitState
from streamflow.core.machines.table import IllegalTransition


def received(number: int, name: str = "go") -> SignalReceived:
    return SignalReceived(signal=number, name=name)


def mailbox(*, signals: int = 0, waits: tuple[int, ...] = ()) -> tuple[Mailbox, list[Wait]]:
    box = Mailbox()
    for number in range(signals):
        box.receive(received(number))
    return box, [signal.create(SignalAwaited(number=number, name="go"), box) for number in waits]


EVENTS = (SignalTaken(number=4, signal=0), SignalWaitCancelled(number=4))


@pytest.mark.parametrize(("state", "event"), list(itertools.product(WaitState, EVENTS)))
def test_every_pair_of_state_and_event_is_in_the_table_or_illegal(state, event):
    box, (wait,) = mailbox(signals=1, waits=(4,))
    wait.state = state
    expected = TRANSITIONS.get((state, type(event)))
    if expected is None:
        with pytest.raises(IllegalTransition, match=f"wait 4 of run w is {state}"):
            signal.evolve(wait, event, box, "w")
    else:
        signal.evolve(wait, event, box, "w")
        assert wait.state is expected
        assert box.waiting == {}
        assert bool(box.untaken) is (expected is WaitState.CANCELLED)


def test_nothing_matches_without_both_a_wait_and_a_signal_of_one_name():
    assert mailbox()[0].match() is None
    assert mailbox(signals=2)[0].match() is None
    assert mailbox(waits=(1,))[0].match() is None
    box, _ = mailbox(waits=(1,))
    box.receive(received(0, "stop"))
    assert box.match() is None


def test_the_oldest_wait_takes_the_oldest_signal_of_its_name():
    box, (first, second) = mailbox(signals=2, waits=(4, 9))
    assert box.match() == SignalTaken(number=4, signal=0)
    signal.evolve(first, SignalTaken(number=4, signal=0), box, "w")
    assert box.match() == SignalTaken(number=9, signal=1)
    signal.evolve(second, SignalTaken(number=9, signal=1), box, "w")
    assert (box.untaken, box.waiting, box.received) == ({}, {}, 2)


def test_of_two_names_that_match_the_older_wait_goes_first():
    box = Mailbox()
    for number, name in ((7, "stop"), (3, "go")):
        signal.create(SignalAwaited(number=number, name=name), box)
    box.receive(received(0, "stop"))
    box.receive(received(1, "go"))
    assert box.match() == SignalTaken(number=3, signal=1)


def test_a_wait_that_was_given_up_leaves_its_signal_to_the_next():
    box, (first, _) = mailbox(waits=(1, 2))
    signal.evolve(first, SignalWaitCancelled(number=1), box, "w")
    box.receive(received(0))
    assert box.match() == SignalTaken(number=2, signal=0)


@given(st.lists(st.sampled_from(["a", "b"])), st.lists(st.sampled_from(["a", "b"])), st.booleans())
def test_each_signal_is_taken_at_most_once_in_order_of_its_name(sent, awaited, signals_first):
    box = Mailbox()
    waits: dict[int, Wait] = {}

    def send():
        for number, name in enumerate(sent):
            box.receive(received(number, name))

    if signals_first:
        send()
    for number, name in enumerate(awaited):
        waits[number] = signal.create(SignalAwaited(number=number, name=name), box)
    if not signals_first:
        send()
    taken = []
    while (take := box.match()) is not None:
        signal.evolve(waits[take.number], take, box, "w")
        taken.append(take)
    for name in ("a", "b"):
        of_name = [take for take in taken if awaited[take.number] == name]
        assert len(of_name) == min(sent.count(name), awaited.count(name))
        assert [take.signal for take in of_name] == [n for n, each in enumerate(sent) if each == name][: len(of_name)]
        assert [take.number for take in of_name] == sorted(take.number for take in of_name)


def test_a_signal_out_of_order_or_one_that_is_not_there_is_illegal():
    box, (wait,) = mailbox(signals=1, waits=(4,))
    with pytest.raises(IllegalTransition, match="signal 3 received, expected number 1"):
        box.receive(received(3))
    with pytest.raises(IllegalTransition, match="signal go: 8 is not there"):
        signal.evolve(wait, SignalTaken(number=4, signal=8), box, "w")
    empty, _ = mailbox()
    with pytest.raises(IllegalTransition, match="signal go: 4 is not there"):
        signal.evolve(Wait(number=4, name="go"), SignalWaitCancelled(number=4), empty, "w")


def test_only_a_waiting_wait_is_open_and_nothing_outside_knows_of_it():
    waits = [Wait(number=1, name="go", state=state) for state in WaitState]
    assert [wait.state for wait in waits if wait.is_open] == [WaitState.WAITING]
    assert waits[0].abandon("w", 1) == []
    assert waits[0].waits_for() == "signal go"


def test_the_diagram_names_every_state_and_event():
    assert signal.__doc__
    words = [state.name for state in WaitState] + [event.__name__ for _, event in TRANSITIONS]
    assert [word for word in words if word not in signal.__doc__] == []
