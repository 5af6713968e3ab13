"""One node of a cluster: a Java process with its properties, its data and its log in the cluster's directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

from streamflow.broker import process
from streamflow.broker.jars import Runtime
from streamflow.broker.settings import HOST, is_free
from streamflow.errors import StreamflowError, Unavailable

STOP_SECONDS: Final = 10.0
"""How long a node may take to end on SIGTERM before it is killed; its data survives that too."""
FORMAT_SECONDS: Final = 60.0
LAST_LINES: Final = 15


class Node:
    """Node `number`, counted from 1. `Cluster` makes it; `kill`, `pause` and so on are for tests of what then happens.

    `log_file` holds what the process wrote, over all its lives.
    """

    def __init__(
        self, number: int, directory: Path, *, port: int, controller_port: int, runtime: Runtime, heap_mb: int
    ) -> None:
        self.number = number
        self.port = port
        self.controller_port = controller_port
        self.data = directory / f"node-{number}"
        self.log_file = directory / f"node-{number}.log"
        self.properties = directory / f"node-{number}.properties"
        self._logging = directory / "log4j2.properties"
        self._runtime = runtime
        self._heap_mb = heap_mb
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._ended_by_us = False

    @property
    def address(self) -> str:
        """Where clients reach this node."""
        return f"{HOST}:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether its process is there, paused or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return self._process.pid if self._process is not None and self.is_running else None

    def format(self, cluster_id: str) -> None:
        """Make the data folder of a new node; one that is there already is kept as it is.

        In a folder aside that is then renamed, so that a format which was cut off is not taken for a formatted node.
        """
        if self.data.exists():
            return
        aside = self.data.with_suffix(".formatting")
        shutil.rmtree(aside, ignore_errors=True)
        properties = self.properties.read_text().replace(f"log.dirs={self.data}\n", f"log.dirs={aside}\n")
        formatting = aside.with_name(f"{aside.name}.properties")
        formatting.write_text(properties)
        done = process.start(
            self._java(256, "kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(formatting)),
            self.log_file,
        )
        try:
            code = done.wait(FORMAT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(self._failure(f"could not be formatted within {FORMAT_SECONDS:g} s")) from None
        finally:
            if done.poll() is None:
                done.kill()
                done.wait()
        if code != 0:
            raise Unavailable(self._failure(f"could not be formatted, exit code {code}"))
        formatting.unlink()
        aside.rename(self.data)

    def start(self) -> None:
        """Start the process, and return before it answers: `Cluster.wait` waits for that."""
        if self.is_running:
            raise StreamflowError(f"node {self.number} runs already, pid {self.pid}: stop() or kill() it first")
        for port in (self.port, self.controller_port):
            if not is_free(port):
                raise Unavailable(
                    f"port {port} on {HOST} is taken, which node {self.number} of the broker needs: "
                    f"stop what listens there (perhaps another broker), or name another port"
                )
        self._log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
        self._ended_by_us = False
        record = self._runtime.record
        recording = [] if record is None else [f"-XX:AOTCacheOutput={record}"]
        self._process = process.start(
            self._java(self._heap_mb, *recording, "kafka.Kafka", str(self.properties)), self.log_file
        )

    def check(self) -> None:
        """Raise when the process ended and nobody here ended it."""
        if self._process is not None and not self._ended_by_us and not self.is_running:
            raise Unavailable(self._failure(f"ended with exit code {self._process.returncode}"))

    def request_stop(self) -> None:
        """SIGTERM; a paused process is woken up to see it."""
        self._ended_by_us = True
        if self._process is not None and self.is_running:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Let it end in order; after `seconds` it is killed."""
        self.request_stop()
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """SIGKILL: the process has no chance to tidy up. Its data stays, and `start` goes on with it."""
        self._ended_by_us = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: the process keeps its connections and says nothing, as on a machine that hangs.

        Returns once it stands still: threads stop one after another, and may answer somebody meanwhile.
        """
        self._signal(signal.SIGSTOP)
        if self._process is not None and hasattr(os, "waitid"):  # macOS lacks it before Python 3.13
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT: it goes on as if no time had passed."""
        self._signal(signal.SIGCONT)

    def memory_bytes(self) -> int:
        """Resident memory now; 0 where there is no /proc, or no process."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except OSError:
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def last_words(self) -> str:
        """The last lines that the process wrote since it was started."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(self._log_start)
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        return "\n  ".join(lines[-LAST_LINES:]) or "(nothing)"

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or not self.is_running:
            raise StreamflowError(f"node {self.number} does not run: start() it first")
        self._process.send_signal(number)

    def _failure(self, what: str) -> str:
        return f"node {self.number} of the broker {what}. The end of {self.log_file}:\n  {self.last_words()}"

    def _java(self, heap_mb: int, *arguments: str) -> list[str]:
        archive = self._runtime.archive
        return [
            str(self._runtime.java),
            f"-Xmx{heap_mb}m",
            # The smallest of the collectors; the others' threads would compete with the tests for the machine.
            "-XX:+UseSerialGC",
            # And the quick one of the compilers alone: the other would take a third of a core for the minutes that such
            # a broker lives. It starts in 1.7 s instead of 2.4, and W2 on a fresh one makes 5,100 steps/s, not 4,500.
            "-XX:TieredStopAtLevel=1",
            # Kafka's own, of which Java 25 warns at each start.
            "--sun-misc-unsafe-memory-access=allow",
            *([] if archive is None else [f"-XX:AOTCache={archive}"]),
            # Java 25 takes part of the archive's machine code for wrong, makes it anew, and warns at each start.
            "-XX:+UnlockDiagnosticVMOptions",
            "-XX:-AOTAdapterCaching",
            f"-Dlog4j2.configurationFile={self._logging}",
            "-cp",
            self._runtime.class_path,
            *arguments,
        ]


def stop_all(nodes: list[Node]) -> None:
    """Stop them at the same time, within the time that one may take."""
    for node in nodes:
        node.request_stop()
    give_up_at = time.monotonic() + STOP_SECONDS
    for node in nodes:
        node.stop(max(0.0, give_up_at - time.monotonic()))
