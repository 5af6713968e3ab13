"""Every state that a model can reach, breadth first, so that what is wrong is found by the shortest way to it."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from tests.model.fence import OFFSETLESS, UNANSWERED, Action, Batch, Model, State, name, numbers


@dataclass(frozen=True)
class Explored:
    """What an exploration saw. `violation` is None if every property holds in every state."""

    states: int
    transitions: int
    depth: int
    """Steps on the longest of the shortest ways."""
    logs: int
    violation: str | None = None
    trace: str = ""
    """The shortest way to the violation, a line for each step."""


def explore(model: Model) -> Explored:
    """Go everywhere, or to the first violation."""
    collects = gc.isenabled()
    gc.disable()  # it would walk over all states again and again, and none of them is garbage
    try:
        return _explore(model)
    finally:
        if collects:
            gc.enable()


def _explore(model: Model) -> Explored:
    first = model.first()
    came: dict[State, tuple[State, Action] | None] = {first: None}
    level, depth, transitions = [first], 0, 0
    following, nodes = model.following, model.logs.nodes
    while level:
        reached: list[State] = []
        for state in level:
            for action, after in following(state):
                transitions += 1
                if not isinstance(after, str):
                    if after in came:
                        continue
                    came[after] = (state, action)
                    reached.append(after)
                why = after if isinstance(after, str) else nodes[after.log].broken
                if why is not None:
                    steps = [_told(model, action, None if isinstance(after, str) else after), f"=> {why}"]
                    while (step := came[state]) is not None:
                        steps.append(_told(model, step[1], state))
                        state = step[0]
                    trace = "\n".join([*steps[:1:-1], *steps[:2]])
                    return Explored(len(came), transitions, depth + 1, len(nodes), why, trace)
        level = reached
        depth += bool(level)
    return Explored(len(came), transitions, depth, len(nodes))


def _told(model: Model, action: Action, after: State | None) -> str:
    """One step as a line: what happened, and the log behind it; what does not count is in parentheses."""
    text = _text(action)
    if after is None:
        return text
    log = []
    for offset, entry, counts in model.log(after).entries():
        shown = f"{offset}:{name(entry.life)} {numbers(Batch(*entry, 1))}"
        log.append(shown if counts else f"({shown})")
    return f"{text:<56} | {'  '.join(log)}".rstrip(" |")


def _text(action: Action) -> str:
    who = name(action.life)
    match action:
        case Action(kind="begin", at=at):
            return f"{who} reads up to offset {at}, and claims"
        case Action(kind="trim", at=at):
            return f"the log is cut at offset {at}"
        case Action(kind="land", batch=batch, landed=landed, copied=copied, answer=answer, at=at) if batch is not None:
            told = f"{who} hears {at}"
            if answer == OFFSETLESS:
                told = f"{who} hears no offset"
            elif answer == UNANSWERED:
                told = f"{who} hears nothing"
            verb = "lands" if landed == batch.size else f"lands up to {batch.term}.{batch.seq + landed - 1}"
            if action.left_out:
                verb = f"lands from {batch.term}.{batch.seq + action.left_out} on, without its head"
                told = told.replace(f"hears {at}", f"hears {at + batch.size - action.left_out - 1} of its last record")
            return f"{who}'s {numbers(batch)} {verb}; {told}{', and it lands again' if copied else ''}"
        case Action(kind="hear", answer=answer):
            return f"{who} hears {answer}"
        case Action(kind="go on"):
            return f"{who} gives up waiting, reads back, goes on in its term"
        case _:
            return f"{who}: {action.kind}"
