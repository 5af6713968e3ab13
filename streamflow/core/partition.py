"""One partition: routes commands and outcomes to runs and makes one turn of each run that they move.

Rules of this file:

- A command takes effect once: a run remembers the ids of the commands that its turns applied, also those of the runs
  before it under its id, and every turn says how far the commands topic is consumed. Within one pass only the last turn
  moves that offset, so that a pass of which only a part became durable is taken again from the start, and deduplicated.
- A refused command is a value (a rejection with its reason), never an exception, and leaves no turn.
- An outcome counts only for the attempt that runs now, a timer only while it is pending: everything else is dropped.
- Time never runs backwards: `at` of a turn is at least that of the one before. One pass has one instant, so that the
  fold of a turn, which knows no other, gives what was live.

Theory of operation. `command` and `outcome` stage inputs by run. `decide` takes the staged runs one by one: it finds
the run in memory or loads it (fold of its turns, then replay of its code), applies the inputs in order, and makes a
turn of the events. State moves at once, ahead of the log; when an append fails, the whole partition is dropped and
restored. Nothing here performs an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, TypeAlias, assert_never

from msgspec import Struct
from msgspec.structs import replace

from streamflow.core.commands import (
    CancelWorkflow,
    CleanupWorkflow,
    Command,
    FireTimer,
    Query,
    ReportAttempt,
    SignalWorkflow,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.core.effects import (
    DropTimer,
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
    CancelRequested,
    RunBlocked,
    RunCancelled,
    RunCreated,
    RunDeleted,
    RunFailed,
    RunStarted,
    RunTerminated,
    RunUnblocked,
    SignalReceived,
    StepAttemptFailed,
    StepCompleted,
    StepDue,
    StepFailed,
    StepStarted,
    TimerFired,
    Turn,
    instant,
)
from streamflow.core.machines.run import Run, RunState
from streamflow.core.machines.state import Decision
from streamflow.core.machines.step import Step, StepState
from streamflow.core.replay import Code, Execution
from streamflow.core.reports import outcome_of
from streamflow.errors import ErrorInfo

StepOutcome: TypeAlias = StepStarted | StepCompleted | StepFailed | StepAttemptFailed

CLOCK_SKEW_MS_MAX: Final = 1000
"""How far a timer may lie ahead of the owner's clock and still count as due: clocks of two hosts differ."""

COMMANDS_REMEMBERED_MAX: Final = 1_000
"""Commands of earlier runs that a new run of their id still knows: more than senders repeat, and they fit a record."""


class Rejected(Struct, frozen=True):
    """A command that cannot be: `type` is the `RequestError` to raise at the sender."""

    type: str
    message: str


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


CodeFactory: TypeAlias = Callable[[Execution, Run], Code]


