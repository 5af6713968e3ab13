"""Handles: which status they wait for, whatever order things come in."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.structs import replace

from streamflow.client import statuses
from streamflow.client.statuses import FEED_STATUSES_MAX
from streamflow.core import commands as c
from streamflow.errors import (
    CommandRejected,
    ErrorInfo,
    InvalidArguments,
    PayloadTooLarge,
    StreamflowError,
    Unavailable,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowNotFound,
    WorkflowTerminated,
)
from streamflow.logs.base import STATUS, Outgoing
from streamflow.workflow.definitions import Registry
from tests.client.owner import Owner, owned


@dataclass
class Receipt:
    total: int


registry = Registry()


@registry.workflow
async def fulfil(order: str, total: int = 0) -> Receipt:
    return Receipt(total)


def run(test: Callable[..., Coroutine[Any, Any, None]], app: Registry | None = registry) -> None:
    async def main() -> None:
        async with owned(app) as (owner, client):
            await asyncio.wait_for(test(owner, client), 20)

    asyncio.run(main())


def queries(owner: Owner) -> int:
    return len(owner.of_kind(c.Query))


def test_a_result_comes_without_a_question():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o-1")
        waiting = asyncio.create_task(handle.result())
        await owner.finish(handle.id, b'{"total":5}')
        assert await waiting == Receipt(5)
        assert await handle.result() == Receipt(5)
        assert queries(owner) == 0

    run(test)


def test_a_result_is_typed_by_what_is_known_of_the_workflow():
    async def test(owner: Owner, client: Any) -> None:
        await client.start("fulfil", "o-1", id="a")
        await owner.finish("a", b'{"total":5}')
        assert await client.handle("a").result() == Receipt(5)
        assert await client.handle("a", fulfil).result() == Receipt(5)

    run(test)

    async def unknown(owner: Owner, client: Any) -> None:
        await client.start("fulfil", "o-1", id="a")
        await owner.finish("a", b'{"total":5}')
        assert await client.handle("a").result() == {"total": 5}
        assert await client.handle("a", fulfil).result() == Receipt(5)

    run(unknown, None)


def test_the_ways_a_run_may_end():
    async def test(owner: Owner, client: Any) -> None:
        failed, cancelled, terminated = [await client.start(fulfil, "o", id=id) for id in "abc"]
        await failed.signal("end", error="boom")
        await cancelled.cancel()
        await terminated.terminate("enough")
        with pytest.raises(WorkflowFailed) as failure:
            await failed.result()
        assert (failure.value.id, failure.value.error) == ("a", ErrorInfo("ValueError", "boom"))
        with pytest.raises(WorkflowCancelled, match="b was cancelled"):
            await cancelled.result()
        with pytest.raises(WorkflowTerminated, match="c was terminated: enough"):
            await terminated.result()

    run(test)


def test_a_timeout_says_that_the_run_goes_on():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        with pytest.raises(TimeoutError, match=r"run a was not closed within 0\.01 s; it goes on"):
            await handle.result(timeout=0.01)
        for wrong in (-1, "5", float("nan")):
            with pytest.raises(InvalidArguments, match="timeout of result"):
                await handle.result(timeout=wrong)
        await owner.finish("a", b'{"total":1}')
        assert await handle.result(timeout=10) == Receipt(1)

    run(test)


def test_attaching_to_a_closed_run_gives_its_result():
    async def test(owner: Owner, client: Any) -> None:
        await (await client.start(fulfil, "o", id="a")).signal("end", {"total": 3})
        gc.collect()
        handle = await client.start(fulfil, "o", id="a")
        assert handle.attached and not client.handle("a").attached
        assert await handle.result(10) == Receipt(3)
        assert queries(owner) == 1
        assert not (await client.start(fulfil, "o", id="a", if_exists="restart")).attached

    run(test)


def test_attaching_when_nothing_is_published_asks():
    async def test(owner: Owner, client: Any) -> None:
        owner.quiet = True
        handle = await client.start(fulfil, "o", id="a")
        await handle.signal("end", {"total": 3})
        assert await handle.result(10) == Receipt(3)

    run(test)


def test_the_last_published_status_needs_no_owner():
    async def test(owner: Owner, client: Any) -> None:
        first, other = await client.start(fulfil, "o", id="a"), client.handle("b")
        for value in range(1200):  # more than one read gives
            await owner.log.publish(owner.change(replace(owner.runs_["a"], progress=b"%d" % value)))
        await client.start(fulfil, "p", id="b")
        owner.deaf = True
        status = await first.published()
        assert (status.id, status.state, status.progress, status.args) == ("a", "running", 1199, ["o"])
        assert (await other.published()).args == ["p"]
        assert await client.handle("c").published() is None
        await owner.log.publish([Outgoing(STATUS, owner.home("a"), b"a", None)])
        assert await first.published() is None
        assert queries(owner) == 0
        await owner.log.publish([Outgoing(STATUS, owner.home("a"), b"a", b"xx")])
        with pytest.raises(Unavailable, match="the last published status of run a cannot be read"):
            await first.published()

    run(test)


def test_looking_for_the_last_published_status_ends(monkeypatch: pytest.MonkeyPatch):
    async def test(owner: Owner, client: Any) -> None:
        monkeypatch.setattr(statuses, "PUBLISHED_SECONDS", 0.01)
        monkeypatch.setattr(owner.log, "read", lambda *_: asyncio.Event().wait())
        handle = await client.start(fulfil, "o", id="a")
        with pytest.raises(Unavailable, match=r"run a was not found within 0\.01 s: start a worker"):
            await handle.published()

    run(test)


def test_a_restart_waits_for_the_new_run():
    async def test(owner: Owner, client: Any) -> None:
        first = await client.start(fulfil, "o", id="a")
        await owner.finish("a", b'{"total":1}')
        assert await first.result(10) == Receipt(1)
        second = await client.start(fulfil, "o", id="a", if_exists="restart")
        waiting = asyncio.create_task(second.result(10))
        await asyncio.wait((waiting,), timeout=0.05)
        assert not waiting.done()
        await owner.finish("a", b'{"total":2}')
        assert await waiting == Receipt(2)
        assert (await second.status()).run == 2

    run(test)


def test_an_old_status_that_comes_late_changes_nothing():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        old = owner.change(owner.runs_["a"])
        owner.change(owner.runs_["a"])
        assert (await handle.status()).turn == 3
        await owner.log.publish(old)
        await owner.finish("a", b'{"total":9}')
        assert await handle.result(10) == Receipt(9)
        assert handle._interest.record.turn == 4

    run(test)


def test_a_run_that_is_cleaned_up_while_somebody_waits():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        waiting = [asyncio.create_task(handle.result()), asyncio.create_task(collect(handle))]
        await owner.arrive(2)
        assert await client.handle("a").cleanup(force=True) is True
        for task in waiting:
            with pytest.raises(WorkflowNotFound, match="run a was cleaned up"):
                await task

    run(test)


async def collect(handle: Any) -> list[Any]:
    return [(status.state, status.progress) async for status in handle.watch()]


def test_an_id_that_is_used_again_after_cleanup():
    async def test(owner: Owner, client: Any) -> None:
        first = await client.start(fulfil, "o", id="a")
        await first.signal("end", {"total": 1})
        assert await first.result(10) == Receipt(1)
        await first.cleanup()
        second = await client.start(fulfil, "o", id="a")
        waiting = asyncio.create_task(second.result(10))
        # The tombstone of the run before, a second time: as a follower that lags sees it.
        await owner.log.publish([Outgoing(STATUS, owner.home("a"), b"a", None)])
        await second.signal("end", {"total": 2})
        assert await waiting == Receipt(2)

    run(test)


def test_unknown_runs():
    async def test(owner: Owner, client: Any) -> None:
        handle = client.handle("nobody")
        for call in (handle.result, handle.status, handle.steps, handle.history):
            with pytest.raises(WorkflowNotFound, match="no run nobody"):
                await call()
        with pytest.raises(WorkflowNotFound):
            await collect(handle)
        with pytest.raises(InvalidArguments, match="1 to 255 bytes"):
            client.handle("")
        with pytest.raises(InvalidArguments):
            client.handle("x" * 256)

    run(test)


def test_watchers_see_every_change_to_the_end():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        watchers = [asyncio.create_task(collect(client.handle("a"))) for _ in range(3)]
        await owner.arrive(4)
        for number in range(5):
            await handle.signal("progress", number)
        await owner.finish("a", b"null")
        expected = [("running", None), *(("running", n) for n in range(5)), ("completed", 4)]
        for watcher in watchers:
            assert await watcher == expected
        assert await collect(handle) == [("completed", 4)]

    run(test)


def test_a_slow_watcher_misses_what_lies_between_never_the_last():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        watching = handle.watch()
        assert (await anext(watching)).state == "running"
        for _ in range(FEED_STATUSES_MAX + 50):
            await owner.log.publish(owner.change(owner.runs_["a"]))
        await owner.finish("a")
        await handle.status()
        seen = [status async for status in watching]
        assert 1 <= len(seen) <= FEED_STATUSES_MAX
        assert seen[-1].state == "completed"

    run(test)


def test_a_watch_that_nobody_reads_leaves_nothing():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        async for status in handle.watch():
            assert status.state == "running"
            break
        gc.collect()
        assert not list(handle._interest.feeds)
        watching = handle.watch()
        await watching.aclose()
        assert [status async for status in watching] == []

    run(test)


def test_handles_that_nobody_holds_leave_nothing():
    async def test(owner: Owner, client: Any) -> None:
        async def one(id: str) -> None:
            handle = await client.start(fulfil, "o", id=id)
            await owner.finish(id, b'{"total":1}')
            await handle.result(10)

        for number in range(50):
            await one(f"w{number}")
        gc.collect()
        assert not client._statuses._interests
        assert not client._requests._pending

    run(test)


def test_many_who_wait_for_one_run():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        waiting = [asyncio.create_task(client.handle("a").result()) for _ in range(20)]
        waiting[0].cancel()
        await owner.arrive(20)
        await owner.finish("a", b'{"total":1}')
        assert await asyncio.gather(*waiting[1:]) == [Receipt(1)] * 19
        assert not handle._interest._waiters

    run(test)


def test_signals_and_their_ids():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        await asyncio.gather(*(handle.signal("progress", 1, id="once") for _ in range(3)))
        await handle.signal("progress", 2)
        sent = [command.command_id for command in owner.of_kind(c.SignalWorkflow)]
        assert sent[:3] == ["signal:once"] * 3 and sent[3] != "signal:once"
        assert owner.runs_["a"].turn == 3
        body = owner.of_kind(c.SignalWorkflow)[0].body
        assert body == c.SignalWorkflow(name="progress", value=b"1", error=None)

    run(test)


def test_wrong_requests_of_a_handle():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        wrong = [
            (handle.signal("", 1), InvalidArguments, "signal name"),
            (handle.signal("x", 1, error="e"), InvalidArguments, "exclude each other"),
            (handle.signal("x", error=5), InvalidArguments, "error must be a str"),
            (handle.signal("x", object()), InvalidArguments, "cannot be written as JSON"),
            (handle.signal("x", "y" * 1_000_000), PayloadTooLarge, "the value of signal x has 1,000,002 bytes"),
            (handle.signal("x", id="y" * 256), InvalidArguments, "id of a signal"),
            (handle.terminate(5), InvalidArguments, "reason must be a str"),
            (handle.cleanup(force="yes"), InvalidArguments, "force must be a bool"),
            (handle.steps(order="up"), InvalidArguments, "order"),
            (handle.steps(limit=0), InvalidArguments, "limit"),
            (handle.steps(cursor="x"), InvalidArguments, "cursor"),
            (handle.restart(), StreamflowError, "not part of this version"),
        ]
        for call, error, text in wrong:
            with pytest.raises(error, match=text):
                await call
        assert len(owner.commands) == 1

    run(test)


def test_a_rejection_is_raised_as_its_class():
    def refuse(command: c.Command) -> None:
        if isinstance(command.body, c.CancelWorkflow):
            raise CommandRejected("run a is completed")

    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        owner.before = refuse
        with pytest.raises(CommandRejected, match="run a is completed"):
            await handle.cancel()

    run(test)


def test_closing_the_client_wakes_everybody():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o", id="a")
        watching = handle.watch()
        await anext(watching)
        owner.deaf = True
        waiting = [
            asyncio.create_task(handle.result()),
            asyncio.create_task(anext(watching)),
            asyncio.create_task(handle.status()),
        ]
        await owner.arrive(3)
        await client.close()
        await client.close()
        for task in waiting:
            with pytest.raises(Unavailable, match="the client was closed"):
                await task
        for call in (handle.status, handle.cancel, client.handle("b").result, client.list):
            with pytest.raises(Unavailable, match="the client was closed"):
                await call()
        with pytest.raises(Unavailable):
            await client.start(fulfil, "o")

    run(test)
