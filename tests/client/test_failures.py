"""What the client does when the log fails under it: reads that fail for a while, damage, closing while it opens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from streamflow.client import Client
from streamflow.client import follow as follow_module
from streamflow.errors import CorruptLog, Unavailable
from streamflow.logs.base import REPLIES, STATUS, Log, Outgoing, Record
from streamflow.logs.open import open_log
from tests.client.owner import Owner, owned


def failing_reads(log: Log, topic: str, errors: Sequence[Exception]) -> list[Exception]:
    """Let the next reads of the topic fail with these; what is left of them is returned, to look at."""
    left = list(errors)
    follow = log.follow

    async def flaky(topic_: str, partition: int, offset: int, *, limit: int = 1000) -> AsyncIterator[list[Record]]:
        if topic_ == topic and left:
            raise left.pop(0)
        async for batch in follow(topic_, partition, offset, limit=limit):
            yield batch

    log.follow = flaky  # type: ignore[method-assign,assignment]
    return left


def run(test: Callable[[Owner, Any], Any]) -> None:
    async def main() -> None:
        async with owned() as (owner, client):
            await asyncio.wait_for(test(owner, client), 20)

    asyncio.run(main())


@pytest.mark.parametrize("topic", [REPLIES, STATUS])
def test_reads_that_fail_for_a_while_are_tried_again(topic: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(follow_module, "FOLLOW_RETRY_SECONDS", 0.001)

    async def main() -> None:
        log = await open_log("memory://", app="shop")
        left = failing_reads(log, topic, [Unavailable("locked")] * 3)
        owner = Owner(log)
        serving = [asyncio.create_task(owner.serve(partition)) for partition in range(log.partitions)]
        async with Client(log) as client:
            handle = await client.start("fulfil", id="a")
            await handle.signal("end", 5)
            assert await handle.result(10) == 5
        assert left == []
        for task in serving:
            task.cancel()
        await asyncio.wait(serving)
        await log.close()

    asyncio.run(main())


@pytest.mark.parametrize("topic", [REPLIES, STATUS])
def test_damage_is_told_to_whoever_waits(topic: str):
    async def main() -> None:
        log = await open_log("memory://", app="shop")
        failing_reads(log, topic, [CorruptLog("bad page")])
        owner = Owner(log)
        serving = [asyncio.create_task(owner.serve(partition)) for partition in range(log.partitions)]
        async with Client(log) as client:
            with pytest.raises(Unavailable, match="cannot be read: bad page; connect again"):
                await (await client.start("fulfil", id="a")).result(10)
            with pytest.raises(Unavailable, match="bad page"):
                await client.start("fulfil")
        for task in serving:
            task.cancel()
        await asyncio.wait(serving)
        await log.close()

    asyncio.run(main())


def test_a_log_that_is_closed_while_somebody_waits():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start("fulfil", id="a")
        waiting = asyncio.create_task(handle.result())
        await handle.status()
        await owner.log.close()
        with pytest.raises(Unavailable, match="it was closed; connect again"):
            await waiting
        with pytest.raises(Unavailable):
            await handle.status()
        with pytest.raises(Unavailable):
            await client.handle("b").result()

    run(test)


def test_a_publish_that_is_refused_at_once_or_cancelled():
    async def test(owner: Owner, client: Any) -> None:
        publish = owner.log.publish

        def refuse(records: Sequence[Outgoing], **options: Any) -> asyncio.Future[None]:
            raise Unavailable("full")

        def cancel(records: Sequence[Outgoing], **options: Any) -> asyncio.Future[None]:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.cancel()
            return future

        for wrong, text in ((refuse, "full"), (cancel, "closed while the command was sent")):
            owner.log.publish = wrong  # type: ignore[method-assign]
            with pytest.raises(Unavailable, match=text):
                await client.start("fulfil")
        owner.log.publish = publish  # type: ignore[method-assign]
        await client.start("fulfil")

    run(test)


def test_closing_while_it_opens():
    async def main() -> None:
        log = await open_log("memory://", app="shop")
        end_offset, asked, answer = log.end_offset, asyncio.Event(), asyncio.Event()

        async def slow(topic: str, partition: int) -> int:
            asked.set()
            await answer.wait()
            return await end_offset(topic, partition)

        log.end_offset = slow  # type: ignore[method-assign]
        client = Client(log)
        starting = [asyncio.create_task(client.start("fulfil", id="a")) for _ in range(3)]
        opening = [asyncio.create_task(client.open()) for _ in range(3)]
        await asked.wait()
        await client.close()
        answer.set()
        outcomes = await asyncio.gather(*starting, *opening, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {Unavailable}
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await log.close()

    asyncio.run(main())


def test_statuses_that_are_damaged_are_skipped(caplog: pytest.LogCaptureFixture):
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start("fulfil", id="a")
        await owner.log.publish([Outgoing(STATUS, owner.home("a"), b"a", b"garbage")])
        await owner.finish("a", b"5")
        assert await handle.result(10) == 5

    run(test)
    assert "skipped" in caplog.text
