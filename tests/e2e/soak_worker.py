"""`streamflow worker`, which trims its history after minutes, where others do so after days: run as a module.

It trims nothing that soak_recorder.py has not read: what is judged must have been seen.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from streamflow.cli.main import cli
from streamflow.config import LIMITS, Limits
from streamflow.logs.base import HISTORY
from streamflow.logs.kafka import KafkaLog
from streamflow.worker.worker import Worker
from tests.e2e.soak_app import PROGRESS_VARIABLE, TRIM_RECORDS, TRIM_SECONDS
from tests.e2e.soak_recorder import has_recorded

EARLY: Final = Limits(trim_records_min=TRIM_RECORDS, trim_seconds=TRIM_SECONDS)
LOOK_SECONDS: Final = 0.1


def trim_what_is_recorded(progress: Path) -> None:
    """Let each trim of a history wait until the recorder that tells this file has read what goes."""
    trim = KafkaLog.trim

    async def wait_and_trim(self: KafkaLog, topic: str, partition: int, before: int) -> int:
        while topic == HISTORY and not has_recorded(progress, partition, before):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)  # tidy: a file of another process tells nobody
        return await trim(self, topic, partition, before)

    KafkaLog.trim = wait_and_trim  # type: ignore[method-assign]


if __name__ == "__main__":
    # There is no option for it: nobody needs one, and a worker that trims so often mostly copies.
    defaults = Worker.__init__.__kwdefaults__ or {}
    assert defaults["limits"] is LIMITS
    defaults["limits"] = EARLY
    trim_what_is_recorded(Path(os.environ[PROGRESS_VARIABLE]))
    cli(prog_name="streamflow")
