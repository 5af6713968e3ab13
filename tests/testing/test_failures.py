"""What a failed simulation says, and that the bugs of users are found."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from _pytest.outcomes import Skipped

import streamflow as sf
from tests.testing.shop import app, order, sleep, wait

SEEDS = range(10)
NAMES = ("streamflow.worker", "streamflow.client", "streamflow.logs")


async def place(client: sf.Client) -> list[str]:
    return await (await client.start(order, 5, id="order-1")).result()


def failure(scenario: Any, on: sf.App = app, **options: Any) -> sf.testing.SimulationFailed:
    with pytest.raises(sf.testing.SimulationFailed) as failed:
        sf.testing.simulate(on, scenario, **options)
    return failed.value


def test_a_failed_assertion_is_the_cause_and_the_text_says_how_to_see_it_again():
    async def wrong(client: sf.Client) -> None:
        await client.start(sleep, 3, id="sleeper")
        result = await place(client)
        assert result == ["paid 6"]

    error = failure(wrong, seed=11, faults=sf.testing.Faults(4, kinds=["crash"]), workers=2)
    assert isinstance(error.__cause__, AssertionError)
    assert "paid 6" in str(error.__cause__)
    text = str(error)
    assert text.startswith(f"seed 11, after {error.virtual_seconds:,.3f} s of the world's time (2030-03-17 17:4")
    assert "AssertionError: assert ['paid 5'" in text
    assert "Play it again: simulate(app, wrong, seed=11, faults=Faults(4, kinds=['crash']), workers=2)" in text
    assert "sleeper (sleep): running, waits for sleep until 2030-03-20" in text
    assert "run order-1: StepCompleted number=0 attempt=1 result=paid 5" in text
    assert error.faults and all(fault in text for fault in error.faults)
    assert (error.seed, error.last[-1] in text) == (11, True)
    again = failure(wrong, seed=11, faults=sf.testing.Faults(4, kinds=["crash"]), workers=2)
    assert str(again) == text


def test_the_first_bad_seed_ends_it():
    async def sometimes(client: sf.Client, world: sf.testing.World) -> None:
        played.append(world.seed)
        assert world.seed < 3

    played: list[int] = []
    assert failure(sometimes, seeds=SEEDS).seed == 3
    assert played == [0, 1, 2, 3]


def test_nothing_left_to_happen_is_said_with_what_is_waited_for():
    async def forgotten(client: sf.Client) -> None:
        await (await client.start(wait, "go", id="w-1")).result()

    text = str(failure(forgotten))
    assert "Stuck: nothing is left to happen, while the test still waits: w-1 (wait): running" in text
    assert re.search(r"signal go; the scenario waits at test_failures.py:\d+, in forgotten", text)


def test_a_future_that_nobody_settles_is_no_hang():
    async def forgotten(client: sf.Client) -> None:
        await asyncio.get_running_loop().create_future()

    assert "every run is closed" in str(failure(forgotten))


def test_a_loop_that_never_ends_is_no_hang():
    async def poll(client: sf.Client) -> None:
        while (await client.list()).items == []:
            await client.list()

    text = str(failure(poll, steps_max=2_000))
    assert "TooLong: not done after 2,000 events: a loop that never ends" in text
    assert "no run got any further lately: a step's own code goes on, or the scenario. Not closed: no run" in text
    assert re.search(r"the scenario waits at test_failures.py:\d+, in poll", text)


def endless() -> tuple[sf.App, sf.Workflow[[], None], sf.Workflow[[], None]]:
    """Two workflows that never end: one takes a step after the other, one has a step that never waits."""
    never = sf.App("never")

    @never.step
    async def tick() -> None:
        """Nothing."""

    @never.step
    async def busy() -> None:
        while True:  # noqa: ASYNC110  # that is the point
            await asyncio.sleep(0)

    @never.workflow
    async def for_ever() -> None:
        while True:
            await tick()

    @never.workflow
    async def wait_for_busy() -> None:
        await busy()

    return never, for_ever, wait_for_busy


def test_a_run_that_never_ends_is_named_with_what_it_does():
    never, for_ever, _ = endless()

    async def scenario(client: sf.Client) -> None:
        await client.start(for_ever, id="quiet-1", delay=10 * 86_400)
        await (await client.start(for_ever, id="busy-1")).result()

    text = str(failure(scenario, never, steps_max=5_000))
    assert re.search(r"run busy-1 is the busiest, lately with Step\w+ (tick )?\d+ times\. Not closed: ", text)
    assert "quiet-1 (for_ever): scheduled" in text.splitlines()[0]
    assert "busy-1 (for_ever): running, waits for step tick" in text.splitlines()[0]


def test_a_step_that_never_waits_is_named():
    never, _, wait_for_busy = endless()

    async def scenario(client: sf.Client) -> None:
        await (await client.start(wait_for_busy, id="b-1")).result()

    text = str(failure(scenario, never, steps_max=1_000))
    assert "no run got any further lately" in text
    assert "at work: step busy (number 0, attempt 1) of run b-1; the scenario waits at test_failures.py:" in text


def test_a_queue_that_nobody_serves_is_named():
    async def scenario(client: sf.Client) -> None:
        await (await client.start(order, 5)).result()

    assert "nobody sends anything; no worker serves queue lorries (see queues=)" in str(failure(scenario, queues=[]))


def test_where_things_go_wrong_on_purpose_only_errors_are_logged(caplog: pytest.LogCaptureFixture):
    """Warnings of faults are the product's daily bread; so are those of the log that the workers write to."""

    async def scenario(client: sf.Client) -> None:
        for name in NAMES:
            logging.getLogger(name).warning("lost")
            logging.getLogger(name).error("broken")

    caplog.set_level(logging.INFO)
    before = [logging.getLogger(name).level for name in NAMES]
    sf.testing.simulate(app, scenario, faults=sf.testing.Faults(1, without=[0]))
    assert [(each.name, each.message) for each in caplog.records] == [(name, "broken") for name in NAMES]
    caplog.clear()
    sf.testing.simulate(app, scenario)
    assert len(caplog.records) == 2 * len(NAMES), "nothing goes wrong on purpose"
    assert [logging.getLogger(name).level for name in NAMES] == before


