"""Notices a step that blocks the event loop (a forgotten `time.sleep`), names it, and counts it.

A thread asks the loop for a sign of life a few times a second. Ownership does not depend on the loop (the log adapter
renews it from a thread of its own), so a blocked loop costs time, never correctness.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time

from streamflow.metrics import LOOP_BLOCKED
from streamflow.worker.executor import Executor
from streamflow.workflow.stepinfo import StepInfo

log = logging.getLogger("streamflow.worker")

REPEAT_SECONDS = 10.0
"""How often a loop that stays blocked is reported again."""


class Watchdog:
    """Watches the loop on which it is started."""

    def __init__(self, executor: Executor, *, blocked_seconds: float) -> None:
        self.executor = executor
        self.blocked_seconds = blocked_seconds
        self.blocked_count = 0
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()
        self._alive = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="streamflow-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; returns when the thread has ended."""
        self._stopped.set()
        self._alive.set()  # it is: this runs on it
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self.blocked_seconds / 2):
            self._alive.clear()
            try:
                self._loop.call_soon_threadsafe(self._alive.set)  # enters the event loop here
            except RuntimeError:
                return  # the loop is closed
            asked_at = time.monotonic()
            if not self._alive.wait(self.blocked_seconds) and not self._stopped.is_set():
                self._report(asked_at)

    def _report(self, asked_at: float) -> None:
        step = self._culprit()
        if step is None or self._alive.is_set():
            return  # the engine itself, or other code of this process, is busy: nothing a user could mend
        self.blocked_count += 1
        LOOP_BLOCKED.inc()
        ended = False
        while not ended and not self._stopped.is_set():
            ended = self._alive.wait(REPEAT_SECONDS)
            spent = time.monotonic() - asked_at
            log.warning(
                "step %s of run %s (attempt %d) %s the event loop for %.1f s: make it a plain def: "
                "it then runs in a thread",
                step.step,
                step.workflow_id,
                step.attempt,
                "blocked" if ended else "has been blocking",
                spent,
            )

    def _culprit(self) -> StepInfo | None:
        task = asyncio.current_task(self._loop)
        return None if task is None else self.executor.running_in(task)
