"""`Client.list`: every partition is asked, and their pages are merged by (created_at, id).

The cursor is a position in that order, the same for all partitions, so that it needs to hold no more than one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from streamflow.client.answers import list_in
from streamflow.core.commands import Query
from streamflow.projections.queries import Order, list_cursor
from streamflow.projections.views import Page, RunStatus

Ask = Callable[[int, Query], Awaitable[bytes | None]]


class _Part:
    """What one partition has answered so far, and not yet given away."""

    def __init__(self, partition: int, cursor: str | None) -> None:
        self.partition = partition
        self.items: deque[RunStatus] = deque()
        self.cursor = cursor
        self.asked = False

    @property
    def must_ask(self) -> bool:
        """Whether its next item is not known."""
        return not self.items and (not self.asked or self.cursor is not None)


async def merged(
    ask: Ask, partitions: int, *, order: Order, limit: int, cursor: str | None, filters: dict[str, Any]
) -> Page[RunStatus]:
    """One page over all partitions; `ask` sends a query to one of them."""
    parts = [_Part(partition, cursor) for partition in range(partitions)]
    sign = 1 if order == "asc" else -1
    items: list[RunStatus] = []

    async def fill(part: _Part) -> None:
        params = {**filters, "order": order, "limit": limit - len(items), "cursor": part.cursor}
        answer = await ask(part.partition, Query(query="list", params=msgspec.json.encode(params)))
        page = list_in(answer, f"the list of partition {part.partition}", order, part.cursor)
        part.asked = True
        part.items.extend(page.items)
        part.cursor = page.cursor

    while len(items) < limit:
        while unknown := [part for part in parts if part.must_ask]:
            await _all(fill(part) for part in unknown)
        heads = [part for part in parts if part.items]
        if not heads:
            return Page(items, None)
        first = heads[0]
        for part in heads[1:]:
            if _comes_before(part.items[0], first.items[0], sign):
                first = part
        items.append(first.items.popleft())
    is_more = any(part.items or part.cursor is not None for part in parts)
    return Page(items, list_cursor(order, items[-1]) if is_more else None)


def _comes_before(one: RunStatus, other: RunStatus, sign: int) -> bool:
    return (_key(one) < _key(other)) == (sign > 0)


def _key(status: RunStatus) -> tuple[float, bytes]:
    """As the owners order: their stores compare the ids' bytes."""
    return (0.0 if status.created_at is None else status.created_at.timestamp(), status.id.encode())


async def _all(questions: Any) -> None:
    """Wait for all of them, also when one fails, so that no task outlives the call."""
    outcomes: Sequence[BaseException | None] = await asyncio.gather(*questions, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
