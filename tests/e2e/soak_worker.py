"""`streamflow worker`, which trims its history after minutes, where others do so after days: run as a module."""

from __future__ import annotations

from typing import Final

from streamflow.cli.main import cli
from streamflow.config import LIMITS, Limits
from streamflow.worker.worker import Worker
from tests.e2e.soak_app import TRIM_RECORDS, TRIM_SECONDS

EARLY: Final = Limits(trim_records_min=TRIM_RECORDS, trim_seconds=TRIM_SECONDS)

if __name__ == "__main__":
    # There is no option for it: nobody needs one, and a worker that trims so often mostly copies.
    defaults = Worker.__init__.__kwdefaults__ or {}
    assert defaults["limits"] is LIMITS
    defaults["limits"] = EARLY
    cli(prog_name="streamflow")
