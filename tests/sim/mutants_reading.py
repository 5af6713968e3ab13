"""Lists and watchers that do not show what there is: see mutants.py. Only somebody who looks finds them."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

import streamflow.client.client
import streamflow.projections.queries
from streamflow.client import listing
from streamflow.client.handle import Changes
from streamflow.client.statuses import Interest, position
from streamflow.core.effects import StatusRecord
from streamflow.projections.views import CLOSED_STATES, Page, RunStatus
from tests.sim.mutating import Patch, mutation, swap

# -- lists -----------------------------------------------------------------------------------------------------------


@mutation("7", seeds=4)
def drop_an_entry_of_a_list() -> Patch:
    """The oldest of several is not listed."""
    usual = listing.merged

    async def merged(*args: Any, **options: Any) -> Page[RunStatus]:
        page = await usual(*args, **options)
        return Page(page.items[:-1] if len(page.items) > 2 else page.items, page.cursor)

    return swap(streamflow.client.client, "merged", merged)


@mutation("7", seeds=4)
def list_one_partition_less() -> Patch:
    """The last partition is not asked, unless it is the only one."""
    usual = listing.merged

    async def merged(ask: Any, partitions: int, **options: Any) -> Page[RunStatus]:
        return await usual(ask, max(1, partitions - 1), **options)

    return swap(streamflow.client.client, "merged", merged)


@mutation("7", seeds=4)
def list_one_page_only() -> Patch:
    """There is never a next page."""
    usual = listing.merged

    async def merged(*args: Any, **options: Any) -> Page[RunStatus]:
        return Page((await usual(*args, **options)).items, None)

    return swap(streamflow.client.client, "merged", merged)


@mutation("7", seeds=1)
def list_runs_of_all_states() -> Patch:
    """The owner does not look at the state that is asked for."""
    usual = streamflow.projections.queries._list_params

    def list_params(query: Any) -> Any:
        params, after = usual(query)
        return replace(params, state=None), after

    return swap(streamflow.projections.queries, "_list_params", list_params)


@mutation("7", seeds=16)
def merge_lists_in_the_wrong_order() -> Patch:
    """What several partitions answer is merged the newest first, whatever was asked for."""
    usual = listing._comes_before
    return swap(listing, "_comes_before", lambda one, other, sign: usual(one, other, -1))


# -- watching --------------------------------------------------------------------------------------------------------


@mutation("7", seeds=16)
def skip_a_status_that_is_watched() -> Patch:
    """Watchers are shown each second status, and those that close runs."""
    usual = Interest.offer

    def offer(self: Interest, record: StatusRecord) -> None:
        is_news = self.record is None or position(record) > position(self.record)
        usual(self, record)
        for feed in self.feeds or ():
            if is_news and record.turn % 2 and record.state not in CLOSED_STATES:
                feed.records.pop()

    return swap(Interest, "offer", offer)


@mutation("7", seeds=1)
def end_a_watch_early() -> Patch:
    """A watcher hears no more after the third turn of the run."""
    usual = Changes.__anext__

    async def next_status(self: Changes) -> RunStatus:
        status = await usual(self)
        self._ended = self._ended or status.turn > 3
        return status

    return swap(Changes, "__anext__", next_status)


@mutation("7", seeds=17)
def show_watchers_what_came_late() -> Patch:
    """A status of an earlier turn that comes late is shown after the newer one."""

    def offer(self: Interest, record: StatusRecord) -> None:
        self.deleted = False
        if self.record is None or position(record) > position(self.record):
            self.record = record
        for feed in self.feeds or ():
            feed.records.append(record)
        self._wake()

    return swap(Interest, "offer", offer)


@mutation("7", seeds=1)
def watch_beyond_the_end() -> Patch:
    """A watcher is shown the last status once more."""
    usual = Changes.__anext__
    last: dict[Changes, RunStatus] = {}

    async def next_status(self: Changes) -> RunStatus:
        if self in last:
            return last.pop(self)
        status = await usual(self)
        if status.is_closed:
            last[self] = status
        return status

    return swap(Changes, "__anext__", next_status)
