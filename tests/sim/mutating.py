"""How the product is broken on purpose, and how it is told when a mutation is broken itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final
from unittest import mock

from streamflow.errors import StreamflowError

Patch = AbstractContextManager[Any]


@dataclass(frozen=True)
class Mutation:
    """A mistake in the product while `patch()` is entered; `found_by` says what of the simulator may notice it."""

    name: str
    found_by: frozenset[str]
    seeds: int
    patch: Callable[[], Patch]


MUTATIONS: Final[list[Mutation]] = []
MISTAKES: Final[list[str]] = []
"""What the mutations themselves raised: then they prove nothing."""


def mutation(*found_by: str, seeds: int) -> Callable[[Callable[[], Patch]], Callable[[], Patch]]:
    """Enter a mutation in the list."""

    def enter(patch: Callable[[], Patch]) -> Callable[[], Patch]:
        MUTATIONS.append(Mutation(patch.__name__, frozenset(found_by), seeds, patch))
        return patch

    return enter


def swap(owner: object, name: str, code: Callable[..., Any]) -> Patch:
    """Put `code` in the place of the product's; an error that it raises itself is noted in `MISTAKES`."""

    def noted(error: BaseException) -> None:
        if isinstance(error, StreamflowError):
            return  # the log's, passed on
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        if traceback is not None and traceback.tb_frame.f_code.co_filename == code.__code__.co_filename:
            MISTAKES.append(f"{code.__qualname__}: {error!r}")

    @wraps(code)
    def called(*args: Any, **options: Any) -> Any:
        try:
            return code(*args, **options)
        except Exception as error:  # whatever it is, it is passed on
            noted(error)
            raise

    @wraps(code)
    async def awaited(*args: Any, **options: Any) -> Any:
        try:
            return await code(*args, **options)
        except Exception as error:  # whatever it is, it is passed on
            noted(error)
            raise

    return mock.patch.object(owner, name, awaited if inspect.iscoroutinefunction(code) else called)


def both(*patches: Patch) -> Patch:
    """Several patches that make one mistake."""
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(patch)
    return stack
