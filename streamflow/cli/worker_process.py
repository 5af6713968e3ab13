"""Worker processes that a command starts, measures and kills; whatever happens to the command, they end with it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from streamflow.errors import StreamflowError

STOP_SECONDS: Final = 10.0
"""How long a worker may take to stop on SIGTERM before it is killed: twice what it allows itself."""

_POLL_SECONDS: Final = 0.02
_TAIL_LINES: Final = 15
_PAGE_BYTES: Final = 1024

T = TypeVar("T")


class WorkerDied(StreamflowError):
    """A worker process ended although nobody ended it; the text has the end of what it wrote."""


class WorkerProcess:
    """One `streamflow worker` in a process of its own; what it writes goes to the file `output`."""

    def __init__(self, command: Sequence[str], output: Path, variables: Mapping[str, str]) -> None:
        self.output = output
        self.killed = False
        with output.open("ab") as sink:
            # A session of its own: Ctrl-C in the terminal reaches the command alone, which then decides.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise `WorkerDied` when the process ended without our doing."""
        if not self.killed and not self.is_alive:
            code = self._process.returncode
            raise WorkerDied(f"worker {self.pid} ended with exit code {code}; it wrote:\n  {self.last_words()}")

    def last_words(self, lines_max: int = _TAIL_LINES) -> str:
        """The last lines that the process wrote."""
        lines = self.output.read_text(errors="replace").splitlines()[-lines_max:]
        return "\n  ".join(lines) or "(nothing)"

    def kill(self) -> None:
        """SIGKILL: the process has no chance to tidy up."""
        self.killed = True
        self._process.kill()
        self._process.wait()

    async def stop(self, seconds: float = STOP_SECONDS) -> int:
        """SIGTERM, then wait for the process to end; its exit code. A worker that does not stop in time is killed."""
        self.killed = True
        self._process.terminate()
        deadline = time.monotonic() + seconds
        while True:
            if not self.is_alive:
                return self._process.wait()
            if time.monotonic() > deadline:
                self.kill()
            await asyncio.sleep(_POLL_SECONDS)

    def cpu_seconds(self) -> float:
        """User and system time that the process has used, of all its threads; 0.0 where there is no /proc."""
        fields = _read_proc(self.pid, "stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0

    def memory_bytes(self) -> int:
        """Resident memory now; 0 where there is no /proc."""
        return self._memory("VmRSS:")

    def memory_bytes_peak(self) -> int:
        """The most resident memory that the process ever had; 0 where there is no /proc."""
        return self._memory("VmHWM:")

    def _memory(self, name: str) -> int:
        for line in _read_proc(self.pid, "status").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * _PAGE_BYTES
        return 0


def _read_proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


class Workers:
    """The worker processes of one command. Leaving the block kills those that still run, whatever the reason."""

    def __init__(self) -> None:
        self.all: list[WorkerProcess] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for worker in self.all:
            if worker.is_alive:
                worker.kill()

    def start(
        self,
        app: str,
        url: str,
        output: Path,
        *options: str,
        variables: Mapping[str, str] | None = None,
        profile: Path | None = None,
    ) -> WorkerProcess:
        """Start `streamflow worker APP --url URL OPTIONS…`; with `profile`, under cProfile, which writes there."""
        under = [] if profile is None else ["-m", "cProfile", "-o", str(profile)]
        command = [sys.executable, *under, "-m", "streamflow", "worker", app, "--url", url, *options]
        worker = WorkerProcess(command, output, variables or {})
        self.all.append(worker)
        return worker

    def check(self) -> None:
        """Raise `WorkerDied` when one of them ended without our doing."""
        for worker in self.all:
            worker.check()

    async def watch(self) -> None:
        """Check them for ever: a task beside the one that waits for what they do."""
        while True:
            self.check()
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """Stop gracefully those that still run, at the same time."""
        await asyncio.gather(*(worker.stop() for worker in self.all if worker.is_alive))


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, where SIGTERM and SIGHUP end `main` as Ctrl-C does: with its `finally` blocks.

    A second Ctrl-C only asks again: asyncio itself would raise it wherever the code happens to be, also where a task
    was about to be woken up, which then nobody ever does.

    What fails inside task groups comes out as the first error alone, so that the caller can say it in a line.
    """

    async def guarded() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main)
        received: list[int] = []

        def end(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end, number)
        try:
            return await task
        except asyncio.CancelledError:
            if received and received[0] == signal.SIGINT:
                raise KeyboardInterrupt from None
            if received:
                raise SystemExit(128 + received[0]) from None
            raise

    try:
        return asyncio.run(guarded())
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group
