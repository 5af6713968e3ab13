"""What the outcome of an attempt says: values that do not fit, errors, and when it is tried again."""

from __future__ import annotations

import math
from typing import Any

import pytest

import streamflow as sf
from streamflow.config import PAYLOAD_BYTES_MAX, TRACEBACK_BYTES_MAX
from streamflow.core.events import INSTANT_MS_MAX, StepAttemptFailed, StepFailed
from tests.worker.executing import NOW, a_step, bench, error_of, run


def test_values_that_do_not_fit_fail_the_step_for_good():
    async def wrong() -> int:
        return "no int"  # type: ignore[return-value]

    async def no_json() -> Any:
        return object()

    async def nan() -> float:
        return math.nan

    async def large() -> str:
        return "x" * PAYLOAD_BYTES_MAX

    async def test():
        async with bench() as it:
            for function in (wrong, no_json, nan):
                outcome = await it.of(a_step(function))
                assert isinstance(outcome, StepFailed)
                assert outcome.error.type == "streamflow.errors.InvalidArguments"
                assert function.__name__ in outcome.error.message
            outcome = await it.of(a_step(large))
            assert isinstance(outcome, StepFailed)
            assert outcome.error.type == "streamflow.errors.PayloadTooLarge"
            assert "the result of step large of run w has 900,002 bytes" in outcome.error.message

    run(test())


def test_recorded_arguments_that_no_longer_fit_fail_the_step_for_good():
    async def takes(n: int) -> None: ...

    async def test():
        async with bench() as it:
            step = a_step(takes)
            step.signature.encode_args = lambda args, kwargs: b'["text"]'  # type: ignore[method-assign]
            outcome = await it.of(step)
            assert isinstance(outcome, StepFailed)
            assert outcome.error.type == "streamflow.errors.InvalidArguments"

    run(test())


class Refused(Exception):
    """Somebody's own error."""


async def refuses(kind: str = "refused") -> None:
    match kind:
        case "refused":
            raise Refused("no")
        case "later":
            raise sf.RetryAfter(7, "busy")
        case "much later":
            raise sf.RetryAfter(1e13, "next geological era")
        case "endless":
            raise sf.RetryAfter(math.inf)
        case "never":
            raise sf.NonRetryable("no use")


def boom(error: BaseException, attempt: int) -> float:
    raise SystemExit("when")


@pytest.mark.parametrize(
    ("kind", "retry", "attempt", "delay"),
    [
        ("refused", sf.Retry(initial=2, jitter=0), 1, 2000),
        ("refused", sf.Retry(initial=2, jitter=0), 2, 4000),
        ("refused", sf.Retry(max_attempts=2), 2, None),
        ("refused", sf.Retry(on=(ValueError,)), 1, None),
        ("refused", sf.Retry(on=Refused, initial=1, jitter=0), 1, 1000),
        ("refused", sf.Retry(unless=Refused), 1, None),
        ("refused", sf.Retry(when=lambda error, attempt: attempt * 3.0), 2, 6000),
        ("refused", sf.Retry(when=lambda error, attempt: False), 1, None),
        ("refused", sf.Retry(initial=2, jitter=0, max_elapsed=10), 1, None),
        ("refused", sf.Retry(initial=2, jitter=0, max_elapsed=62), 1, 2000),
        ("refused", sf.Retry.never, 1, None),
        ("later", sf.Retry(), 1, 7000),
        ("never", sf.Retry(max_attempts=None), 1, None),
    ],
)
def test_the_policy_decides_on_the_error_itself(kind: str, retry: sf.Retry, attempt: int, delay: int | None):
    async def test():
        async with bench() as it:
            outcome = await it.of(a_step(refuses), kind, retry=retry, attempt=attempt, scheduled_at=NOW - 60_000)
            if delay is None:
                assert isinstance(outcome, StepFailed)
            else:
                assert isinstance(outcome, StepAttemptFailed)
                assert (outcome.attempt, outcome.retry_at) == (attempt, NOW + delay)

    run(test())


def test_a_policy_that_breaks_fails_the_step_with_its_own_error():
    async def test():
        async with bench() as it:
            broken = sf.Retry(when=lambda error, attempt: "soon")  # type: ignore[arg-type, return-value]
            outcome = await it.of(a_step(refuses), retry=broken)
            assert isinstance(outcome, StepFailed) and "Retry.when" in outcome.error.message
            assert "Refused: no" in outcome.error.traceback
            outcome = await it.of(a_step(refuses), retry=sf.Retry(when=boom))
            assert isinstance(outcome, StepFailed) and outcome.error.type == "SystemExit"
            outcome = await it.of(a_step(refuses), "endless")
            assert isinstance(outcome, StepFailed) and "RetryAfter.seconds" in outcome.error.message

    run(test())


def test_an_attempt_after_the_end_of_the_calendar_still_fits_a_record():
    async def test():
        async with bench() as it:
            outcome = await it.of(a_step(refuses), "much later")
            assert isinstance(outcome, StepAttemptFailed)
            assert outcome.retry_at == INSTANT_MS_MAX

    run(test())


def test_an_at_most_once_step_is_never_tried_again():
    async def test():
        async with bench() as it:
            assert isinstance(await it.of(a_step(refuses, at_most_once=True), "later"), StepFailed)

    run(test())


def test_an_error_keeps_its_qualified_type_its_text_and_the_end_of_its_traceback():
    def deep(n: int) -> None:
        if n:
            deep(n - 1)
        raise Refused("\ud800 is no text €" + "é" * 20_000)

    async def fails() -> None:
        try:
            deep(2)
        except Refused as error:
            raise LookupError("ü" * 30_000) from error

    async def unspeakable() -> None:
        class Silent(Exception):
            def __str__(self) -> str:
                raise ValueError

        raise Silent

    async def test():
        async with bench() as it:
            error = error_of(await it.of(a_step(refuses)))
            assert (error.type, error.message) == (f"{__name__}.Refused", "no")
            assert error.traceback.rstrip().endswith("Refused: no") and "in refuses" in error.traceback
            error = error_of(await it.of(a_step(fails)))
            assert error.type == "LookupError" and error.message == "ü" * 8192
            assert len(error.traceback.encode()) <= TRACEBACK_BYTES_MAX + 3
            assert error.traceback.startswith("…") and error.traceback.rstrip().endswith("ü")
            error = error_of(await it.of(a_step(unspeakable)))
            assert error.message == "(its text could not be made: ValueError)"

    run(test())
