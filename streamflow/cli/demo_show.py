"""The demo's story: two workers, many orders, one SIGKILL, a replacement; then the log is asked."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import streamflow as sf
from streamflow.cli import demo_shop
from streamflow.cli.demo_view import Scene, View
from streamflow.cli.evidence import LINES_VARIABLE, STARTED, Findings, History, examine, read_history, read_lines
from streamflow.cli.worker_process import WorkerProcess, Workers
from streamflow.core.events import RunCompleted, SignalAwaited
from streamflow.logs.base import HISTORY, Log
from streamflow.logs.open import open_log

APP: Final = "streamflow.cli.demo_shop:app"
ORDERS_PER_SECOND: Final = 30
"""New orders come this fast: quick enough to be over soon, slow enough to be watched."""

APPROVAL_SECONDS: Final = 0.5
"""How long the person who approves takes."""

REPLACEMENT_SECONDS: Final = 1.0
"""How long after the kill somebody starts another worker."""

DEADLINE_SECONDS: Final = 60.0
"""What a run beyond this has is a fault, and the summary will say which."""

_FRAME_SECONDS: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the demo found out; `problems` are broken promises in words, none when all is well."""

    orders: int
    seconds: float
    killed_worker: int | None
    killed_after_seconds: float | None
    taken_over_seconds: float | None
    cut_off_attempts: int
    records: int
    partitions: int
    findings: Findings
    problems: list[str] = field(default_factory=list)


