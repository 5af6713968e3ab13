"""Instants, durations and other people's text in words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from streamflow.cli import words
from streamflow.cli.words import Clock

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone(timedelta(hours=1)))
SHORT = Clock(NOW, short=True)
LONG = Clock(NOW, short=False)


def ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 ms"),
        (0.0123, "12 ms"),
        (0.9999, "1.0 s"),
        (3.44, "3.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h"),
        (11045, "3 h 4 min"),
        (86400 * 12 + 3 * 3600, "12 d 3 h"),
        (86400 * 4000, "4000 d"),
    ],
)
def test_a_duration_has_two_figures_that_matter(seconds: float, expected: str) -> None:
    assert words.duration(seconds) == expected


def test_a_time_of_today_is_short_on_a_terminal_and_whole_in_a_pipe() -> None:
    at = datetime(2026, 3, 1, 11, 0, 12, tzinfo=UTC)
    assert SHORT.instant(at) == "12:00:12 (in 12 s)"
    assert SHORT.time(at - timedelta(days=1)) == "2026-02-28 12:00:12"
    assert LONG.time(at) == "2026-03-01T12:00:12.000+01:00"


def test_relative_times() -> None:
    assert SHORT.relative(NOW + timedelta(seconds=0.4)) == "now"
    assert SHORT.relative(NOW - timedelta(minutes=3)) == "3 min ago"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("signal approved", "signal approved"),
        (f"sleep until {ms(NOW + timedelta(seconds=90))}", "sleep until 12:01:30 (in 1 min 30 s)"),
        (
            f"step charge (attempt 2 at {ms(NOW + timedelta(seconds=4))})",
            "step charge (attempt 2 at 12:00:04, in 4.0 s)",
        ),
        ("sleep until 2026-03-01T11:01:30.000Z", "sleep until 12:01:30 (in 1 min 30 s)"),
        ("step x (attempt 2 at 2026-03-01T11:00:04.000Z)", "step x (attempt 2 at 12:00:04, in 4.0 s)"),
        ("step charge (attempt 2)", "step charge (attempt 2)"),
        ("signal until 5", "signal until 5"),
        ("and 5 more", "and 5 more"),
        ("signal \x1b[31m", "signal \\x1b[31m"),
    ],
)
def test_what_a_run_waits_for(entry: str, expected: str) -> None:
    assert words.waiting(entry, SHORT) == expected


def test_text_of_others_cannot_steer_the_terminal_or_break_a_line() -> None:
    assert words.safe("a\x1b[2Jb\r\n") == "a\\x1b[2Jb\\r\\n"
    assert words.safe("a\nb", keep="\n") == "a\nb"
    assert words.one_line("a\n  b\tc") == "a b c"
    assert words.compact({"a": "é\u202e"}) == '{"a": "é\\u202e"}'


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("fire_at", ms(NOW), "fire_at=12:00:00"),
        ("fire_at", NOW, "fire_at=12:00:00"),
        ("started_at", 0, "started_at=0"),
        ("name", "charge", "name=charge"),
        ("name", "two words", 'name="two words"'),
        ("args", [1, "a"], 'args=[1, "a"]'),
        ("error", {"type": "ValueError", "message": "a\nb", "traceback": "…"}, "error=ValueError: a b"),
    ],
)
def test_fields_of_events(name: str, value: object, expected: str) -> None:
    assert words.field(name, value, SHORT) == expected
