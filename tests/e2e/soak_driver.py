"""The client of the soak, in a process of its own: starts, signals, cancels and terminates runs until told to stop.

What it is about to do and what it was told goes to a journal, a line each. It may be killed at any moment: whoever
comes next reads the journal and goes on with every run whose end has not been seen, as a client of that kind would:
what had no answer is sent again. When the file `enough` is there it starts no more, waits for the end of all runs, and
exits with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import streamflow as sf
from tests.e2e.soak_app import FOREVER, Program, expected, make, signal_value, signals

JOURNAL: Final = "driver.jsonl"
ENOUGH: Final = "enough"

STARTS_PER_SECOND: Final = 3.0
"""What a machine of two cores does beside three brokers and all workers, with time left to catch up after faults."""
OPEN_MAX: Final = 80
"""Runs under way at once: above it nothing is started, so that an outage does not pile up more than can be drained."""
PAUSE_SECONDS: Final = 0.5

T = TypeVar("T")
Line = dict[str, Any]


def intend(chance: random.Random, workflow_id: str) -> Line:
    """A run by chance: its program, what ends it, and what must come of it. A pure function of the chance."""
    program: Program = make(chance)
    ending = chance.choices((None, "cancel", "terminate", "deadline"), (10, 2, 1, 1))[0]
    timeout = None
    if ending is not None:  # nothing but its ending ends it
        program = ["sequence", [["gather", [["sleep", FOREVER], program]]]]
    if ending == "deadline":
        timeout = chance.choice((0.5, 3.0))
    closed = {"cancel": "cancelled", "terminate": "terminated", "deadline": "failed"}
    return {
        "what": "intend",
        "id": workflow_id,
        "program": program,
        "delay": chance.choice((None, None, None, 0.5, 3.0)),
        "timeout": timeout,
        "signals": {name: signal_value(name) for name in signals(program)} if ending is None else {},
        "in_order": chance.random() < 0.5,
        "ending": ending,
        "ending_after": round(chance.uniform(0.0, 4.0), 2),
        "state": closed.get(ending or "", "completed"),
        "result": expected(program) if ending is None else None,
    }


@dataclass
class Known:
    """What the journal says of one run."""

    intended: Line
    started: bool = False
    answered: set[str] = field(default_factory=set)
    """The signals that were accepted or refused, and the ending."""
    saw: bool = False


def whole_lines(path: Path) -> bytes:
    """What the journal holds, without a last line that was cut off: what that tells was not done, or is done again."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def read_journal(path: Path) -> dict[str, Known]:
    """The runs of the journal."""
    known: dict[str, Known] = {}
    for text in whole_lines(path).splitlines():
        line = json.loads(text)
        match line["what"]:
            case "intend":
                known[line["id"]] = Known(line)
            case "started":
                known[line["id"]].started = True
            case "accepted" | "refused":
                known[line["id"]].answered.add(line["command"])
            case "saw":
                known[line["id"]].saw = True
    return known


