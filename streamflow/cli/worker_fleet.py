"""`worker --processes N`: one parent, N worker processes that share the partitions as workers anywhere do.

    parent ── a pipe, the stdin of each ──▶ worker 1 … N      SIGTERM, SIGINT: passed on; a second one ends all at once

- A worker that dies is named, and started again after a growing pause; one that dies again and again ends all, with
  exit code 1, so that whoever supervises the parent gets to know. One whose call is wrong ends all at once, with 2.
- A worker ends when the parent is gone, SIGKILL included: its stdin, which nobody writes to, then comes to an end.
- With `--metrics-port` each worker has a port of its own, which it keeps: that one and the next ones.
- The log's URL goes to the workers in the environment, since command lines are there for everybody to read.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from streamflow.cli.output import Output

DEATHS_MAX: Final = 5
DEATHS_SECONDS: Final = 60.0
"""A worker that died so often within this time will not live when it is started once more."""

PAUSE_SECONDS: Final = 0.5
PAUSE_SECONDS_MAX: Final = 8.0
"""Before a dead worker is started again; it doubles with each death that counts."""

STOP_SECONDS: Final = 25.0
"""After so long a worker that does not stop is killed: its own limits make less, and containers get 30 seconds."""

EXIT_USAGE: Final = 2
CHECK_SECONDS: Final = 0.2
"""How soon the end of a worker is noticed."""


class _Member:
    """One of the N, by its number: the process that it has now, and when it died lately."""

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self.number = number
        self._command, self._environment = command, environment
        self.deaths: deque[float] = deque(maxlen=DEATHS_MAX)
        self.process: subprocess.Popen[bytes] | None = None
        self.start_at = 0.0

    def start(self) -> None:
        # A session of its own: Ctrl-C in the terminal reaches the parent alone, which passes it on, once.
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, env=self._environment, start_new_session=True
        )

    def died(self, now: float) -> float | None:
        """Note a death. The pause before the next start, None when there have been too many."""
        self.deaths.append(now)
        lately = sum(now - each < DEATHS_SECONDS for each in self.deaths)
        return None if lately >= DEATHS_MAX else min(PAUSE_SECONDS * 2 ** (lately - 1), PAUSE_SECONDS_MAX)

    def send(self, number: int) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


class Fleet:
    """The parent's side: `run` starts the workers and returns the exit code."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: dict[str, str], output: Output) -> None:
        self._members = [_Member(number, command, environment) for number, command in enumerate(commands, 1)]
        self._output = output
        self._signals: list[int] = []
        self._woken = threading.Event()

    def run(self) -> int:
        """Until a signal, or until a worker cannot live; in either case none is left."""
        with self._listen():
            try:
                code = self._supervise()
                for member in self._members:
                    member.send(signal.SIGTERM)
                self._wait_for_all()
                return code
            finally:
                self._kill()

    def _supervise(self) -> int:
        while not self._signals:
            now = time.monotonic()
            for member in self._members:
                if self._signals:
                    break
                if member.process is None:
                    if now >= member.start_at:
                        member.start()
                elif (ended := member.process.poll()) is not None and (code := self._bury(member, ended)):
                    return code
            self._woken.wait(CHECK_SECONDS)
        self._output.say("Stopping: passed on to all workers (a second signal exits at once)")
        return 0

    def _bury(self, member: _Member, ended: int) -> int:
        """Say that it died. 0 if it will be started again, else what the parent exits with."""
        assert member.process is not None, member.number
        now = time.monotonic()
        named = f"Worker process {member.number} (pid {member.process.pid}) {_reason(ended)}"
        _close(member.process)
        member.process = None
        if ended == EXIT_USAGE:
            self._output.say(f"{named}: its call is wrong, stopping all")
            return EXIT_USAGE
        pause = member.died(now)
        if pause is None:
            self._output.say(f"{named}: {DEATHS_MAX} deaths within {DEATHS_SECONDS:g} s, stopping all")
            return 1
        self._output.say(f"{named}: starting another in {pause:g} s")
        member.start_at = now + pause
        return 0

    def _wait_for_all(self) -> None:
        give_up_at = time.monotonic() + STOP_SECONDS
        running = [member for member in self._members if member.process is not None]
        while running := [each for each in running if each.process is not None and each.process.poll() is None]:
            if time.monotonic() > give_up_at:
                numbers = ", ".join(str(each.number) for each in running)
                self._output.say(f"Worker processes {numbers} did not stop within {STOP_SECONDS:g} s: killing them")
                return
            self._woken.wait(CHECK_SECONDS)

    def _kill(self) -> None:
        for member in self._members:
            if member.process is not None:
                member.process.kill()
                member.process.wait()
                _close(member.process)

    @contextmanager
    def _listen(self) -> Generator[None, None, None]:
        """Take signals; the second one ends all workers and this process at once."""

        def handle(number: int, frame: object) -> None:
            self._signals.append(number)
            if len(self._signals) > 1:
                for member in self._members:
                    member.send(signal.SIGKILL)
                os._exit(128 + number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _reason(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def serve_all(
    spec: str,
    processes: int,
    options: Sequence[str],
    *,
    app: str,
    url: str,
    place: str,
    create: bool,
    metrics_port: int | None,
    output: Output,
) -> int:
    """What `worker --processes N` does; the exit code."""
    # Before there are any workers: what is wrong is said once, and they do not make the same topics at the same time.
    asyncio.run(_prepare(url, app, create=create))
    command = [sys.executable, "-m", "streamflow", "worker", spec, "--stop-with-stdin", *options]
    if output.as_json:
        output.line({"app": app, "url": place, "processes": processes, "pid": os.getpid()})
    shown = f", metrics on ports {metrics_port} to {metrics_port + processes - 1}" if metrics_port else ""
    output.say(f"Starting {processes} worker processes of app {app} on {place}{shown}, parent pid {os.getpid()}")
    commands = [[*command, *_metrics_option(metrics_port, index)] for index in range(processes)]
    code = Fleet(commands, {**os.environ, "STREAMFLOW_URL": url}, output).run()
    output.say("Stopped all.")
    return code


def _metrics_option(port: int | None, index: int) -> list[str]:
    """The port of one worker's metrics; 0 stays 0, since each of them then finds a free one."""
    return [] if port is None else ["--metrics-port", str(port + index if port else 0)]


async def _prepare(url: str, app: str, *, create: bool) -> None:
    from streamflow.logs import open_log

    await (await open_log(url, app=app, create=create)).close()


def call_when_stdin_ends(call: Callable[[], object]) -> None:
    """Call it, in a thread, when the other end of this process's stdin is closed: its parent is gone."""

    def wait() -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 1024):
                pass
        call()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
