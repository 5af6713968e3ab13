"""The machines of a world, and the worker that lives on each, one process after another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from streamflow.errors import Unavailable
from streamflow.metrics import unwatch
from streamflow.sim.cluster import Cluster
from streamflow.sim.host import Disk, Loss, SimHost
from streamflow.sim.log import SimLog
from streamflow.sim.world import Process
from streamflow.worker.processor import Processor
from streamflow.worker.worker import Worker
from streamflow.workflow.definitions import Registry

RESTART_SECONDS: Final = 1.0
"""After so long a supervisor starts a worker again that could not serve."""


@dataclass
class Machine:
    """Where one worker lives after another."""

    name: str
    disk: Disk = field(default_factory=Disk)
    process: Process | None = None
    worker: Worker | None = None
    lives: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of its workers."""
    wanted: bool = True

    @property
    def is_up(self) -> bool:
        return self.process is not None and self.process.is_alive


class Machines:
    """All machines that serve one app. With `chance`, each process's clocks are off and drift; without, they are right.

    `options` are further arguments of each `Worker`; `prepare` is called in each process before its worker is made;
    `failed` is told what a worker dies of, where that is not an outage.
    """

    def __init__(
        self,
        cluster: Cluster,
        app: Registry,
        name: str,
        count: int,
        *,
        chance: random.Random | None = None,
        host: Callable[[Process, Disk], SimHost] = SimHost,
        prepare: Callable[[], object] = lambda: None,
        worker: type[Worker] = Worker,
        log: Callable[[Cluster, Process, str], SimLog] = SimLog,
        options: dict[str, Any] | None = None,
        failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.all = [Machine(f"m{number}") for number in range(count)]
        self._app, self._name, self._chance = app, name, chance
        self._host, self._prepare, self._worker, self._log = host, prepare, worker, log
        self._options, self._failed = options or {}, failed

    def start(self, machine: Machine) -> None:
        """A worker process on that machine."""
        machine.lives += 1
        process = machine.process = self.world.process(f"{machine.name}-{machine.lives}")
        if self._chance is not None:
            process.wall_offset = self._chance.choice((0.0, 0.0, 0.0, -2.0, 3.0))
            process.drift = self._chance.choice((1.0, 1.0, 0.999, 1.001))
        self.world.note(process.name, "starts")
        process.run(self._serve(machine, process))

    def processors(self) -> list[Processor]:
        """Those of all workers that live."""
        return [
            processor
            for machine in self.all
            if machine.is_up and machine.worker is not None
            for processor in machine.worker.processors.values()
        ]

    async def _serve(self, machine: Machine, process: Process) -> None:
        self._prepare()
        while True:
            log = self._log(self.cluster, process, self._name)
            host = self._host(process, machine.disk)
            try:
                worker = machine.worker = self._worker(self._app, log, host=host, **self._options, **machine.options)
                self.world.at_close.append(partial(unwatch, worker.gauges))
                await worker.start()
                await worker.wait()
                return
            except Unavailable as error:  # a supervisor would start it again
                self.world.note(process.name, f"could not serve: {error}")
                await log.close()
                await asyncio.sleep(RESTART_SECONDS)
            except Exception as error:  # whatever it is, no supervisor can mend it
                if self._failed is None:
                    raise
                self._failed(error)
                return

    def kill(self, machine: Machine, loss: Loss) -> None:
        """The process dies, and its disk may lose something."""
        assert machine.process is not None
        machine.process.kill()
        if machine.worker is not None and any(each.turns_in_flight for each in machine.worker.processors.values()):
            self.world.marks["killed with unacknowledged turns"] += 1
        machine.worker = None
        machine.disk.lose(loss, machine.process)

    def restart(self, machine: Machine) -> None:
        """Start it again, if it is down and should be up."""
        if machine.wanted and not machine.is_up:
            self.start(machine)
