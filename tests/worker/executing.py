"""An executor on a fixed clock, and what it reports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import streamflow as sf
from streamflow.config import Limits
from streamflow.core.events import StepAttemptFailed, StepFailed
from streamflow.worker.executor import Attempt, AttemptOutcome, Executor
from streamflow.workflow.code import StepCall
from streamflow.workflow.definitions import Registry, Step
from streamflow.workflow.stepinfo import StepInfo

NOW = 1_000_000


class FixedClock:
    def now_ms(self) -> int:
        return NOW


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def call_of(step: Step[..., Any], **changes: Any) -> StepCall:
    call = StepCall(
        step=step,
        name=step.name,
        retry=step.retry or sf.Retry(initial=1, jitter=0),
        timeout=step.timeout,
        delay=None,
        at=None,
        queue=None,
        check_args=True,
    )
    return replace(call, **changes)


class Bench:
    """An executor, and what it reports."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.outcomes: dict[int, AttemptOutcome] = {}
        self.order: list[int] = []
        self._numbers = 0
        self._waiters: dict[int, asyncio.Future[AttemptOutcome]] = {}

    def start(
        self,
        step: Step[..., Any],
        *args: Any,
        attempt: int = 1,
        owner: object = None,
        scheduled_at: int = NOW,
        **changes: Any,
    ) -> int:
        number = self._numbers
        self._numbers += 1
        self._waiters[number] = asyncio.get_running_loop().create_future()
        made = Attempt(
            owner=owner or self,
            info=StepInfo(workflow_id="w", run=1, step=step.name, number=number, attempt=attempt),
            call=call_of(step, **changes),
            args=step.signature.encode_args(args, {}),
            scheduled_at=scheduled_at,
            at_most_once=step.at_most_once,
            report=self.report,
        )
        self.executor.start(made)
        return number

    def report(self, info: StepInfo, outcome: AttemptOutcome) -> None:
        assert info.number not in self.outcomes, "an attempt reports once"
        self.outcomes[info.number] = outcome
        self.order.append(info.number)
        self._waiters[info.number].set_result(outcome)

    def cancel(self, number: int) -> None:
        self.executor.cancel(self, "w", 1, number)

    async def outcome(self, number: int) -> AttemptOutcome:
        return await self._waiters[number]

    async def of(self, step: Step[..., Any], *args: Any, **changes: Any) -> AttemptOutcome:
        return await self.outcome(self.start(step, *args, **changes))


@asynccontextmanager
async def bench(max_parallel_steps: int = 8, **limits: Any) -> AsyncIterator[Bench]:
    executor = Executor(FixedClock(), max_parallel_steps=max_parallel_steps, limits=Limits(**limits))
    try:
        yield Bench(executor)
    finally:
        executor.close()
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def a_step(function: Callable[..., Any], **options: Any) -> Step[..., Any]:
    made: Step[..., Any] = Registry().step(**options)(function)
    return made


def error_of(outcome: AttemptOutcome) -> sf.ErrorInfo:
    assert isinstance(outcome, (StepFailed, StepAttemptFailed)), outcome
    return outcome.error
