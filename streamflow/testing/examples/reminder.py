"""A workflow that sleeps for 30 days, tested in milliseconds: once by a scenario, once by hand."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import streamflow as sf

app = sf.App("reminders")


@app.step
async def send_mail(to: str, text: str) -> None:
    """Would talk to a mail server: the tests mock it."""
    raise RuntimeError("no mail server here")


@app.workflow
async def remind(customer: str) -> str:
    """Ask for a payment, a month later once more, unless it is paid by then."""
    await send_mail(customer, "please pay")
    try:
        await sf.wait_signal("paid", timeout=timedelta(days=30))
    except TimeoutError:
        await send_mail(customer, "please pay now")
        return "reminded"
    return "paid"


def test_who_does_not_pay_is_reminded_after_30_days() -> None:
    """A scenario: an async function that plays the part of everybody outside. Its time is virtual, too."""

    async def scenario(client: sf.Client, world: sf.testing.World) -> str:
        world.mock_step(send_mail, None)
        run = await client.start(remind, "ada")
        result = await run.result()
        first, second = world.calls(send_mail)
        assert timedelta(days=30) <= second.at - first.at < timedelta(days=30, seconds=5)
        assert second.args == ("ada", "please pay now")
        return result

    played = sf.testing.simulate(app, scenario)
    assert played.result == "reminded"
    assert played.virtual_seconds > 30 * 86_400


def test_who_pays_on_the_29th_day_is_not_reminded() -> None:
    """The same world by hand, in a test that has an event loop already, as pytest-asyncio's and anyio's have."""

    async def test() -> None:
        async with sf.testing.world(app) as world:
            world.mock_step(send_mail, None)
            run = await world.client.start(remind, "ada")
            await world.advance(timedelta(days=29))
            assert (await run.status()).state == "running"
            await world.crash_worker()  # nothing is lost with it
            await run.signal("paid")
            assert await run.result() == "paid"
            assert len(world.calls(send_mail)) == 1

    asyncio.run(test())
