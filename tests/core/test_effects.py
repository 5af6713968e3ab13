"""Effects: plain values that the runtime performs."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.core.effects import Effect, StatusRecord, TimerRecord

TIMERS = st.builds(
    TimerRecord,
    workflow_id=st.text(max_size=5),
    kind=st.sampled_from(["start", "deadline", "sleep", "step"]),
    run=st.integers(1, 3),
    number=st.integers(0, 12),
    attempt=st.integers(0, 12),
    fire_at=st.just(0),
)


@pytest.mark.parametrize("effect", typing.get_args(Effect))
def test_an_effect_is_a_value(effect):
    assert effect.__struct_config__.frozen and effect.__doc__


def test_a_timers_key_is_stable():
    timer = TimerRecord(workflow_id="ordér", kind="step", run=2, number=7, attempt=3, fire_at=99)
    assert timer.key == "ordér\0002.step.7.3.99".encode()


@given(TIMERS)
def test_a_timers_key_says_when_it_is_due(timer):
    assert TimerRecord.fire_at_of(timer.key) == timer.fire_at


@given(TIMERS, TIMERS)
def test_two_timers_share_a_key_only_if_they_are_one(one, other):
    assert (one.key == other.key) is (one == other)


def test_statuses_do_not_share_their_lists():
    one, other = (
        StatusRecord(workflow_id=id, workflow="work", run=1, turn=1, state="running", args=b"[]") for id in "ab"
    )
    assert one.waiting_on is not other.waiting_on
