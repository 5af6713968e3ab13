"""The fence of one history partition as a small model: owners, the log, and a network that may do anything.

A *life* is one owner from its restore to the first outcome that it does not know: whoever begins again is another life,
with nothing of the old one in memory. It reads the log to the end and claims. What it appends is fixed, since the fence
does not look into records: batches of `Bounds.batches` records, as many under way at once as `Bounds.window`.

What is under way lands at any time, in any order, or never; so a batch that is lost is one that stays under way. That
makes most steps of an owner superfluous, and the eager model leaves them out: it writes as soon as it may (a batch sent
later is one that is longer under way), hears an answer as soon as the batch lands (who hears later acts later, on the
same log), and never crashes (who crashed is one whose answers are all lost from there on). With `Bounds.eager` False
each of these is a step of its own; a test compares what both can reach.

README.md says which action stands for what in the code, and what was left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.model.logs import HEIR, NOBODY, Entry, Logs, Node, Protocol, Reader

OFFSETLESS: Final = -1
"""An answer without an offset: the broker knows the batch already, a duplicate of its sender's own."""
UNANSWERED: Final = -2
"""The batch has landed, and its answer never comes."""


@dataclass(frozen=True)
class Bounds:
    """How far the model is explored; what lies within is explored whole."""

    lives: int
    """Owners that begin, in all; any number of them at once."""
    batches: tuple[int, ...]
    """Records of the batches that each owner appends behind its claim."""
    window: int
    """Batches under way at once, of one owner."""
    copies: int = 0
    """Batches that land a second time."""
    torn: int = 0
    """Batches of which a part lands first, and the rest later or never."""
    headless: int = 0
    """Batches of which a later part lands without the part before it, which lands after it or never."""
    trims: int = 0
    """How often the head of the log goes."""
    ordered: bool = False
    """Whether the batches of one owner land in its order, as those of one idempotent producer do."""
    eager: bool = True
    """False: sending, hearing and crashing are steps of their own."""


class Batch(NamedTuple):
    """Records under way: `size` of them, from `seq` on."""

    life: int
    term: int
    seq: int
    size: int


class Life(NamedTuple):
    """An owner that has not ended. Its batch 0 is its claim."""

    life: int
    term: int
    read_to: int
    done: int
    """Batches that it acted on."""
    sent: int
    following: int
    """The offset at which it expects the first batch that it has not acted on."""
    answers: tuple[tuple[int, int], ...]
    """Batch and answer, of those that it has not heard."""


class State(NamedTuple):
    """One state of the model."""

    log: int
    """A number of `Logs.nodes`."""
    lives: tuple[Life, ...]
    under_way: tuple[Batch, ...]
    begun: int
    copies: int
    torn: int
    trims: int
    headless: int = 0


class Action(NamedTuple):
    """One step: `kind` is "begin", "land" or "trim"; "send", "hear", "end" or "go on" where these are steps."""

    kind: str
    life: int = NOBODY
    batch: Batch | None = None
    landed: int = 0
    copied: bool = False
    answer: int = UNANSWERED
    at: int = 0
    left_out: int = 0
    """Records at the head of the batch that did not land with the others."""


Step = tuple[Action, State | str]
"""An action, and the state behind it; a string is what is wrong with what an owner does there."""


