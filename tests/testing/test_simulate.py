"""`simulate`: virtual time, all kinds of steps, crashes and faults, the same story for the same seed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

import streamflow as sf
from streamflow.sim.faults import KINDS
from streamflow.testing.options import WorldOptions
from tests.testing.shop import app, charge, drive, forget, hurry, order, pack, sleep, slow, wait

MONTH_EVENTS_MAX = 1_500
"""What a month's sleep may cost in events of the world; by the tick of its clocks it would be millions."""


async def place(client: sf.Client) -> list[str]:
    return await (await client.start(order, 5, id="order-1")).result()


async def place_many(client: sf.Client) -> int:
    runs = [await client.start(sleep, 0.001 * number) for number in range(3)]
    runs += [await client.start(sleep, 0.001 * number) for number in range(3)]
    return len(await asyncio.gather(*(run.result() for run in runs)))


def test_a_scenario_is_played_and_its_result_returned():
    played = sf.testing.simulate(app, place)
    assert played.result == ["paid 5", "packed a book in attempt 1", "drove a book"]
    assert (played.seed, played.faults, played.crashes) == (0, (), 0)


def test_a_month_is_a_few_events():
    async def month(client: sf.Client) -> str:
        return await (await client.start(sleep, 30)).result()

    played = sf.testing.simulate(app, month)
    assert played.result == "slept"
    assert played.virtual_seconds >= 30 * 86_400
    assert played.events < MONTH_EVENTS_MAX


def test_the_scenarios_own_time_is_virtual_too():
    async def month(client: sf.Client, world: sf.testing.World) -> timedelta:
        begun = world.now
        await asyncio.sleep(30 * 86_400)  # tidy: of the world's own time
        return world.now - begun

    played = sf.testing.simulate(app, month)
    assert played.result == timedelta(days=30)
    assert played.events < MONTH_EVENTS_MAX


def test_time_begins_where_the_test_says():
    async def when(client: sf.Client, world: sf.testing.World) -> datetime:
        run = await client.start(sleep, 0)
        await run.result()
        created = (await run.status()).created_at
        assert created is not None
        return created

    begin = datetime(2024, 2, 28, 12, tzinfo=UTC)
    assert sf.testing.simulate(app, when, start_at=begin).result - begin < timedelta(seconds=10)


def test_time_does_not_leap_over_what_a_step_does():
    async def race(client: sf.Client) -> tuple[str, str]:
        in_time = await client.start(hurry, 60, 90)
        late = await client.start(hurry, 90, 60)
        first = await in_time.result()
        with pytest.raises(sf.WorkflowFailed, match=r"TimeoutError|unhandled errors"):
            await late.result()
        return first, "late"

    for seed in range(5):
        assert sf.testing.simulate(app, race, seed=seed).result == ("done", "late")


def test_a_crash_follows_every_turn_and_nothing_is_lost():
    played = sf.testing.simulate(app, place, seeds=range(10), crash_after_every_turn=True)
    assert all(each.result[0] == "paid 5" and each.crashes >= 1 for each in played)
    assert max(each.crashes for each in played) >= 4
    assert len({each.trace for each in played}) == len(played)


def test_with_crashes_a_step_runs_again():
    async def count(client: sf.Client, world: sf.testing.World) -> int:
        await place(client)
        return len(world.calls(charge))

    played = sf.testing.simulate(app, count, seeds=range(10), crash_after_every_turn=True)
    assert max(each.result for each in played) > 1


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_of_fault_happens_and_is_survived(kind: str):
    played = sf.testing.simulate(app, place_many, faults=sf.testing.Faults(5, kinds=[kind]), workers=2)
    assert played.result == 6
    said = {
        "compact": "cleaned", "crash": "is killed", "jump": "wall clock", "leave": "asked to leave",
        "outage": "down 1", "pause": "is stopped", "storm": "for ", "cut": "hears no broker", "strand": "late 0.7",
        "leaderless": "has no leader", "offsets": "go back", "seize": "taken",
    }[kind]  # fmt: skip
    assert any(said in fault for fault in played.faults), played.faults


