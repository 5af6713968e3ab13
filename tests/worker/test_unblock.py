"""A run that goes straight on when fitting code comes back starts each of its new steps once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf


def make_app(first: int) -> sf.App:
    app = sf.App("unblocking", retry=sf.Retry.never)

    @app.step
    async def number(value: int) -> int:
        return value

    @app.workflow
    async def flow() -> list[int]:
        return [await number(first), await sf.wait_signal("go", int), await number(3)]

    @app.step
    async def exits() -> None:
        raise GeneratorExit

    @app.workflow
    async def exits_its_step() -> str:
        try:
            await exits()
        except sf.StepFailed as failed:
            return failed.error.type
        return "returned"

    return app


@asynccontextmanager
async def served(folder: Path, first: int) -> AsyncIterator[sf.Client]:
    async with make_app(first).serve(f"sqlite:///{folder}/log.db") as client:
        yield client


async def state_is(handle: sf.Handle[Any], state: str) -> sf.RunStatus:
    async for status in handle.watch():
        if status.state == state:
            return status
    raise AssertionError(f"the run closed and was never {state}")


def test_an_unblocked_run_starts_its_next_step_once_and_the_partition_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with served(tmp_path, 1) as client:
            handle = await client.start("flow", id="r1")
            async for status in handle.watch():
                if status.waiting_on == ["signal go"]:
                    break
        async with served(tmp_path, 2) as client:
            handle = client.handle("r1")
            await handle.signal("go", 2)
            blocked = await state_is(handle, "blocked")
            assert blocked.error is not None
            assert "[1]" in blocked.error.message
            assert "[2]" in blocked.error.message
            assert blocked.waiting_on == ["fitting code"]
        assert "run r1 is blocked" in caplog.text
        async with served(tmp_path, 1) as client:
            assert await client.handle("r1").result(timeout=20) == [1, 2, 3]

    asyncio.run(main())
    assert "beginning again from the log" not in caplog.text


def test_a_step_that_raises_generator_exit_fails(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, 1) as client:
            assert await (await client.start("exits_its_step")).result(timeout=20) == "GeneratorExit"

    asyncio.run(main())
