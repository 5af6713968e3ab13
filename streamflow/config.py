"""Every limit by name, with the reason for its size. Frozen; a worker is given one `Limits`."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

RECORD_BYTES_MAX: Final = 1_000_000
"""One record of the log: librdkafka's `message.max.bytes` default, so that a log may move to Kafka as it is."""

PAYLOAD_BYTES_MAX: Final = 900_000
"""One argument list, result, signal or progress value: fits a record with everything that goes around it."""

TRACEBACK_BYTES_MAX: Final = 16_384
"""The end of a traceback that is kept with an error: enough for the frames that matter."""


class Limits(Struct, frozen=True, kw_only=True):
    """The limits of one worker process."""

    live_runs_max: int = 512
    """Runs kept in memory with their code per partition; a parked run costs about 6 KiB, a reload about 0.3 ms."""

    decided_turns_unacknowledged_max: int = 4_096
    """Turns decided ahead of the log per partition: a second's worth at full speed; then deciding waits."""

    pass_inputs_max: int = 256
    """Runs that a new owner looks at, or timers that it takes in, in one pass: 20 to 30 ms of work where the runs are
    short, so that the event loop stays responsive. Other passes are bounded by `commands_read_max` and by the outcomes
    that came while turns were under way. A run that must be loaded costs its whole length: 10 ms for 100 steps."""

    commands_read_max: int = 512
    """Commands read at once per partition; unread ones stay in the log (back-pressure)."""

    consumed_unsaid_max: int = 512
    """Commands without effect on a run (questions, repeats) after which the history says that they are consumed: a new
    owner looks at so many again. Those that were forwarded or buried are said at once."""

    published_offset_batches: int = 100
    """Appends without anything to publish after which the published offset is moved alone: so much a new owner derives
    again for nothing."""

    steps_waiting_max: int = 20_000
    """Attempts that wait for a free slot per worker; above it the worker takes no new commands."""

    queue_read_max: int = 16
    """Attempts read at once from a partition of a step queue: each may be a megabyte, and there are few slots."""

    queue_window_max: int = 256
    """Attempts taken from a partition of a step queue beyond the oldest that still runs: so many are run again at most
    when the worker dies, and so many run beside one that takes very long."""

    step_threads_max: int = 64
    """Threads for plain `def` steps: they mostly wait for IO, and each costs a stack."""

    stuck_threads_max: int = 256
    """Threads whose step was given up (a timeout, a cancel) and did not return: each is replaced, up to so many."""

    outgoing_records_max: int = 20_000
    """Records for other topics that are not acknowledged, per partition: some 10 MB; above it no command is read."""

    loop_blocked_seconds: float = 0.5
    """A step that keeps the event loop this long is named in a warning."""

    stop_seconds: float = 5.0
    """How long a stopping worker waits for what is under way to become durable."""

    trim_records_min: int = 20_000
    """History records that trimming must remove to be worth its snapshots: half a second of a restore."""

    snapshot_runs_at_once: int = 32
    """Runs copied forward in one append: a few milliseconds, so that turns need not wait for a trim."""

    trim_seconds: float = 600.0
    """How often an owner trims the topics that are trimmed by age (a step worker its queue), on a local log also how
    exactly; and how long a history that hardly grows may hold what runs have left behind."""

    commands_kept_seconds: float = 7 * 86_400.0
    """How long consumed commands stay in the log, to see what was asked. Those not consumed stay until they are."""

    replies_kept_seconds: float = 3_600.0
    """How long answers stay: far longer than anybody waits for one."""

    dead_letters_kept_seconds: float = 28 * 86_400.0
    """How long what could not be applied stays, for somebody to look at it."""

    attempts_kept_seconds: float = 86_400.0
    """How long attempts that are done with stay on the topic of their queue, to see what was asked."""

    late_status_seconds: float = 900.0
    """How long after a take-over statuses of earlier owners may still come: a producer gives up after two minutes, a
    broker drops a connection that is idle for ten."""

    late_status_look_seconds: float = 5.0
    """How often the last statuses on the topic are compared with their runs. One that is behind twice is late; once, it
    is under way, so this is far longer than a publish takes."""

    late_status_runs_max: int = 20_000
    """Runs whose last status is kept for the next look, at most 800 bytes of each: 16 MB per partition. So many do not
    get a status within one look."""

    late_status_records_back_max: int = 20_000
    """Statuses read back of those that were there before the take-over: a log that keeps no times of its records could
    mean all of them."""

    late_statuses_at_once_max: int = 32
    """Statuses read back, compared or published again at once: each may be a megabyte, and usually half a millisecond
    goes by."""

    request_seconds: float = 30.0
    """How long a client waits for the answer to a command before it raises `Unavailable`."""


LIMITS: Final = Limits()
