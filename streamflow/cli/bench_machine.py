"""What a measurement stands on: the machine, and how fast its disk confirms a commit."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from streamflow.cli.bench_stand import quantile

COMMITS: Final = 300
CALLS: Final = 100_000


def describe(folder: Path) -> dict[str, Any]:
    """The machine, with the limits that no engine on it can pass; `folder` is on the disk that is measured."""
    commits = sqlite_commit_ms(folder)
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": _file_system(folder),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "python_calls_per_second": python_calls_per_second(),
        "sqlite": sqlite3.sqlite_version,
        "streamflow": _version(),
        "sqlite_commit_p50_ms": quantile(commits, 0.5),
        "sqlite_commit_p99_ms": quantile(commits, 0.99),
    }


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sqlite_commit_ms(folder: Path, commits: int = COMMITS) -> list[float]:
    """How long single commits of one row take, each on the disk when it is done (WAL, `synchronous=FULL`)."""
    path = folder / "commits.db"
    db = sqlite3.connect(path, isolation_level=None)
    taken = []
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE records(id INTEGER PRIMARY KEY, value BLOB)")
        for _ in range(commits):
            began = time.perf_counter()
            db.execute("INSERT INTO records(value) VALUES (?)", (b"x" * 200,))
            taken.append((time.perf_counter() - began) * 1000)
    finally:
        db.close()
        path.unlink()
    return taken


def python_calls_per_second(calls: int = CALLS) -> float:
    """How many calls of a method that makes an object this interpreter manages, the best of five goes.

    The same version differs by more than half between builds: one made without profile-guided optimisation and with a
    shared library, as version managers do unless told otherwise, is the slow one. The engine is as fast as its Python.
    """
    best = 0.0
    for _ in range(5):
        began = time.process_time()
        place = _Place(0)
        for _ in range(calls):
            place = place.next()
        best = max(best, calls / (time.process_time() - began))
    return best


class _Place:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def next(self) -> _Place:
        return _Place(self.number + 1)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    """Its type: on a tmpfs a commit costs nothing, and the figures say nothing about a disk."""
    best, found = "", "unknown"
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return sys.platform
    for mount in mounts:
        _, point, kind, *_ = mount.split()
        if len(point) >= len(best) and folder.resolve().is_relative_to(point):
            best, found = point, kind
    return found


def _version() -> str:
    try:
        return version("streamflow-engine")
    except PackageNotFoundError:
        return "not installed"
