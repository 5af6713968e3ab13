"""`simulate`: a scenario played in a world, from a seed or from many."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, Unpack, overload

from streamflow.client.client import Client
from streamflow.errors import InvalidArguments
from streamflow.sim.guard import NotSimulated
from streamflow.testing.control import World
from streamflow.testing.options import Options, WorldOptions, check_names
from streamflow.testing.report import first_line
from streamflow.testing.stage import Stage
from streamflow.testing.steps import foreign_text
from streamflow.workflow.app import App

T = TypeVar("T")
Scenario: TypeAlias = "Callable[[Client], Coroutine[Any, Any, T]] | Callable[[Client, World], Coroutine[Any, Any, T]]"


@dataclass(frozen=True)
class Played(Generic[T]):
    """A story that went well. `trace` is a checksum of all that happened: equal seeds have equal ones."""

    result: T
    """What the scenario returned."""
    seed: int
    faults: Sequence[str]
    """What went wrong on purpose, in order."""
    crashes: int
    """How often a worker was crashed by `crash_after_every_turn` or `World.crash_worker`."""
    virtual_seconds: float
    events: int
    """How much happened, in steps of the world."""
    trace: int


@overload
def simulate(
    app: App,
    scenario: Scenario[T],
    *,
    seed: int = 0,
    **options: Unpack[WorldOptions],
) -> Played[T]: ...
@overload
def simulate(
    app: App,
    scenario: Scenario[T],
    *,
    seeds: Iterable[int],
    **options: Unpack[WorldOptions],
) -> list[Played[T]]: ...
def simulate(
    app: App,
    scenario: Scenario[T],
    *,
    seed: int | None = None,
    seeds: Iterable[int] | None = None,
    **options: Unpack[WorldOptions],
) -> Played[T] | list[Played[T]]:
    """Play `scenario` in a simulated world, and return how that went.

    The scenario is `async def scenario(client)`, or `scenario(client, world)` to fail, mock and count steps as well. It
    starts runs, sends signals, awaits results and asserts, in virtual time: its own `asyncio.sleep`, too. The workers,
    the client and the timers are the product's; the log, the disks, the clocks and all chance come from `seed`. Its
    connection to the log is a good one: what goes wrong goes wrong with workers and brokers, so no request need be
    repeated.

    `seeds` (`range(50)`) plays it once for each, fails with the first bad one, and returns a list.
    `crash_after_every_turn` has a crash follow each turn that became durable: at once, soon, or when a step has run and
    nobody knows it yet. The worker starts again on its disk or on an empty one. Code that does not replay, and steps
    that cannot bear to run twice, show.

    `faults` is how many random faults happen at most, or `Faults(…)`. `workers` share `partitions`; they serve
    `queues`: those that the app's steps name, unless others are given. The world's time begins at `start_at`, by
    default in 2030. More than `steps_max` events are a failure.

    Each attempt of a step is held up before it begins, and again before its answer is given, by up to `step_delay`
    (seconds or a timedelta, 0 for not at all), but by no more than a tenth of its timeout. So steps that run side by
    side end in another order under another seed, and in the same one each time under the same.

    Raises `SimulationFailed`, with the original exception as its cause, when the scenario raises, when a run is
    blocked since its code does not replay, when an invariant of the engine breaks, or when nothing is left to happen
    while the scenario still waits. What pytest skips is skipped. `InvalidArguments`, or `TypeError` for an option that
    does not exist, before anything is played: also for `seeds` that are none.

    Steps run on the simulated process, plain functions too: time is virtual there, and nothing real may be waited for.
    A socket, a subprocess, `time.sleep` or a future of another event loop is `NotSimulated`: mock such steps.
    """
    check_names("simulate", options, "seed", "seeds")
    _check_scenario(scenario)
    if seeds is None:
        return _play(scenario, Options(app, 0 if seed is None else seed, **options))
    if seed is not None:
        raise InvalidArguments("seed and seeds exclude each other, found both; give one")
    if isinstance(seeds, int):
        raise InvalidArguments(f"seeds must be many ints, found {seeds!r}: write seeds=range({seeds})")
    if not isinstance(seeds, Iterable):
        raise InvalidArguments(f"seeds must be many ints, found {seeds!r}: write seeds=range(50)")
    played = [_play(scenario, Options(app, each, **options)) for each in seeds]
    if not played:
        raise InvalidArguments(f"seeds must be at least one int, found none in {seeds!r}: nothing would be tested")
    return played


def _check_scenario(scenario: object) -> None:
    if inspect.isgeneratorfunction(scenario) or inspect.isasyncgenfunction(scenario):
        raise InvalidArguments(f"scenario must be an async function, found a generator: {scenario!r} has a `yield`")
    if not callable(scenario) or _wants(scenario) not in (1, 2):
        raise InvalidArguments(
            f"scenario must be an async function of a client, or of a client and a world, found {scenario!r}"
        )


def _wants(scenario: Callable[..., Any]) -> int:
    """How many positional arguments it must be given."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(scenario).parameters.values()
    return sum(each.kind in kinds and each.default is each.empty for each in parameters)


def _play(scenario: Any, options: Options) -> Played[Any]:
    name = getattr(scenario, "__name__", "scenario")
    stage = Stage(options, again=f"simulate(app, {name}, seed={options.seed}{options.said()})")
    with stage.open():
        try:
            main = _begin(stage, scenario)
            if inspect.isawaitable(main):
                return _story(stage, main)
        except BaseException as error:  # whatever it is, this seed failed with it
            if not is_failure(error):
                raise
            raise stage.failed(_what(error, name)) from error
    raise InvalidArguments(f"scenario must be an async function, found {scenario!r}: write `async def`")


def _begin(stage: Stage, scenario: Any) -> Any:
    stage.scenario = (
        scenario(stage.client, World(stage, stage.client)) if _wants(scenario) == 2 else scenario(stage.client)
    )
    return stage.scenario


def _story(stage: Stage, main: Awaitable[Any]) -> Played[Any]:
    async def drive() -> Any:
        async with stage.client:
            return await main

    driving = stage.driver.run(drive())
    stage.run(driving.done)
    result = driving.result()
    if stage.trouble.count or stage.options.crash_after_every_turn:
        stage.settle()
    stage.check_unhandled()
    return Played(
        result=result,
        seed=stage.options.seed,
        faults=tuple(stage.faults.said),
        crashes=stage.crashes,
        virtual_seconds=stage.world.now,
        events=stage.world.steps,
        trace=stage.world.trace,
    )


def is_failure(error: BaseException) -> bool:
    """Whether the test failed with it: not if it was skipped, or the process shall end."""
    return isinstance(error, Exception) or type(error).__name__ == "Failed"  # pytest.fail()'s is no Exception


def _what(error: BaseException, name: str) -> str:
    """In one line, what went wrong."""
    foreign = foreign_text(error, f"scenario {name}")
    return f"{NotSimulated.__name__}: {foreign}" if foreign is not None else first_line(error)
