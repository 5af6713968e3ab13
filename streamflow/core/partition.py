"""One partition: routes commands and outcomes to runs and makes one turn of each run that they move.

Rules of this file:

- A command takes effect once: a run remembers the ids of the commands that its turns applied, also those of the runs
  before it under its id, and every turn says how far the commands topic is consumed. Within one pass only the last turn
  moves that offset, so that a pass of which only a part became durable is taken again from the start, and deduplicated.
- A refused command is a value (a rejection with its reason), never an exception, and leaves no turn.
- Time never runs backwards: `at` of a turn is at least that of the one before. One pass has one instant, so that the
  fold of a turn, which knows no other, gives what was live.

Theory of operation. `command` and `outcome` stage inputs by run. `decide` takes the staged runs one by one: it finds
the run in memory or loads it (fold of its turns, then replay of its code), applies the inputs in order, and makes a
turn of the events. State moves at once, ahead of the log; when an append fails, the whole partition is dropped and
restored. Nothing here performs an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import islice
from typing import Final, Protocol, TypeAlias

from msgspec import Struct

from streamflow.core.commands import (
    Command,
    FireTimer,
)
from streamflow.core.effects import (
    Effect,
    PublishStatus,
    RecordStart,
    Reply,
    SendReply,
    StartAttempt,
    TimerRecord,
)
from streamflow.core.events import (
    Applied,
    RunBlocked,
    RunUnblocked,
    StepFailed,
    Turn,
)
from streamflow.core.inputs import CodeFactory, Inputs, Rejected, StepOutcome, attach_code
from streamflow.core.machines.run import Run, RunState
from streamflow.core.machines.state import Decision
from streamflow.core.machines.step import Step, StepState
from streamflow.core.replay import Execution
from streamflow.errors import ErrorInfo

CLOCK_SKEW_MS_MAX: Final = 1000
"""How far a timer may lie ahead of the owner's clock and still count as due: clocks of two hosts differ."""

EVICT_LOOK_MAX: Final = 32
"""Runs looked at when one must leave memory; the ones used longest ago are mostly free to go."""

COMMANDS_REMEMBERED_MAX: Final = 1_000
"""Commands of earlier runs that a new run of their id still knows: more than senders repeat, and they fit a record."""


Answer: TypeAlias = tuple[str, Effect]


class DeadCommand(Struct, frozen=True):
    """A rejected command whose sender waits for no answer: it goes to the dead letters."""

    offset: int
    command: Command
    reason: str


class DecidedTurn(Struct, frozen=True):
    """A turn, not durable yet; `run` is the state after it, `effects` are due when it is durable."""

    turn: Turn
    run: Run
    effects: list[Effect]
    closed: bool
    deleted: bool


class Decided(Struct, frozen=True):
    """The result of one pass. `answers`, each with its workflow id, are owed once all turns up to here are durable.

    `late` counts the outcomes from queues that nobody awaited any more.
    """

    turns: list[DecidedTurn]
    answers: list[Answer]
    dead: list[DeadCommand]
    late: int = 0


class Runs(Protocol):
    """Where runs that are not in memory come from."""

    def turns(self, workflow_id: str) -> Sequence[Turn]:
        """All turns of the run, of its current number, oldest first; also those not durable yet. [] if unknown."""


class Staged(Struct, frozen=True):
    """A command with its place in the commands topic."""

    offset: int
    command: Command


Input: TypeAlias = Staged | FireTimer | tuple[int, StepOutcome]


