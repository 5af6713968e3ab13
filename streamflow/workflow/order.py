"""The order in which asyncio goes through sets: on the loop of a run the same each time the same code runs.

A set has its order from the hashes of its members, and what asyncio puts into sets is hashed by its address. Where a
replay went through one in another order it would cancel the members of a group in another order than the run did, or
call other steps first, and decide otherwise.

Rules
- Tasks, futures and gatherings of an OrderedLoop have a place of their own, which is their hash: a number drawn from
  how many came before, so the same code gets the same ones. `done` and `pending` of asyncio.wait, a TaskGroup's set
  and those that the code makes itself have their order from it.
- A coroutine cannot have one. asyncio.as_completed makes a set of what it is given, only to take each once; here it
  takes them in the order given. What it is given may be a set itself, of coroutines: a run refuses it (code.py).
- asyncio.all_tasks makes its set from one that all loops of the process share, and that has its order from all of
  them. Equal members of the new set would still lie as they came in, where their places collide; so they come sorted.
- A task factory of the code's own makes tasks without a place: a run refuses it, too.
- Not covered: what code makes past the loop, by `asyncio.Future()` and `asyncio.Task()`, and its own objects in sets.

How asyncio is reached
    Its functions find `set` and `list` among the globals of their module before the built-in ones, so those of
    asyncio.tasks are put there: all that the functions do besides stays what this version of Python does, and also
    what was imported from asyncio earlier finds them. On any other loop they are the built-in ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Generator, Iterable
from typing import Any
from zlib import crc32

from streamflow.workflow.refusing import Refusing

__all__ = ["OrderedFuture", "OrderedLoop", "OrderedTask"]

_get_running_loop = asyncio._get_running_loop


class OrderedLoop(Refusing):
    """A loop that gives places to what is made on it."""

    __slots__ = ("_futures_placed", "_salt", "_tasks_made")

    def __init__(self, salt: int) -> None:
        # Of the run, so that the tasks of many runs do not share their places in asyncio's own set of all tasks.
        self._salt = salt
        self._tasks_made = 0
        self._futures_placed = 0

    def _task_place(self) -> int:
        return crc32(self._tasks_made.to_bytes(8, "big"), self._salt)

    def _future_place(self) -> int:
        self._futures_placed += 1
        return crc32(self._futures_placed.to_bytes(9, "big"), self._salt)

    def _each_once(self, items: Iterable[Any]) -> Collection[Any]:
        """What stands for `set(items)` where asyncio goes through it: in the order given."""
        return dict.fromkeys(items).keys()


class OrderedTask(asyncio.Task[Any]):
    """A task with a place of its own."""

    __slots__ = ("_place",)

    def __init__(self, place: int, coro: Generator[Any, None, Any] | Coroutine[Any, Any, Any], **options: Any) -> None:
        self._place = place
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._place


def _place(future: Any) -> int:
    """The future's place, taken when it is first asked for: few futures ever are in a set."""
    try:
        place: int = future._place
    except AttributeError:
        place = future._place = future.get_loop()._future_place()
    return place


class OrderedFuture(asyncio.Future[Any]):
    """A future with a place of its own."""

    __slots__ = ("_place",)

    __hash__ = _place


def _hash_of_gathering(future: asyncio.Future[Any]) -> int:
    return _place(future) if isinstance(future.get_loop(), OrderedLoop) else object.__hash__(future)


def _each_once(items: Iterable[Any] = ()) -> Collection[Any]:
    """`set` for asyncio.tasks, which only goes through what it makes of an argument."""
    loop = _get_running_loop()
    if isinstance(loop, OrderedLoop) and items:
        return loop._each_once(items)
    return set(items)


def _in_order(items: Iterable[Any] = ()) -> list[Any]:
    """`list` for asyncio.tasks, which makes one of all tasks of the process."""
    listed = list(items)
    if isinstance(_get_running_loop(), OrderedLoop):
        listed.sort(key=_place_of_task)
    return listed


def _place_of_task(task: object) -> int:
    return task._place if isinstance(task, OrderedTask) else -1  # another loop's, which is not asked for


asyncio.tasks._GatheringFuture.__hash__ = _hash_of_gathering  # type: ignore[attr-defined]
asyncio.tasks.list = _in_order  # type: ignore[attr-defined]
asyncio.tasks.set = _each_once  # type: ignore[attr-defined]
