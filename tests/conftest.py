"""What every test gets: no settings from the developer's shell, and property tests without a wall-clock deadline."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

pytest_plugins = ["tests.kafka.plugin"]

# A shell that starts the run in the background has it ignore Ctrl-C, and with it every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline measures the machine, not the code: on a busy one it fails at random. The timeout of the run is enough.
settings.register_profile("streamflow", deadline=None, print_blob=True)
settings.load_profile("streamflow")


@pytest.fixture(autouse=True)
def _no_settings_from_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STREAMFLOW_URL", "STREAMFLOW_APP"):
        monkeypatch.delenv(name, raising=False)
