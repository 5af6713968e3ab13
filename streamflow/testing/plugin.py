"""The pytest plugin: the fixture `streamflow`, and the option `--streamflow-seed`.

Each test has a seed of its own, made of its id, so that it is the same in every run and different between tests. When
a test fails that used it, the report names the seed and the command that plays it again.

Nothing of the simulator is imported before a test asks for it: pytest loads this module in every run of whoever has
streamflow installed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, TypeVar, Unpack, overload
from zlib import crc32

import pytest

if TYPE_CHECKING:
    from streamflow.testing.control import World
    from streamflow.testing.options import WorldOptions
    from streamflow.testing.play import Played, Scenario
    from streamflow.workflow.app import App

T = TypeVar("T")
OPTION = "--streamflow-seed"


class Simulations:
    """What the fixture `streamflow` gives: `simulate` and `world` of `sf.testing`, with a seed of the test's own."""

    def __init__(self, seed: int, *, is_told: bool) -> None:
        self.seed = seed
        self.played = seed
        """The seed that was played last: what a failure names."""
        self._is_told = is_told

    @overload
    def simulate(
        self, app: App, scenario: Scenario[T], *, seed: int | None = None, **options: Unpack[WorldOptions]
    ) -> Played[T]: ...
    @overload
    def simulate(
        self, app: App, scenario: Scenario[T], *, seeds: int | Iterable[int], **options: Unpack[WorldOptions]
    ) -> list[Played[T]]: ...
    def simulate(
        self,
        app: App,
        scenario: Scenario[T],
        *,
        seed: int | None = None,
        seeds: int | Iterable[int] | None = None,
        **options: Unpack[WorldOptions],
    ) -> Played[T] | list[Played[T]]:
        """See `sf.testing.simulate`. `seeds=50` plays 50, from the test's own on; `--streamflow-seed` only its one."""
        from streamflow.testing.play import simulate

        if seeds is None:
            self.played = self.seed if seed is None or self._is_told else seed
            return simulate(app, scenario, seed=self.played, **options)
        if self._is_told:
            seeds = (self.seed,)
        elif isinstance(seeds, int):
            seeds = range(self.seed, self.seed + seeds)
        if not (seeds := list(seeds)):
            return simulate(app, scenario, seeds=seeds, **options)  # which refuses it
        return [self.simulate(app, scenario, seed=each, **options) for each in seeds]

    def world(
        self, app: App, *, seed: int | None = None, **options: Unpack[WorldOptions]
    ) -> AbstractAsyncContextManager[World]:
        """See `sf.testing.world`."""
        from streamflow.testing.bridge import world

        self.played = self.seed if seed is None or self._is_told else seed
        return world(app, seed=self.played, **options)


SIMULATIONS = pytest.StashKey[Simulations]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    group = parser.getgroup("streamflow")
    group.addoption(
        OPTION,
        type=int,
        default=None,
        metavar="SEED",
        help="The seed of simulated worlds (default: one of each test's own, made of its id).",
    )


@pytest.fixture
def streamflow(request: pytest.FixtureRequest) -> Simulations:
    """Workflows in simulated worlds: `streamflow.simulate(app, scenario)` and `streamflow.world(app)`."""
    told: int | None = request.config.getoption(OPTION)
    seed = crc32(request.node.nodeid.encode()) if told is None else told
    made = Simulations(seed, is_told=told is not None)
    request.node.stash[SIMULATIONS] = made
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the seed where a test failed that had one."""
    report = yield
    made = item.stash.get(SIMULATIONS, None)
    if report.failed and made is not None:
        again = f"pytest '{item.nodeid}' {OPTION}={made.played}"
        report.sections.append(("streamflow", f"seed {made.played}; play it again: {again}"))
    return report
