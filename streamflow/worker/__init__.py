"""The worker: the only owner of partitions. It restores, claims, decides, appends, applies and performs effects."""

from streamflow.worker.worker import Worker

__all__ = ["Worker"]
