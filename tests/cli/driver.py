"""Runs the real command line in processes of their own, and waits for what they say with a deadline."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, "-c", "from streamflow.cli.main import cli; cli(prog_name='streamflow')"]
DEADLINE_SECONDS = 60.0

SHOP = """
import asyncio
import sys
import time

import streamflow as sf

app = sf.App("shop")


@app.step
async def charge(order: str, amount: int) -> str:
    return f"paid {amount} for {order}"


@app.step(retry=sf.Retry(max_attempts=2, initial=0.01))
async def refuse(why: str) -> None:
    raise ValueError(why)


@app.step
async def hold() -> None:
    print("holding the event loop", file=sys.stderr, flush=True)
    time.sleep(60)


@app.step
def linger() -> None:
    print("lingering in a thread", file=sys.stderr, flush=True)
    time.sleep(60)


@app.workflow
async def fulfil(order: str, amount: int = 5) -> dict[str, object]:
    sf.progress({"done": 1, "total": 2})
    payment = await charge(order, amount)
    note = await sf.wait_signal("approved")
    return {"payment": payment, "note": note}


@app.workflow
async def add(a: int, b: int) -> int:
    return a + b


@app.workflow
async def broken(why: str) -> None:
    await refuse(why)


@app.workflow
async def patient(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "slept"


@app.workflow
async def stuck() -> None:
    await hold()


@app.workflow
async def slow() -> None:
    await linger()
"""


class Process:
    """A command under way; `wait_for` reads what it says line by line."""

    def __init__(self, folder: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *args],
            cwd=folder,
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._lines: queue.Queue[None] = queue.Queue()
        assert self.process.stdout is not None and self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=each, daemon=True)
            for each in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                lines.append(line.rstrip("\n"))
                self._lines.put(None)
        self._lines.put(None)

    def wait_for(self, text: str, *, stream: str = "stdout") -> str:
        """The first line on that stream which holds `text`."""
        lines: list[str] = getattr(self, stream)
        give_up_at = time.monotonic() + DEADLINE_SECONDS
        while True:
            for line in list(lines):
                if text in line:
                    return line
            assert any(reader.is_alive() for reader in self._readers), f"ended without {text!r}: {self.said}"
            try:
                self._lines.get(timeout=max(0.0, give_up_at - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {text!r} in {DEADLINE_SECONDS} s: {self.said}") from None

    @property
    def said(self) -> str:
        """Everything so far, for the text of an assertion."""
        return "\n".join(["stdout:", *self.stdout, "stderr:", *self.stderr])

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code, once it and its output have ended."""
        code = self.process.wait(DEADLINE_SECONDS)
        for reader in self._readers:
            reader.join(DEADLINE_SECONDS)
        return code

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


Starter = Callable[..., Process]


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a command: this source tree, no settings of the developer's."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFLOW_")}
    return mine | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TZ": "UTC"} | (more or {})


def run(
    folder: Path, *args: str, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *args],
        cwd=folder,
        env=environment(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
