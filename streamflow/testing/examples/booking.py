"""Steps that fail, are tried again and are undone: with a crash after every turn, nothing may be lost or done twice."""

from __future__ import annotations

import streamflow as sf

app = sf.App("travel", retry=sf.Retry(max_attempts=3, initial=1.0))


class Bank:
    """Stands for a service: it knows a repeated request by its key, as services should."""

    def __init__(self) -> None:
        self.booked: dict[str, int] = {}

    def book(self, key: str, amount: int) -> str:
        self.booked.setdefault(key, amount)
        return key

    def cancel(self, key: str) -> None:
        self.booked.pop(key, None)


bank = Bank()


@app.step
async def pay(amount: int) -> str:
    """Safe to run twice: the idempotency key is the same for all attempts."""
    return bank.book(sf.step_info().idempotency_key, amount)


@app.step
async def give_back(payment: str) -> None:
    """Undoes a payment, as often as one likes."""
    bank.cancel(payment)


@app.step
async def reserve_seat(flight: str) -> str:
    """Would ask the airline."""
    return f"seat on {flight}"


@app.workflow
async def book(flight: str) -> str:
    """Pay and reserve; when there is no seat, give the money back."""
    payment = await pay(100)
    try:
        return await reserve_seat(flight)
    except sf.StepFailed:
        await give_back(payment)
        return "no seat"


def test_a_step_that_fails_twice_is_tried_a_third_time() -> None:
    """Crashed after every turn, on disks kept and lost, over ten seeds: the same result, paid once."""

    async def scenario(client: sf.Client, world: sf.testing.World) -> str:
        bank.booked.clear()
        world.fail_step(reserve_seat, times=2, error=ConnectionError("the airline does not answer"))
        run = await client.start(book, "LH 1")
        result = await run.result()
        assert list(bank.booked.values()) == [100], "paid once, however often the step ran"
        return result

    played = sf.testing.simulate(app, scenario, seeds=range(10), crash_after_every_turn=True)
    assert {each.result for each in played} == {"seat on LH 1"}
    assert all(each.crashes >= 3 for each in played)


def test_what_fails_for_good_is_undone() -> None:
    """The last attempt fails, too: the money goes back, whatever crashes meanwhile."""

    async def scenario(client: sf.Client, world: sf.testing.World) -> str:
        bank.booked.clear()
        world.fail_step(reserve_seat, times=100, error=ConnectionError)  # more than it has attempts
        run = await client.start(book, "LH 1")
        result = await run.result()
        assert bank.booked == {}
        return result

    played = sf.testing.simulate(app, scenario, seeds=range(10), crash_after_every_turn=True)
    assert {each.result for each in played} == {"no seat"}
