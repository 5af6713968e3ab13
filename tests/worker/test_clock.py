"""The worker's clock over jumps of the wall clock."""

from __future__ import annotations

import asyncio

from streamflow.worker.clock import NS_PER_MS, Clock


class Hands:
    """A wall clock and a monotonic one, moved by hand."""

    def __init__(self, wall_ms: int) -> None:
        self.wall_ms = float(wall_ms)
        self.monotonic_ms = 7.0

    def clock(self) -> Clock:
        return Clock(lambda: int(self.wall_ms * NS_PER_MS), lambda: int(self.monotonic_ms * NS_PER_MS))

    def pass_ms(self, ms: float) -> None:
        self.wall_ms += ms
        self.monotonic_ms += ms


def test_follows_the_wall_clock_and_rounds_down() -> None:
    hands = Hands(1000)
    clock = hands.clock()
    assert clock.now_ms() == 1000
    hands.pass_ms(10.9)
    assert clock.now_ms() == 1010


def test_set_back_it_goes_on_with_real_time() -> None:
    hands = Hands(1_000_000)
    clock = hands.clock()
    assert clock.now_ms() == 1_000_000
    hands.wall_ms -= 500_000
    assert clock.now_ms() == 1_000_000
    for _ in range(10):
        hands.pass_ms(0.25)
        clock.now_ms()
    assert clock.now_ms() == 1_000_002, "parts of a millisecond add up"
    hands.pass_ms(600_000)
    assert clock.now_ms() == 1_600_002


def test_small_steps_back_do_not_add_up() -> None:
    hands = Hands(1_000_000)
    clock = hands.clock()
    for _ in range(10_000):
        hands.pass_ms(1.0)
        before = clock.now_ms()
        hands.wall_ms -= 0.5
        assert clock.now_ms() == before, "never backwards"
    hands.pass_ms(0.5)
    assert clock.now_ms() == int(hands.wall_ms) == 1_005_000


def test_a_little_behind_is_waited_for_and_no_more() -> None:
    hands = Hands(1_000_000)
    clock = hands.clock()
    clock.now_ms()
    hands.wall_ms -= 1_000
    hands.pass_ms(900)
    assert clock.now_ms() == 1_000_000
    hands.pass_ms(200)
    assert clock.now_ms() == 1_000_100
    hands.wall_ms -= 1_100
    hands.pass_ms(0)
    before = clock.now_ms()
    hands.pass_ms(500)
    assert clock.now_ms() == before + 500


def test_clocks_of_different_speed_do_not_part() -> None:
    hands = Hands(1_000_000)
    clock = hands.clock()
    for _ in range(10):
        hands.wall_ms += 3_600_000
        hands.monotonic_ms += 3_603_600
        assert clock.now_ms() == int(hands.wall_ms)


def test_jump_forward_is_believed() -> None:
    hands = Hands(1000)
    clock = hands.clock()
    clock.now_ms()
    hands.wall_ms += 3_600_000
    assert clock.now_ms() == 3_601_000


def test_advance_to_is_a_floor() -> None:
    hands = Hands(1000)
    clock = hands.clock()
    clock.advance_to(5000)
    assert clock.now_ms() == 5000
    clock.advance_to(10)
    hands.pass_ms(30)
    assert clock.now_ms() == 5030
    hands.wall_ms = 9000
    assert clock.now_ms() == 9000


def test_wait_ends_by_event_or_time() -> None:
    async def main() -> None:
        clock, event = Clock(), asyncio.Event()
        await clock.wait(event, 0.001)
        event.set()
        await clock.wait(event, None)

    asyncio.run(main())
