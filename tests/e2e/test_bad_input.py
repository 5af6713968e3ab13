"""Bad input, given as a user gives it: through an app that is served on a real SQLite file. Each gets a clear error,
nothing is lost, and the partition goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import streamflow as sf
from streamflow.codec.avro import decode_dead_letter
from streamflow.ids import partition_of
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, Outgoing
from streamflow.logs.open import open_log

app = sf.App("bad-input", retry=sf.Retry.never)


@app.step
async def echo(value: str) -> str:
    return value


@app.step
async def returns_no_json() -> object:
    return object()


@app.step
async def returns_much(size: int) -> str:
    return "x" * size


@app.workflow
async def simple(value: str) -> str:
    return await echo(value)


@app.workflow
async def handles_no_json() -> str:
    try:
        await returns_no_json()
    except sf.StepFailed as failed:
        return failed.error.type
    return "no error"


@app.workflow
async def handles_much(size: int) -> str:
    try:
        await returns_much(size)
    except sf.StepFailed as failed:
        return f"{failed.error.type} after {failed.attempts}"
    return "no error"


@app.workflow
async def waits_for_go() -> int:
    return await sf.wait_signal("go", int)


@app.workflow
async def naive_inside() -> None:
    await sf.sleep_until(datetime(2030, 1, 1))  # noqa: DTZ001 - the mistake that is tested


@app.workflow
async def calls_wrongly() -> str:
    return await echo(5)  # type: ignore[arg-type]


@app.workflow
async def never_awaits() -> None:
    while True:
        pass


@app.workflow
async def reads_a_file() -> str:
    return Path("/etc/hostname").read_text()  # noqa: ASYNC240 - the mistake that is tested


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[sf.Client]:
    async with app.serve(f"sqlite:///{tmp_path}/log.db") as client:
        yield client


def on_app(tmp_path: Path, scenario: Callable[[sf.Client], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serving(tmp_path) as client:
            await scenario(client)
            # Whatever was done to it, the partition goes on.
            assert await (await client.start(simple, "still here")).result(timeout=20) == "still here"

    asyncio.run(main())


def test_naive_datetimes_are_refused_with_what_to_write_instead(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        with pytest.raises(sf.InvalidArguments, match=r"aware datetime.*datetime\.now\(timezone\.utc\)"):
            await client.start(simple, "x", at=datetime(2030, 1, 1))  # noqa: DTZ001 - the mistake that is tested
        with pytest.raises(sf.WorkflowFailed, match="aware datetime"):
            await (await client.start(naive_inside)).result(timeout=20)

    on_app(tmp_path, scenario)


def test_negative_delays_are_refused(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        with pytest.raises(sf.InvalidArguments, match=r"delay.*-1"):
            await client.start(simple, "x", delay=-1)
        with pytest.raises(sf.InvalidArguments, match="timeout"):
            await client.start(simple, "x", timeout=timedelta(seconds=-3))
        with pytest.raises(sf.InvalidArguments, match="delay of step echo"):
            echo.options(delay=-0.5)

    on_app(tmp_path, scenario)


def test_wrong_retry_fields_are_named() -> None:
    for field, value in {
        "max_attempts": 0,
        "initial": -1,
        "factor": 0.5,
        "max_delay": -1,
        "jitter": 2,
        "on": (int,),
    }.items():
        with pytest.raises(ValueError, match=f"Retry.{field}"):
            sf.Retry(**{field: value})  # type: ignore[arg-type]


def test_a_name_can_be_registered_once() -> None:
    registry = sf.Registry()
    registry.step(name="twice")(lambda: None)
    with pytest.raises(ValueError, match="'twice' is registered twice"):
        registry.step(name="twice")(lambda: None)


def test_arguments_that_the_annotation_refuses_are_refused_at_the_caller(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        with pytest.raises(sf.InvalidArguments, match=r"simple.*value"):
            await client.start(simple, 5)  # type: ignore[arg-type]
        with pytest.raises(sf.WorkflowFailed, match=r"InvalidArguments.*echo"):
            await (await client.start(calls_wrongly)).result(timeout=20)
        # By name, the client does not know the function: the run fails instead.
        with pytest.raises(sf.WorkflowFailed, match="InvalidArguments"):
            await (await sf_by_name(client, 5)).result(timeout=20)

    async def sf_by_name(client: sf.Client, value: object) -> sf.Handle[object]:
        async with sf.connect(str(client_url), app="bad-input") as stranger:
            handle = await stranger.start("simple", value)
            return client.handle(handle.id)

    client_url = f"sqlite:///{tmp_path}/log.db"
    on_app(tmp_path, scenario)


def test_unknown_workflows_and_runs_are_said_to_be_unknown(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        with pytest.raises(sf.WorkflowNotFound, match="nope"):
            await client.start("nope", id="unknown-1")
        with pytest.raises(sf.WorkflowNotFound, match="no-such-run"):
            await client.handle("no-such-run").status()
        for request in (client.handle("no-such-run").cancel, client.handle("no-such-run").terminate):
            with pytest.raises(sf.WorkflowNotFound, match="no-such-run"):
                await request()

    on_app(tmp_path, scenario)


def test_a_closed_run_takes_no_signal(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        handle = await client.start(simple, "done", id="closed-1")
        assert await handle.result(timeout=20) == "done"
        with pytest.raises(sf.CommandRejected, match="closed-1 is completed"):
            await handle.signal("go", 1)
        with pytest.raises(sf.CommandRejected, match="closed-1 is completed"):
            await handle.cancel()

    on_app(tmp_path, scenario)


def test_results_that_are_not_json_or_too_large_fail_the_step_and_the_run_handles_it(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        assert await (await client.start(handles_no_json)).result(timeout=20) == "streamflow.errors.InvalidArguments"
        much = await client.start(handles_much, 2_000_000)
        assert await much.result(timeout=20) == "streamflow.errors.PayloadTooLarge after 1"
        enough = await client.start(handles_much, 800_000)
        assert await enough.result(timeout=20) == "no error"

    on_app(tmp_path, scenario)


def test_a_signal_of_the_wrong_type_fails_the_run_that_waits_for_it(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        handle = await client.start(waits_for_go)
        await handle.signal("go", "not a number")
        with pytest.raises(sf.WorkflowFailed, match="InvalidArguments"):
            await handle.result(timeout=20)

    on_app(tmp_path, scenario)


def test_garbage_in_the_commands_topic_goes_to_the_dead_letters_with_its_reason(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        log = await open_log(f"sqlite:///{tmp_path}/log.db", app="bad-input")
        partition = partition_of("anybody", log.partitions)
        await log.publish(
            [
                Outgoing(COMMANDS, partition, b"anybody", b"\x00garbage"),
                Outgoing(COMMANDS, partition, b"anybody", b""),
                Outgoing(COMMANDS, partition, b"\xff\xfe", b"\xc3\x01" + bytes(300)),
            ]
        )
        letters: list[bytes] = []
        async for records in log.follow(DEAD_LETTERS, partition, 0):
            letters += [record.value or b"" for record in records]
            if len(letters) == 3:
                break
        await log.close()
        decoded = [decode_dead_letter(letter) for letter in letters]
        assert [letter.value for letter in decoded] == [b"\x00garbage", b"", b"\xc3\x01" + bytes(300)]
        assert all(letter.reason and letter.topic == "bad-input.commands" for letter in decoded)

    on_app(tmp_path, scenario)


def test_a_workflow_that_never_awaits_is_blocked_and_the_others_go_on(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        handle = await client.start(never_awaits, id="busy")
        async for status in handle.watch():
            if status.state == "blocked":
                break
        assert status.error is not None
        assert "busy" in status.error.message
        assert "without awaiting" in status.error.message
        assert "never_awaits" in status.error.message
        await handle.terminate("enough")
        with pytest.raises(sf.WorkflowTerminated, match="enough"):
            await handle.result(timeout=20)

    on_app(tmp_path, scenario)


def test_io_in_a_workflow_fails_the_run_and_says_to_use_a_step(tmp_path: Path) -> None:
    async def scenario(client: sf.Client) -> None:
        with pytest.raises(sf.WorkflowFailed, match=r"NotInWorkflow.*step"):
            await (await client.start(reads_a_file)).result(timeout=20)

    on_app(tmp_path, scenario)


def test_two_apps_share_one_file_without_seeing_each_other(tmp_path: Path) -> None:
    other = sf.App("other-app")

    @other.workflow(name="simple")
    async def same_name(value: str) -> str:
        return f"other {value}"

    async def main() -> None:
        url = f"sqlite:///{tmp_path}/log.db"
        async with app.serve(url) as mine, other.serve(url, state_dir=tmp_path / "other") as theirs:
            first = await mine.start(simple, "x", id="same-id")
            second = await theirs.start(same_name, "x", id="same-id")
            assert await first.result(timeout=20) == "x"
            assert await second.result(timeout=20) == "other x"
            assert [run.id for run in (await theirs.list()).items] == ["same-id"]

    asyncio.run(main())


def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    path.write_bytes(b"this is not a database, and it is somebody's thesis" * 100)
    before = path.read_bytes()

    async def main() -> None:
        with pytest.raises(sf.CorruptLog, match=r"log\.db"):
            async with app.serve(f"sqlite:///{path}"):
                raise AssertionError("it must not open")

    asyncio.run(main())
    assert path.read_bytes() == before
