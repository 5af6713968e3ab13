"""The client of an app: it starts, watches, signals and lists runs, and needs no service but the log."""

from streamflow.client.client import Client
from streamflow.client.handle import Handle

__all__ = ["Client", "Handle"]
