"""Steps on a queue: what of a call travels to those who run it, and what cannot."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import streamflow as sf
from streamflow.codec.avro import decode_task
from streamflow.core.effects import StepTask
from streamflow.core.events import RemoteCall
from streamflow.workflow.remote import decode_retry, remote_call
from tests.worker.harness import run, world


def dispatched(app: sf.App, workflow: str = "flow") -> list[tuple[str, StepTask]]:
    """What a run of the workflow puts on which queue."""
    found: list[tuple[str, StepTask]] = []

    async def test() -> None:
        async with world(app) as it:
            await it.start("w", workflow)
            for queue in ("cpu", "gpu"):
                records = await it.records(f"steps.{queue}")
                found.extend((queue, decode_task(record.value or b"")) for record in records)
            assert it.executor.attempts == {}, "they are not the owner's to run"

    run(test())
    return found


def test_the_queue_of_the_call_goes_before_that_of_the_step():
    app = sf.App("shop")

    @app.step(queue="gpu", timeout=9)
    async def embed(text: str) -> int:
        return len(text)

    @app.workflow
    async def flow() -> None:
        await asyncio.gather(
            embed("a"), embed.options(queue="cpu", name="other", timeout=0.0015, retry=sf.Retry(max_attempts=2))("b")
        )

    (other_queue, other), (queue, plain) = dispatched(app)
    assert (queue, plain.step, plain.name, plain.args) == ("gpu", "embed", "embed", b'["a"]')
    assert (plain.workflow, plain.timeout_ms, plain.retry, plain.attempt) == ("flow", 9000, None, 1)
    assert (other_queue, other.step, other.name, other.args) == ("cpu", "embed", "other", b'["b"]')
    assert (other.timeout_ms, decode_retry(other.retry or b"")) == (2, sf.Retry(max_attempts=2))


def test_a_step_without_a_queue_may_be_put_on_one_and_the_block_around_counts():
    app = sf.App("shop")

    @app.step
    async def work() -> None: ...

    @app.workflow
    async def flow() -> None:
        with app.defaults(retry=sf.Retry(initial=7)):
            await work.options(queue="gpu")()

    ((_, task),) = dispatched(app)
    assert decode_retry(task.retry or b"") == sf.Retry(initial=7)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"on": ValueError}, "has on: code does not travel"),
        ({"unless": (ValueError,)}, "has unless"),
        ({"when": lambda error, attempt: True, "on": OSError}, "has on, when"),
    ],
    ids=["on", "unless", "when"],
)
def test_code_in_the_retry_of_a_call_is_refused(fields: dict[str, Any], said: str):
    with pytest.raises(sf.InvalidArguments, match=rf"step work runs on a queue.*{said}"):
        remote_call("work", "flow", timeout=None, retry=sf.Retry(**fields))


def test_every_number_of_a_policy_comes_back():
    retry = sf.Retry(max_attempts=None, initial=0.25, factor=3, max_delay=9, jitter=0, max_elapsed=60)
    call = remote_call("work", "flow", timeout=None, retry=retry)
    assert call == RemoteCall(step="work", workflow="flow", retry=call.retry)
    assert decode_retry(call.retry or b"") == retry


def test_at_most_once_and_a_queue_exclude_each_other():
    async def work() -> None: ...

    with pytest.raises(ValueError, match=r"step work has both at_most_once and a queue.*leave out one"):
        sf.Registry().step(at_most_once=True, queue="gpu")(work)
    once = sf.Registry().step(at_most_once=True)(work)
    with pytest.raises(sf.InvalidArguments, match="step work has both at_most_once and a queue"):
        once.options(queue="gpu")
    with pytest.raises(ValueError, match="queue must match"):
        sf.Registry().step(work).options(queue="G P U")
