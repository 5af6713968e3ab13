"""Retry arithmetic: delays within bounds, the same in every process, and errors sorted into again and never."""

from __future__ import annotations

import math
import sys
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.core.retry import FACTOR_MAX, SECONDS_MAX, Retry, chance, seconds
from streamflow.errors import NonRetryable, RetryAfter

ATTEMPTS = st.integers(min_value=1, max_value=10**12)
SECONDS = st.floats(min_value=0, max_value=1e6)


@given(
    attempt=ATTEMPTS,
    initial=SECONDS,
    max_delay=SECONDS,
    factor=st.floats(min_value=1, max_value=1e300) | st.integers(min_value=1, max_value=10**300),
    jitter=st.floats(min_value=0, max_value=1),
    key=st.text(),
)
def test_a_delay_is_the_capped_exponential_within_its_jitter(attempt, initial, max_delay, factor, jitter, key):
    retry = Retry(max_attempts=None, initial=initial, max_delay=max_delay, factor=factor, jitter=jitter)
    try:
        base = min(initial * float(factor) ** (attempt - 1), max_delay)
    except OverflowError:
        base = max_delay if initial else 0.0
    delay = retry.delay(attempt, key)
    assert base * (1 - jitter) * 0.999 <= delay <= base * (1 + jitter) * 1.001
    assert delay == retry.delay(attempt, key)


@given(st.lists(st.text() | st.integers(), max_size=4))
def test_chance_is_a_number_from_0_to_below_1(parts):
    assert 0 <= chance(*parts) < 1


def test_chance_is_the_same_in_every_process_and_release():
    assert chance("w", 1, 0, 1) == CHANCE_W101
    assert chance("w", 1, 0, 2) != CHANCE_W101
    assert chance("ab", "c") != chance("a", "bc")
    assert chance("\ud800") != chance("\ud801")
    assert [round(Retry().delay(attempt, "w", 1, 0), 9) for attempt in (1, 2)] == DELAYS_W10


CHANCE_W101 = 0.4891694707977676
DELAYS_W10 = [0.494584735, 1.499155616]


def test_without_jitter_the_delays_double_up_to_the_longest():
    retry = Retry(jitter=0, max_attempts=None)
    assert [retry.delay(attempt) for attempt in (1, 2, 3, 7, 8, 9)] == [0.5, 1, 2, 32, 60, 60]


@pytest.mark.parametrize("attempt", [5_000, 10**9, 10**18])
@pytest.mark.parametrize("factor", [1, 2, 2.5, FACTOR_MAX])
def test_an_unlimited_retry_never_overflows(attempt, factor):
    retry = Retry(max_attempts=None, factor=factor, jitter=0, max_delay=30)
    assert retry.next_delay(ValueError(), attempt, 0.0) == (0.5 if factor == 1 else 30)
    assert Retry(max_attempts=None, factor=factor, initial=0).delay(attempt) == 0


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_attempts", [0, -1, 1.5, True, "3"]),
        ("initial", [-1, math.nan, math.inf, 10**400, "1", True, None, timedelta(seconds=-1)]),
        ("max_delay", [-0.1, math.inf, "1", None]),
        ("factor", [0.9, -2, math.inf, math.nan, 10**400, "2", True, None]),
        ("jitter", [-0.1, 1.1, math.nan, "0", True, None]),
        ("max_elapsed", [-1, math.nan, "1", False]),
        ("on", [ValueError(), "ValueError", (ValueError, 3), int, [ValueError]]),
        ("unless", [ValueError(), (int,), None]),
        ("when", [3, "yes"]),
    ],
)
def test_a_wrong_field_is_named(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"Retry\.{field} must be"):
            Retry(**{field: value})


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, 0.0), (1.5, 1.5), (timedelta(minutes=1), 60.0), (timedelta.max, SECONDS_MAX), (SECONDS_MAX, SECONDS_MAX)],
)
def test_a_duration_is_seconds_or_a_timedelta(given, expected):
    assert seconds(given, what="delay") == expected
    assert isinstance(seconds(given, what="delay"), float)


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, -math.inf, sys.float_info.max, 10**400])
def test_a_duration_out_of_range_names_what_it_was_for(wrong):
    with pytest.raises(ValueError, match=r"the delay must be at least 0 seconds and not infinite"):
        seconds(wrong, what="the delay")


