"""What goes wrong in a world: faults drawn one by one from a seed, and the end of all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from streamflow.logs.base import TOPICS
from streamflow.sim.cluster import MOMENTS, Aim, Ambush, Weather
from streamflow.sim.host import Loss
from streamflow.sim.lane import FATES_OF_ONE, FATES_OF_PARTS
from streamflow.sim.log import APP_GROUP
from streamflow.sim.machines import Machine, Machines
from streamflow.sim.world import Process

KINDS: Final = frozenset((
    "compact", "crash", "cut", "jump", "leaderless", "leave", "offsets", "outage", "pause", "seize", "storm",
    "strand",
))  # fmt: skip

KILLED_WITHIN: Final = 400
"""A process that is killed or stopped runs up to so many callbacks more: it may happen at any of its awaits."""
AIMED: Final = 0.5
"""How often a kill or a storm waits for a write of several records to the history, which else they rarely meet."""
AIMED_SECONDS_MAX: Final = 15.0
"""A kill waits no longer for it."""
AMBUSHED: Final = 0.4
"""How often a kill waits for the moment at which a worker has let go of something, or counts it as done."""

Fault: TypeAlias = "Callable[[Machine, random.Random], str]"


class Faults:
    """The faults of one seed. What each number does depends on the seed and the number alone, and on who is up then."""

    def __init__(
        self, machines: Machines, seed: int | str, *, kinds: frozenset[str] = KINDS, ambushed: float = AMBUSHED
    ) -> None:
        self.machines, self.seed = machines, seed
        self.cluster, self.world = machines.cluster, machines.world
        self.kinds, self.ambushed = kinds, ambushed
        self.calm = self.cluster.weather
        """How it is when nothing goes wrong."""
        self.said: list[str] = []
        """What went wrong, in order."""

    def fault(self, number: int) -> None:
        """Something goes wrong. What, is drawn for each number apart, so that faults can be left out."""
        chance = random.Random(f"fault {number} of {self.seed}")
        machine = chance.choice(self.machines.all)
        kinds: list[Fault] = [self._outage, self._compact, *(self._storm for _ in range(6))]
        kinds += [self._leaderless, self._seize, self._offsets]
        if machine.is_up:
            kinds += [self._cut, self._strand]
            kinds += [
                self._crash,
                self._crash,
                self._crash,
                self._crash,
                self._pause,
                self._pause,
                self._leave,
                self._jump,
            ]
        kinds = [kind for kind in kinds if kind.__name__.strip("_") in self.kinds] or [self._compact]
        said = chance.choice(kinds)(machine, chance)
        self.said.append(f"{number}: at {self.world.now:.3f} s {said}")
        self.world.note("fault", self.said[-1])

    def heal(self) -> None:
        """From here on nothing goes wrong any more."""
        self.world.note("world", "heals")
        self.world.leap_to = self.cluster.next_due
        self.cluster.weather = self.calm
        self.cluster.mend_all()
        self.cluster.aims.clear()
        self.cluster.ambushes.clear()
        for machine in self.machines.all:
            self.machines.restart(machine)

    def _crash(self, machine: Machine, chance: random.Random) -> str:
        if chance.random() < self.ambushed:
            return self._ambush(chance)
        process = machine.process
        assert process is not None
        loss = chance.choice((Loss.NOTHING, Loss.NOTHING, Loss.UNFLUSHED, Loss.OLD, Loss.DAMAGED))
        seconds = chance.choice((0.1, 1.0, 10.0, 20.0))

        def strike() -> None:
            if machine.process is process and process.is_alive:
                self.machines.kill(machine, loss)
                self._later(seconds, lambda: self.machines.restart(machine))

        if chance.random() < AIMED:
            fate = chance.choice(FATES_OF_PARTS)
            aim = Aim(fate, process, lambda: process.after(0, strike))
            self.cluster.aims.append(aim)

            def in_any_case() -> None:
                if aim in self.cluster.aims:
                    self.cluster.aims.remove(aim)
                    process.after(chance.randint(0, KILLED_WITHIN), strike)

            self._later(chance.uniform(1.0, AIMED_SECONDS_MAX), in_any_case)
            return f"{machine.name} is killed for {seconds:g} s when a write of it gets {fate}, on its disk: {loss}"
        callbacks = chance.randint(0, KILLED_WITHIN)
        process.after(callbacks, strike)
        return f"{machine.name} is killed after {callbacks} callbacks, for {seconds:g} s, on its disk: {loss}"

    def _ambush(self, chance: random.Random) -> str:
        """Whoever comes to the moment first is killed, often with its store: the next one has nothing but the log."""
        moment, loss = (
            chance.choice((*MOMENTS, *MOMENTS[:2])),
            chance.choice((Loss.NOTHING, Loss.OLD, Loss.DAMAGED, Loss.DAMAGED)),
        )
        seconds, callbacks = chance.choice((0.1, 1.0, 10.0, 20.0)), chance.choice((0, 0, 1, 5, 20, KILLED_WITHIN))

        def strike(struck: Machine, process: Process) -> None:
            if struck.process is process and process.is_alive:
                self.machines.kill(struck, loss)
                self._later(seconds, lambda: self.machines.restart(struck))

        def hit(process: Process) -> None:
            for struck in self.machines.all:
                if struck.process is process:
                    self.cluster.mark(f"killed when {moment}")
                    if callbacks:
                        process.after(callbacks, partial(strike, struck, process))
                    else:
                        strike(struck, process)

        self.cluster.ambushes.append(Ambush(moment, hit))
        return f"whoever is at the brokers when {moment} is killed for {seconds:g} s, on its disk: {loss}"

    def _pause(self, machine: Machine, chance: random.Random) -> str:
        assert machine.process is not None
        seconds = chance.choice((0.05, 1.0, 5.0, 12.0, 20.0))
        callbacks = chance.randint(0, KILLED_WITHIN)
        machine.process.after(callbacks, partial(machine.process.stop, seconds))
        return f"{machine.name} is stopped after {callbacks} callbacks, for {seconds:g} s"

    def _leave(self, machine: Machine, chance: random.Random) -> str:
        """SIGTERM, and another life later."""
        process, worker = machine.process, machine.worker
        if process is None or worker is None:
            return f"{machine.name} has not begun yet"

        seconds = chance.uniform(10.0, 30.0)
        back_at = self.world.now + seconds

        async def leave() -> None:
            await worker.stop()
            process.kill()
            self.world.at(back_at, lambda: self.machines.restart(machine))  # later, if it was long in leaving

        process.run(leave())
        return f"{machine.name} is asked to leave for {seconds:.1f} s"

    def _jump(self, machine: Machine, chance: random.Random) -> str:
        assert machine.process is not None
        machine.process.wall_offset += chance.choice((-3600.0, -5.0, 5.0, 60.0))
        return f"the wall clock of {machine.name} jumps to {machine.process.wall_offset:+g} s"

    def _compact(self, machine: Machine, chance: random.Random) -> str:
        seconds = chance.choice((0.0, 60.0, 60.0))
        self.cluster.compact(delete_retention=seconds)
        return f"the compacted topics are cleaned, of tombstones older than {seconds:g} s, too"

    def _strand(self, machine: Machine, chance: random.Random) -> str:
        """What is sent hangs in the network, then the sender is gone: it lands among the records of its successor."""
        seconds, process = chance.uniform(0.5, 4.0), machine.process
        said = self._weather(Weather(late=0.7), seconds)

        def go() -> None:
            if machine.is_up and machine.process is process:
                self.machines.kill(machine, Loss.NOTHING)
                self._later(20.0, lambda: self.machines.restart(machine))

        self._later(seconds, go)
        return f"{said}; then {machine.name} is killed for 20 s"

    def _cut(self, machine: Machine, chance: random.Random) -> str:
        """One process hears nothing of the brokers, while others go on."""
        process = machine.process
        assert process is not None
        requests_arrive, seconds = chance.random() < 0.5, chance.choice((0.5, 5.0, 12.0, 20.0))
        self.cluster.cut(process, requests_arrive=requests_arrive)
        self._later(seconds, lambda: self.cluster.mend(process))
        return f"{process.name} hears no broker for {seconds:g} s{', but they hear it' if requests_arrive else ''}"

    def _leaderless(self, machine: Machine, chance: random.Random) -> str:
        place, seconds = (chance.choice(TOPICS), chance.randrange(self.cluster.partitions)), chance.choice((0.5, 10.0))
        self.cluster.leaderless.add(place)
        self._later(seconds, lambda: self.cluster.leaderless.discard(place))
        return f"{place[0]}[{place[1]}] has no leader for {seconds:g} s"

    def _seize(self, machine: Machine, chance: random.Random) -> str:
        return self.cluster.group(APP_GROUP).seize(chance)

    def _offsets(self, machine: Machine, chance: random.Random) -> str:
        return self.cluster.lose_offsets(chance)

    def _storm(self, machine: Machine, chance: random.Random) -> str:
        """A while in which requests are slow, lost, late, torn, repeated or unanswered."""
        weather = Weather(delay=chance.choice((0.001, 0.1, 0.5)), spike=chance.choice((0.0, 0.05, 0.3)))
        for name in (*FATES_OF_ONE, "refused", "slow", "partial", "full"):
            if chance.random() < 0.4:
                setattr(weather, name, chance.choice((0.01, 0.05, 0.2)))
        for name in FATES_OF_PARTS:  # few writes have several records
            if chance.random() < 0.6:
                setattr(weather, name, chance.choice((0.1, 0.5)))
        said = self._weather(weather, chance.uniform(1.0, 15.0))
        if chance.random() < AIMED:
            self.cluster.aims.append(Aim(chance.choice(FATES_OF_PARTS)))
            said += f"; a write gets {self.cluster.aims[-1].fate}"
        return said

    def _outage(self, machine: Machine, chance: random.Random) -> str:
        return self._weather(Weather(down=True), chance.choice((0.5, 5.0, 15.0)))

    def _weather(self, weather: Weather, seconds: float) -> str:
        self.cluster.weather = weather

        def clear() -> None:
            if self.cluster.weather is weather:
                self.cluster.weather = self.calm
                self.world.note("weather", "clear")

        self._later(seconds, clear)
        usual = vars(Weather())
        changed = ", ".join(f"{name} {value:g}" for name, value in vars(weather).items() if value != usual[name])
        return f"for {seconds:.1f} s: {changed or 'nothing'}"

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        self.world.at(self.world.now + seconds, event)
