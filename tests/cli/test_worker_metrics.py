"""`worker --metrics-port`: a page of metrics for each process, fetched over HTTP while runs come and go."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests import metering
from tests.cli import driver
from tests.cli.conftest import Shop
from tests.cli.driver import Process, Starter
from tests.metering import Sample, value


def fetch(port: int) -> dict[Sample, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return metering.parsed(answer.read().decode())


def until(ports: list[int], true: Callable[[dict[Sample, float]], bool]) -> dict[Sample, float]:
    """Fetch all pages until what they say together holds."""
    give_up_at = time.monotonic() + driver.DEADLINE_SECONDS
    while True:
        total: dict[Sample, float] = {}
        for page in map(fetch, ports):
            for sample, number in page.items():
                total[sample] = total.get(sample, 0.0) + number
        if true(total):
            return total
        assert time.monotonic() < give_up_at, total
        time.sleep(0.05)  # tidy: another process's metrics have no event


def start(shop: Shop, workflow: str, *args: str) -> None:
    ran = driver.run(shop.folder, "start", workflow, *args, env=shop.env)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def two_ports() -> int:
    """The first of two ports in a row that nobody has."""
    while True:
        with socket.socket() as first, socket.socket() as second, suppress(OSError, OverflowError):
            first.bind(("", 0))
            port: int = first.getsockname()[1]
            second.bind(("", port + 1))
            return port


def test_the_page_of_a_worker_that_runs_orders(launch: Starter, shop: Shop) -> None:
    worker = launch("worker", "shop:app", "--metrics-port", "0", "--json")
    port = json.loads(worker.wait_for("metrics_port"))["metrics_port"]
    assert f"metrics on port {port}, pid" in worker.wait_for("Serving", stream="stderr")
    start(shop, "add", "1", "2", "--wait")
    start(shop, "fulfil", '"o1"', "--id", "o1")
    start(shop, "patient", "0.01", "--wait")
    start(shop, "broken", '"no"')
    closed = {"workflow": "broken", "state": "failed"}
    # Only now and then is the log asked for its end: wait for that, too.
    page = until(
        [port],
        lambda page: (
            value(page, "runs_closed_total", **closed) == 1
            and (f"{metering.PREFIX}command_lag_records", frozenset({("partition", "0")})) in page
        ),
    )
    assert value(page, "runs_started_total", workflow="fulfil") == 1
    assert value(page, "step_attempts_total", step="charge", outcome="completed") == 1
    assert value(page, "step_attempts_total", step="refuse", outcome="retried") == 1
    assert value(page, "owned_partitions", state="active") == 4
    assert value(page, "restore_duration_seconds_count") == 4
    assert value(page, "timer_lateness_seconds_count") >= 2
    assert metering.names() >= {name for name, _ in page}, "a worker shows what is documented"
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0, worker.said


def test_a_step_worker_has_a_page_too(launch: Starter) -> None:
    worker = launch("worker", "shop:app", "--queue", "gpu", "--metrics-port", "0", "--json")
    said = json.loads(worker.wait_for("metrics_port"))
    page = until([said["metrics_port"]], lambda page: value(page, "running_steps") == 0)
    assert said["queues"] == ["gpu"] and value(page, "owned_partitions", state="active") == 0


def test_a_port_that_is_taken(launch: Starter, shop: Shop) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = driver.run(shop.folder, "worker", "shop:app", "--metrics-port", str(port), env=shop.env)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("Error: ") and f"metrics_port {port} cannot be used" in ran.stderr


def test_each_process_has_the_next_port(launch: Starter, shop: Shop, two_ports: int) -> None:
    ports = [two_ports, two_ports + 1]
    fleet = launch("worker", "shop:app", "--processes", "2", "--metrics-port", str(ports[0]), "--json")
    said = fleet.wait_for("Starting 2 worker processes", stream="stderr")
    assert f"metrics on ports {ports[0]} to {ports[1]}" in said
    for port in ports:
        fleet.wait_for(f'"metrics_port":{port}')
    for number in range(8):
        start(shop, "add", str(number), "1")
    page = until(ports, lambda page: value(page, "runs_closed_total", workflow="add", state="completed") == 8)
    assert value(page, "owned_partitions", state="active") == 4
    fleet.send(signal.SIGTERM)
    assert fleet.wait() == 0, fleet.said


def test_processes_find_free_ports_of_their_own(launch: Starter) -> None:
    fleet = launch("worker", "shop:app", "--processes", "2", "--metrics-port", "0", "--json")
    fleet.wait_for("metrics_port")
    give_up_at = time.monotonic() + driver.DEADLINE_SECONDS
    while len(found := {port_of(fleet, line) for line in fleet.stdout if "metrics_port" in line}) < 2:
        assert time.monotonic() < give_up_at, fleet.said
        time.sleep(0.02)  # tidy: another process's output has no event
    until(sorted(found), lambda page: value(page, "owned_partitions", state="active") == 4)


def port_of(fleet: Process, line: str) -> int:
    port: int = json.loads(line)["metrics_port"]
    assert port > 0, fleet.said
    return port


@pytest.mark.parametrize(("options", "said"), [(["65536"], "0<=x<=65535"), (["65535", "--processes", "2"], "65536")])
def test_a_wrong_port(shop: Shop, options: list[str], said: str) -> None:
    ran = driver.run(shop.folder, "worker", "shop:app", "--metrics-port", *options, env=shop.env)
    assert ran.returncode == 2 and said in ran.stderr