def test_faults_can_be_left_out():
    all_of_them = sf.testing.simulate(app, place_many, seed=3, faults=6)
    numbers = {int(fault.partition(":")[0]) for fault in all_of_them.faults}
    assert numbers, "some happened"
    without = sf.testing.simulate(app, place_many, seed=3, faults=sf.testing.Faults(6, without=numbers))
    assert without.faults == ()


def test_runs_that_are_deleted_break_no_rule():
    async def clean(client: sf.Client) -> tuple[bool, int]:
        kept = await client.start(wait, "never", id="w")
        await kept.terminate()
        await (await client.start(forget, id="f")).result()
        await asyncio.sleep(2 * 3600)  # tidy: of the world's own time
        cleaned = await kept.cleanup()
        again = await client.start(wait, "go", id="w")
        await again.signal("go", "on")
        assert await again.result() == "on"
        return cleaned, len((await client.list()).items)

    for options in ({}, {"crash_after_every_turn": True}, {"faults": 8}):
        assert sf.testing.simulate(app, clean, **options).result == (True, 1)


def test_steps_fail_are_mocked_and_counted():
    async def script(client: sf.Client, world: sf.testing.World) -> list[str]:
        async def driven(what: str) -> str:
            await asyncio.sleep(60)  # tidy: of the world's own time
            return f"{what} by a mock"

        world.fail_step("charge", times=2, error=ConnectionError("no bank"))
        world.mock_step(pack, lambda what: f"{what} in paper")
        world.mock_step(drive, driven)
        result = await place(client)
        assert [call.attempt for call in world.calls(charge)] == [1, 2, 3]
        assert [(call.step, call.args) for call in world.calls()][-2:] == [
            ("pack", ("a book",)),
            ("drive", ("a book",)),
        ]
        first, second, third = world.calls(charge)
        assert timedelta(seconds=1) <= second.at - first.at < timedelta(seconds=1.5)
        assert timedelta(seconds=2) <= third.at - second.at < timedelta(seconds=2.5)
        return result

    assert sf.testing.simulate(app, script).result == ["paid 5", "a book in paper", "a book by a mock"]


def test_a_step_that_is_made_to_fail_for_good_fails_as_its_policy_says():
    async def script(client: sf.Client, world: sf.testing.World) -> sf.ErrorInfo:
        world.fail_step(charge, times=3)
        with pytest.raises(sf.WorkflowFailed, match="step charge failed after 3 attempts") as failed:
            await place(client)
        return failed.value.error

    assert "the test makes step charge fail" in sf.testing.simulate(app, script).result.message


def test_the_same_seed_is_the_same_story_in_two_processes():
    program = (
        "import json, streamflow as sf\n"
        "from tests.testing.test_simulate import app, place\n"
        "options = [{}, {'crash_after_every_turn': True}, {'faults': 8, 'workers': 2}]\n"
        "print(json.dumps([sf.testing.simulate(app, place, seed=7, **each).trace for each in options]))"
    )
    found = []
    for hashing in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hashing}
        ran = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=90, check=False
        )
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout))
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "workers must be an int of at least 1, found 0"),
        ({"seed": "x"}, "seed must be an int, found 'x'; many seeds are seeds=range"),
        ({"seeds": 5}, r"seeds must be many ints, found 5: write seeds=range\(5\)"),
        ({"seed": 1, "seeds": [2]}, "seed and seeds exclude each other"),
        ({"seed": 0, "seeds": [2]}, "seed and seeds exclude each other"),
        ({"seeds": ()}, r"seeds must be at least one int, found none in \(\): nothing would be tested"),
        ({"seeds": range(0)}, "seeds must be at least one int"),
        ({"faults": -1}, "count of Faults must be an int of at least 0, found -1"),
        ({"start_at": datetime(2024, 1, 1)}, "start_at must be an aware datetime"),  # noqa: DTZ001  # that is the point
    ],
)
def test_wrong_options_are_named(options: dict[str, object], said: str):
    with pytest.raises(sf.InvalidArguments, match=said):
        sf.testing.simulate(app, place, **options)  # type: ignore[call-overload]


