"""Who works on a SQLite file: members are locked files, what they hold is a table.

    orders.db.workers/shop/worker-1.lock      "lease until" as text, under flock by the living member
    orders.db.workers/shop+steps.gpu/…        the same for those who serve the queue gpu of that app

- **Dead** is who does not hold the lock of its file: the kernel frees it with the process, also at SIGKILL and at a
  reboot. The database file itself is never locked by us: closing a second descriptor of it would drop SQLite's locks.
- **Stuck** is who holds the lock but let its lease run out (SIGSTOP, a frozen container). The lease is renewed by a
  thread of its own, so a workflow that blocks the event loop keeps its partitions. It lives in the lock file, not in
  the database: renewing needs neither the write lock nor room on the disk, so a full disk takes nobody's partitions.
  Its clock is `time.monotonic`: one for all processes of a host, untouched by the wall clock, and it stands still
  while the machine sleeps, when nobody could renew either.
- **Claims** (table `owners`) change in a write transaction that looks at everything again: a member takes what
  `groups.assign` plans for it and nobody alive holds, and gives up only by `release` or `leave`.

None of this is the fence: a member that wakes up late still believes in its partitions until its next check; its
appends fail as `Fenced`.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from streamflow.errors import InvalidArguments, StreamflowError, Unavailable
from streamflow.ids import check_id
from streamflow.logs.groups import Share, assign
from streamflow.logs.open import LocalUrl
from streamflow.logs.sqlite_file import AppRow, connect, transaction, translate
from streamflow.logs.sqlite_locks import MemberFiles
from streamflow.logs.sqlite_stuck import continue_stopped_writer
from streamflow.logs.sqlite_wakeups import Wakeups

_log = logging.getLogger("streamflow.logs")

CHECK_SECONDS: Final = 0.2
"""How often a member looks for dead ones and changed claims, besides being told: bounds the time to take over."""

_QUOTED_MAX: Final = 200
"""Owner names are file names; longer ones (after quoting) are refused rather than cut."""


async def join(url: LocalUrl, path: Path, group: str, row: AppRow, owner: str) -> SqliteMembership:
    """Become a member of the group (an app, or a queue of one); returns after the first claims were tried."""
    check_id(owner, what="owner")
    if len(quote(owner, safe="")) > _QUOTED_MAX:
        raise InvalidArguments(
            f"owner {owner!r} is too long for a file name ({_QUOTED_MAX} bytes when quoted): shorten it"
        )
    membership = SqliteMembership(url, path, group, row, owner, asyncio.get_running_loop())
    await membership._start()
    return membership


class SqliteMembership:
    """See `streamflow.logs.base.Membership`."""

    def __init__(
        self, url: LocalUrl, path: Path, group: str, row: AppRow, owner: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._loop = loop
        self._changed = asyncio.Event()
        self._left = False
        self._thread = _Heartbeat(url, path, group, row, owner, loop, self._changed.set)

    async def _start(self) -> None:
        self._thread.start()
        await self._thread.joined

    async def assignments(self) -> AsyncIterator[frozenset[int]]:
        """See the port. Ends after `leave`."""
        self._changed.set()
        while not self._left:
            await self._changed.wait()
            self._changed.clear()
            if not self._left:
                yield self._thread.take()

    async def release(self, partition: int) -> None:
        if not self._left:
            await self._thread.release(partition)

    async def confirm(self, partition: int, consumed: int | None = None) -> bool:
        """See the port: what the heartbeat saw last, which is a fraction of a second old."""
        return not self._left and self._thread.holds(partition)

    async def leave(self) -> None:
        if not self._left:
            self._left = True
            self._thread.stop()
        await asyncio.shield(self._thread.ended)
        self._changed.set()


class _Heartbeat(threading.Thread):
    """Renews the lease, watches the others, and makes every change of this member's claims."""

    def __init__(
        self,
        url: LocalUrl,
        path: Path,
        group: str,
        row: AppRow,
        owner: str,
        loop: asyncio.AbstractEventLoop,
        changed: Callable[[], None],
    ) -> None:
        super().__init__(name=f"streamflow-member-{owner}", daemon=True)
        self.joined: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._url, self._path, self._group, self._row, self._owner = url.url, path, group, row, owner
        self._loop, self._changed = loop, changed
        self._share = Share()
        self._members = MemberFiles(url.url, path.with_name(path.name + ".workers") / group, owner)
        self._interest = f"members-{group}".replace(".", "_")
        self._requests: list[tuple[int, asyncio.Future[None]]] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._poke_in, self._poke_out = socket.socketpair()
        self._poke_in.setblocking(False)
        self._poke_out.setblocking(False)
        self._seen: tuple[int, frozenset[str]] | None = None

    # --- called on the loop

    def take(self) -> frozenset[int]:
        with self._lock:
            return self._share.take()

    def holds(self, partition: int) -> bool:
        with self._lock:
            return partition in self._share.shown

    def release(self, partition: int) -> asyncio.Future[None]:
        done: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            if self._stopping:
                done.set_result(None)
                return done
            self._requests.append((partition, done))
        self._poke()
        return done

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
        self._poke()

    def _poke(self) -> None:
        with suppress(OSError):
            self._poke_out.send(b"!")

    # --- the thread

    def run(self) -> None:
        try:
            self._members.enter()
            # Claims need not survive a power cut, which ends all their members.
            db = connect(self._path, synchronous="normal", busy_seconds=0)
        except (StreamflowError, OSError, sqlite3.Error) as error:
            self._members.leave()
            self._close_pokes()
            self._tell(_fail, self.joined, self._translate(error))
            self._tell(_succeed, self.ended)
            return
        wakeups = Wakeups(self._row.file_identity)
        wakeups.want(self._interest)
        try:
            self._check(db, wakeups)
            wakeups.ring([self._interest])
            self._tell(_succeed, self.joined)
            while not self._stopping:
                self._wait(wakeups)
                self._serve_requests(db, wakeups)
                self._check(db, wakeups)
        finally:
            self._leave(db, wakeups)

    def _wait(self, wakeups: Wakeups) -> None:
        listener = wakeups.listen()
        sources = [self._poke_in] if listener is None else [self._poke_in, listener]
        select.select(sources, [], [], CHECK_SECONDS)
        with suppress(BlockingIOError):
            while self._poke_in.recv(4096):
                pass
        wakeups.drain()

    def _check(self, db: sqlite3.Connection, wakeups: Wakeups) -> None:
        """Renew, look around, and change claims if the facts or the plan ask for it."""
        try:
            self._members.renew()
            alive = self._members.alive()
            version = int(db.execute("PRAGMA data_version").fetchone()[0])
            if self._seen == (version, alive):
                return
            owners = self._owners(db)
            plan = assign(self._row.partitions, alive, owners)
            if self._wanted(owners, plan, alive):
                continue_stopped_writer(self._path)
                owners = transaction(db, lambda: self._claim(db))
                plan = assign(self._row.partitions, alive, owners)
                wakeups.ring([self._interest])
            strays = self._update(owners, plan)
            self._seen = (version, alive)
            if strays:
                self._seen = None
                transaction(db, lambda: self._drop(db, strays))
                wakeups.ring([self._interest])
        except (sqlite3.Error, OSError) as error:
            # Ownership stays as it is: the lock is held, and who cannot write cannot take over either.
            _log.warning("%s: member %s could not check its claims: %s", self._url, self._owner, self._translate(error))

    def _wanted(self, owners: dict[int, str], plan: dict[int, str], alive: frozenset[str]) -> list[int]:
        """Partitions that this member should hold, that no living member holds and that it is not still stopping."""
        return [
            partition
            for partition, name in plan.items()
            if name == self._owner and owners.get(partition) not in alive and partition not in self._share.stopping
        ]

    def _claim(self, db: sqlite3.Connection) -> dict[int, str]:
        alive = self._members.alive()
        owners = self._owners(db)
        for partition in self._wanted(owners, assign(self._row.partitions, alive, owners), alive):
            db.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?)", (self._group, partition, self._owner))
            owners[partition] = self._owner
        return owners

    def _owners(self, db: sqlite3.Connection) -> dict[int, str]:
        return dict(db.execute("SELECT partition, owner FROM owners WHERE app=?", (self._group,)).fetchall())

    def _update(self, owners: dict[int, str], plan: dict[int, str]) -> list[int]:
        """Show the consumer its share; returns what this member holds for nobody."""
        held = [partition for partition, name in owners.items() if name == self._owner]
        planned = [partition for partition, name in plan.items() if name == self._owner]
        with self._lock:
            changed = self._share.update(held, planned)
            strays = self._share.strays(held)
        if changed:
            self._tell(self._changed)
        return sorted(strays)

    def _serve_requests(self, db: sqlite3.Connection, wakeups: Wakeups) -> None:
        with self._lock:
            requests, self._requests = self._requests, []
        if not requests:
            return
        try:
            transaction(db, lambda: self._drop(db, [partition for partition, _ in requests]))
        except sqlite3.Error as error:
            for _, done in requests:
                self._tell(_fail, done, self._translate(error))
            return
        for partition, done in requests:
            with self._lock:
                self._share.release(partition)
            self._tell(_succeed, done)
        self._seen = None
        wakeups.ring([self._interest])

    def _drop(self, db: sqlite3.Connection, partitions: list[int]) -> None:
        rows = [(self._group, partition, self._owner) for partition in partitions]
        db.executemany("DELETE FROM owners WHERE app=? AND partition=? AND owner=?", rows)

    def _leave(self, db: sqlite3.Connection, wakeups: Wakeups) -> None:
        try:
            transaction(db, lambda: self._drop(db, list(range(self._row.partitions))))
        except sqlite3.Error as error:
            # The claims of who holds no lock count for nothing, so leaving works without the database.
            _log.warning("%s: member %s left its claims behind: %s", self._url, self._owner, error)
        finally:
            self._members.leave()
            db.close()
            wakeups.ring([self._interest])
            wakeups.close()
            self._close_pokes()
            with self._lock:
                self._stopping = True
                requests, self._requests = self._requests, []
            for _, done in requests:
                self._tell(_succeed, done)
            self._tell(_fail, self.joined, Unavailable(f"{self._url}: member {self._owner} left while joining"))
            self._tell(_succeed, self.ended)

    def _close_pokes(self) -> None:
        self._poke_in.close()
        self._poke_out.close()

    def _translate(self, error: Exception) -> StreamflowError:
        if isinstance(error, StreamflowError):
            return error
        if isinstance(error, sqlite3.Error):
            return translate(error, self._url)
        return Unavailable(
            f"{self._url}: the directory of the workers' locks cannot be used ({error}): check its rights"
        )

    def _tell(self, call: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(call, *args)


def _succeed(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
