"""What a test may do with its world, besides what any client may."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import datetime
from typing import Any, Final, TypeVar

from streamflow.client.client import Client
from streamflow.core.retry import Duration
from streamflow.errors import InvalidArguments
from streamflow.testing.stage import Stage
from streamflow.testing.steps import Call, MadeToFail
from streamflow.workflow.definitions import Step, check_duration

T = TypeVar("T")
POLL_SECONDS: Final = 0.05


class World:
    """A simulated world: `client` talks to its workers; the rest looks at it and interferes."""

    def __init__(self, stage: Stage, client: Client) -> None:
        self._stage = stage
        self.client = client
        """`sf.Client`'s methods and handles."""

    @property
    def seed(self) -> int:
        """What everything here comes from: the same seed is the same story."""
        return self._stage.options.seed

    @property
    def now(self) -> datetime:
        """The world's time, in UTC. It begins in 2030, or at `start_at`."""
        return self._stage.now

    @property
    def virtual_seconds(self) -> float:
        """How much of the world's time has passed."""
        return self._stage.world.now

    @property
    def events(self) -> int:
        """How much has happened, in steps of the world: what a test costs, however fast the machine is."""
        return self._stage.world.steps

    @property
    def faults(self) -> list[str]:
        """What went wrong on purpose so far, in order."""
        return list(self._stage.faults.said)

    async def advance(self, duration: Duration) -> None:
        """Let that much virtual time pass (seconds or a timedelta), with all that happens in it."""
        await self._play(asyncio.sleep(check_duration(duration, what="duration of advance()")))

    async def crash_worker(self, number: int = 0, *, keep_disk: bool = True) -> None:
        """Kill a worker (SIGKILL: no `finally` runs) and start it again; returns when every partition is served.

        Kept is the log: what was acknowledged, and what was on its way there and still lands; and the worker's disk,
        unless `keep_disk` is False. Lost is its memory: attempts that were running begin again, under the same number,
        and runs are loaded by replaying their code.
        """
        machine = self._stage.machine(number)

        async def crash() -> None:
            self._stage.crash(machine, keep_disk=keep_disk)
            while not self._stage.is_served():  # noqa: ASYNC110  # nobody tells when the group has settled
                await asyncio.sleep(POLL_SECONDS)

        await self._play(crash())

    def fail_step(
        self,
        step: Step[..., Any] | str,
        times: int = 1,
        error: BaseException | type[BaseException] | None = None,
    ) -> None:
        """Let the next `times` attempts of that step raise `error` instead of running.

        Whether and when they are tried again is for the step's policy to say. The step is given itself or by its name.
        """
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise InvalidArguments(f"times must be an int of at least 1, found {times!r}")
        name = self._stage.steps.name_of(step)
        if error is None:
            error = MadeToFail(f"the test makes step {name} fail")
        elif not isinstance(error, BaseException) and not (
            isinstance(error, type) and issubclass(error, BaseException)
        ):
            raise InvalidArguments(f"error must be an exception or a class of one, found {error!r}")
        self._stage.steps.script(step).failing.extend([error] * times)

    def mock_step(self, step: Step[..., Any] | str, mock: object) -> None:
        """From now on, let the step give `mock` instead of running: a value, or what a function makes of its arguments.

        The function may be async; what it raises is the attempt's failure. What it returns must fit the step's
        annotation. Attempts that are under way go on as they began.
        """
        self._stage.steps.script(step).mock = (mock,)

    def calls(self, step: Step[..., Any] | str | None = None) -> list[Call]:
        """The attempts that began so far, oldest first: of that step, or of all."""
        calls = self._stage.steps.calls
        if step is None:
            return list(calls)
        name = self._stage.steps.name_of(step)
        return [call for call in calls if call.step == name]

    async def _play(self, main: Coroutine[Any, Any, T]) -> T:
        return await main