def test_an_exception_that_reached_nobody_is_a_failure():
    async def careless(client: sf.Client) -> None:
        async def boom() -> None:
            raise ValueError("nobody looks")

        task = asyncio.get_running_loop().create_task(boom())
        await asyncio.sleep(1)  # tidy: of the world's own time
        del task

    error = failure(careless)
    assert "an exception reached nobody" in str(error)
    assert isinstance(error.__cause__, AssertionError) and "nobody looks" in str(error.__cause__.__cause__)


def test_pytest_fail_is_a_failure_and_a_skip_is_none():
    async def fails(client: sf.Client) -> None:
        pytest.fail("as I say")

    async def skips(client: sf.Client) -> None:
        pytest.skip(reason="not today")

    assert "as I say" in str(failure(fails))
    with pytest.raises(Skipped, match="not today"):
        sf.testing.simulate(app, skips)


# -- bugs of users ----------------------------------------------------------------------------------------------------


def coin_with_sides() -> tuple[sf.App, sf.Step[[], str], sf.Step[[], str]]:
    """An app, and two steps of it that tell themselves apart."""
    coin = sf.App("coin")

    @coin.step
    async def heads() -> str:
        return "heads"

    @coin.step
    async def tails() -> str:
        return "tails"

    return coin, heads, tails


def test_a_workflow_that_tosses_a_coin_is_found():
    coin, heads, tails = coin_with_sides()

    @coin.workflow
    async def toss() -> str:
        return await (heads if random.random() < 0.5 else tails)()

    async def scenario(client: sf.Client) -> str:
        return await (await client.start(toss, id="t-1")).result()

    error = failure(scenario, coin, seeds=range(50), crash_after_every_turn=True)
    assert isinstance(error.__cause__, sf.NonDeterminismError)
    assert re.search(
        r"its history has the step '(heads|tails)' once, the same code now asked for it not at all", str(error)
    )
    assert "NonDeterminismError: run t-1 (toss) does not replay" in str(error)
    assert "Use sf.random()" in str(error.__cause__)


def test_the_same_with_the_runs_own_chance_is_fine():
    coin, heads, tails = coin_with_sides()

    @coin.workflow
    async def toss() -> list[str]:
        return [await (heads if sf.random().random() < 0.5 else tails)() for _ in range(4)]

    async def scenario(client: sf.Client) -> list[str]:
        first = await (await client.start(toss, id="t-1")).result()
        again = await client.start(toss, id="t-1", if_exists="restart")  # another run of the same id
        return first + await again.result()

    sides = [each.result for each in sf.testing.simulate(coin, scenario, seeds=SEEDS, crash_after_every_turn=True)]
    assert all(set(side) <= {"heads", "tails"} and len(side) == 8 for side in sides)


def test_a_workflow_that_looks_at_the_clock_is_found(monkeypatch: pytest.MonkeyPatch):
    late = sf.App("late")
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(ticks))

    @late.step
    async def note(at: int) -> int:
        return at

    @late.workflow
    async def look() -> int:
        return await note(time.perf_counter_ns())  # other arguments on replay

    async def scenario(client: sf.Client) -> int:
        return await (await client.start(look)).result()

    error = failure(scenario, late, seeds=SEEDS, crash_after_every_turn=True)
    assert isinstance(error.__cause__, sf.NonDeterminismError)


