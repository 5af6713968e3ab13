"""The group of one step queue, for logs whose groups and offsets are two things: a membership that also commits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from streamflow.logs.base import Membership


class CommittingMembership:
    """See `streamflow.logs.base.QueueMembership`."""

    def __init__(
        self,
        membership: Membership,
        committed: Callable[[int], Awaitable[int]],
        commit: Callable[[int, int], Awaitable[None]],
    ) -> None:
        self._membership, self._committed, self._commit = membership, committed, commit

    def assignments(self) -> AsyncIterator[frozenset[int]]:
        return self._membership.assignments()

    async def confirm(self, partition: int, consumed: int | None = None) -> bool:
        return await self._membership.confirm(partition, consumed)

    async def release(self, partition: int) -> None:
        await self._membership.release(partition)

    async def leave(self) -> None:
        await self._membership.leave()

    async def committed(self, partition: int) -> int:
        return await self._committed(partition)

    async def commit(self, partition: int, offset: int) -> None:
        await self._commit(partition, offset)
