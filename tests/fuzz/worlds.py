"""Targets that are more than a decoder: the intake with the core behind it, a restore with the queries behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from types import SimpleNamespace
from typing import Any, Final

from streamflow.codec import avro
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.commands import Query
from streamflow.core.effects import TimerRecord
from streamflow.errors import RequestError
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, REPLIES, STATUS, TIMERS, Outgoing, Record
from streamflow.projections import queries
from streamflow.store.memory import MemoryStore
from streamflow.worker.intake import Intake
from streamflow.worker.outbox import outgoing
from streamflow.worker.restore import Restorer
from streamflow.worker.state import PartitionState
from tests.core.scripted import World
from tests.fuzz import examples

READERS: Final[dict[str, Callable[[bytes], Any]]] = {
    COMMANDS: avro.decode_command,
    DEAD_LETTERS: avro.decode_dead_letter,
    REPLIES: avro.decode_reply,
    STATUS: avro.decode_status,
    TIMERS: avro.decode_timer,
    "steps.gpu": avro.decode_task,
}
RECORDS_MAX: Final = 200
"""Of one input of the intake: more say nothing new, and take long."""
PLACE: Final[Any] = SimpleNamespace(app="fuzzed", partitions=examples.PARTITIONS)
CLOCK: Final[Any] = SimpleNamespace(now_ms=lambda: 1_000_000)
SCHEMAS: Final[Any] = SimpleNamespace(schema_of=examples.REGISTERED.__getitem__)


def check_outgoing(records: Iterable[Outgoing]) -> None:
    """What leaves the partition can be read, and is small enough for the log."""
    for record in records:
        if record.value is not None:
            assert len(record.key) + len(record.value) <= RECORD_BYTES_MAX, record.topic
            READERS[record.topic](record.value)
            if record.topic == TIMERS:
                assert TimerRecord.fire_at_of(record.key) == avro.decode_timer(record.value).fire_at >= 0


def intake(data: bytes) -> None:
    """Records of the commands topic, whoever wrote them: each has its effect or none, and nothing stops."""
    world = World(work=examples.busy)
    partition_intake = Intake(PLACE, 0, examples.Runs(), CLOCK, SCHEMAS)
    ids = set()
    for offset, value in enumerate(islice(examples.chunks(data), RECORDS_MAX)):
        found = partition_intake.sort([Record(offset, value[-3:], value or None)])
        assert len(found.commands) + len(found.elsewhere) <= 1
        check_outgoing([*found.answers, *found.elsewhere])
        for place, command in found.commands:
            ids.add(command.workflow_id)
            world.partition.command(place, command)
        decided = world.decide_only(later_ms=1)
        check_outgoing(partition_intake.bury(dead) for dead in decided.dead)
        for item in decided.turns:
            again = avro.decode_history(avro.encode_history(item.turn))
            assert again == item.turn
            check_outgoing(outgoing(item.effects, 0, item.turn.workflow_id, examples.PARTITIONS))
        for workflow_id, answer in decided.answers:
            check_outgoing(outgoing((answer,), 0, workflow_id, examples.PARTITIONS))
        world.keep(decided.turns)
    statuses = {each: world.live(each).status() for each in ids if each in world.partition.live}
    # A new owner finds the same runs, and their code the same way through them.
    world.owner(term=2)
    for workflow_id in sorted(ids):
        world.partition.recover(workflow_id)
    for item in world.decide_only().turns:
        raise AssertionError(f"a new owner decides otherwise: {item.turn}")
    for workflow_id, status in statuses.items():
        assert world.run(workflow_id).status() == status


def restore(data: bytes) -> None:
    """A history, whoever wrote it: what was taken is there and can be asked for, at once or record by record."""
    state = PartitionState(MemoryStore())
    restorer = Restorer(state, 0)
    flags = data[0] if data else 0
    restorer.trimmed = bool(flags & 1)
    records = [Record(offset, b"", value or None) for offset, value in enumerate(examples.chunks(data[1:]))]
    for batch in [records] if flags & 2 else [[record] for record in records]:
        restorer.fold(batch)
    for run in list(state.runs(descending=False, after=None)):
        for name in ("status", "steps", "history", "list"):
            try:
                queries.answer(Query(query=name), run.workflow_id, state)
            except RequestError as error:
                raise AssertionError(f"a run that is there is not found: {error}") from error
    assert Restorer(state, 0).row() == restorer.row() or restorer.parts.parts
