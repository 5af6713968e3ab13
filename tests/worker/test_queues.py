"""A step queue served: what is taken is answered, or run again by somebody else."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import streamflow as sf
from streamflow.codec.avro import decode_command, decode_dead_letter, encode_task
from streamflow.config import PAYLOAD_BYTES_MAX, Limits
from streamflow.core.commands import ReportAttempt
from streamflow.core.effects import DeadLetter, StepTask
from streamflow.errors import CorruptLog, PayloadTooLarge, Unavailable
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, Log, Outgoing
from streamflow.logs.open import open_log
from streamflow.worker.executor import Executor
from streamflow.worker.queues import QueueReader, QueueService
from tests import waiting
from tests.worker.harness import ManualClock, run, settle

_names = itertools.count()


class Away:
    """A log whose calls fail for as long as they are told to; `failures` is how often more, by the call's name."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.failures: Counter[str] = Counter()
        self.error: Exception = Unavailable("the log is away")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)

    def fails(self, name: str) -> bool:
        self.failures[name] -= 1
        return self.failures[name] >= 0

    def publish(self, records: Any) -> Awaitable[None]:
        if self.fails("publish"):
            raise self.error
        return self.log.publish(records)

    async def offset_at(self, *args: Any) -> int:
        if self.fails("offset_at"):
            raise self.error
        return await self.log.offset_at(*args)

    def follow(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        if self.fails("follow"):
            raise self.error
        return self.log.follow(*args, **options)

    async def join_queue(self, queue: str, owner: str) -> Any:
        away, membership = self, await self.log.join_queue(queue, owner)

        class Failing:
            def __getattr__(self, name: str) -> Any:
                if name in ("commit", "committed", "release") and away.fails(name):
                    raise away.error
                return getattr(membership, name)

        return Failing()


class Scene:
    """A queue on a memory log, an app whose steps wait for the test's word, and any number of services."""

    def __init__(self, log: Log, **limits: Any) -> None:
        self.log = Away(log)
        self.limits = Limits(**{"stop_seconds": 0.0} | limits)
        self.clock = ManualClock()
        self.app = sf.App("test", retry=sf.Retry(max_attempts=2, initial=1, jitter=0))
        self.began: list[tuple[str, int]] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.services: list[QueueService] = []
        self.executors: list[Executor] = []

        @self.app.step
        async def work(name: str) -> str:
            self.began.append((name, sf.step_info().attempt))
            await self.gate(name).wait()
            return name

        @self.app.step
        async def quick(name: str) -> str:
            self.began.append((name, sf.step_info().attempt))
            return name

        @self.app.step
        async def large() -> str:
            return "x" * PAYLOAD_BYTES_MAX

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def serve(self, owner: str = "one", slots: int = 8) -> QueueService:
        executor = Executor(self.clock, max_parallel_steps=slots, limits=self.limits)
        service = QueueService(
            "gpu",
            app=self.app,
            log=self.log,  # type: ignore[arg-type]
            owner=owner,
            executor=executor,
            clock=self.clock,
            slots=asyncio.Semaphore(slots),
            limits=self.limits,
        )
        self.executors.append(executor)
        self.services.append(service)
        await service.start()
        await settle()
        return service

    async def put(
        self, name: str, step: str = "quick", *, attempt: int = 1, partition: int = 0, scheduled_at: int = 0
    ) -> None:
        """Dispatch the attempt of the step of run `name`."""
        args = b"[]" if step == "large" else f'["{name}"]'.encode()
        task = StepTask(
            workflow_id=name, run=1, number=0, attempt=attempt, workflow="", step=step, name=step, args=args,
            scheduled_at=scheduled_at,
        )  # fmt: skip
        await self.put_raw(encode_task(task), partition)

    async def put_raw(self, value: bytes | None, partition: int = 0) -> None:
        await self.log.log.publish([Outgoing("steps.gpu", partition, b"k", value)])
        await settle()

    async def answers(self) -> list[tuple[str, ReportAttempt]]:
        """Run and report of each answer."""
        found = []
        for partition in range(self.log.partitions):
            for record in await self.log.log.read(COMMANDS, partition, 0):
                command = decode_command(record.value or b"")
                assert isinstance(command.body, ReportAttempt)
                found.append((command.workflow_id, command.body))
        return found

    async def answered(self) -> list[str]:
        return sorted(name for name, _ in await self.answers())

    async def until_answered(self, *names: str) -> None:
        for _ in range(10_000):
            if await self.answered() == sorted(names):
                return
            await asyncio.sleep(0.001)  # tidy: what is waited for has no event
        raise AssertionError(await self.answered())

    async def letters(self) -> list[DeadLetter]:
        return [decode_dead_letter(record.value or b"") for record in await self.log.log.read(DEAD_LETTERS, 0, 0)]

    async def committed(self, partition: int = 0) -> int:
        member = await self.log.log.join_queue("gpu", f"looker-{next(_names)}")
        found = await member.committed(partition)
        await member.leave()
        return found


@asynccontextmanager
async def scene(partitions: int = 1, **limits: Any) -> AsyncIterator[Scene]:
    log = await open_log(f"memory://queue-{next(_names)}?partitions={partitions}", app="test")
    it = Scene(log, **limits)
    try:
        yield it
    finally:
        for service in it.services:
            await service.stop()
        for executor in it.executors:
            executor.close()
        await log.close()


def on_scene(**options: Any) -> Callable[[Callable[[Scene], Awaitable[None]]], Callable[[], None]]:
    """Run the test in a scene of its own."""

    def decorate(body: Callable[[Scene], Awaitable[None]]) -> Callable[[], None]:
        def main() -> None:
            async def inside() -> None:
                async with scene(**options) as it:
                    await body(it)

            run(inside())

        main.__name__ = getattr(body, "__name__", "main")
        return main

    return decorate


@on_scene()
async def test_what_is_taken_is_answered_and_committed(it: Scene) -> None:
    await it.put("a")
    await it.serve()
    await it.put("b")
    await it.until_answered("a", "b")
    assert [report.result for _, report in await it.answers()] == [b'"a"', b'"b"']
    reader = it.services[0].readers[0]
    await waiting.until(lambda: reader.committed == 2)
    assert it.began == [("a", 1), ("b", 1)]


@on_scene()
async def test_only_what_lies_below_the_oldest_that_runs_is_committed_and_the_rest_is_run_again(it: Scene) -> None:
    first = await it.serve()
    for name, step in (("a", "quick"), ("b", "work"), ("c", "quick")):
        await it.put(name, step)
    await it.until_answered("a", "c")
    await waiting.until(lambda: first.readers[0].committed == 1)
    await first.stop()
    it.gate("b").set()
    await it.serve("two")
    await it.until_answered("a", "b", "c", "c")
    assert it.began == [("a", 1), ("b", 1), ("c", 1), ("b", 1), ("c", 1)], "c's second answer is dropped by its run"


@on_scene(attempts_kept_seconds=0.0, trim_seconds=60.0)
async def test_what_is_committed_and_old_is_trimmed_now_and_then(it: Scene) -> None:
    it.clock.at_ms = 1 << 50  # whatever the log's own clock says, its records are older
    service = await it.serve()

    async def start() -> int:
        return await it.log.log.start_offset("steps.gpu", 0)

    async def commits(name: str, committed: int) -> None:
        await it.put(name)
        await waiting.until(lambda: service.readers[0].committed == committed)
        await settle()

    it.log.failures["offset_at"] = 1
    await commits("a", 1)
    await commits("b", 2)
    assert await start() == 0, "it failed, and is due again in a minute"
    it.clock.at_ms += 60_000
    await it.put("long", "work")
    await it.put("c")
    await it.until_answered("a", "b", "c")
    await settle()
    assert await start() == 2, "what still runs stays, and what came after it"
    it.gate("long").set()
    await waiting.until(lambda: service.readers[0].committed == 4)
    await settle()
    assert await start() == 2, "not again before a minute has passed"
    it.clock.at_ms += 60_000
    await commits("d", 5)
    assert await start() == 5


@on_scene(trim_seconds=0.0)
async def test_what_is_committed_and_young_stays(it: Scene) -> None:
    service = await it.serve()
    await it.put("a")
    await waiting.until(lambda: service.readers[0].committed == 1)
    await settle()
    assert await it.log.log.start_offset("steps.gpu", 0) == 0


@on_scene(stop_seconds=10.0)
async def test_a_stop_lets_end_what_ends_soon(it: Scene) -> None:
    service = await it.serve()
    await it.put("a", "work")
    stopping = asyncio.ensure_future(service.stop())
    await settle()
    await it.put("b")
    it.gate("a").set()
    await stopping
    assert await it.answered() == ["a"], "nothing new is taken"
    assert service.ended.done() and service.ended.exception() is None
    await service.stop()
    await it.serve("two")
    await it.until_answered("a", "b")
    assert it.began == [("a", 1), ("b", 1)], "what was answered was committed, too"


@on_scene()
async def test_an_attempt_that_is_put_out_again_is_run_once(it: Scene) -> None:
    service = await it.serve()
    await it.put("a")
    await it.until_answered("a")
    await it.put("b", "work")
    for name, step in (("a", "quick"), ("b", "work")):
        await it.put(name, step)
    it.gate("b").set()
    await it.until_answered("a", "b")
    await waiting.until(lambda: service.readers[0].committed == 4)
    assert it.began == [("a", 1), ("b", 1)]


@on_scene()
async def test_a_newer_attempt_ends_the_older_one_and_not_the_other_way_round(it: Scene) -> None:
    service = await it.serve()
    await it.put("a", "work")
    await it.put("a", "work", attempt=3)
    await it.put("a", "work", attempt=2)
    it.gate("a").set()
    await it.until_answered("a")
    assert [report.attempt for _, report in await it.answers()] == [3]
    await waiting.until(lambda: service.readers[0].committed == 3)


@on_scene()
async def test_attempts_of_a_run_that_was_cleaned_up_are_not_those_of_the_next_one_of_its_id(it: Scene) -> None:
    """The numbers of a run, its steps and their attempts begin anew; found by the simulator."""
    service = await it.serve()
    await it.put("a", "work")
    await it.put("a", "work", scheduled_at=1)
    it.gate("a").set()
    await it.until_answered("a")
    await it.put("a", "work", scheduled_at=2)
    await it.until_answered("a", "a")
    assert [report.scheduled_at for _, report in await it.answers()] == [1, 2]
    await waiting.until(lambda: service.readers[0].committed == 3)


@on_scene()
async def test_a_newer_attempt_leaves_an_answer_alone_that_is_on_its_way(it: Scene) -> None:
    service = await it.serve()
    it.log.failures["publish"] = 1
    await it.put("a")
    await it.put("a", attempt=2)
    await it.until_answered("a", "a")
    assert sorted(report.attempt for _, report in await it.answers()) == [1, 2]
    await waiting.until(lambda: service.readers[0].committed == 2)


@on_scene()
async def test_garbage_goes_to_the_dead_letters_and_the_partition_goes_on(it: Scene) -> None:
    service = await it.serve()
    for value in (b"junk", b"", None):
        await it.put_raw(value)
    await it.put("a")
    await it.until_answered("a")
    letters = sorted(await it.letters(), key=lambda letter: letter.offset)
    assert [(letter.topic, letter.offset, letter.value) for letter in letters] == [
        ("test.steps.gpu", 0, b"junk"),
        ("test.steps.gpu", 1, b""),
        ("test.steps.gpu", 2, None),
    ]
    assert "StepTask cannot be decoded" in letters[0].reason
    await waiting.until(lambda: service.readers[0].committed == 4)


@on_scene()
async def test_a_step_that_the_app_does_not_have_fails_and_is_tried_again_as_the_policy_says(it: Scene) -> None:
    await it.serve()
    await it.put("a", "gone")
    await it.put("b", "gone", attempt=2)
    await it.until_answered("a", "b")
    reports = dict(await it.answers())
    assert (reports["a"].retry_after_ms, reports["b"].retry_after_ms) == (1000, None)
    error = reports["a"].error
    assert error is not None and "step gone of run a is on queue gpu" in error.message
    assert "start the workers of the queue with the app's current code" in error.message


@on_scene()
async def test_a_result_larger_than_a_record_fails_for_good_and_says_whose_it_is(it: Scene) -> None:
    await it.serve()
    await it.put("a", "large")
    await it.until_answered("a")
    ((_, report),) = await it.answers()
    assert report.error is not None and report.retry_after_ms is None
    assert report.error.type == "streamflow.errors.PayloadTooLarge"
    assert "the result of step large of run a has 900,002 bytes" in report.error.message
    assert "at most 900,000" in report.error.message


@on_scene(partitions=2)
async def test_no_more_is_taken_than_there_are_slots(it: Scene) -> None:
    await it.serve(slots=2)
    for name in "abcd":
        await it.put(name, "work", partition=ord(name) % 2)
    assert len(it.began) == 2
    for name in "abcd":
        it.gate(name).set()
    await it.until_answered(*"abcd")
    assert len(it.began) == 4


@on_scene(queue_window_max=3)
async def test_no_more_is_taken_than_the_window_beyond_the_oldest(it: Scene) -> None:
    await it.serve()
    await it.put("a", "work")
    for name in "bcdef":
        await it.put(name)
    await it.until_answered("b", "c")
    it.gate("a").set()
    await it.until_answered(*"abcdef")


@pytest.mark.parametrize("call", ["publish", "follow", "commit", "committed"])
def test_a_log_that_is_away_for_a_moment_is_asked_again(call: str) -> None:
    @on_scene()
    async def asked_again(it: Scene) -> None:
        it.log.failures[call] = 2
        service = await it.serve()
        await it.put("a")
        await it.until_answered("a")
        await waiting.until(lambda: service.readers[0].committed == 1)
        assert it.began == [("a", 1)]

    asked_again()


@on_scene(partitions=2)
async def test_a_newcomer_takes_its_share_and_what_is_cut_off_runs_there(it: Scene) -> None:
    await it.serve()
    await it.put("a", "work", partition=0)
    await it.put("b", "work", partition=1)
    it.log.failures["release"] = 1
    second = await it.serve("two")
    await waiting.until(lambda: len(second.readers) == 1)
    (partition,) = second.readers
    moved = "ab"[partition]
    await waiting.until(lambda: it.began.count((moved, 1)) == 2)
    for name in "ab":
        it.gate(name).set()
    await it.until_answered("a", "b")


@on_scene()
async def test_what_breaks_is_begun_again_from_what_is_committed(it: Scene) -> None:
    service = await it.serve()
    await it.put("a")
    await it.until_answered("a")
    await waiting.until(lambda: service.readers[0].committed == 1)
    it.log.error = PayloadTooLarge("an answer that no log takes")
    it.log.failures["publish"] = 1
    await it.put("b")
    await it.until_answered("a", "b")
    assert it.began == [("a", 1), ("b", 1), ("b", 1)]
    assert not service.ended.done()


@on_scene()
async def test_a_stop_between_two_tries_does_not_wait(it: Scene) -> None:
    it.log.error = RuntimeError("broken")
    it.log.failures["committed"] = 1_000
    service = await it.serve()
    assert not service.readers
    await service.stop()


@on_scene()
async def test_a_corrupt_log_ends_the_service(it: Scene) -> None:
    it.log.error = CorruptLog("page me")
    it.log.failures["committed"] = 1
    service = await it.serve()
    with pytest.raises(CorruptLog, match="page me"):
        await service.ended


@on_scene()
async def test_a_closed_log_ends_the_service(it: Scene) -> None:
    service = await it.serve()
    await it.log.close()
    with pytest.raises(Unavailable, match="closed"):
        await service.ended


def test_a_reader_that_was_dropped_frees_its_slots() -> None:
    @on_scene()
    async def frees(it: Scene) -> None:
        service = await it.serve(slots=1)
        await it.put("a", "work")
        reader: QueueReader = service.readers[0]
        assert reader.slots.locked()
        await service.stop()
        assert not reader.slots.locked() and reader.below == 1

    frees()