class Driver:
    """One life of the client."""

    def __init__(self, client: sf.Client, folder: Path, chance: random.Random) -> None:
        self.client = client
        self.folder = folder
        self.chance = chance
        self.life = 0
        self._file = os.open(folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.truncate(self._file, len(whole_lines(folder / JOURNAL)))  # what comes next is no part of a line that was cut

    def write(self, line: Line) -> None:
        """One write, which a kill cuts at the end of a page at most."""
        os.write(self._file, (json.dumps(line) + "\n").encode())

    async def run(self, life: int) -> None:
        """Until there is enough and all runs have ended."""
        self.life = life
        known = read_journal(self.folder / JOURNAL)
        async with asyncio.TaskGroup() as group:
            under_way = {group.create_task(self.see_through(each)) for each in known.values() if not each.saw}
            number = 0
            while not (self.folder / ENOUGH).exists():
                under_way = {task for task in under_way if not task.done()}
                if len(under_way) < OPEN_MAX:
                    line = intend(self.chance, f"run-{life}-{number}")
                    number += 1
                    self.write(line)
                    under_way.add(group.create_task(self.see_through(Known(line))))
                await asyncio.sleep(self.chance.expovariate(STARTS_PER_SECOND))  # tidy: the load has a rate
        self.write({"what": "done"})

    async def see_through(self, known: Known) -> None:
        """Start the run if need be, send what it must get, and wait for its end."""
        line = known.intended
        workflow_id = line["id"]
        if not known.started:
            start = self.client.start
            options = {"id": workflow_id, "delay": line["delay"], "timeout": line["timeout"]}
            await insist(lambda: start("play", line["program"], **options))
            self.write({"what": "started", "id": workflow_id})
        handle: sf.Handle[Any] = self.client.handle(workflow_id)
        async with asyncio.TaskGroup() as group:
            left = {name: value for name, value in line["signals"].items() if name not in known.answered}
            if line["in_order"]:
                group.create_task(self.signals(handle, left))
            else:
                for name, value in left.items():
                    group.create_task(self.signal(handle, name, value))
            if line["ending"] in ("cancel", "terminate") and line["ending"] not in known.answered:
                group.create_task(self.end(handle, line))
        await self.watch(handle)

    async def signals(self, handle: sf.Handle[Any], values: dict[str, str]) -> None:
        """One sender of several: sometimes the next goes out before the one before is answered."""
        await asyncio.sleep(self.chance.uniform(0, 3))  # tidy: some signals come before they are awaited, some after
        names = list(values)
        self.chance.shuffle(names)
        async with asyncio.TaskGroup() as group:
            for name in names:
                sending = group.create_task(self.send(handle, name, values[name]))
                if self.chance.random() < 0.5:
                    await sending

    async def signal(self, handle: sf.Handle[Any], name: str, value: str) -> None:
        await asyncio.sleep(self.chance.uniform(0, 3))  # tidy: some signals come before they are awaited, some after
        await self.send(handle, name, value)

    async def send(self, handle: sf.Handle[Any], name: str, value: str) -> None:
        self.write({"what": "sending", "id": handle.id, "command": name, "life": self.life, "at": now_ms()})
        for _ in range(self.chance.choice((1, 1, 2))):  # sent twice it signals once
            await self.command(handle, name, lambda: handle.signal(name, value, id=f"{handle.id}/{name}"))

    async def end(self, handle: sf.Handle[Any], line: Line) -> None:
        await asyncio.sleep(line["ending_after"])  # tidy: it is ended wherever it then is
        await self.command(handle, line["ending"], handle.cancel if line["ending"] == "cancel" else handle.terminate)

    async def command(self, handle: sf.Handle[Any], name: str, send: Callable[[], Awaitable[None]]) -> None:
        try:
            await insist(send)
        except (sf.CommandRejected, sf.WorkflowNotFound) as error:
            # Its first answer was lost with the client, and the run is closed by now, or deleted.
            self.write({"what": "refused", "id": handle.id, "command": name, "error": str(error)})
        else:
            self.write({"what": "accepted", "id": handle.id, "command": name})

    async def watch(self, handle: sf.Handle[Any]) -> None:
        result = error = None
        state = "completed"
        try:
            result = await insist(handle.result)
        except sf.WorkflowCancelled:
            state = "cancelled"
        except sf.WorkflowTerminated:
            state = "terminated"
        except sf.WorkflowFailed as failed:
            state, error = "failed", str(failed)
        except sf.WorkflowNotFound:  # it was closed and deleted before this life of the client came to look
            state = "gone"
        self.write({"what": "saw", "id": handle.id, "state": state, "result": result, "error": error})


def now_ms() -> int:
    """The wall clock, as the records have it."""
    return time.time_ns() // 1_000_000


async def insist(send: Callable[[], Awaitable[T]]) -> T:
    """Ask again while nobody answers: the same command twice takes effect once."""
    while True:
        try:
            return await send()
        except sf.Unavailable:
            await asyncio.sleep(PAUSE_SECONDS)  # tidy: nothing says when somebody answers again


async def main() -> None:
    """Be the client of that life, the first of which is 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--app", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--life", type=int, required=True)
    args = parser.parse_args()
    # As workers have it: the checker reads these lines.
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    async def connected() -> sf.Client:
        return await stack.enter_async_context(sf.connect(args.url, app=args.app))

    from contextlib import AsyncExitStack

    async with AsyncExitStack() as stack:
        client = await insist(connected)
        await Driver(client, args.folder, random.Random(f"{args.seed}/{args.life}")).run(args.life)


if __name__ == "__main__":
    asyncio.run(main())