def test_an_option_that_does_not_exist_is_named_with_those_that_do():
    known = ", ".join(("seed", "seeds", *WorldOptions.__annotations__))
    with pytest.raises(TypeError) as failed:
        sf.testing.simulate(app, place, worker=2)  # type: ignore[call-overload]
    assert str(failed.value) == (f"simulate() has no option 'worker': did you mean 'workers'? Its options are {known}")
    with pytest.raises(TypeError) as failed:
        sf.testing.simulate(app, place, colour="red")  # type: ignore[call-overload]
    assert str(failed.value) == f"simulate() has no option 'colour'. Its options are {known}"


def test_what_is_no_scenario_is_refused():
    with pytest.raises(sf.InvalidArguments, match="scenario must be an async function of a client"):
        sf.testing.simulate(app, lambda: None)  # type: ignore[arg-type]

    def plain(client: sf.Client) -> int:
        return 1

    with pytest.raises(sf.InvalidArguments, match=r"scenario must be an async function, found .*plain.*write `async"):
        sf.testing.simulate(app, plain)  # type: ignore[arg-type]

    async def yields(client: sf.Client) -> AsyncIterator[int]:
        yield 1

    with pytest.raises(sf.InvalidArguments, match=r"must be an async function, found a generator: .*yields"):
        sf.testing.simulate(app, yields)  # type: ignore[arg-type]
    also = lambda client: place(client)  # noqa: E731,PLW0108  # plain, and gives a coroutine
    assert sf.testing.simulate(app, also).result[0] == "paid 5"
    with pytest.raises(sf.InvalidArguments, match="kinds of Faults must be some of compact, crash"):
        sf.testing.Faults(kinds=["flood"])
    with pytest.raises(sf.InvalidArguments, match=r"must be many, found 'crash': write kinds=\{'crash'\}"):
        sf.testing.Faults(kinds="crash")
    for kinds in (None, 5, [["crash"]], ()):
        with pytest.raises(sf.InvalidArguments, match="kinds of Faults must be some of compact, crash"):
            sf.testing.Faults(kinds=kinds)  # type: ignore[arg-type]
    with pytest.raises(sf.InvalidArguments, match="numbers of its 3 faults, counted from 0, found 3"):
        sf.testing.Faults(3, without=[2, 3])
    with pytest.raises(sf.InvalidArguments, match="numbers of its 3 faults, counted from 0, found True"):
        sf.testing.Faults(3, without=[True])
    with pytest.raises(sf.InvalidArguments, match="crash_after_every_turn must be a bool, found 'no'"):
        sf.testing.simulate(app, place, crash_after_every_turn="no")  # type: ignore[call-overload]
    with pytest.raises(sf.InvalidArguments, match=r"seeds must be many ints, found <object .*write seeds=range\(50\)"):
        sf.testing.simulate(app, place, seeds=object())  # type: ignore[call-overload]
    assert sf.testing.Faults(3, without=[2]).without == {2}


def test_a_step_of_another_app_is_refused():
    other = sf.App("other")

    @other.step
    async def charge(amount: int) -> str:
        return "other"

    async def script(client: sf.Client, world: sf.testing.World) -> None:
        for wrong in (charge, "chrge"):
            with pytest.raises(
                sf.InvalidArguments, match=r"has no step 'ch.*'; its steps are: charge, pack, drive, slow"
            ):
                world.fail_step(wrong)
        with pytest.raises(sf.InvalidArguments, match="times must be an int of at least 1"):
            world.fail_step(slow, times=0)
        with pytest.raises(sf.InvalidArguments, match="there are 1 workers, numbered from 0, found no worker 1"):
            await world.crash_worker(1)

    assert sf.testing.simulate(app, script).result is None


def test_it_runs_inside_of_an_event_loop_too():
    async def test() -> list[str]:
        return sf.testing.simulate(app, place).result

    assert asyncio.run(test())[0] == "paid 5"
