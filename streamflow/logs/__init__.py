"""The log: one port (`base`), one adapter per URL scheme, chosen by `open_log`. The design is in DESIGN.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamflow.logs.open import open_log as open_log

__all__ = ["open_log"]


def __getattr__(name: str) -> object:
    # Lazily, so that importing the port loads neither sqlite3 nor a Kafka client.
    if name == "open_log":
        from streamflow.logs.open import open_log

        return open_log
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
