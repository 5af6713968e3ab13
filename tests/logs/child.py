"""Another process for the tests of the SQLite log: `python -m tests.logs.child VERB URL …`, talking in lines.

`support.Child` is the other end. Each verb prints what happens to it, flushed line by line.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sqlite3
import sys
import time

import streamflow.logs.sqlite  # noqa: F401 another user may not be able to read the library any more
from streamflow.errors import StreamflowError
from streamflow.logs import open_log
from streamflow.logs.base import HISTORY, Log, Membership


def say(*words: object) -> None:
    print(*words, flush=True)


async def member(log: Log, owner: str) -> None:
    """Join; print assignments; `append PARTITION`, `block SECONDS` and `leave` come on stdin."""
    membership = await log.join(owner)
    ends = [await log.end_offset(HISTORY, partition) for partition in range(log.partitions)]
    printing = asyncio.create_task(print_assignments(membership))
    while line := await asyncio.to_thread(sys.stdin.readline):
        verb, _, argument = line.strip().partition(" ")
        if verb == "append":
            partition = int(argument)
            try:
                await log.append(partition, ends[partition], [(owner.encode(), b"v")])
                ends[partition] += 1
                say("appended", ends[partition])
            except StreamflowError as error:
                say("failed", type(error).__name__)
        elif verb == "block":
            say("blocking")
            time.sleep(float(argument))  # noqa: ASYNC251  # tidy: a user's blocking call on the loop is the subject
            say("blocked")
        elif verb == "leave":
            await membership.leave()
            say("left")
    await printing


async def stuck(log: Log, owner: str) -> None:
    """Join, then stop in the middle of a write; print when it is over. The member's threads are stopped, too."""
    membership = await log.join(owner)
    printing = asyncio.create_task(print_assignments(membership))
    await asyncio.to_thread(sys.stdin.readline)
    db = sqlite3.connect(log.url.removeprefix("sqlite:///"), isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    say("writing")
    os.kill(os.getpid(), signal.SIGSTOP)
    db.execute("COMMIT")
    db.close()
    say("written")
    await asyncio.to_thread(sys.stdin.readline)
    await membership.leave()
    await printing


async def print_assignments(membership: Membership) -> None:
    async for partitions in membership.assignments():
        say("assigned", *sorted(partitions))


async def appender(log: Log, owner: str) -> None:
    """Append to all partitions, pipelined, for ever; print each acknowledged (partition, offset)."""
    ends = [0] * log.partitions
    under_way: set[asyncio.Future[int]] = set()
    while True:
        for partition in range(log.partitions):
            future = log.append(partition, ends[partition], [(owner.encode(), b"%d" % ends[partition])])
            future.add_done_callback(functools.partial(acked, partition))
            under_way.add(future)
            ends[partition] += 1
        if len(under_way) >= 100:
            _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)


def acked(partition: int, done: asyncio.Future[int]) -> None:
    say("acked", partition, done.result())


async def follower(log: Log, topic: str) -> None:
    """Follow partition 0; print for each record how long ago its value, a `monotonic_ns`, was."""
    say("following", await log.end_offset(topic, 0))
    async for batch in log.follow(topic, 0, 0):
        for record in batch:
            assert record.value is not None
            say("late", time.monotonic_ns() - int(record.value))


async def opener(log: Log, _: str) -> None:
    """Print which log it is."""
    say("identity", log.identity)


async def main() -> None:
    verb, url, argument = sys.argv[1:4]
    if uid := os.environ.get("TEST_UID"):
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    try:
        log = await open_log(url, app="shop")
    except StreamflowError as error:
        say("refused", type(error).__name__, error)
        return
    verbs = {"member": member, "appender": appender, "follower": follower, "opener": opener, "stuck": stuck}
    try:
        await verbs[verb](log, argument)
    finally:
        await log.close()


if __name__ == "__main__":
    asyncio.run(main())