class Staged(Struct, frozen=True):
    """A command with its place in the commands topic."""

    offset: int
    command: Command


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
    ) -> None:
        self.runs = runs
        self.code_of = code_of
        self.timeout_of = timeout_of  # milliseconds, of a start that says none itself
        self.term = term
        self.seq = 0
        self.consumed = consumed
        self.at = 0
        self.live: dict[str, Execution] = {}
        self.next_command = consumed
        self._staged: dict[str, list[Staged | tuple[int, StepOutcome]]] = {}
        self._wake: set[str] = set()
        self._fire_at: list[int] = []
        self._late = 0

    # -- staging -----------------------------------------------------------------------------------------------------

    def command(self, offset: int, command: Command) -> None:
        """Stage a command; offsets come in order, and one that was consumed before is skipped."""
        if offset < self.next_command:
            return
        self.next_command = offset + 1
        self._staged.setdefault(command.workflow_id, []).append(Staged(offset, command))
        if isinstance(command.body, FireTimer):
            self._fire_at.append(command.body.fire_at)

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
        # A timer service ahead of us moves our time, by so little that it never leads the real one by more.
        self.at = max(self.at, now, *(at for at in self._fire_at if at <= now + CLOCK_SKEW_MS_MAX))
        self._fire_at = []
        self._late = 0
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
        return Decided(turns, answers, dead, self._late)

    def evict(self, workflow_id: str) -> None:
        """Drop a run from memory; it is loaded again when an input comes."""
        execution = self.live.pop(workflow_id, None)
        if execution is not None:
            execution.close()

    def close(self) -> None:
        """Drop all runs from memory."""
        for workflow_id in list(self.live):
            self.evict(workflow_id)

    def _decide_run(
        self,
        workflow_id: str,
        inputs: Sequence[Staged | tuple[int, StepOutcome]],
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
                self._outcome(execution, *item)
            elif item is not None:
                verdict = self._command(execution, item.command)
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
        if run.state is RunState.RUNNING and self._attach_code(execution):
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

    def _attach_code(self, execution: Execution) -> bool:
        """Give the execution its workflow's code; without any it diverges."""
        run = execution.run
        factory = self.code_of(run.workflow)
        if factory is None:
            execution.diverge(
                f"run {run.workflow_id} is of workflow {run.workflow}, which this worker's app does not have: "
                f"start a worker whose app registers it"
            )
            return False
        execution.code = factory(execution, run)
        return True

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

    def _outcome(self, execution: Execution, run_number: int, outcome: StepOutcome) -> bool:
        """Take what became of an attempt; False when nobody awaits it any more."""
        run = execution.run
        step = run.step(outcome.number)
        if run.run != run_number or step is None or not step.accepts(outcome.attempt):
            return False
        if type(outcome) is StepStarted:
            # A blocked run has no code that could run the attempt: its start must not be used up.
            if step.state is StepState.OPEN and run.state is RunState.RUNNING:
                execution.take(outcome)
        elif type(outcome) is StepAttemptFailed:
            execution.take(replace(outcome, retry_at=instant(outcome.retry_at)))
        else:
            execution.take(outcome)
        return True

    def _reported(self, execution: Execution, report: ReportAttempt) -> None:
        """An attempt on a queue has ended, says whoever ran it; late or again it has no effect."""
        step = execution.run.step(report.number)
        # Of an attempt that the owner runs itself only its own executor knows what became of it.
        is_remote = step is not None and step.queue is not None
        if not is_remote or not self._outcome(execution, report.run, outcome_of(report, self.at)):
            self._late += 1

    # -- commands ----------------------------------------------------------------------------------------------------

    def _command(self, execution: Execution, command: Command) -> Rejected | bytes | None:
        """Apply a command: the value of its answer, why it is refused, or None where nobody asks."""
        run = execution.run
        body = command.body
        assert not isinstance(body, Query), "a query changes nothing: it is answered without the core"
        if isinstance(body, FireTimer):
            self._timer(execution, body)
            return None
        if isinstance(body, ReportAttempt):
            self._reported(execution, body)
            return None
        if command.command_id in run.commands:
            return b"null" if not isinstance(body, CleanupWorkflow) else b"true"
        if isinstance(body, StartWorkflow):
            return self._start(execution, body)
        if run.state is RunState.NONE or run.state is RunState.DELETED:
            return Rejected("WorkflowNotFound", f"there is no run {run.workflow_id}: check the id, or start it first")
        if isinstance(body, CleanupWorkflow):
            return self._cleanup(execution, body)
        if run.is_closed:
            doing = DOING[type(body)]
            return Rejected(
                "CommandRejected",
                f"run {run.workflow_id} is {run.state}: only an open run can be {doing}; start a new one",
            )
        match body:
            case CancelWorkflow():
                self._cancel(execution)
            case TerminateWorkflow(reason=reason):
                execution.take(RunTerminated(reason=reason))
            case SignalWorkflow(name=name, value=value, error=error):
                signal = run.mailbox.received
                execution.take(SignalReceived(signal=signal, name=name, value=value, error=error))
            case _:
                assert_never(body)
        return b"null"

    def _start(self, execution: Execution, body: StartWorkflow) -> Rejected | bytes:
        run = execution.run
        if run.state is not RunState.NONE and run.state is not RunState.DELETED:
            if run.workflow != body.workflow:
                return Rejected(
                    "WorkflowExists",
                    f"run {run.workflow_id} is of workflow {run.workflow}, not {body.workflow}: choose another id",
                )
            if body.if_exists == "error":
                return Rejected(
                    "WorkflowExists",
                    f"run {run.workflow_id} exists already, {run.state}: choose another id, or if_exists='attach'",
                )
            if body.if_exists != "restart" or not run.is_closed:
                return b"null"
        if self.code_of(body.workflow) is None:
            return Rejected(
                "WorkflowNotFound",
                f"no workflow {body.workflow} on this worker: register it on the app that the worker serves, "
                f"or check the name (run {run.workflow_id} was not started)",
            )
        start_at = body.start_at if body.delay_ms is None else self.at + body.delay_ms
        start_at = None if start_at is None else instant(start_at)
        timeout_ms = self.timeout_of(body.workflow) if body.timeout_ms is None else body.timeout_ms
        begins_at = self.at if start_at is None else max(start_at, self.at)
        execution.restart()
        execution.take(
            RunCreated(
                workflow=body.workflow,
                args=body.args,
                run=run.run + 1,
                start_at=start_at,
                timeout_ms=timeout_ms,
                deadline_at=None if timeout_ms is None else instant(begins_at + timeout_ms),
                context=body.context,
            )
        )
        if start_at is None:
            self._begin(execution)
        return b"null"

    def _begin(self, execution: Execution) -> None:
        """The run's code begins."""
        self._attach_code(execution)  # where there is none, the caller finds the execution diverged
        execution.take(RunStarted())

    def _cancel(self, execution: Execution) -> None:
        run = execution.run
        if run.state is RunState.SCHEDULED:
            execution.take(RunCancelled())
        elif not run.cancel_requested:
            execution.take(CancelRequested())

    def _cleanup(self, execution: Execution, body: CleanupWorkflow) -> bytes:
        if not execution.run.is_closed:
            if not body.force:
                return b"false"
            execution.take(RunTerminated(reason="cleaned up"))
        execution.take(RunDeleted())
        return b"true"

    def _timer(self, execution: Execution, fired: FireTimer) -> None:
        """A timer is due: ignore it unless it is pending, and then have its record dropped."""
        run = execution.run
        if run.run != fired.run or not run.timer_pending(fired.kind, fired.number, fired.attempt):
            stale = TimerRecord(
                workflow_id=run.workflow_id,
                kind=fired.kind,
                run=fired.run,
                number=fired.number,
                attempt=fired.attempt,
                fire_at=fired.fire_at,
            )
            execution.effects.append(DropTimer(stale))
            return
        if run.timer_due_at(fired.kind, fired.number) > self.at:
            return  # somebody else's command, or a clock far ahead: the service sends it again when it is due
        match fired.kind:
            case "start":
                self._begin(execution)
            case "deadline":
                execution.take(RunFailed(error=_deadline_error(run)))
            case "sleep":
                execution.take(TimerFired(number=fired.number))
            case _:
                execution.take(StepDue(number=fired.number, attempt=fired.attempt))


DOING: Final[Mapping[type[Struct], str]] = {
    CancelWorkflow: "cancelled",
    TerminateWorkflow: "terminated",
    SignalWorkflow: "signalled",
}


def _blocked(error: Exception) -> RunBlocked:
    return RunBlocked(error=ErrorInfo(type="streamflow.errors.NonDeterminismError", message=str(error)))


def _deadline_error(run: Run) -> ErrorInfo:
    return ErrorInfo(type="TimeoutError", message=f"run {run.workflow_id} did not end within its timeout")


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
