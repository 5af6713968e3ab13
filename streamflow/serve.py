"""What `App.serve` and `App.connect` do: open the log, start a worker, make a client, and end it all in order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from streamflow.client.client import Client
from streamflow.codec.registry import Schemas
from streamflow.errors import InvalidArguments
from streamflow.ids import check_app
from streamflow.logs.open import open_log

if TYPE_CHECKING:
    from streamflow.worker import Worker
    from streamflow.workflow.app import App

__all__ = ["Client", "connect", "serve"]

URL_VARIABLE: Final = "STREAMFLOW_URL"
URL_DEFAULT: Final = "sqlite:///streamflow.db"


def log_url(url: str | None) -> str:
    """The URL that is meant: the one given, else $STREAMFLOW_URL, else a file in the current directory."""
    if url is None:
        return os.environ.get(URL_VARIABLE) or URL_DEFAULT
    if not isinstance(url, str):
        raise InvalidArguments(f"url must be a str such as {URL_DEFAULT!r}, found {url!r}")
    return url


def schemas_of(url: str) -> Schemas | None:
    """The schema registry that a log's URL names, if it names one."""
    if not url.startswith("kafka://"):
        return None
    from streamflow.logs.kafka_url import parse_kafka

    settings = parse_kafka(url).registry
    if settings is None:
        return None
    from streamflow.codec.registry_client import RegistryClient

    return Schemas(RegistryClient(settings))


@asynccontextmanager
async def connect(url: str | None = None, *, app: App | str) -> AsyncGenerator[Client, None]:
    """A client of an app, by its name where its code is not at hand. Its topics are made by its workers."""
    if isinstance(app, str):
        name, registry = check_app(app), None
    else:
        name, registry = app.name, app
    url = log_url(url)
    log = await open_log(url, app=name, create=False)
    try:
        async with Client(log, registry, schemas=schemas_of(url)) as client:
            yield client
    finally:
        await log.close()


@asynccontextmanager
async def serve(
    app: App,
    url: str | None = None,
    *,
    state_dir: str | os.PathLike[str] | None = None,
    max_parallel_steps: int | None = None,
    queues: Sequence[str] = (),
    metrics_port: int | None = None,
    create_topics: bool = True,
) -> AsyncGenerator[Client, None]:
    """A worker of the app in this process, and a client to it; it serves the step `queues` beside its partitions."""
    from streamflow.worker import Worker

    url = log_url(url)
    log = await open_log(url, app=app.name, create=create_topics)
    try:
        schemas = schemas_of(url)
        worker = Worker(
            app,
            log,
            state_dir=state_dir,
            max_parallel_steps=max_parallel_steps,
            queues=queues,
            schemas=schemas,
        )
        async with serve_metrics(metrics_port):
            try:
                await worker.start()
                async with _dies_with(worker), Client(log, app, schemas=schemas) as client:
                    yield client
            finally:
                await worker.stop()
    finally:
        await log.close()


@asynccontextmanager
async def _dies_with(worker: Worker) -> AsyncGenerator[None, None]:
    """Cancel the block when the worker dies, and raise what it died of in its place."""
    block = asyncio.current_task()
    assert block is not None, "serve() is used in a task"
    interrupted = False

    def ended(waiting: asyncio.Task[None]) -> None:
        nonlocal interrupted
        if not waiting.cancelled() and waiting.exception() is not None:
            interrupted = True
            block.cancel()

    watching = asyncio.get_running_loop().create_task(worker.wait(), name="worker-died")
    watching.add_done_callback(ended)
    try:
        yield
    except asyncio.CancelledError:
        # Only our own cancellation turns into the worker's error: one from outside goes on as it is.
        if interrupted and block.uncancel() == 0:
            watching.result()
        raise
    finally:
        watching.remove_done_callback(ended)
        watching.cancel()
        await asyncio.wait((watching,))


@asynccontextmanager
async def serve_metrics(port: int | None) -> AsyncGenerator[int | None, None]:
    """This process's metrics over HTTP, for Prometheus to fetch; the port that it has, where 0 asks for a free one."""
    if port is None:
        yield None
        return
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise InvalidArguments(f"metrics_port must be 0 to 65535, found {port!r}")
    from prometheus_client import start_http_server

    try:
        server, _ = start_http_server(port)
    except OSError as error:
        raise InvalidArguments(f"metrics_port {port} cannot be used ({error.strerror}): choose another") from None
    try:
        yield server.server_port
    finally:
        # In a thread: it waits for the server's own thread to look up.
        await asyncio.to_thread(server.shutdown)
        server.server_close()