def test_a_step_that_cannot_bear_to_run_twice_is_found():
    bank = sf.App("bank")
    balance = 0

    @bank.step
    async def withdraw(amount: int) -> None:
        nonlocal balance
        balance -= amount

    @bank.workflow
    async def buy() -> None:
        await withdraw(10)

    async def scenario(client: sf.Client) -> None:
        nonlocal balance
        balance = 100
        await (await client.start(buy)).result()
        assert balance == 90, "withdrawn once"

    assert sf.testing.simulate(bank, scenario).result is None
    error = failure(scenario, bank, seeds=SEEDS, crash_after_every_turn=True)
    assert "withdrawn once" in str(error.__cause__)


def read_file() -> None:
    with open(__file__) as file:
        file.read()


def nap() -> None:
    time.sleep(3_600)  # tidy: that it is refused is what is tested


@pytest.mark.parametrize("does", [read_file, socket.socket, nap])
def test_a_workflow_that_does_io_is_told_so_by_the_product(does: Callable[[], object]):
    reader = sf.App("reader")

    @reader.workflow
    async def read() -> None:
        does()

    async def scenario(client: sf.Client) -> None:
        with pytest.raises(sf.WorkflowFailed, match="NotInWorkflow"):
            await (await client.start(read)).result()

    assert sf.testing.simulate(reader, scenario).result is None


# -- the real world ---------------------------------------------------------------------------------------------------


def connect() -> None:
    socket.create_connection(("127.0.0.1", 9))


async def connect_by_loop() -> None:
    await asyncio.open_connection("127.0.0.1", 9)


async def serve() -> None:
    await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)


async def start_process() -> None:
    await asyncio.create_subprocess_exec("true")


def run_process() -> None:
    subprocess.run(["true"], check=True)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (connect, "socket"),
        (connect_by_loop, r"loop.create_connection\(\)|socket"),
        (serve, r"loop.create_server\(\)|socket"),
        (start_process, r"loop.subprocess_exec\(\)"),
        (run_process, "subprocess.Popen"),
        (nap, r"time.sleep\(\) stops the whole simulated world"),
    ],
)
def test_a_step_that_reaches_for_the_real_world_is_told_so(function: Callable[..., Any], said: str):
    real = sf.App("real")
    step = real.step(function)

    @real.workflow
    async def reach() -> None:
        await step()

    async def scenario(client: sf.Client) -> None:
        await (await client.start(reach, id="r-1")).result()

    error = failure(scenario, real)
    assert isinstance(error.__cause__, sf.testing.NotSimulated)
    assert f"NotSimulated: step {function.__name__} (number 0, attempt 1) of run r-1: " in str(error)
    assert re.search(said, str(error)) and "mock" in str(error)

    async def mocked(client: sf.Client, world: sf.testing.World) -> None:
        world.mock_step(step, None)
        await (await client.start(reach)).result()

    assert sf.testing.simulate(real, mocked).result is None


def test_a_step_that_waits_for_another_event_loop_is_told_so():
    async def test() -> None:
        foreign, other = [asyncio.get_running_loop().create_future() for _ in range(2)]
        real = sf.App("real")

        @real.step
        async def step() -> None:
            await foreign

        @real.workflow
        async def reach() -> None:
            await step()

        async def scenario(client: sf.Client) -> None:
            await (await client.start(reach, id="r-1")).result()

        async def direct(client: sf.Client) -> None:
            await other

        said = "NotSimulated: step step (number 0, attempt 1) of run r-1 waits for a future, lock or event of another"
        assert said in str(failure(scenario, real))
        assert "NotSimulated: scenario direct waits for a future" in str(failure(direct, real))
        foreign.cancel()

    asyncio.run(test())


def test_a_scenario_that_reaches_for_the_real_world_is_told_so():
    async def scenario(client: sf.Client) -> None:
        nap()

    assert "NotSimulated: the test's own code, outside of any step: time.sleep()" in str(failure(scenario))


def test_a_plain_step_is_told_so_too():
    real = sf.App("real")

    @real.step
    def step() -> None:
        socket.getaddrinfo("localhost", 80)

    @real.workflow
    async def reach() -> None:
        await step()

    async def scenario(client: sf.Client) -> None:
        await (await client.start(reach)).result()

    assert "socket.getaddrinfo reaches for the real world" in str(failure(scenario, real))
    assert socket.getaddrinfo("127.0.0.1", 80), "outside of worlds nothing is refused"


def test_log_records_may_go_where_they_like():
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            socket.socket().close()
            said.append(record.getMessage())

    logger = logging.getLogger("tests.testing")
    handler = Handler()
    logger.addHandler(handler)

    async def scenario(client: sf.Client) -> None:
        logger.warning("hello")

    try:
        sf.testing.simulate(app, scenario)
    finally:
        logger.removeHandler(handler)
    assert said == ["hello"]