def test_the_longest_duration_fits_the_logs_integers():
    assert SECONDS_MAX * 1000 < 2**63 - 253_402_300_799_000


def test_durations_are_kept_as_seconds():
    retry = Retry(initial=timedelta(milliseconds=20), max_delay=timedelta(minutes=2), max_elapsed=timedelta(hours=1))
    assert (retry.initial, retry.max_delay, retry.max_elapsed) == (0.02, 120.0, 3600.0)


def test_a_single_class_does_for_a_tuple():
    assert Retry(on=ValueError, unless=KeyError) == Retry(on=(ValueError,), unless=(KeyError,))


def test_the_last_attempt_is_the_last():
    retry = Retry(max_attempts=3, jitter=0)
    assert [retry.next_delay(ValueError(), attempt, 0.0) for attempt in (1, 2, 3, 4)] == [0.5, 1.0, None, None]
    assert Retry.never.next_delay(ValueError(), 1, 0.0) is None


def test_no_attempt_starts_after_the_longest_time_in_all():
    retry = Retry(max_attempts=None, jitter=0, initial=2, factor=1, max_elapsed=10)
    assert [retry.next_delay(ValueError(), 1, elapsed) for elapsed in (0.0, 8.0, 8.001)] == [2, 2, None]
    assert retry.next_delay(RetryAfter(11), 1, 0.0) is None


def test_only_the_selected_errors_are_tried_again():
    retry = Retry(on=(OSError, ValueError), unless=(FileNotFoundError,), jitter=0)
    assert retry.next_delay(OSError(), 1, 0.0) == 0.5
    assert retry.next_delay(UnicodeError(), 1, 0.0) == 0.5
    assert retry.next_delay(FileNotFoundError(), 1, 0.0) is None
    assert retry.next_delay(KeyError(), 1, 0.0) is None
    assert retry.next_delay(KeyboardInterrupt(), 1, 0.0) is None
    assert Retry(on=()).next_delay(ValueError(), 1, 0.0) is None


@pytest.mark.parametrize(
    ("verdict", "delay"), [(True, 0.5), (False, None), (7, 7.0), (0.25, 0.25), (0, 0.0), (timedelta(minutes=1), 60.0)]
)
def test_when_decides_yes_no_or_the_delay(verdict, delay):
    asked = []

    def when(*given):
        asked.append(given)
        return verdict

    retry = Retry(jitter=0, on=ValueError, when=when)
    error = ValueError()
    assert retry.next_delay(error, 1, 0.0) == delay
    assert asked == [(error, 1)]
    assert retry.next_delay(KeyError(), 1, 0.0) is None
    assert len(asked) == 1, "an error that is not selected is never asked about"


def test_a_wrong_verdict_is_named():
    with pytest.raises(ValueError, match=r"the delay from Retry\.when must be at least 0 seconds"):
        Retry(when=lambda *_: -1).next_delay(ValueError(), 1, 0.0)


def test_a_step_may_stop_its_retries_or_name_the_delay_whatever_the_policy_says():
    retry = Retry(on=OSError, when=lambda *_: False)
    assert retry.next_delay(RetryAfter(12.5), 1, 0.0) == 12.5
    assert Retry(on=Exception).next_delay(NonRetryable("no"), 1, 0.0) is None
    assert Retry.never.next_delay(RetryAfter(1), 1, 0.0) is None, "but not beyond the last attempt"
    with pytest.raises(ValueError, match=r"RetryAfter\.seconds must be at least 0"):
        retry.next_delay(RetryAfter(-1), 1, 0.0)


def test_attempts_are_counted_from_1():
    with pytest.raises(AssertionError):
        Retry().delay(0)