class Partition:
    """The state of one owned partition."""

    def __init__(
        self,
        runs: Runs,
        code_of: Callable[[str], CodeFactory | None],
        *,
        term: int,
        consumed: int,
        timeout_of: Callable[[str], int | None] = lambda workflow: None,
        retention_of: Callable[[str], int | None] = lambda workflow: None,
    ) -> None:
        self.runs = runs
        self.code_of = code_of
        self.inputs = Inputs(code_of, timeout_of)
        self.retention_of = retention_of
        self.term = term
        self.seq = 0
        self.consumed = consumed
        self.at = 0
        self.live: dict[str, Execution] = {}
        self.next_command = consumed
        self._staged: dict[str, list[Input]] = {}
        self._wake: set[str] = set()
        self._fire_at: list[int] = []

    # -- staging -----------------------------------------------------------------------------------------------------

    def command(self, offset: int, command: Command) -> None:
        """Stage a command; offsets come in order, and one that was consumed before is skipped."""
        if offset < self.next_command:
            return
        self.next_command = offset + 1
        self._staged.setdefault(command.workflow_id, []).append(Staged(offset, command))
        if isinstance(command.body, FireTimer):
            self._fire_at.append(command.body.fire_at)

    def timer(self, due: TimerRecord) -> None:
        """Stage a timer that is due by the owner's own clock: as a command that fires it, without one on the topic."""
        fired = FireTimer(kind=due.kind, run=due.run, number=due.number, attempt=due.attempt, fire_at=due.fire_at)
        self._staged.setdefault(due.workflow_id, []).append(fired)

    def skip(self, offset: int) -> None:
        """A record of the commands topic that is no command of ours: consumed, without effect."""
        self.next_command = max(self.next_command, offset + 1)

    def outcome(self, workflow_id: str, run: int, outcome: StepOutcome) -> None:
        """Stage what became of a step's attempt in run number `run`."""
        self._staged.setdefault(workflow_id, []).append((run, outcome))

    def recover(self, workflow_id: str) -> None:
        """Stage a run that a new owner must look at: it has attempts that should run, or is blocked."""
        self._staged.setdefault(workflow_id, [])
        self._wake.add(workflow_id)

    @property
    def has_work(self) -> bool:
        """Whether `decide` would do anything."""
        return bool(self._staged)

    # -- deciding ----------------------------------------------------------------------------------------------------

    def decide(self, now: int) -> Decided:
        """Take everything staged. `now` is the time in milliseconds; it counts only where it goes forward."""
        # A sender that is ahead of us moves our time, by so little that it never leads the real one by more.
        self.at = max(self.at, now, *(at for at in self._fire_at if at <= now + CLOCK_SKEW_MS_MAX))
        self._fire_at = []
        self.inputs.late = 0
        turns: list[DecidedTurn] = []
        answers: list[Answer] = []
        dead: list[DeadCommand] = []
        staged, self._staged = self._staged, {}
        for workflow_id, inputs in staged.items():
            decided = self._decide_run(workflow_id, inputs, answers, dead)
            if decided is not None:
                turns.append(decided)
        self.consumed = self.next_command
        if turns:
            turns[-1].turn.consumed = self.consumed
        return Decided(turns, answers, dead, self.inputs.late)

    def evict(self, workflow_id: str) -> None:
        """Drop a run from memory; it is loaded again when an input comes."""
        execution = self.live.pop(workflow_id, None)
        if execution is not None:
            execution.close()

    def evict_above(self, runs_max: int, pinned: Container[str]) -> None:
        """Let the runs used longest ago leave memory, those that only wait and are not pinned; `runs_max` are left."""
        excess = len(self.live) - runs_max
        if excess <= 0:
            return
        for workflow_id in list(islice(self.live, excess + EVICT_LOOK_MAX)):
            if self.live[workflow_id].run.open_attempts or workflow_id in pinned:
                self.live[workflow_id] = self.live.pop(workflow_id)  # to the end: the next look begins behind it
            else:
                self.evict(workflow_id)
                excess -= 1
                if not excess:
                    break

    def close(self) -> None:
        """Drop all runs from memory."""
        for workflow_id in list(self.live):
            self.evict(workflow_id)

    def _decide_run(
        self,
        workflow_id: str,
        inputs: Sequence[Input],
        answers: list[Answer],
        dead: list[DeadCommand],
    ) -> DecidedTurn | None:
        woken = workflow_id in self._wake
        self._wake.discard(workflow_id)
        execution = self._execution(workflow_id, woken=woken)
        run = execution.run
        applied: list[Applied] = []
        replies: list[Effect] = []
        mark = _mark(run) if not execution.events else None
        before = len(execution.events), len(execution.inputs)
        if woken:
            self._resume(execution)
        for item in (None, *inputs):
            if isinstance(item, tuple):
                self.inputs.outcome(execution, *item)
            elif isinstance(item, FireTimer):
                self.inputs.timer(execution, item)
            elif item is not None:
                verdict = self.inputs.command(execution, item.command)
                if isinstance(verdict, Rejected):
                    _reject(verdict, item, answers, dead)
                elif verdict is not None:
                    reply = _reply(item.command, verdict)
                    if len(execution.inputs) > before[1]:
                        execution.run.commands[item.command.command_id] = None
                        applied.append(Applied(command_id=item.command.command_id, reply_to=item.command.reply_to))
                        replies += reply
                    else:  # it changed nothing, so it is answered alike when it comes again
                        answers += [(workflow_id, effect) for effect in reply]
            if execution.diverged is not None:
                execution = self._block(execution, *before)
            before = len(execution.events), len(execution.inputs)
        return self._turn(execution, applied, replies, mark, answers)

    def _turn(
        self,
        execution: Execution,
        applied: list[Applied],
        replies: list[Effect],
        mark: object,
        answers: list[Answer],
    ) -> DecidedTurn | None:
        """Make a turn of what the execution has gathered, if anything happened."""
        run = execution.run
        execution.retain(self.retention_of)
        events, effects = execution.flush()
        if not events and not applied:
            if run.is_closed or run.state is RunState.NONE:
                self.evict(run.workflow_id)
            answers += [(run.workflow_id, effect) for effect in (*effects, *replies)]
            return None
        run.turn += 1
        if run.first_turn == run.turn:
            applied = _with_earlier(run, applied)
        turn = Turn(
            workflow_id=run.workflow_id,
            turn=run.turn,
            term=self.term,
            seq=0,  # given when it is handed over, with its parts
            at=self.at,
            consumed=self.consumed,
            events=events,
            commands=applied,
        )
        deleted = run.state is RunState.DELETED
        if mark is None or mark != _mark(run):
            effects.append(PublishStatus(None if deleted else run.status()))
        effects += replies
        closed = run.is_closed
        if closed:
            self.evict(run.workflow_id)
        return DecidedTurn(turn, run, effects, closed, deleted)

    def _execution(self, workflow_id: str, *, woken: bool) -> Execution:
        """The run in memory, or loaded and replayed."""
        if woken:
            self.evict(workflow_id)  # blocked, perhaps: its code is tried again from the start
        execution = self.live.pop(workflow_id, None)
        if execution is None:
            execution = self._load(workflow_id, unblock=woken)
        self.live[workflow_id] = execution  # moved to the end: the order of `live` is that of use
        execution.at = self.at
        return execution

    def _load(self, workflow_id: str, *, unblock: bool) -> Execution:
        turns = self.runs.turns(workflow_id)
        execution = self._folded(workflow_id, turns)
        run = execution.run
        if run.state is RunState.SCHEDULED:
            execution.keep_signals(turns)
        if run.state is RunState.BLOCKED and unblock:
            execution.emit(RunUnblocked())
        if run.state is RunState.RUNNING and attach_code(execution, self.code_of):
            execution.replay(turns)
        if execution.diverged is None:
            return execution
        blocked_before = self._folded(workflow_id, turns)
        error = execution.diverged
        execution.close()
        if blocked_before.run.state is not RunState.BLOCKED:
            blocked_before.emit(_blocked(error))
        return blocked_before

    def _folded(self, workflow_id: str, turns: Sequence[Turn]) -> Execution:
        run = Run(workflow_id=workflow_id)
        for turn in turns:
            run.fold(turn)
        return Execution(run, at=self.at)

    def _block(self, execution: Execution, events: int, inputs: int) -> Execution:
        """The code does not fit. Keep the events and inputs before the input that showed it, so many of each; then take
        that input too, without what the code decided on it, and say why.
        """
        assert execution.diverged is not None
        execution.close()
        workflow_id = execution.run.workflow_id
        fresh = self._folded(workflow_id, self.runs.turns(workflow_id))
        fresh.run.commands = execution.run.commands
        for event in execution.events[:events]:
            fresh.emit(event)
        fresh.inputs = execution.inputs[:inputs]
        for event in execution.inputs[inputs:]:
            fresh.take(event)
        fresh.emit(_blocked(execution.diverged))
        self.live[workflow_id] = fresh
        return fresh

    def _resume(self, execution: Execution) -> None:
        """A new owner: the attempts that were open here run again; those that must not are failed.

        What was put on a queue is still there, or with whoever took it; or it is derived again (`effects_since`).
        """
        if execution.run.state is not RunState.RUNNING:
            return
        # What the code has only now decided, replayed with what it did not know before, starts by itself.
        begun = {effect.number for effect in execution.effects if isinstance(effect, StartAttempt | RecordStart)}
        for decision in list(execution.run.decisions.values()):
            if execution.diverged is not None:
                return
            if not isinstance(decision, Step) or not decision.runs_here or decision.number in begun:
                continue
            if decision.state is StepState.STARTED:
                error = ErrorInfo(
                    type="streamflow.errors.StepInterrupted",
                    message=f"step {decision.name} runs at most once, and its worker died while it ran",
                )
                execution.take(StepFailed(number=decision.number, attempt=decision.attempt, error=error))
            else:
                execution.effects += decision.begin(execution.run.workflow_id, execution.run.run)