class Model:
    """The protocol within bounds: its first state, and all that may happen in each."""

    def __init__(self, bounds: Bounds, protocol: Protocol | None = None) -> None:
        self.bounds, self.protocol = bounds, protocol or Protocol()
        self.logs = Logs(self.protocol)
        self.acts: set[tuple[int, int, int, int]] = set()
        """All that was acted on, ever: the log's number, the life, and from which to which seq."""
        self._sizes = (1, *bounds.batches)
        self._firsts = tuple(sum(self._sizes[:number]) for number in range(len(self._sizes) + 1))

    def first(self) -> State:
        """Nobody there, nothing written."""
        return State(self.logs.empty.number, (), (), 0, 0, 0, 0)

    def log(self, state: State) -> Node:
        """The log of the state."""
        return self.logs.nodes[state.log]

    def following(self, state: State) -> Iterator[Step]:
        """All that may happen next."""
        if state.begun < self.bounds.lives:
            yield from self._begin(state)
        for number, batch in enumerate(state.under_way):
            if (not number or batch != state.under_way[number - 1]) and not self._is_later(state, number):
                yield from self._land(state, batch)
        if not self.bounds.eager:
            for life in state.lives:
                yield from self._slowly(state, life)
        if self.protocol.goes_on == "in its term":
            for life in state.lives:
                yield from self._go_on(state, life)
        if state.trims < self.bounds.trims:
            yield from self._trim(state)

    # -- an owner: restore, claim, append, hear --------------------------------------------------------------------

    def _begin(self, state: State) -> Iterator[Step]:
        """Whatever a store held, or wherever the log begins: all that a reader can be that has read the log."""
        node = self.log(state)
        end, number = node.end, state.begun
        older = [node]
        while not self.protocol.reads_to_the_end and (parent := older[-1].parent) is not None:
            older.append(parent)
        for term, read_to in dict.fromkeys((reader.term, each.end) for each in older for reader in each.readers):
            term = max(1, max(0, term) + self.protocol.term_above)
            life = Life(number, term, read_to, 0, 0, end, ())
            yield (
                Action("begin", number, at=read_to),
                self._on(state._replace(lives=(*state.lives, life), begun=state.begun + 1), life),
            )

    def _on(self, state: State, life: Life) -> State | str:
        """The owner does all that it can do at once, or in the slow model nothing."""
        while self.bounds.eager:
            if self._may_send(life):
                after = self._send(state, life)
            elif life.answers and life.answers[0][0] == life.done:
                after = self._hear(state, life)
            else:
                break
            if isinstance(after, str):
                return after
            found = self._life(after, life.life)
            if found is None:
                return after
            state, life = after, found
        return state

    def _may_send(self, life: Life) -> bool:
        if life.sent == len(self._sizes):
            return False
        if not life.done:
            return not life.sent or (not self.protocol.awaits_claim and life.sent <= self.bounds.window)
        return life.sent < life.done + self.bounds.window

    def _send(self, state: State, life: Life) -> State | str:
        batch = Batch(life.life, life.term, self._firsts[life.sent], self._sizes[life.sent])
        if batch.seq and not self.protocol.acts_on_answers:
            return f"{name(life.life)} acts on {numbers(batch)}, which is not in the log"
        state = state._replace(under_way=tuple(sorted((*state.under_way, batch))))
        return self._with(state, life._replace(sent=life.sent + 1))

    def _hear(self, state: State, life: Life) -> State | str:
        """The answer to the first batch that the owner waits for: it acts, or it ends."""
        (_, answer), *answers = life.answers
        good = self._is_good(life, answer)
        at = life.following if answer < 0 else answer
        if good and (why := self._act(state, life, life.done, at)) is not None:
            return why
        if not good and (self.protocol.goes_on != "blindly" or answer == UNANSWERED):
            return self._without(state, life)
        life = life._replace(done=life.done + 1, following=at + self._sizes[life.done], answers=tuple(answers))
        if life.done == len(self._sizes):
            return self._without(state, life)  # nothing is left to say or to hear
        return self._with(state, life)

    def _is_good(self, life: Life, answer: int) -> bool:
        if answer == OFFSETLESS:
            return life.done > 0 and not self.protocol.refuses_offsetless
        checks = self.protocol.checks_offset if life.done else self.protocol.checks_claim
        return answer >= 0 and (answer == life.following or not checks)

    def _act(self, state: State, life: Life, number: int, offset: int) -> str | None:
        """What is wrong if the life acts on that batch of its own, which it believes to be at `offset`.

        What it acts on was decided on all that it has read, its claim, and its own records before: so these and no
        others must be what counts between where it stopped reading and there.
        """
        node = self.log(state)
        batch = Batch(life.life, life.term, self._firsts[number], self._sizes[number])
        self.acts.add((node.number, life.life, batch.seq, batch.seq + batch.size - 1))
        last = offset + batch.size - 1
        found: list[Entry] = []
        while node.parent is not None and node.entry is not None and node.end > life.read_to:
            if node.counts and node.end - 1 <= last:
                found.append(node.entry)
            elif node.end - 1 == last:
                return f"{name(life.life)} acts on {numbers(batch)}, and offset {last} does not count"
            node = node.parent
        gone = max(0, node.end - life.read_to)  # with the head of the log
        own = [Entry(life.life, life.term, seq) for seq in range(gone, batch.seq + batch.size)]
        if found[::-1] != own and life.life < HEIR:
            return f"{name(life.life)} acts on {numbers(batch)}, and decided it on other records than those that count"
        return None

    def _slowly(self, state: State, life: Life) -> Iterator[Step]:
        yield Action("end", life.life), self._without(state, life)
        if self._may_send(life):
            yield Action("send", life.life), self._send(state, life)
        if life.answers and life.answers[0][0] == life.done:
            yield Action("hear", life.life, answer=life.answers[0][1]), self._hear(state, life)

    def _go_on(self, state: State, life: Life) -> Iterator[Step]:
        """A mutation: see `Protocol.goes_on`."""
        node = self.log(state)
        if life.life < HEIR and life.done == 1 and node.readers[0] == Reader(life.term, 1):
            heir = Life(life.life + HEIR, life.term, node.end, 1, 1, node.end, ())
            after = self._without(state, life)
            yield Action("go on", life.life), self._on(after._replace(lives=(*after.lives, heir)), heir)

    def _life(self, state: State, number: int) -> Life | None:
        for life in state.lives:
            if life.life == number:
                return life
        return None

    def _with(self, state: State, life: Life) -> State:
        return state._replace(lives=tuple(life if each.life == life.life else each for each in state.lives))

    def _without(self, state: State, life: Life) -> State:
        return state._replace(lives=tuple(each for each in state.lives if each.life != life.life))

    # -- the network: what is under way becomes the end of the log, and its sender may be told ------------------------

    def _is_later(self, state: State, number: int) -> bool:
        """Whether a batch waits for one before it, or is the claim of a life that differs from another in name only."""
        batch, before = state.under_way[number], state.under_way[:number]
        if self.bounds.ordered and any(each.life == batch.life for each in before):
            return True
        if batch.seq or (life := self._life(state, batch.life)) is None:
            return False
        same = life._replace(life=0)
        return any(
            not each.seq and (other := self._life(state, each.life)) is not None and other._replace(life=0) == same
            for each in before
            if each.life != batch.life
        )

    def _land(self, state: State, batch: Batch) -> Iterator[Step]:
        node = self.log(state)
        offset, left = node.end, list(state.under_way)
        left.remove(batch)
        if batch.size > 1 and state.torn < self.bounds.torn:
            torn = node
            for landed in range(1, batch.size):
                torn = self.logs.extend(torn, Entry(batch.life, batch.term, batch.seq + landed - 1))
                rest = batch._replace(seq=batch.seq + landed, size=batch.size - landed)
                after = state._replace(log=torn.number, under_way=tuple(sorted((*left, rest))), torn=state.torn + 1)
                answer = UNANSWERED if self.protocol.hears_every_record else offset
                action = Action("land", batch.life, batch, landed, answer=answer, at=offset)
                yield action, self._answer(after, batch, answer)
        if batch.size > 1 and state.headless < self.bounds.headless:
            yield from self._land_headless(state, batch, left)
        for seq in range(batch.seq, batch.seq + batch.size):
            node = self.logs.extend(node, Entry(batch.life, batch.term, seq))
        answers = (offset, OFFSETLESS, UNANSWERED) if self._awaited(state, batch) is not None else (UNANSWERED,)
        for copied in (False, True) if state.copies < self.bounds.copies else (False,):
            if copied:
                after = state._replace(log=node.number, copies=state.copies + 1)
            else:
                after = state._replace(log=node.number, under_way=tuple(left))
            for answer in answers:
                action = Action("land", batch.life, batch, batch.size, copied, answer, offset)
                yield action, self._answer(after, batch, answer)

    def _land_headless(self, state: State, batch: Batch, left: list[Batch]) -> Iterator[Step]:
        """Requests of one batch are told apart by the broker alone: one may be given up, and the next one land."""
        offset = self.log(state).end
        for left_out in range(1, batch.size):
            node = self.log(state)
            for seq in range(batch.seq + left_out, batch.seq + batch.size):
                node = self.logs.extend(node, Entry(batch.life, batch.term, seq))
            under_way = tuple(sorted((*left, batch._replace(size=left_out))))
            after = state._replace(log=node.number, under_way=under_way, headless=state.headless + 1)
            answer = offset - left_out if self.protocol.hears_the_last else UNANSWERED
            action = Action("land", batch.life, batch, batch.size, answer=answer, at=offset, left_out=left_out)
            yield action, self._answer(after, batch, answer)

    def _awaited(self, state: State, batch: Batch) -> tuple[Life, int] | None:
        """Who waits for an answer to this batch, and which of its batches it is."""
        life = self._life(state, batch.life)
        if life is None or batch.seq not in self._firsts[life.done : life.sent]:
            return None
        number = self._firsts.index(batch.seq)
        if batch.size != self._sizes[number] or any(number == answered for answered, _ in life.answers):
            return None
        return life, number

    def _answer(self, state: State, batch: Batch, answer: int) -> State | str:
        """The answer is at the sender."""
        found = self._awaited(state, batch)
        if found is None:
            return state
        life, number = found
        if not self.protocol.in_order and answer == life.following + batch.seq - self._firsts[life.done]:
            why = self._act(state, life, number, answer)
            if why is not None:
                return why
        life = life._replace(answers=tuple(sorted((*life.answers, (number, answer)))))
        return self._on(self._with(state, life), life)

    # -- trimming ----------------------------------------------------------------------------------------------------

    def _trim(self, state: State) -> Iterator[Step]:
        """The head goes, up to a record that counts and is no claim.

        When it was asked for makes no difference: what counts goes on counting, so a request that comes late cuts
        where it would have cut before.
        """
        node = self.log(state)
        for offset, entry, counts in node.entries():
            if offset > node.start and ((counts and entry.seq) or not self.protocol.cuts_at_valid):
                cut = self.logs.trim(node, offset)
                yield Action("trim", at=offset), state._replace(log=cut.number, trims=state.trims + 1)


def name(life: int) -> str:
    """What an owner is called in a trace."""
    return chr(ord("a") + life % HEIR) + "'" * (life // HEIR) if life >= 0 else "?"


def numbers(batch: Batch) -> str:
    """The records of a batch, as in a trace: term.seq."""
    if not batch.seq:
        return f"claim {batch.term}"
    return " ".join(f"{batch.term}.{seq}" for seq in range(batch.seq, batch.seq + batch.size))
