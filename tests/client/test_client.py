"""The client: starts, lists, and what it does when answers do not come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from streamflow.client import Client
from streamflow.client import requests as requests_module
from streamflow.config import Limits
from streamflow.core import commands as c
from streamflow.errors import (
    CommandRejected,
    InvalidArguments,
    PayloadTooLarge,
    StreamflowError,
    Unavailable,
    WorkflowExists,
    WorkflowNotFound,
)
from streamflow.logs.base import REPLIES, Log, Outgoing
from streamflow.logs.open import open_log
from streamflow.workflow.definitions import Registry
from tests.client.owner import Owner, owned

registry = Registry()
IMPATIENT = Limits(request_seconds=0.2)


@registry.workflow
async def fulfil(order: str, total: int = 0) -> int:
    return total


@registry.workflow(timeout=60)
async def limited() -> None: ...


@registry.step
async def charge() -> None: ...


async def plain(order: str) -> None: ...


def run(test: Callable[..., Coroutine[Any, Any, None]], limits: Limits | None = None) -> None:
    async def main() -> None:
        async with owned(registry, limits=limits) as (owner, client):
            await asyncio.wait_for(test(owner, client), 20)

    asyncio.run(main())


def start_of(owner: Owner) -> c.StartWorkflow:
    body = owner.of_kind(c.StartWorkflow)[-1].body
    assert isinstance(body, c.StartWorkflow)
    return body


def test_what_a_start_says():
    async def test(owner: Owner, client: Any) -> None:
        handle = await client.start(fulfil, "o-1", 5)
        assert len(handle.id) == 32
        assert start_of(owner) == c.StartWorkflow(workflow="fulfil", args=b'["o-1",5]')
        await client.start("unknown", "o-1", {"a": [1]}, id="x", context={"by": "ann"}, if_exists="error", timeout=1.5)
        assert start_of(owner) == c.StartWorkflow(
            workflow="unknown",
            args=b'["o-1",{"a":[1]}]',
            timeout_ms=1500,
            if_exists="error",
            context=b'{"by":"ann"}',
        )
        await client.start(fulfil, "o", delay=timedelta(seconds=1.0004))
        assert start_of(owner).delay_ms == 1001
        at = datetime(2030, 1, 1, tzinfo=UTC)
        await client.start(fulfil, "o", at=at)
        assert start_of(owner).start_at == at.timestamp() * 1000
        await client.start(limited)
        assert start_of(owner).timeout_ms == 60_000
        await client.start(limited, timeout=5)
        assert start_of(owner).timeout_ms == 5_000
        assert {command.reply_to for command in owner.commands} == {client._requests.reply_to}

    run(test)


WRONG: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((fulfil,), {}, InvalidArguments, "order missing|missing a required argument"),
    ((fulfil, 5), {}, InvalidArguments, "argument order: expected `?str"),
    ((fulfil, "o", 1, 2), {}, InvalidArguments, "too many|at most"),
    (("fulfil", 5), {}, InvalidArguments, "argument order"),
    ((fulfil, "x" * 1_000_000), {}, PayloadTooLarge, "the arguments of workflow fulfil"),
    ((fulfil, "x" * 600_000), {"context": "y" * 600_000}, PayloadTooLarge, "the command has 1,200,"),
    ((fulfil, "o"), {"id": ""}, InvalidArguments, "id must not be empty: give 1 to 255 bytes"),
    ((fulfil, "o"), {"id": 5}, InvalidArguments, "id must be a str"),
    ((fulfil, "o"), {"id": "\ud800"}, InvalidArguments, "not valid UTF-8"),
    ((fulfil, "o"), {"delay": 1, "at": datetime.now(UTC)}, InvalidArguments, "delay and at exclude each other"),
    ((fulfil, "o"), {"delay": -1}, InvalidArguments, "at least 0 seconds"),
    ((fulfil, "o"), {"delay": 1e12}, InvalidArguments, "delay of run .* must be at most"),
    ((fulfil, "o"), {"at": datetime(2030, 1, 1)}, InvalidArguments, "aware"),  # noqa: DTZ001
    ((fulfil, "o"), {"at": 5}, InvalidArguments, "aware"),
    ((fulfil, "o"), {"timeout": 0}, InvalidArguments, "must be more than 0"),
    ((fulfil, "o"), {"timeout": "1"}, InvalidArguments, "seconds or a timedelta"),
    ((fulfil, "o"), {"if_exists": "replace"}, InvalidArguments, "one of attach, error, restart, found 'replace'"),
    ((fulfil, "o"), {"context": object()}, InvalidArguments, "cannot be written as JSON"),
    ((fulfil, "o"), {"on_complete": charge}, StreamflowError, "on_complete is not part of this version"),
    ((charge,), {}, InvalidArguments, "decorated with @app.workflow, or its name, found <step charge>"),
    ((plain, "o"), {}, InvalidArguments, "decorated with @app.workflow"),
    ((5,), {}, InvalidArguments, "decorated with @app.workflow"),
    (("",), {}, InvalidArguments, "workflow name"),
]


@pytest.mark.parametrize(("args", "options", "error", "text"), WRONG)
def test_a_wrong_start_sends_nothing(args: Any, options: Any, error: type[Exception], text: str):
    async def test(owner: Owner, client: Any) -> None:
        with pytest.raises(error, match=text):
            await client.start(*args, **options)
        assert owner.commands == []

    run(test)


@pytest.mark.parametrize(
    ("named", "raised"),
    [
        ("WorkflowExists", WorkflowExists),
        ("streamflow.errors.WorkflowNotFound", WorkflowNotFound),
        ("SomethingNew", CommandRejected),
        ("StepFailed", CommandRejected),
    ],
)
def test_a_rejection_by_name(named: str, raised: type[Exception]):
    def refuse(command: c.Command) -> None:
        error = CommandRejected("why")
        error.__class__ = type(named, (CommandRejected,), {})
        raise error

    async def test(owner: Owner, client: Any) -> None:
        owner.before = refuse
        with pytest.raises(raised, match="why"):
            await client.start(fulfil, "o")

    run(test)


class Counting:
    """Counts the calls of publish that carry commands."""

    def __init__(self, log: Log) -> None:
        self.calls: list[int] = []
        publish = log.publish

        def counted(records: Sequence[Outgoing], **options: Any) -> asyncio.Future[None]:
            self.calls.append(len(records))
            return publish(records, **options)

        log.publish = counted  # type: ignore[method-assign]


def test_commands_of_one_turn_of_the_loop_are_published_together():
    async def main() -> None:
        async with owned(registry) as (owner, client):
            await client.start(fulfil, "first")
            counting = Counting(owner.log)
            owner.deaf = True
            starting = [asyncio.create_task(client.start(fulfil, "o")) for _ in range(200)]
            await owner.arrive(201)
            assert counting.calls == [200]
            await client.close()
            outcomes = await asyncio.gather(*starting, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {Unavailable}

    asyncio.run(main())


def test_a_command_is_sent_again_until_it_is_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests_module, "RESEND_SECONDS", 0.01)
    monkeypatch.setattr(requests_module, "SWEEP_SECONDS", 0.01)

    async def test(owner: Owner, client: Any) -> None:
        owner.deaf = True
        starting = asyncio.create_task(client.start(fulfil, "o", id="a"))
        await owner.arrive(3)
        owner.deaf = False
        await starting
        assert len({command.command_id for command in owner.commands}) == 1
        assert owner.runs_["a"].turn == 1

    run(test)


def test_a_cleanup_whose_answer_was_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests_module, "RESEND_SECONDS", 0.01)
    monkeypatch.setattr(requests_module, "SWEEP_SECONDS", 0.01)

    async def test(owner: Owner, client: Any) -> None:
        def forget(command: c.Command) -> None:
            if len(owner.of_kind(c.CleanupWorkflow)) > 1:
                raise WorkflowNotFound("there is no run a")

        handle = await client.start(fulfil, "o", id="a")
        owner.deaf = True
        cleaning = asyncio.create_task(handle.cleanup(force=True))
        await owner.arrive(2)
        owner.before, owner.deaf = forget, False
        assert await cleaning is True
        with pytest.raises(WorkflowNotFound):
            await handle.cleanup()

    run(test)


def test_no_worker_answers():
    async def test(owner: Owner, client: Any) -> None:
        owner.deaf = True
        with pytest.raises(Unavailable) as error:
            await client.start(fulfil, "o", id="a")
        assert "no worker answered for run a within 0.2 s: is a worker for app shop running on memory://?" in str(
            error.value
        )
        assert "may still be applied" in str(error.value)
        with pytest.raises(Unavailable, match=r"no worker answered for partition \d") as error:
            await client.list()
        assert "may still be applied" not in str(error.value)  # a question changes nothing
        assert client._requests._pending == {}

    run(test, IMPATIENT)


def test_a_log_that_refuses_to_write():
    async def main() -> None:
        async with owned(registry) as (owner, client):
            failing: list[asyncio.Future[None]] = []

            def refused(records: Sequence[Outgoing], **options: Any) -> asyncio.Future[None]:
                failing.append(asyncio.get_running_loop().create_future())
                failing[-1].set_exception(Unavailable("disk full"))
                return failing[-1]

            publish, owner.log.publish = owner.log.publish, refused  # type: ignore[method-assign]
            with pytest.raises(Unavailable, match="disk full"):
                await client.start(fulfil, "o")
            owner.log.publish = publish  # type: ignore[method-assign]
            await client.start(fulfil, "o")

    asyncio.run(main())


def test_a_log_that_is_closed_underneath():
    async def main() -> None:
        log = await open_log("memory://", app="shop")
        client = Client(log, registry)
        await client.open()
        await log.close()
        with pytest.raises(Unavailable, match="closed"):
            await client.start(fulfil, "o")
        await client.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_replies_that_are_not_ours_or_damaged_are_skipped(caplog: pytest.LogCaptureFixture):
    async def test(owner: Owner, client: Any) -> None:
        def disturb(command: c.Command) -> None:
            key = command.command_id.encode()
            for foreign, value in ((b"other", b"garbage"), (key, b"garbage"), (key, b"\xc3\x01")):
                owner.log.publish([Outgoing(REPLIES, client._requests.reply_to, foreign, value)])

        owner.before = disturb
        assert (await client.start(fulfil, "o", id="a")).id == "a"

    run(test)
    assert "skipped" in caplog.text


def test_opening_at_the_same_time_follows_once():
    async def main() -> None:
        log = await open_log("memory://", app="shop")
        client = Client(log)
        await asyncio.gather(*(client.open() for _ in range(5)))
        assert [task.get_name() for task in asyncio.all_tasks()].count("client-replies") == 1
        await client.close()
        await log.close()

    asyncio.run(main())


def test_lists_are_merged_over_partitions():
    async def test(owner: Owner, client: Any) -> None:
        for number in range(25):
            await client.start(fulfil, "o", id=f"w{number:02}")
        await owner.finish("w03", b"3")
        ids = [f"w{number:02}" for number in range(25)]
        for order, expected in (("asc", ids), ("desc", ids[::-1])):
            for limit in (1, 4, 25, 100):
                found: list[str] = []
                cursor = None
                while True:
                    page = await client.list(order=order, limit=limit, cursor=cursor)
                    found += [status.id for status in page.items]
                    cursor = page.cursor
                    if cursor is None:
                        break
                    assert len(page.items) == limit
                assert found == expected, (order, limit)
        assert [status.id for status in (await client.list(state="completed")).items] == ["w03"]
        assert [status.id for status in (await client.list(workflow=limited)).items] == []
        assert len((await client.list(workflow=fulfil)).items) == 25

    run(test)


def test_wrong_lists():
    async def test(owner: Owner, client: Any) -> None:
        for options in (
            {"order": "up"},
            {"limit": 0},
            {"limit": 5000},
            {"state": "lost"},
            {"cursor": "x"},
            {"workflow": 5},
        ):
            with pytest.raises(InvalidArguments):
                await client.list(**options)
        assert owner.commands == []

    run(test)


def test_a_partition_that_refuses_a_list_leaves_no_task():
    async def test(owner: Owner, client: Any) -> None:
        def refuse(command: c.Command) -> None:
            raise InvalidArguments("no")

        owner.before = refuse
        with pytest.raises(InvalidArguments, match="no"):
            await client.list()

    run(test)
