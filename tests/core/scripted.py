"""Workflow code without asyncio, and a partition with its history, for the tests of the core.

A program is a generator function. It asks for decisions through its `Script` and yields the numbers that it waits for;
what comes back is the first of them with its outcome: `number, outcome = yield {first, second}`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeAlias

from streamflow.core.commands import Body, Command, FireTimer, StartWorkflow
from streamflow.core.effects import Effect, PublishStatus, SendReply, TimerRecord
from streamflow.core.events import (
    Event,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunFailed,
    SignalReceived,
    StepCompleted,
    StepScheduled,
    Turn,
)
from streamflow.core.inputs import CodeFactory, StepOutcome
from streamflow.core.machines.run import Run
from streamflow.core.partition import Decided, DecidedTurn, Partition
from streamflow.core.replay import Decisions, Diverged, Outcome
from streamflow.errors import ErrorInfo, NonDeterminismError

Arrived: TypeAlias = Outcome | SignalReceived
Program: TypeAlias = Callable[["Script", bytes], Generator[set[int], tuple[int, Arrived], bytes]]

T0 = 1_000_000
"""When the tests begin."""


class Failure(Exception):
    """What a program raises to fail its run."""


class Cancelled(Exception):
    """Raised in a program whose run is to unwind."""


class Endless(Exception):
    """What a program raises to stand for a loop without an await."""


class Script:
    """Implements `Code` with a generator. `seen` is all that the program was given, each with the instant."""

    def __init__(self, program: Program, decisions: Decisions, run: Run) -> None:
        self.program = program
        self.decisions = decisions
        self.run = run
        self.at = 0
        self.replaying = False
        self.seen: list[tuple[int, object]] = []
        self.open: set[int] = set()
        self.waiting: set[int] = set()
        self.arrived: dict[int, Arrived] = {}
        self.started = self.cancelling = self.closed = False
        self.generator: Generator[set[int], tuple[int, Arrived], bytes] | None = None

    # Code: what the core calls.

    def begin(self, args: bytes) -> None:
        self.generator = self.program(self, args)

    def resolve(self, number: int, outcome: Outcome, signal: SignalReceived | None) -> bool:
        if number not in self.open:
            return False
        self.open.discard(number)
        self.arrived[number] = signal or outcome
        return True

    def cancel(self) -> None:
        self.cancelling = True

    def drain(self, at: int, replaying: bool) -> None:
        self.at, self.replaying = at, replaying
        try:
            while self.generator is not None and self._advance(self.generator):
                pass
        except StopIteration as end:
            self._end(RunCompleted(result=end.value or b"null"))
        except Failure as error:
            self._end(RunFailed(error=ErrorInfo("Failure", str(error))))
        except Cancelled:
            self._end(RunCancelled())
        except Diverged:
            self.generator = None
        except Endless:
            raise NonDeterminismError("loops without an await") from None

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self.generator = None

    def _advance(self, generator: Generator[set[int], tuple[int, Arrived], bytes]) -> bool:
        if not self.started:
            self.started = True
            self.waiting = next(generator)
            return True
        if self.cancelling:
            self.cancelling = False
            self.seen.append((self.at, "cancelled"))
            self.waiting = generator.throw(Cancelled())
            return True
        for number, outcome in self.arrived.items():
            if number in self.waiting:
                del self.arrived[number]
                self.seen.append((self.at, outcome))
                self.waiting = generator.send((number, outcome))
                return True
        return False

    def _end(self, event: RunCompleted | RunFailed | RunCancelled) -> None:
        self.generator = None
        self.decisions.close_run(event)

    # What a program calls.

    def step(self, name: str, args: bytes = b"[]", **options: Any) -> int:
        defaults: dict[str, Any] = {"start_at": None, "queue": None, "at_most_once": False, "check_args": True}
        return self._asked(self.decisions.step(name, args, **defaults | options))

    def sleep(self, delay_ms: int, name: str = "sleep") -> int:
        return self._asked(self.decisions.timer(name, self.at + delay_ms))

    def signal(self, name: str) -> int:
        return self._asked(self.decisions.wait(name))

    def give_up(self, number: int) -> None:
        if number in self.open:
            self.open.discard(number)
            self.decisions.cancel(number)
        self.arrived.pop(number, None)

    def _asked(self, number: int) -> int:
        self.open.add(number)
        return number


class World:
    """A partition, its history and its commands topic. `decide` takes what was sent and keeps the turns."""

    def __init__(self, **programs: Program) -> None:
        self.programs: dict[str, Program] = dict(programs)
        self.retention: dict[str, int] = {}
        self.now = T0
        self.history: list[Turn] = []
        self.commands: list[Command] = []
        self.effects: list[Effect] = []
        self.dead: list[str] = []
        self.scripts: list[Script] = []
        self.partition = self.owner()

    def owner(self, term: int = 1) -> Partition:
        """A new owner of what is in the history."""
        consumed = max((turn.consumed for turn in self.history), default=0)
        partition = Partition(self, self.code_of, term=term, consumed=consumed, retention_of=self.retention.get)
        partition.at = max((turn.at for turn in self.history), default=0)
        self.partition = partition
        return partition

    def code_of(self, workflow: str) -> CodeFactory | None:
        program = self.programs.get(workflow)
        if program is None:
            return None

        def factory(decisions: Decisions, run: Run) -> Script:
            script = Script(program, decisions, run)
            self.scripts.append(script)
            return script

        return factory

    def turns(self, workflow_id: str) -> list[Turn]:
        """As a store has them: since the run last began, nothing of one that was deleted."""
        kept: list[Turn] = []
        state = Run(workflow_id=workflow_id)
        for turn in self.history:
            if turn.workflow_id == workflow_id:
                state.fold(turn)
                kept = [] if state.state == "deleted" else [*kept, turn]
        return [turn for turn in kept if turn.turn >= state.first_turn]

    # Sending.

    def send(self, body: Body, to: str = "w", *, id: str | None = None, reply_to: int | None = 7) -> Command:
        """Stage a command at the end of the commands topic."""
        command_id = id or f"c{len(self.commands)}"
        command = Command(command_id=command_id, workflow_id=to, sent_at=self.now, body=body, reply_to=reply_to)
        self.commands.append(command)
        self.partition.command(len(self.commands) - 1, command)
        return command

    def start(self, workflow: str = "work", to: str = "w", *, id: str | None = None, **options: Any) -> list[Any]:
        """Send a start and decide on it."""
        self.send(StartWorkflow(workflow=workflow, **options), to, id=id)
        return self.decide()

    def outcome(self, outcome: StepOutcome, to: str = "w", run: int = 1) -> None:
        """Stage what became of an attempt."""
        self.partition.outcome(to, run, outcome)

    def complete(
        self, number: int, result: bytes = b"1", *, attempt: int = 1, to: str = "w", run: int = 1
    ) -> list[Any]:
        """Let an attempt return and decide on it."""
        self.outcome(StepCompleted(number=number, attempt=attempt, result=result), to, run)
        return self.decide()

    def fire(self, timer: TimerRecord) -> None:
        """Send what the timer service sends."""
        self.send(fired(timer), timer.workflow_id, id=timer.key.decode(), reply_to=None)

    # Deciding.

    def decide(self, later_ms: int = 0) -> list[Any]:
        """Decide, keep the turns, and return their events."""
        decided = self.decide_only(later_ms)
        self.keep(decided.turns)
        self.effects += [effect for _, effect in decided.answers]
        return [event for item in decided.turns for event in item.turn.events]

    def decide_only(self, later_ms: int = 0) -> Decided:
        """Decide, and leave the turns to the caller: they are not durable."""
        self.now += later_ms
        decided = self.partition.decide(self.now)
        self.dead += [dead.reason for dead in decided.dead]
        return decided

    def keep(self, turns: Iterable[DecidedTurn]) -> None:
        """The turns are durable: their effects are performed."""
        self.effects = []
        for item in turns:
            self.history.append(item.turn)
            self.effects += item.effects

    # Looking.

    # Any, here and above: a test knows which event it looks at, and that an error is there.

    def run(self, workflow_id: str = "w") -> Any:
        """The run as its history has it."""
        run = Run(workflow_id=workflow_id)
        for turn in self.turns(workflow_id):
            run.fold(turn)
        return run

    def live(self, workflow_id: str = "w") -> Any:
        """The run as it is in memory."""
        return self.partition.live[workflow_id].run

    def of(self, *kinds: type) -> list[Any]:
        """The effects of these kinds of the last pass."""
        return [effect for effect in self.effects if isinstance(effect, kinds)]

    @property
    def statuses(self) -> list[Any]:
        """The statuses published in the last pass."""
        return [effect.status for effect in self.of(PublishStatus)]

    @property
    def replies(self) -> list[tuple[str, object]]:
        """Command id and the value, or the type of the error, of each reply of the last pass."""
        sent: list[Any] = [effect.reply for effect in self.of(SendReply)]
        return [
            (reply.command_id, reply.value if reply.accepted else reply.error and reply.error.type) for reply in sent
        ]


def fired(timer: TimerRecord) -> FireTimer:
    """The body of the command that fires the timer."""
    return FireTimer(kind=timer.kind, run=timer.run, number=timer.number, attempt=timer.attempt, fire_at=timer.fire_at)


def kinds(events: Iterable[Event]) -> list[str]:
    """The names of the events' types."""
    return [type(event).__name__ for event in events]


def turn(*events: Event, number: int = 1, at: int = T0, workflow_id: str = "w", **fields: Any) -> Turn:
    """A turn of those events."""
    return Turn(
        workflow_id=workflow_id, turn=number, term=1, seq=number, at=at, consumed=0, events=list(events), **fields
    )


def created(**fields: Any) -> RunCreated:
    """The event that begins a run."""
    known: dict[str, Any] = {"workflow": "work", "args": b"[]"}
    return RunCreated(**known | fields)


def scheduled(number: int = 0, **fields: Any) -> StepScheduled:
    """The event that schedules a step."""
    known: dict[str, Any] = {"number": number, "name": "charge", "args": b"[1]", "fingerprint": 1}
    return StepScheduled(**known | fields)


ERROR = ErrorInfo("ValueError", "no")
