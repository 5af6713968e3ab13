"""The bytes of every record as they were written at a release: logs are kept for years."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamflow.codec.envelope import schema_folder
from streamflow.core import effects, events
from streamflow.core.commands import (
    BODIES,
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
from streamflow.errors import ErrorInfo
from tests.codec.records import KINDS

GOLDEN = Path(__file__).parent / "golden"
RULE = "schemas are never edited after release: add a version and an upcaster (streamflow/codec/DESIGN.md)"
AT = 1_790_000_000_000
ERROR = ErrorInfo("shop.errors.Declined", "card declined: “no funds”", "Traceback …")


def command(body):
    return Command(command_id="c-1", workflow_id="order-7f3a", sent_at=AT, reply_to=3, body=body)


def turn(*found, **changes):
    return events.Turn(
        workflow_id="order-7f3a", turn=12, term=3, seq=991, at=AT, consumed=123_456, events=list(found), **changes
    )


ALL_EVENTS = (
    events.RunCreated(workflow="w", args=b"[1]", run=2, start_at=AT, deadline_at=AT + 1, timeout_ms=9, context=b"{}"),
    events.RunStarted(),
    events.StepScheduled(
        number=4,
        name="charge",
        args='["é"]'.encode(),
        fingerprint=-(2**63),
        start_at=AT,
        queue="gpu",
        at_most_once=True,
        remote=events.RemoteCall(step="pay", workflow="fulfil", timeout_ms=9, retry=b'{"max_attempts":3}'),
    ),
    events.StepDue(number=4, attempt=2),
    events.StepStarted(number=4, attempt=2),
    events.StepAttemptFailed(number=4, attempt=1, error=ERROR, retry_at=AT, started_at=AT - 5),
    events.StepCompleted(number=4, attempt=2, result=b'"ok"', started_at=AT),
    events.StepFailed(number=5, attempt=1, error=ERROR, started_at=AT),
    events.StepCancelled(number=6),
    events.TimerSet(number=7, name="sleep", fire_at=AT),
    events.TimerFired(number=7),
    events.TimerCancelled(number=8),
    events.SignalAwaited(number=9, name="approved"),
    events.SignalReceived(signal=0, name="approved", value=b"true", error="no"),
    events.SignalTaken(number=9, signal=0),
    events.SignalWaitCancelled(number=10),
    events.ProgressSet(value=b"50"),
    events.CancelRequested(),
    events.RunCompleted(result=b"null"),
    events.RunFailed(error=ERROR),
    events.RunCancelled(),
    events.RunTerminated(reason="wrong order"),
    events.RunBlocked(error=ERROR),
    events.RunUnblocked(),
    events.RunDeleted(),
    events.RetentionSet(delete_at=AT),
)

EXAMPLES = {
    "Command.StartWorkflow": command(
        StartWorkflow(
            workflow="fulfil", args=b"[1]", start_at=AT, delay_ms=5, timeout_ms=9, if_exists="error", context=b'{"a":1}'
        )
    ),
    "Command.CancelWorkflow": command(CancelWorkflow()),
    "Command.TerminateWorkflow": command(TerminateWorkflow(reason="wrong order")),
    "Command.SignalWorkflow": command(SignalWorkflow(name="approved", value=b"true", error="no")),
    "Command.CleanupWorkflow": command(CleanupWorkflow(force=True)),
    "Command.FireTimer": command(FireTimer(kind="sleep", run=1, number=2, attempt=3, fire_at=AT)),
    "Command.ReportAttempt": command(
        ReportAttempt(
            run=1, number=4, attempt=2, result=b"1", error=ERROR, retry_after_ms=500, started_at=AT, scheduled_at=AT
        )
    ),
    "Command.Query": command(Query(query="steps", params=b'{"limit":5}')),
    "History.Claim": events.Claim(term=3, owner="host-1:77", at=AT),
    "History.Turn": turn(commands=[events.Applied(command_id="c-1", reply_to=3)], part=1, last=False),
    **{f"History.Turn.{type(event).__name__}": turn(event) for event in ALL_EVENTS},
    "History.RunSnapshot": events.RunSnapshot(
        workflow_id="order-7f3a",
        turn=12,
        term=3,
        seq=992,
        at=AT,
        consumed=5,
        turns=[b"", b"\x00\xff"],
        part=1,
        last=False,
    ),
    "History.Consumed": events.Consumed(term=3, seq=993, at=AT, consumed=12),
    "StepTask": effects.StepTask(
        workflow_id="order-7f3a",
        run=2,
        number=4,
        attempt=3,
        workflow="fulfil",
        step="embed",
        name="embed-title",
        args='["é"]'.encode(),
        scheduled_at=AT,
        timeout_ms=30_000,
        retry=b'{"max_attempts":3}',
    ),
    "Timer": effects.TimerRecord(workflow_id="order-7f3a", kind="step", run=1, number=4, attempt=2, fire_at=AT),
    "Status": effects.StatusRecord(
        workflow_id="order-7f3a",
        workflow="fulfil",
        run=1,
        turn=12,
        state="failed",
        args=b"[1]",
        result=b"1",
        error=ERROR,
        progress=b"50",
        waiting_on=["step charge", "signal approved"],
        context=b"{}",
        created_at=AT,
        started_at=AT + 1,
        closed_at=AT + 2,
        reason="why",
    ),
    "Reply": effects.Reply(command_id="c-1", workflow_id="order-7f3a", accepted=False, error=ERROR, value=b"1"),
    "DeadLetter": effects.DeadLetter(
        topic="shop.commands", partition=3, offset=77, key=b"\xff", value=b"junk", reason="not Avro", at=AT
    ),
}


def test_there_is_an_example_of_every_class():
    assert {type(event) for event in ALL_EVENTS} == set(events.EVENTS)
    assert {f"Command.{cls.__name__}" for cls in BODIES} <= EXAMPLES.keys()


def test_no_golden_file_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.hex")} == EXAMPLES.keys(), RULE


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_bytes_are_those_of_the_release(name):
    kind = KINDS[name.partition(".")[0]]
    path = GOLDEN / f"{name}.hex"
    if not path.exists():  # a new kind of record: its bytes become the rule with the commit that adds the file
        path.write_text(kind.encode(EXAMPLES[name]).hex() + "\n")
        pytest.fail(f"wrote {path.name}: commit it")
    golden = bytes.fromhex(path.read_text().strip())
    assert kind.encode(EXAMPLES[name]).hex() == golden.hex(), RULE
    assert kind.decode(golden) == EXAMPLES[name], RULE


OLD = sorted(GOLDEN.glob("[0-9]*/*.hex"))


@pytest.mark.parametrize("path", OLD, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_an_older_schema_wrote_is_read_as_ever(path: Path):
    kind = KINDS[path.name.partition(".")[0]]
    written = bytes.fromhex(path.read_text().strip())
    assert written != kind.encode(EXAMPLES[path.stem])
    assert kind.decode(written) == EXAMPLES[path.stem], RULE


def test_there_are_bytes_of_each_older_schema():
    older = {tuple(path.stem.split(".")) for path in (schema_folder() / "old").glob("*.avsc")}
    assert older == {(path.name.partition(".")[0], path.parent.name) for path in OLD}
