"""A real worker process on a real broker, and what clients in other languages do to it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar

import streamflow as sf
from streamflow.cli.worker_process import WorkerProcess, Workers
from streamflow.codec.avro import decode_dead_letter
from streamflow.core.effects import DeadLetter
from streamflow.logs.base import DEAD_LETTERS, Log, Record
from streamflow.logs.open import open_log
from tests.kafka.orders import APP_VARIABLE

ROOT: Final = Path(__file__).resolve().parents[2]
CLIENTS: Final = ROOT / "deploy" / "clients"
DEADLINE_SECONDS: Final = 120.0
PAUSE_SECONDS: Final = 0.05
PARTITIONS: Final = 3

T = TypeVar("T")


class Served:
    """One app on the broker: `url` is what its worker was given, `plain_url` the same without a schema registry."""

    def __init__(self, bootstrap: str, folder: Path, registry: str | None) -> None:
        self.app = f"wire-{uuid.uuid4().hex[:8]}"
        self.bootstrap = bootstrap
        self.registry = registry
        self.plain_url = f"kafka://{bootstrap}?partitions={PARTITIONS}"
        self.url = self.plain_url + ("" if registry is None else f"&schema.registry.url={registry}")
        self.folder = folder
        self.output = folder / "worker.log"

    def start(self, workers: Workers) -> WorkerProcess:
        return workers.start(
            "tests.kafka.orders:app",
            self.url,
            self.output,
            "--state-dir",
            str(self.folder / "state"),
            variables={APP_VARIABLE: self.app, "PYTHONPATH": ":".join([str(ROOT), *filter(None, sys.path)])},
        )

    # -- clients of others -------------------------------------------------------------------------------------------

    def plain(self, *args: str) -> dict[str, Any]:
        """Run deploy/clients/plain.py as its user would."""
        return self._python("plain.py", self.bootstrap, self.app, *args)

    def with_registry(self, *args: str) -> dict[str, Any]:
        """Run deploy/clients/with_registry.py as its user would."""
        assert self.registry is not None
        return self._python("with_registry.py", self.registry, self.bootstrap, self.app, *args)

    def _python(self, script: str, *args: str) -> dict[str, Any]:
        command = [sys.executable, str(CLIENTS / script), *args]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
        assert done.returncode == 0, f"{done.stderr}\n{self.said()}"
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def produce(self, value: bytes, *, key: str, partition: int = -1) -> None:
        """Append a command where librdkafka's own default partitioner, which is not ours, puts it, or where told."""
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": self.bootstrap, "message.max.bytes": 1_040_000})
        failures: list[object] = []
        producer.produce(
            f"{self.app}.commands",
            key=key.encode(),
            value=value,
            partition=partition,
            on_delivery=lambda error, _: failures.append(error),
        )
        assert producer.flush(DEADLINE_SECONDS) == 0
        assert failures == [None], failures

    # -- what came of it ---------------------------------------------------------------------------------------------

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_until_said(self, text: str, *, after: int = 0) -> None:
        wait_until(lambda: text in self.said()[after:], lambda: f"the worker did not say {text!r}:\n{self.said()}")

    def in_log(self, question: Callable[[Log], Awaitable[T]]) -> T:
        async def ask() -> T:
            log = await open_log(self.plain_url, app=self.app)
            try:
                return await question(log)
            finally:
                await log.close()

        return asyncio.run(ask())

    def records(self, topic: str) -> dict[int, list[Record]]:
        """All records of a topic, by partition."""

        async def read(log: Log) -> dict[int, list[Record]]:
            return {partition: await log.read(topic, partition, 0, limit=10_000) for partition in range(PARTITIONS)}

        return self.in_log(read)

    def letters(self) -> list[DeadLetter]:
        found = self.records(DEAD_LETTERS).values()
        return [decode_dead_letter(record.value or b"") for records in found for record in records]

    def wait_for_letters(self, count: int) -> list[DeadLetter]:
        self.wait_until_said("goes to the dead letters")
        wait_until(lambda: len(self.letters()) >= count, lambda: f"{self.letters()}\n{self.said()}")
        return self.letters()

    def result(self, workflow_id: str, url: str | None = None) -> Any:
        async def ask() -> Any:
            async with sf.connect(url or self.url, app=self.app) as client:
                return await client.handle(workflow_id).result(timeout=DEADLINE_SECONDS)

        return asyncio.run(ask())

    def prove_it_goes_on(self) -> None:
        """Every partition takes a run from its start to its end."""

        async def ask() -> None:
            async with sf.connect(self.url, app=self.app) as client:
                for number in range(3 * PARTITIONS):
                    handle = await client.start("echo", f"still here {number}")
                    assert await handle.result(timeout=DEADLINE_SECONDS) == f"still here {number}"

        asyncio.run(ask())


def wait_until(holds: Callable[[], bool], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(PAUSE_SECONDS)  # tidy: another process tells us nothing of what it has done


@contextmanager
def serving(bootstrap: str, folder: Path, registry: str | None = None) -> Generator[Served, None, None]:
    """A worker in a process of its own; its topics go when it does."""
    served = Served(bootstrap, folder, registry)
    with Workers() as workers:
        served.in_log(_made)
        try:
            served.start(workers)
            served.wait_until_said("erving")
            served.prove_it_goes_on()
            yield served
        finally:
            asyncio.run(workers.stop())
            delete_topics(bootstrap, served.app)


async def _made(log: Log) -> None:
    assert log.partitions == PARTITIONS


def delete_topics(bootstrap: str, app: str) -> None:
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": bootstrap})
    names = [name for name in admin.list_topics(timeout=10).topics if name.startswith(f"{app}.")]
    for done in admin.delete_topics(names).values() if names else ():
        done.result(10)


def load_client(script: str) -> ModuleType:
    """A client's functions, for what its command line does not do."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(Path(script).stem, CLIENTS / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