class Show:
    """One performance in `folder`, with `orders` orders; on the log at `url`, else on a new file in the folder."""

    def __init__(self, orders: int, folder: Path, workers: Workers, view: View, url: str | None = None) -> None:
        self.orders = orders
        self.folder = folder
        self.url = url or f"sqlite:///{folder / 'shop.db'}"
        self._lines = folder / "steps.txt"
        self._workers = workers
        self._view = view
        self._history = History()
        self._began = time.monotonic()
        self._completed: deque[str] = deque(maxlen=6)
        self._claims_told = 0
        self._half_done = asyncio.Event()
        self._killed: tuple[WorkerProcess, float] | None = None
        self._taken_over_seconds: float | None = None
        self._cut_off = 0
        self._errors: list[str] = []

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._began

    async def perform(self) -> Summary:
        """Run it all. Raises `WorkerDied` when a worker ends that nobody killed."""
        log = await open_log(self.url, app=demo_shop.app.name)
        try:
            self._start_worker()
            self._start_worker()
            try:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    await self._act(log)
            except TimeoutError:
                said = self._workers.all[-1].last_words(1)
                self._errors.append(f"not done after {DEADLINE_SECONDS:.0f} seconds; the last worker wrote: {said}")
            seconds = self.seconds
            await self._workers.stop()
            # A second reading from the first record on: the summary rests on nothing that was counted on the way.
            history = await read_history(log)
            return self._sum_up(history, log.partitions, seconds)
        finally:
            await log.close()

    async def _act(self, log: Log) -> None:
        async with demo_shop.app.connect(self.url) as client, asyncio.TaskGroup() as tasks:
            followers = [self._follow(log, partition, client, tasks) for partition in range(log.partitions)]
            beside = [tasks.create_task(each) for each in (self._workers.watch(), self._draw(), *followers)]
            kill = tasks.create_task(self._kill_half_way())
            outcomes = await asyncio.gather(
                *(self._order(client, number) for number in range(self.orders)), return_exceptions=True
            )
            self._errors += [f"{type(found).__name__}: {found}" for found in outcomes if found is not None]
            if not self._half_done.is_set():
                kill.cancel()  # so many orders failed that it would never come to it
            await asyncio.wait((kill,))
            for task in beside:
                task.cancel()
        self._frame()

    # --- the people: customers, the one who approves, and the one who pulls the plug

    async def _order(self, client: sf.Client, number: int) -> None:
        await asyncio.sleep(number / ORDERS_PER_SECOND)
        # Every third order is large enough to need approval.
        order = demo_shop.Order(id=f"order-{number:04}", total=250 if number % 3 == 0 else 40)
        handle = await client.start(demo_shop.fulfil, order, id=order.id)
        receipt = await handle.result()
        assert receipt.order_id == order.id and receipt.approved, receipt

    async def _approve(self, client: sf.Client, workflow_id: str) -> None:
        await asyncio.sleep(APPROVAL_SECONDS)
        # With an id the signal counts once, even if it has to be sent twice.
        await client.handle(workflow_id).signal("approved", True, id=f"approval-of-{workflow_id}")

    async def _kill_half_way(self) -> None:
        await self._half_done.wait()
        victim = self._busiest()
        under_way = self._attempts_under_way()
        victim.kill()
        self._killed = (victim, self.seconds)
        self._cut_off = under_way[victim.pid]
        self._tell(f"worker {victim.pid} killed with SIGKILL, {self._cut_off} steps cut off in the middle", "bold red")
        await asyncio.sleep(REPLACEMENT_SECONDS)
        self._start_worker("a replacement: ")

    def _busiest(self) -> WorkerProcess:
        under_way = self._attempts_under_way()
        return max(self._workers.all, key=lambda worker: under_way[worker.pid])

    def _attempts_under_way(self) -> Counter[int]:
        """Attempts per process that have started and not ended."""
        found: Counter[int] = Counter()
        for line in read_lines(self._lines):
            found[line.pid] += 1 if line.what == STARTED else -1
        return found

    def _start_worker(self, why: str = "") -> None:
        output = self.folder / f"worker-{len(self._workers.all) + 1}.log"
        worker = self._workers.start(
            APP,
            self.url,
            output,
            "--state-dir",
            str(self.folder / "state"),
            variables={LINES_VARIABLE: str(self._lines)},
        )
        self._tell(f"{why}worker {worker.pid} started", "green")

    # --- the audience: what the log says while it grows

    async def _follow(self, log: Log, partition: int, client: sf.Client, tasks: asyncio.TaskGroup) -> None:
        async for batch in log.follow(HISTORY, partition, 0):
            for record in batch:
                assert record.value is not None, record
                turn = self._history.take(partition, record.value)
                if turn is None:
                    continue
                if any(isinstance(event, SignalAwaited) for event in turn.events):
                    tasks.create_task(self._approve(client, turn.workflow_id))
                if any(isinstance(event, RunCompleted) for event in turn.events):
                    self._completed.append(turn.workflow_id)
            if self._history.completed >= self.orders / 2:
                self._half_done.set()

    async def _draw(self) -> None:
        while True:
            self._frame()
            await asyncio.sleep(_FRAME_SECONDS)

    def _frame(self) -> None:
        self._tell_claims()
        runs = self._history.runs.values()
        self._view.show(
            Scene(
                seconds=self.seconds,
                orders=self.orders,
                phases=self._history.phases(),
                steps=sum(bool(step.outcomes) for run in runs for step in run.steps.values()),
                failed_attempts=sum(step.failed_attempts for run in runs for step in run.steps.values()),
                workers=[(each.pid, "running" if each.is_alive else "killed") for each in self._workers.all],
                last_orders=list(self._completed),
            )
        )

    def _tell_claims(self) -> None:
        """Who took which partitions since the last frame."""
        claims = self._history.claims[self._claims_told :]
        self._claims_told += len(claims)
        taken: dict[str, list[int]] = {}
        for partition, claim in claims:
            taken.setdefault(claim.owner, []).append(partition)
        for owner, partitions in taken.items():
            what = f"{self._worker_name(owner)} {{}} partition{'s' if len(partitions) > 1 else ''} "
            what += ", ".join(map(str, sorted(partitions)))
            if self._killed is None or self._taken_over_seconds is not None:
                self._tell(what.format("owns"), "green")
            else:
                self._taken_over_seconds = self.seconds - self._killed[1]
                self._tell(what.format("took over"), "bold green")

    def _worker_name(self, owner: str) -> str:
        return next((f"worker {each.pid}" for each in self._workers.all if f"-{each.pid}-" in owner), owner)

    def _tell(self, text: str, style: str = "") -> None:
        self._view.tell(self.seconds, text, style)

    # --- the reckoning

    def _sum_up(self, history: History, partitions: int, seconds: float) -> Summary:
        findings = examine(history, read_lines(self._lines))
        return Summary(
            orders=self.orders,
            seconds=round(seconds, 3),
            killed_worker=self._killed[0].pid if self._killed else None,
            killed_after_seconds=round(self._killed[1], 3) if self._killed else None,
            taken_over_seconds=None if self._taken_over_seconds is None else round(self._taken_over_seconds, 3),
            cut_off_attempts=self._cut_off,
            records=history.records,
            partitions=partitions,
            findings=findings,
            problems=[*find_problems(self.orders, findings, self._killed is not None), *self._errors[:3]],
        )


def find_problems(orders: int, findings: Findings, killed: bool) -> list[str]:
    """The broken promises, in words."""
    problems = []
    if findings.runs_completed != orders or findings.runs != orders:
        problems.append(
            f"{orders} orders were placed, the log has {findings.runs}, {findings.runs_completed} completed"
        )
    if not killed:
        problems.append("no worker was killed, so this run shows nothing")
    for what, steps in (
        ("steps lost", findings.lost),
        ("completed steps run again", findings.run_again),
        ("attempts that the log does not know", findings.unknown),
        ("steps completed that nobody performed", findings.unperformed),
    ):
        if steps:
            problems.append(f"{len(steps)} {what}: {_some(steps)}")
    return problems


def _some(steps: Sequence[Any]) -> str:
    return ", ".join(map(str, steps[:3])) + (", ..." if len(steps) > 3 else "")
