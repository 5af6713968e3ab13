"""Retry arithmetic: which errors are tried again, and when. Chance comes from (run, step, attempt), so replay agrees.

delay before attempt n+1 = min(initial * factor**(n-1), max_delay) * uniform(1-jitter, 1+jitter)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, Final, TypeAlias

from streamflow.errors import NonRetryable, RetryAfter

Duration: TypeAlias = float | timedelta
"""Seconds, or a timedelta."""
ErrorTypes: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]
SECONDS_MAX: Final = timedelta.max.total_seconds()
"""The longest duration, as timedelta has it; in milliseconds it fits every integer of the log."""
FACTOR_MAX: Final = 1e300
"""The largest growth per attempt: it reaches the longest delay at once."""


def seconds(value: Duration, *, what: str) -> float:
    """The duration in seconds; `ValueError` naming `what` when it is negative, endless or not a duration."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} must be seconds or a timedelta, found {value!r}")
    if not 0 <= value <= SECONDS_MAX:
        raise ValueError(f"{what} must be at least 0 seconds and not infinite, found {value!r}")
    return float(value)


def chance(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone: the same in every process and on every replay."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


@dataclass(frozen=True, slots=True)
class Retry:
    """When a failed step is tried again.

    `max_attempts` (None: no limit) counts the first attempt too; `initial`, `max_delay` and `max_elapsed` are
    durations, `max_elapsed` being the time from the scheduling of the step after which no further attempt starts.
    Errors of a class in `on` and not in `unless` are retried; `when(error, attempt)` decides further: True, False, or
    the delay in seconds. Wrong fields are a `ValueError` that names the field.
    """

    max_attempts: int | None = 5
    initial: Duration = 0.5
    factor: float = 2.0
    max_delay: Duration = 60.0
    jitter: float = 0.5
    max_elapsed: Duration | None = None
    on: ErrorTypes = (Exception,)
    unless: ErrorTypes = ()
    when: Callable[[BaseException, int], bool | float] | None = None

    never: ClassVar[Retry]
    """One attempt."""

    def __post_init__(self) -> None:
        attempts = self.max_attempts
        if attempts is not None and (isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1):
            raise ValueError(
                f"Retry.max_attempts must be an int of at least 1, or None for no limit, found {attempts!r}"
            )
        for name in ("initial", "max_delay"):
            object.__setattr__(self, name, seconds(getattr(self, name), what=f"Retry.{name}"))
        if self.max_elapsed is not None:
            object.__setattr__(self, "max_elapsed", seconds(self.max_elapsed, what="Retry.max_elapsed"))
        if not _is_number(self.factor) or not 1 <= self.factor <= FACTOR_MAX:
            raise ValueError(f"Retry.factor must be a number from 1 to {FACTOR_MAX:g}, found {self.factor!r}")
        object.__setattr__(self, "factor", float(self.factor))  # powers of an int would grow without bound
        if not _is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise ValueError(f"Retry.jitter must be a number from 0 to 1, found {self.jitter!r}")
        for name in ("on", "unless"):
            object.__setattr__(self, name, _error_types(getattr(self, name), field=name))
        if self.when is not None and not callable(self.when):
            raise ValueError(f"Retry.when must be callable(error, attempt), found {self.when!r}")

    def delay(self, attempt: int, *key: object) -> float:
        """Seconds between the failure of `attempt` and the next one; chance comes from `key` (run, step)."""
        assert attempt >= 1, attempt
        assert isinstance(self.initial, float) and isinstance(self.max_delay, float)  # by __post_init__
        try:
            base = min(self.initial * self.factor ** (attempt - 1), self.max_delay)
        except OverflowError:
            base = self.max_delay if self.initial else 0.0
        return base * (1 - self.jitter + 2 * self.jitter * chance(*key, attempt))

    def next_delay(self, error: BaseException, attempt: int, elapsed: float, *key: object) -> float | None:
        """Seconds until the next attempt after `attempt` failed with `error`, None when it was the last one.

        `elapsed` is the time in seconds since the step was scheduled.
        """
        delay = self._selected(error, attempt, *key)
        if delay is None or (self.max_attempts is not None and attempt >= self.max_attempts):
            return None
        if self.max_elapsed is not None:
            assert isinstance(self.max_elapsed, float)  # by __post_init__
            if elapsed + delay > self.max_elapsed:
                return None
        return delay

    def _selected(self, error: BaseException, attempt: int, *key: object) -> float | None:
        """The delay that the kind of error asks for, None when it must not be retried."""
        if isinstance(error, NonRetryable):
            return None
        if isinstance(error, RetryAfter):
            return seconds(error.seconds, what="RetryAfter.seconds")
        if not isinstance(error, self.on) or isinstance(error, self.unless):
            return None
        if self.when is None:
            return self.delay(attempt, *key)
        verdict = self.when(error, attempt)
        if isinstance(verdict, bool):
            return self.delay(attempt, *key) if verdict else None
        return seconds(verdict, what="the delay from Retry.when")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _error_types(value: object, *, field: str) -> tuple[type[BaseException], ...]:
    types = value if isinstance(value, tuple) else (value,)
    for item in types:
        if not isinstance(item, type) or not issubclass(item, BaseException):
            raise ValueError(f"Retry.{field} must be an exception class or a tuple of them, found {item!r}")
    return types


Retry.never = Retry(max_attempts=1)
