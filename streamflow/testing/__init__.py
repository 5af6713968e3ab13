"""Tests of workflows in the simulator: the product's own workers and client, in virtual time, on one thread.

    simulate(app, scenario)   plays a scenario from a seed: a month in milliseconds, crashes after every turn, faults
    world(app)                the same world by hand, inside an ordinary asyncio test
    Faults                    what goes wrong, for both
    SimulationFailed          says what broke, under which seed, and how to play it again
    NotSimulated              a step reached for the real world: mock it

With pytest, the fixture `streamflow` does both with a seed of each test's own (`plugin.py`). `examples/` has three
tests to begin with; DESIGN.md says what is real here and what is not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from streamflow.sim.guard import NotSimulated
    from streamflow.testing.bridge import world
    from streamflow.testing.control import World
    from streamflow.testing.options import Faults
    from streamflow.testing.play import Played, simulate
    from streamflow.testing.report import SimulationFailed
    from streamflow.testing.steps import Call

_HOME: Final = {
    "Call": "streamflow.testing.steps",
    "Faults": "streamflow.testing.options",
    "NotSimulated": "streamflow.sim.guard",
    "Played": "streamflow.testing.play",
    "SimulationFailed": "streamflow.testing.report",
    "World": "streamflow.testing.control",
    "simulate": "streamflow.testing.play",
    "world": "streamflow.testing.bridge",
}

__all__ = ["Call", "Faults", "NotSimulated", "Played", "SimulationFailed", "World", "simulate", "world"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