def _blocked(error: Exception) -> RunBlocked:
    return RunBlocked(error=ErrorInfo(type="streamflow.errors.NonDeterminismError", message=str(error)))


def _mark(run: Run) -> object:
    """What of a run its published status must follow at once: steps that follow each other change none of it."""
    parked = None if run.open_attempts else [_waits(decision) for decision in run.decisions.values()]
    return (run.run, run.state, run.progress, parked)


def _waits(decision: Decision) -> object:
    """What makes one wait of a parked run differ from another: on a queue also which attempt it is."""
    return (decision.number, decision.state, decision.attempt) if isinstance(decision, Step) else decision.number


def _with_earlier(run: Run, applied: list[Applied]) -> list[Applied]:
    """The commands of a run's first turn: with those of earlier runs of its id, so that they stay applied once."""
    if len(run.commands) == len(applied):
        return applied  # there are none
    now = dict.fromkeys(command.command_id for command in applied)
    earlier = [command_id for command_id in run.commands if command_id not in now][-COMMANDS_REMEMBERED_MAX:]
    run.commands = dict.fromkeys(earlier) | now
    return [Applied(command_id=command_id) for command_id in earlier] + applied


def _reply(command: Command, value: bytes) -> list[Effect]:
    if command.reply_to is None:
        return []
    reply = Reply(command_id=command.command_id, workflow_id=command.workflow_id, accepted=True, value=value)
    return [SendReply(command.reply_to, reply)]


def _reject(why: Rejected, item: Staged, answers: list[Answer], dead: list[DeadCommand]) -> None:
    """Tell the sender, or keep the command with the reason where the sender listens to no answer."""
    command = item.command
    if command.reply_to is None:
        dead.append(DeadCommand(item.offset, command, f"{why.type}: {why.message}"))
        return
    reply = Reply(
        command_id=command.command_id,
        workflow_id=command.workflow_id,
        accepted=False,
        error=ErrorInfo(type=why.type, message=why.message),
    )
    answers.append((command.workflow_id, SendReply(command.reply_to, reply)))
