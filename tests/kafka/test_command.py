"""`streamflow broker`: what it prints, how it ends, and what it says when it cannot begin."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamflow.broker.probe import Probe
from streamflow.broker.settings import HOST, free_ports
from tests.cli import driver
from tests.cli.driver import Process
from tests.waiting import until

CACHE_EMPTY = {"STREAMFLOW_MAVEN_REPOSITORY": "http://127.0.0.1:1"}


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def broker(kafka_runtime: None, tmp_path: Path, port: int) -> Iterator[Process]:
    """The command under way; it has not said anything yet."""
    process = Process(tmp_path, "broker", "--port", str(port))
    yield process
    process.close()


def test_it_prints_its_address_and_ctrl_c_stops_it(broker: Process, port: int, tmp_path: Path):
    address = broker.wait_for("bootstrap").split()[1]
    assert address == f"{HOST}:{port}"
    assert broker.wait_for("url").split()[1] == f"kafka://{address}"
    assert "answers with 1 node" in broker.wait_for("Ctrl-C", stream="stderr")
    probe = Probe(address)
    asyncio.run(until(lambda: probe.nodes() == [1]))
    broker.send(signal.SIGINT)
    assert broker.wait() == 0, broker.said
    assert f"Stopped. The data is in {tmp_path}/streamflow-broker" in broker.said
    assert Probe(address).nodes() == []


def test_as_json_and_sigterm_and_fresh(kafka_runtime: None, tmp_path: Path, port: int):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "node-1.log").write_text("of an earlier life\n")
    process = Process(tmp_path, "broker", "--port", str(port), "--dir", "kept", "--fresh", "--json")
    try:
        said = json.loads(process.wait_for("bootstrap"))
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.said
    finally:
        process.close()
    assert (said["bootstrap"], said["url"]) == (f"{HOST}:{port}", f"kafka://{HOST}:{port}")
    assert (said["directory"], [node["number"] for node in said["nodes"]]) == (str(folder), [1])
    assert "an earlier life" not in (folder / "node-1.log").read_text()


def test_a_signal_while_it_starts_stops_it_too(broker: Process, tmp_path: Path):
    broker.wait_for("Starting", stream="stderr")
    broker.send(signal.SIGTERM)
    assert broker.wait() == 0, broker.said
    assert broker.stdout == []


def test_a_node_that_dies_ends_the_command(kafka_runtime: None, tmp_path: Path, port: int):
    process = Process(tmp_path, "broker", "--port", str(port), "--json")
    try:
        said = json.loads(process.wait_for("bootstrap"))
        os.kill(said["nodes"][0]["pid"], signal.SIGKILL)
        assert process.wait() == 1
    finally:
        process.close()
    assert "Error: node 1 of the broker ended with exit code -9" in process.said


def test_a_taken_port_and_missing_jars_are_one_line_and_exit_code_1(kafka_runtime: None, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        done = driver.run(tmp_path, "broker", "--port", str(taken.getsockname()[1]))
    assert (done.returncode, done.stdout) == (1, "")
    assert "is taken" in done.stderr.splitlines()[-1]
    done = driver.run(tmp_path, "broker", env=CACHE_EMPTY | {"XDG_CACHE_HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert "Error: the jars of Apache Kafka" in done.stderr.splitlines()[-1]
