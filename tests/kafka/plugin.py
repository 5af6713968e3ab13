"""Fixtures with a real broker, for every test; and a loud word when there was none.

`kafka` is the bootstrap address of one node that the whole run shares, `kafka_cluster` a running three-node cluster
that the run shares too: whoever hurts it heals it; `kafka_runtime` is for tests that start their own. Tests that ask
for one of them have the marker `kafka`; whoever gets them by `getfixturevalue` sets it himself.
`STREAMFLOW_TEST_KAFKA=host:port` is used instead of the one node. `registry` is a schema registry that the run
shares, `java` compiles and runs Java clients.

Where no broker can be had, these tests are skipped, and the last lines of the run say so. Where the environment says
that it must be there (`CI`, or `STREAMFLOW_REQUIRE_KAFKA=1`), the run fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from streamflow.broker import BrokerMissing, Cluster
from streamflow.broker.jars import find_runtime
from streamflow.broker.probe import Probe
from tests.kafka.artifacts import Java, RunningRegistry, java_folder, registry_folder, running_registry
from tests.kafka.stage import After

ADDRESS_VARIABLE: Final = "STREAMFLOW_TEST_KAFKA"
REQUIRE_VARIABLE: Final = "STREAMFLOW_REQUIRE_KAFKA"
FIXTURES: Final = frozenset({"kafka", "kafka_cluster", "kafka_runtime"})
FETCHED: Final = {"registry": registry_folder, "java": java_folder}
"""Fixtures for which more than the broker is fetched."""
ATTEMPTS: Final = 5
"""Of a second each, for a broker that somebody else started."""

_why_missing = pytest.StashKey[str]()
_faults = pytest.StashKey[list[str]]()

FaultReport = Callable[[str, After], None]


def is_required() -> bool:
    """Whether this run must fail when its Kafka tests cannot run."""
    return any(os.environ.get(name, "").lower() not in {"", "0", "false"} for name in ("CI", REQUIRE_VARIABLE))


# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="session")
def kafka_runtime(pytestconfig: pytest.Config) -> None:
    """Nothing that runs, but what is needed to start brokers of one's own."""
    try:
        find_runtime()
    except BrokerMissing as error:
        pytestconfig.stash[_why_missing] = str(error)
        pytest.skip(f"no Kafka broker: {error}")


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap address of a broker that the whole run shares: use topics and groups of your own."""
    address = os.environ.get(ADDRESS_VARIABLE)
    if address:
        probe = Probe(address)
        assert any(probe.nodes() for _ in range(ATTEMPTS)), f"no broker answers at {ADDRESS_VARIABLE}={address}"
        yield address
        return
    request.getfixturevalue("kafka_runtime")
    with Cluster(tmp_path_factory.mktemp("kafka")) as cluster:
        yield cluster.bootstrap


@pytest.fixture(scope="session")
def kafka_cluster(kafka_runtime: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes that the whole run shares. Leave them as they were: all running, none paused, and answering."""
    with Cluster(tmp_path_factory.mktemp("kafka-cluster"), nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def registry(
    kafka_runtime: None, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningRegistry]:
    """A schema registry that the whole run shares: use subjects of your own; whoever hurts it heals it."""
    _fetched(pytestconfig, "registry")
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def java(kafka_runtime: None, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Java:
    """Compiles and runs clients that are written in Java."""
    _fetched(pytestconfig, "java")
    return Java(tmp_path_factory.mktemp("java"))


def _fetched(config: pytest.Config, fixture: str) -> None:
    try:
        FETCHED[fixture]()
    except BrokerMissing as error:
        config.stash[_why_missing] = str(error)
        pytest.skip(f"no {fixture}: {error}")


@pytest.fixture
def fault_report(pytestconfig: pytest.Config) -> FaultReport:
    """Keeps what a fault cost, for the end of the run: called with a name and what the log said afterwards."""

    def keep(name: str, after: After) -> None:
        pytestconfig.stash.setdefault(_faults, []).append(
            f"{after.longest_pause:5.1f} s without progress: {name} "
            f"({after.findings.runs} runs, {after.findings.repeated_attempts} attempts repeated)"
        )

    return keep


# --------------------------------------------------------------------------------------------------------------- hooks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a broker, before `-m` selects by marker."""
    for item in items:
        if not FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kafka)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fetch the broker before the first test: it may take longer than a test may."""
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    ours = FIXTURES - {"kafka"} if os.environ.get(ADDRESS_VARIABLE) else FIXTURES
    if ours.isdisjoint(used) or session.config.option.collectonly:
        return

    def say(text: str) -> None:
        _write(session.config, f"\n{text}")

    try:
        find_runtime(say)
        for name, fetch in FETCHED.items():
            if name in used:
                fetch(say)
    except BrokerMissing as error:
        session.config.stash[_why_missing] = str(error)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where a broker is required, a run without one has failed."""
    passed = session.exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    if _why_missing in session.config.stash and is_required() and passed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the faults cost, and at length what was missing."""
    if faults := config.stash.get(_faults, None):
        terminalreporter.section("faults")
        for line in faults:
            terminalreporter.write_line(line)
    why = config.stash.get(_why_missing, None)
    if why is not None:
        terminalreporter.section("KAFKA TESTS DID NOT RUN", sep="!", red=True, bold=True)
        terminalreporter.write_line(why)
        terminalreporter.write_line(
            f"This run fails for it, as CI or {REQUIRE_VARIABLE} asks."
            if is_required()
            else f"This run does not fail for it; with {REQUIRE_VARIABLE}=1, and in CI, it would."
        )
        terminalreporter.write_line(f"{ADDRESS_VARIABLE}=host:port uses a broker that runs already.")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Say it once more in the very last line, below pytest's own."""
    why = config.stash.get(_why_missing, None)
    if why is not None:
        _write(config, f"KAFKA TESTS DID NOT RUN: {why}")


def _write(config: pytest.Config, text: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(text, red=True, bold=True)
