"""`world`: a simulated world inside an ordinary asyncio test.

The test's own event loop is real. Whatever it awaits here becomes a task of the simulated process "test", and the
world runs, a slice at a time, until that task is done; between slices the test's other tasks have their turn. So
virtual time passes only while something is awaited, and only as far as that needs.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, NoReturn, TypeVar, Unpack, cast

from streamflow.client.client import Client
from streamflow.client.handle import Changes, Handle
from streamflow.errors import StreamflowError
from streamflow.sim.world import Stuck
from streamflow.testing.control import World
from streamflow.testing.options import WorldByHand, WorldOptions, check_names
from streamflow.testing.play import is_failure
from streamflow.testing.report import SimulationFailed, first_line
from streamflow.testing.stage import Stage
from streamflow.workflow.app import App

T = TypeVar("T")
SLICE_EVENTS: Final = 200
"""How much happens in the world before the test's other tasks have their turn: some milliseconds."""
IDLE_TURNS: Final = 100
"""Turns of the test's loop in which somebody may still send what the world waits for."""
OPENED: Final = (
    "world() is opened by `async with sf.testing.world(app) as world:`, in an async test; a test without an event loop "
    "plays a scenario: sf.testing.simulate(app, scenario)"
)


def world(app: App, *, seed: int = 0, **options: Unpack[WorldOptions]) -> AbstractAsyncContextManager[World]:
    """A simulated world for an asyncio test: `async with sf.testing.world(app) as world: ...`.

    `world.client` starts runs as any client does; awaiting it, or one of its handles, lets the world run as far as the
    answer needs: `handle.result()` of a run that sleeps for a month returns at once, a month later by `world.now`.
    Otherwise time stands still, and `await world.advance(seconds)` makes it pass. The arguments are those of
    `simulate`, and so is what steps may do; but a step is held up only if `step_delay` says so.

    What breaks in the world (a run whose code does not replay, an invariant, a step that reaches for the real world,
    nothing left to happen) is raised as `SimulationFailed` by whatever is awaited then. What the test itself raises
    gets a note that names the seed and the last events.
    """
    check_names("world", options, "seed")
    return _Unopened(WorldByHand(app, seed, **options))


class _Unopened(AbstractAsyncContextManager[World]):
    """What `world` returns: checked, and opened by `async with`."""

    def __init__(self, options: WorldByHand) -> None:
        self._opening = _open(options)
        self._is_opened = False

    async def __aenter__(self) -> World:
        if self._is_opened:
            raise StreamflowError("a world is opened once: make another one by sf.testing.world(app)")
        self._is_opened = True
        return await self._opening.__aenter__()

    async def __aexit__(self, *raised: Any) -> bool | None:
        return await self._opening.__aexit__(*raised)

    def __enter__(self) -> NoReturn:
        raise TypeError(OPENED)

    def __exit__(self, *raised: object) -> None: ...

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name!r} yet: {OPENED}")


@asynccontextmanager
async def _open(options: WorldByHand) -> AsyncGenerator[World, None]:
    stage = Stage(options, again=f"world(app, seed={options.seed}{options.said()})")
    with stage.open():
        made = BridgedWorld(stage)
        try:
            yield made
        except BaseException as error:
            if is_failure(error) and not isinstance(error, SimulationFailed):
                error.add_note(stage.describe("the test failed"))
            raise
        finally:
            made.close()


class BridgedWorld(World):
    """A world whose methods are awaited on another event loop."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage, cast("Client", _Bridged(stage.client, self._play)))
        self._failure: SimulationFailed | None = None
        self._closed = False

    def close(self) -> None:
        """Nothing can be awaited any more."""
        self._closed = True

    async def _play(self, main: Coroutine[Any, Any, T]) -> T:
        if self._closed or self._failure is not None:
            main.close()
            raise self._failure or StreamflowError("the simulated world is closed: await it inside its `async with`")
        task = self._stage.driver.run(main)
        idle = 0
        try:
            while not task.done():
                try:
                    self._slice(task.done)
                    idle = 0
                except Stuck:
                    idle += 1
                    if idle > IDLE_TURNS:
                        raise
                if not task.done():
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            task.cancel()
            self._stage.run(task.done)
            raise
        except Exception as error:  # whatever broke the world, it is told once and for all
            self._failure = self._stage.failed(first_line(error))
            raise self._failure from error
        result: T = task.result()
        return result

    def _slice(self, done: Callable[[], bool]) -> None:
        end = self._stage.world.steps + SLICE_EVENTS
        self._stage.run(lambda: done() or self._closed or self._stage.world.steps >= end)


class _Bridged:
    """A client, a handle or a watch of the world: the same methods, awaited outside of it."""

    def __init__(self, inner: Any, play: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]]) -> None:
        self._inner, self._play = inner, play

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            made = found(*args, **options)
            return self._await(made) if inspect.iscoroutine(made) else self._wrap(made)

        return call

    async def _await(self, main: Coroutine[Any, Any, Any]) -> Any:
        return self._wrap(await self._play(main))

    def _wrap(self, made: Any) -> Any:
        return _Bridged(made, self._play) if isinstance(made, (Client, Handle, Changes)) else made

    def __aiter__(self) -> _Bridged:
        return self

    async def __anext__(self) -> Any:
        return await self._play(self._inner.__anext__())

    def __repr__(self) -> str:
        return repr(self._inner)
