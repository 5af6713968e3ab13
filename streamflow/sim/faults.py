"""What goes wrong in a world: faults drawn one by one from a seed, and the end of all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from streamflow.sim.cluster import Weather
from streamflow.sim.host import Loss
from streamflow.sim.machines import Machine, Machines

KINDS: Final = frozenset(("compact", "crash", "jump", "leave", "outage", "pause", "storm"))

KILLED_WITHIN: Final = 400
"""A process that is killed or stopped runs up to so many callbacks more: it may happen at any of its awaits."""

Fault: TypeAlias = "Callable[[Machine, random.Random], str]"


class Faults:
    """The faults of one seed. What each number does depends on the seed and the number alone, and on who is up then."""

    def __init__(self, machines: Machines, seed: int | str, *, kinds: frozenset[str] = KINDS) -> None:
        self.machines, self.seed = machines, seed
        self.cluster, self.world = machines.cluster, machines.world
        self.kinds = kinds
        self.said: list[str] = []
        """What went wrong, in order."""

    def fault(self, number: int) -> None:
        """Something goes wrong. What, is drawn for each number apart, so that faults can be left out."""
        chance = random.Random(f"fault {number} of {self.seed}")
        machine = chance.choice(self.machines.all)
        kinds: list[Fault] = [self._storm, self._storm, self._outage, self._compact]
        if machine.is_up:
            kinds += [self._crash, self._crash, self._crash, self._pause, self._pause, self._leave, self._jump]
        kinds = [kind for kind in kinds if kind.__name__.strip("_") in self.kinds] or [self._compact]
        said = chance.choice(kinds)(machine, chance)
        self.said.append(f"{number}: at {self.world.now:.3f} s {said}")
        self.world.note("fault", self.said[-1])

    def heal(self) -> None:
        """From here on nothing goes wrong any more."""
        self.world.note("world", "heals")
        self.world.leap_to = self.cluster.next_due
        self.cluster.weather = Weather()
        for machine in self.machines.all:
            self.machines.restart(machine)

    def _crash(self, machine: Machine, chance: random.Random) -> str:
        process = machine.process
        assert process is not None
        loss = chance.choice((Loss.NOTHING, Loss.NOTHING, Loss.UNFLUSHED, Loss.OLD, Loss.DAMAGED))
        seconds = chance.choice((0.1, 1.0, 10.0, 20.0))

        def strike() -> None:
            if machine.process is process and process.is_alive:
                self.machines.kill(machine, loss)
                self._later(seconds, lambda: self.machines.restart(machine))

        callbacks = chance.randint(0, KILLED_WITHIN)
        process.after(callbacks, strike)
        return f"{machine.name} is killed after {callbacks} callbacks, for {seconds:g} s, on its disk: {loss}"

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

        async def leave() -> None:
            await worker.stop()
            process.kill()

        process.run(leave())
        seconds = chance.uniform(10.0, 30.0)
        self._later(seconds, lambda: self.machines.restart(machine))
        return f"{machine.name} is asked to leave for {seconds:.1f} s"

    def _jump(self, machine: Machine, chance: random.Random) -> str:
        assert machine.process is not None
        machine.process.wall_offset += chance.choice((-3600.0, -5.0, 5.0, 60.0))
        return f"the wall clock of {machine.name} jumps to {machine.process.wall_offset:+g} s"

    def _compact(self, machine: Machine, chance: random.Random) -> str:
        self.cluster.compact()
        return "the compacted topics are cleaned"

    def _storm(self, machine: Machine, chance: random.Random) -> str:
        """A while in which requests are slow, lost, late, torn, repeated or unanswered."""
        weather = Weather(delay=chance.choice((0.001, 0.01, 0.1)), spike=chance.choice((0.0, 0.05, 0.3)))
        for name in ("lost", "late", "torn", "unacknowledged", "repeated", "refused"):
            if chance.random() < 0.4:
                setattr(weather, name, chance.choice((0.01, 0.05, 0.2)))
        return self._weather(weather, chance.uniform(1.0, 15.0))

    def _outage(self, machine: Machine, chance: random.Random) -> str:
        return self._weather(Weather(down=True), chance.choice((0.5, 5.0, 15.0)))

    def _weather(self, weather: Weather, seconds: float) -> str:
        self.cluster.weather = weather

        def clear() -> None:
            if self.cluster.weather is weather:
                self.cluster.weather = Weather()
                self.world.note("weather", "clear")

        self._later(seconds, clear)
        usual = vars(Weather())
        changed = ", ".join(f"{name} {value:g}" for name, value in vars(weather).items() if value != usual[name])
        return f"for {seconds:.1f} s: {changed or 'nothing'}"

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        self.world.at(self.world.now + seconds, event)
