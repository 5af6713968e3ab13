"""The whole contract of handles and clients against a real worker, on every local log."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf
from streamflow.logs.open import open_log

_names = itertools.count()


@dataclass
class Order:
    id: str
    total: int


@dataclass
class Receipt:
    order: Order
    payment: str


def make_app() -> sf.App:
    """A shop whose steps can be held up and made to fail."""
    app = sf.App("shop", retry=sf.Retry(max_attempts=2, initial=0.01))

    @app.step
    async def charge(order_id: str, amount: int) -> str:
        if amount < 0:
            raise ValueError("negative")
        return f"paid {amount} for {order_id}"

    @app.step
    def pack(order_id: str) -> str:
        return sf.step_info().idempotency_key

    @app.workflow
    async def fulfil(order: Order, express: bool = False) -> Receipt:
        sf.progress({"stage": "paying"})
        payment = await charge(order.id, order.total)
        return Receipt(order, payment)

    @app.workflow
    async def approval(order_id: str) -> str:
        sf.progress("asking")
        try:
            answer = await sf.wait_signal("approved", str)
            sf.progress("answered")
            more = await sf.wait_signal("more", str)
            return f"{answer} {more}"
        finally:
            await pack(order_id)

    @app.workflow
    async def sleeper(seconds: float) -> None:
        await asyncio.gather(asyncio.sleep(seconds), pack("s"), pack("s"))

    return app


@asynccontextmanager
async def served(url: str) -> AsyncIterator[tuple[sf.App, sf.Client]]:
    app = make_app()
    async with app.serve(url) as client:
        yield app, client
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, left


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://e2e-{next(_names)}" if request.param == "memory" else f"sqlite:///{tmp_path}/shop.db"


def run(url: str, test: Callable[[Any, Any], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with served(url) as (app, client):
            await asyncio.wait_for(test(app.workflows, client), 60)

    asyncio.run(main())


async def until(client: Any, id: str, state: str = "running", *, waiting_on: str | None = None) -> Any:
    """Watch the run until it is in that state, and waits for that."""
    async for status in client.handle(id).watch():
        if status.state == state and (waiting_on is None or waiting_on in status.waiting_on):
            return status
    raise AssertionError(f"run {id} closed before it was {state}")


def test_a_result_and_a_status(url: str):
    async def test(workflows: Any, client: Any) -> None:
        before = datetime.now(UTC) - timedelta(seconds=1)
        handle = await client.start(workflows["fulfil"], Order("o-1", 5), id="o-1", context={"by": "ann"})
        assert handle.id == "o-1"
        assert await handle.result(timeout=30) == Receipt(Order("o-1", 5), "paid 5 for o-1")
        assert await client.handle("o-1").result() == Receipt(Order("o-1", 5), "paid 5 for o-1")
        status = await handle.status()
        assert (status.id, status.workflow, status.run, status.state) == ("o-1", "fulfil", 1, "completed")
        assert status.args == [{"id": "o-1", "total": 5}]
        assert status.result == {"order": {"id": "o-1", "total": 5}, "payment": "paid 5 for o-1"}
        assert (status.context, status.progress, status.error) == ({"by": "ann"}, {"stage": "paying"}, None)
        assert status.waiting_on == []
        assert before < status.created_at <= status.started_at <= status.closed_at < datetime.now(UTC)

    run(url, test)


def test_a_failure(url: str):
    async def test(workflows: Any, client: Any) -> None:
        handle = await client.start("fulfil", Order("o-1", -1))
        with pytest.raises(sf.WorkflowFailed) as failure:
            await handle.result(timeout=30)
        assert failure.value.id == handle.id
        assert failure.value.error.type == "streamflow.errors.StepFailed"
        assert "ValueError: negative" in failure.value.error.message
        (step,) = (await handle.steps()).items
        assert (step.state, step.attempts, step.error.type, step.args) == (
            "failed",
            2,
            "ValueError",
            [handle.id, -1],
        ) or (step.args == ["o-1", -1] and step.attempts == 2)
        assert (await handle.status()).error.type == "streamflow.errors.StepFailed"

    run(url, test)


def test_signals_progress_and_watching(url: str):
    async def test(workflows: Any, client: Any) -> None:
        handle = await client.start(workflows["approval"], "o-1", id="o-1")
        watching = [asyncio.create_task(collect(client.handle("o-1"))) for _ in range(3)]
        await until(client, "o-1", waiting_on="signal approved")
        await asyncio.gather(*(handle.signal("approved", "yes", id="once") for _ in range(3)))
        await until(client, "o-1", waiting_on="signal more")
        await handle.signal("more", "please")
        assert await handle.result(timeout=30) == "yes please"
        for watcher in watching:
            seen = await watcher
            assert [(status.state, status.progress) for status in seen][-1] == ("completed", "answered")
            assert ["signal approved"] in [status.waiting_on for status in seen]
            turns = [status.turn for status in seen]
            assert turns == sorted(set(turns))
        steps = (await handle.steps()).items
        assert [(step.kind, step.name, step.state, step.result) for step in steps] == [
            ("signal", "approved", "completed", "yes"),
            ("signal", "more", "completed", "please"),
            ("step", "pack", "completed", "o-1/1/2"),
        ]

    run(url, test)


async def collect(handle: Any) -> list[sf.RunStatus]:
    return [status async for status in handle.watch()]


def test_a_signal_sent_as_an_error(url: str):
    async def test(workflows: Any, client: Any) -> None:
        handle = await client.start(workflows["approval"], "o-1")
        await handle.signal("approved", error="no stock")
        with pytest.raises(sf.WorkflowFailed, match="no stock"):
            await handle.result(timeout=30)

    run(url, test)


def test_cancel_unwinds_and_terminate_does_not(url: str):
    async def test(workflows: Any, client: Any) -> None:
        first = await client.start(workflows["approval"], "o-1", id="a")
        await first.cancel()
        with pytest.raises(sf.WorkflowCancelled, match="workflow a was cancelled"):
            await first.result(timeout=30)
        assert [(s.kind, s.state) for s in (await first.steps()).items] == [
            ("signal", "cancelled"),
            ("step", "completed"),
        ]
        second = await client.start(workflows["approval"], "o-1", id="b")
        await second.terminate("enough")
        with pytest.raises(sf.WorkflowTerminated, match="workflow b was terminated: enough"):
            await second.result(timeout=30)
        assert [(s.kind, s.state) for s in (await second.steps()).items] == [("signal", "cancelled")]
        assert (await second.status()).reason == "enough"
        for call in (first.cancel(), first.terminate(), first.signal("approved", "x")):
            with pytest.raises(sf.CommandRejected, match="run a is cancelled"):
                await call

    run(url, test)


def test_what_to_do_when_there_is_a_run(url: str):
    async def test(workflows: Any, client: Any) -> None:
        first = await client.start(workflows["fulfil"], Order("x", 1), id="a")
        assert (await first.result(30)).payment == "paid 1 for x"
        again = await client.start(workflows["fulfil"], Order("y", 2), id="a")
        assert (await again.result(30)).payment == "paid 1 for x"
        with pytest.raises(sf.WorkflowExists, match="run a exists already, completed"):
            await client.start(workflows["fulfil"], Order("y", 2), id="a", if_exists="error")
        with pytest.raises(sf.WorkflowExists, match="run a is of workflow fulfil, not approval"):
            await client.start(workflows["approval"], "o", id="a")
        third = await client.start(workflows["fulfil"], Order("z", 3), id="a", if_exists="restart")
        assert (await third.result(30)).payment == "paid 3 for z"
        assert (await third.status()).run == 2
        assert [step.args for step in (await third.steps()).items] == [["z", 3]]
        types = [event.type for event in await third.history()]
        assert types.count("RunCreated") == types.count("RunCompleted") == 2
        waiting = await client.start(workflows["approval"], "o", id="b")
        attached = await client.start(workflows["approval"], "o", id="b", if_exists="restart")
        await waiting.signal("approved", "1")
        await waiting.signal("more", "2")
        assert await attached.result(30) == await waiting.result(30) == "1 2"

    run(url, test)


def test_cleanup(url: str):
    async def test(workflows: Any, client: Any) -> None:
        handle = await client.start(workflows["approval"], "o", id="a")
        assert await handle.cleanup() is False
        waiting = asyncio.create_task(handle.result())
        await handle.status()
        assert await handle.cleanup(force=True) is True
        # Forced, the run is terminated in the same turn in which it goes: who waited may see either.
        with pytest.raises((sf.WorkflowNotFound, sf.WorkflowTerminated)):
            await asyncio.wait_for(waiting, 30)
        for call in (handle.status, handle.steps, handle.history, handle.cancel, handle.result):
            with pytest.raises(sf.WorkflowNotFound):
                await call()
        assert (await client.list()).items == []
        again = await client.start(workflows["fulfil"], Order("x", 1), id="a")
        assert (await again.result(30)).payment == "paid 1 for x"
        assert await again.cleanup() is True

    run(url, test)


def test_delays_sleeps_and_timeouts(url: str):
    async def test(workflows: Any, client: Any) -> None:
        far = datetime(2100, 1, 1, tzinfo=UTC)
        scheduled = await client.start(workflows["sleeper"], 0.0, id="later", at=far)
        status = await scheduled.status()
        assert (status.state, status.started_at) == ("scheduled", None)
        assert status.waiting_on == ["start until 2100-01-01T00:00:00.000Z"]
        await scheduled.cancel()
        with pytest.raises(sf.WorkflowCancelled):
            await scheduled.result(30)
        soon = await client.start(workflows["sleeper"], 0.01, delay=0.01)
        assert await soon.result(30) is None
        assert {(s.kind, s.state) for s in (await soon.steps()).items} == {
            ("sleep", "completed"),
            ("step", "completed"),
        }
        asleep = await client.start(workflows["sleeper"], 3600.0, id="asleep")
        status = await until(client, "asleep")
        with pytest.raises(TimeoutError, match="asleep was not closed within"):
            await asleep.result(timeout=0.01)
        limited = await client.start(workflows["sleeper"], 3600.0, timeout=0.05)
        with pytest.raises(sf.WorkflowFailed, match=r"TimeoutError: run .* did not end within its timeout"):
            await limited.result(30)

    run(url, test)


def test_pages(url: str):
    async def test(workflows: Any, client: Any) -> None:
        handles = [await client.start(workflows["fulfil"], Order(str(n), n), id=f"w{n}") for n in range(12)]
        await asyncio.gather(*(handle.result(30) for handle in handles))
        await client.start(workflows["approval"], "o", id="open")
        for order in ("asc", "desc"):
            found: list[Any] = []
            cursor = None
            while True:
                page = await client.list(order=order, limit=5, cursor=cursor)
                found += page.items
                cursor = page.cursor
                if cursor is None:
                    break
            assert len(found) == 13
            keys = [(status.created_at, status.id) for status in found]
            assert keys == sorted(keys, reverse=order == "desc")
        assert [status.id for status in (await client.list(state="running")).items] == ["open"]
        assert len((await client.list(workflow=workflows["fulfil"], state="completed")).items) == 12
        sleeper = await client.start(workflows["sleeper"], 0.001)
        await sleeper.result(30)
        first = await sleeper.steps(order="desc", limit=2)
        second = await sleeper.steps(order="desc", limit=2, cursor=first.cursor)
        assert [step.number for step in first.items + second.items] == [2, 1, 0]
        assert second.cursor is None

    run(url, test)


def test_a_large_value_goes_round(url: str):
    async def test(workflows: Any, client: Any) -> None:
        large = "x" * 400_000
        handle = await client.start(workflows["approval"], large)
        await handle.signal("approved", large)
        await handle.signal("more", large)
        assert await handle.result(30) == f"{large} {large}"
        assert len((await handle.steps()).items) >= 1
        assert (await handle.history())[0].type == "RunCreated"
        assert (await client.list()).items[0].id == handle.id

    run(url, test)


def test_requests_for_what_is_not_there(url: str):
    async def test(workflows: Any, client: Any) -> None:
        with pytest.raises(sf.WorkflowNotFound, match="no workflow nothing on this worker"):
            await client.start("nothing", id="a")
        with pytest.raises(sf.InvalidArguments):
            await client.start("fulfil", "not an order")
        nobody = client.handle("nobody")
        for call in (nobody.result, nobody.status, nobody.steps, nobody.history, nobody.cancel, nobody.cleanup):
            with pytest.raises(sf.WorkflowNotFound, match="no run nobody"):
                await call()

    run(url, test)


def test_waiting_and_watching_outlive_the_worker(url: str):
    async def main() -> None:
        app = make_app()
        log = await open_log(url, app="shop")
        async with sf.Client(log, app) as client:
            starting = asyncio.create_task(client.start("fulfil", Order("x", 1), id="a"))
            async with app.serve(url):
                handle = await asyncio.wait_for(starting, 30)
                assert (await handle.result(30)).payment == "paid 1 for x"
                waiting = await client.start("approval", "o", id="b")
                result = asyncio.create_task(waiting.result())
                seen = asyncio.create_task(collect(client.handle("b")))
                await until(client, "b", waiting_on="signal approved")
            signalling = asyncio.create_task(waiting.signal("approved", "yes"))
            async with app.serve(url):
                await asyncio.wait_for(signalling, 30)
                await waiting.signal("more", "please")
                assert await asyncio.wait_for(result, 30) == "yes please"
                assert (await asyncio.wait_for(seen, 30))[-1].state == "completed"
        await log.close()

    asyncio.run(main())


def test_many_runs_at_once(url: str):
    async def test(workflows: Any, client: Any) -> None:
        async def one(n: int) -> None:
            handle = await client.start(workflows["fulfil"], Order(str(n), n))
            assert (await handle.result(60)).payment == f"paid {n} for {n}"

        await asyncio.gather(*(one(n) for n in range(500)))

    run(url, test)


def test_a_client_inside_a_step(url: str):
    async def main() -> None:
        app = make_app()

        @app.step
        async def nested() -> str:
            async with app.connect(url) as client:
                receipt: Receipt = await (await client.start("fulfil", Order("n", 1))).result(30)
                return receipt.payment

        @app.workflow
        async def outer() -> str:
            return await nested()

        async with app.serve(url) as client:
            assert await (await client.start(outer)).result(30) == "paid 1 for n"

    asyncio.run(main())
