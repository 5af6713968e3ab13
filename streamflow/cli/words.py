"""Instants, durations, states and JSON in words, for people. Pure: the present is an argument."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

STYLES: Final[Mapping[str, str]] = {
    "scheduled": "blue",
    "running": "cyan",
    "waiting": "blue",
    "paused": "magenta",
    "blocked": "bold yellow",
    "backing_off": "yellow",
    "completed": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "terminated": "red",
}
"""The colour of each state of a run or a step."""


class Clock(NamedTuple):
    """The present, and whether it may be left out of a time of the same day (on a terminal)."""

    now: datetime
    short: bool

    def time(self, at: datetime) -> str:
        """The instant in local time: `14:03:22` for people, ISO 8601 with the zone for programs."""
        local = at.astimezone(self.now.tzinfo)
        if not self.short:
            return local.isoformat(timespec="milliseconds")
        if local.date() == self.now.date():
            return f"{local:%H:%M:%S}"
        return f"{local:%Y-%m-%d %H:%M:%S}"

    def relative(self, at: datetime) -> str:
        """How far away: `in 12 s`, `3 min ago`."""
        seconds = (at - self.now).total_seconds()
        if abs(seconds) < 1:
            return "now"
        return f"in {duration(seconds)}" if seconds > 0 else f"{duration(-seconds)} ago"

    def instant(self, at: datetime) -> str:
        """`14:03:22 (in 12 s)`."""
        return f"{self.time(at)} ({self.relative(at)})"


def clock(*, short: bool) -> Clock:
    """The local clock."""
    return Clock(datetime.now(UTC).astimezone(), short)


def from_ms(ms: int) -> datetime:
    """The instant of so many milliseconds since the epoch."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)


def duration(seconds: float) -> str:
    """Two figures that matter: `12 ms`, `3.4 s`, `2 min 5 s`, `3 h 4 min`, `12 d 3 h`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, small_unit, small_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            small = whole % size // small_size
            return f"{whole // size} {unit}" + (f" {small} {small_unit}" if small else "")
    return f"{whole} s"


_INSTANT: Final = re.compile(
    r"(?P<word>\b(?:until|at)) (?:(?P<ms>\d{11,15})|(?P<iso>\d{4}-\d\d-\d\dT[\d:.]+Z))(?P<end>\)?)$"
)


def waiting(entry: str, at: Clock) -> str:
    """An entry of `waiting_on`, its instant (ISO 8601, or milliseconds since the epoch) as a local time."""
    found = _INSTANT.search(entry)
    if found is None:
        return safe(entry)
    when = from_ms(int(found["ms"])) if found["ms"] else datetime.fromisoformat(found["iso"])
    # Inside parentheses a comma reads better than a second pair.
    shown = f"{at.time(when)}, {at.relative(when)}" if found["end"] else at.instant(when)
    return f"{safe(entry[: found.start()])}{found['word']} {shown}{found['end']}"


def compact(value: Any) -> str:
    """A JSON value on one line."""
    return safe(json.dumps(value, ensure_ascii=False, default=str))


def one_line(text: str) -> str:
    """The text with its line breaks and runs of blanks folded, nothing left out."""
    return safe(" ".join(text.split()))


def safe(text: str, *, keep: str = "") -> str:
    """The text with control characters escaped: what others wrote must not steer this terminal or break a line."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode("ascii") for each in text
    )


def field(name: str, value: Any, at: Clock) -> str:
    """`name=value` of an event; instants (`…_at`) as times, errors as their text."""
    if name.endswith("_at") and isinstance(value, int) and value > 0:
        return f"{name}={at.time(from_ms(value))}"
    if name.endswith("_at") and isinstance(value, datetime):
        return f"{name}={at.time(value)}"
    if isinstance(value, Mapping) and {"type", "message"} <= value.keys():
        return f"{name}={value['type']}: {one_line(str(value['message']))}"
    if isinstance(value, str) and value and not re.search(r"[\s\"]", value):
        return f"{name}={safe(value)}"
    return f"{name}={compact(value)}"
