"""What a run's turns have sent out, derived again: for a new owner that does not know how far the last one came.

Everything that leaves a partition follows from turns alone, so it can be made a second time; every receiver knows what
it has had by command id, turn number, timer id or attempt.
"""

from __future__ import annotations

from collections.abc import Iterable

from streamflow.core.effects import DispatchAttempt, Effect, Reply, SendReply, StepTask
from streamflow.core.events import Turn
from streamflow.core.machines.run import Run


def effects_since(turns: Iterable[Turn], first: int) -> tuple[Run, list[Effect]]:
    """Fold a run's turns; the effects are those of turn `first` and later, for an owner that derives them again.

    Without the attempts on queues that later turns have overtaken: they would only be run in vain.
    """
    run: Run | None = None
    effects: list[Effect] = []
    for turn in turns:
        run = run or Run(workflow_id=turn.workflow_id)
        due = run.fold(turn)
        if turn.turn >= first:
            effects += due
            effects += [
                reply
                for applied in turn.commands
                if applied.reply_to is not None
                for reply in [_accepted(turn.workflow_id, applied.command_id, applied.reply_to)]
            ]
    assert run is not None
    return run, [
        effect for effect in effects if not isinstance(effect, DispatchAttempt) or _is_awaited(run, effect.task)
    ]


def _is_awaited(run: Run, task: StepTask) -> bool:
    step = run.step(task.number)
    return run.run == task.run and step is not None and step.accepts(task.attempt)


def _accepted(workflow_id: str, command_id: str, reply_to: int) -> SendReply:
    return SendReply(reply_to, Reply(command_id=command_id, workflow_id=workflow_id, accepted=True, value=b"null"))
