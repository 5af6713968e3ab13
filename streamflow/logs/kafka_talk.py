"""What librdkafka says, in our log: once, not once per client, broker and second.

Each client of a process reports each broker that is away, again and again. Who runs a worker wants to read it once.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

log_ = logging.getLogger("streamflow.kafka")

AGAIN_SECONDS: Final = 10.0
"""After so long the same kind of message is shown again; those in between are shown at level debug."""

TRANSIENT: Final = ("GETPID", "METADATAUPDATE", "REQTMOUT", "OFFSET")
"""Kinds that librdkafka repeats by itself until it succeeds: for debugging only."""


class Talk:
    """Takes the place of a logger for librdkafka's clients, which call `log` with `KIND [client] [thread] text`."""

    def __init__(self, log: logging.Logger = log_) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}

    def log(self, level: int, message: str, *args: object) -> None:
        """Show the message, unless one of its kind was shown a moment ago."""
        text = message % args if args else message
        kind = text.partition(" ")[0]
        if kind in TRANSIENT or not self._is_due(kind):
            level = logging.DEBUG
        # Below an error: what is beyond librdkafka's own patience is raised where it matters.
        self._log.log(min(level, logging.WARNING), "%s", text)

    def _is_due(self, kind: str) -> bool:
        now = time.monotonic()
        with self._lock:
            due = now >= self._next.get(kind, 0.0)
            if due:
                self._next[kind] = now + AGAIN_SECONDS
        return due


talk: Final = Talk()
