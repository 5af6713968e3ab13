"""Every metric, in one place; `app.serve(metrics_port=…)` and `streamflow worker --metrics-port` show them.

    name                                     type       labels           what
    streamflow_runs_started_total            counter    workflow         runs taken in, those with a delay as well
    streamflow_runs_closed_total             counter    workflow, state  runs that ended
    streamflow_runs_blocked_total            counter                     times that code did not fit a run's history
    streamflow_turns_total                   counter                     turns made durable
    streamflow_decide_duration_seconds       histogram                   one pass: deciding on all that has arrived
    streamflow_append_duration_seconds       histogram                   one append to the history, until it is durable
    streamflow_step_attempts_total           counter    step, outcome    attempts of steps that ended here
    streamflow_step_timeouts_total           counter    step             attempts cut off by their own timeout
    streamflow_step_duration_seconds         histogram  step             how long an attempt ran, whatever came of it
    streamflow_timer_lateness_seconds        histogram                   from a timer's instant until it was sent
    streamflow_restore_duration_seconds      histogram                   from when a partition is assigned until active
    streamflow_fenced_total                  counter                     partitions given up to another owner
    streamflow_dead_letters_total            counter                     records that could not be read or applied
    streamflow_late_outcomes_total           counter                     outcomes from queues, late or twice: dropped
    streamflow_event_loop_blocked_total      counter                     times that a step kept the event loop
    streamflow_owned_partitions              gauge      state            partitions that this worker has now
    streamflow_blocked_runs                  gauge                      blocked runs of the active ones of those
    streamflow_command_lag_records           gauge      partition        commands that are not carried out yet
    streamflow_outbox_lag_records            gauge      partition        records on their way to the other topics
    streamflow_queue_lag_records             gauge      queue            attempts on a served queue, not done with
    streamflow_running_steps                 gauge                      attempts under way
    streamflow_waiting_steps                 gauge                      attempts that wait for a free slot
    streamflow_build_info                    gauge      version, python  1

Rules of this file:

- Names end in their unit. Labels come from closed sets: an enum, a number of a partition, a name that the app has
  registered (any other is "unknown"). A run's id is never a label.
- What happens once a step or timer is counted in plain ints, which are read only when somebody asks: 0.5 us for the
  outcome and the duration of a step together. With prometheus_client an `inc` alone takes as long, an `observe` twice
  that, and so does finding the child of a label: they are for what happens once a run, a pass, an append, or seldom.
- Gauges cost nothing until they are asked for: each worker is read then (`watched`), from the server's thread.
"""

from __future__ import annotations

import importlib.metadata
import platform
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Final, NamedTuple

from prometheus_client import REGISTRY, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

UNKNOWN: Final = "unknown"
"""Stands for a name that the app of this worker has not registered."""
NAMES_MAX: Final = 1_000
"""Names of steps that have numbers of their own; an app that makes up names without end must not fill the memory."""
OUTCOMES: Final = ("completed", "failed", "retried", "cancelled")
"""What came of an attempt. Cancelled: nobody waits for it any more, or its partition went to another worker."""
CLOSED_STATES: Final = ("completed", "failed", "cancelled", "terminated")
PARTITION_STATES: Final = ("restoring", "claiming", "active", "stopping", "stopped")
"""Where the processor of a partition stands; stopped is one that failed, or goes."""

DECIDE_BUCKETS: Final = (0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
APPEND_BUCKETS: Final = (0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STEP_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
LATENESS_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 60, 300, 3600)
RESTORE_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Distribution:
    """A histogram's numbers: how many values in each bucket, and their sum.

    Workers on two event loops of one process share it without a lock, and may lose a count once in a blue moon.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value; a clock that was set back makes it nothing, not less."""
        if value < 0:
            value = 0.0
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus wants them: each holds all that is in those below it."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(list(self.counts))), strict=True))


class StepTally:
    """What one step's attempts came to in this process."""

    __slots__ = ("cancelled", "completed", "duration", "failed", "retried", "timeouts")

    def __init__(self) -> None:
        self.completed = self.failed = self.retried = self.cancelled = self.timeouts = 0
        self.duration = Distribution(STEP_BUCKETS)


class Reading(NamedTuple):
    """A worker's gauges at this moment."""

    partitions: Mapping[str, int]
    blocked_runs: int
    command_lag: Mapping[int, int]
    outbox_lag: Mapping[int, int]
    queue_lag: Mapping[str, int]
    running_steps: int
    waiting_steps: int


RUNS_STARTED: Final = Counter(
    "streamflow_runs_started_total", "Runs taken in, those with a delay as well.", ["workflow"]
)
RUNS_CLOSED: Final = Counter("streamflow_runs_closed_total", "Runs that ended.", ["workflow", "state"])
RUNS_BLOCKED: Final = Counter("streamflow_runs_blocked_total", "Times that the code did not fit a run's history.")
TURNS: Final = Counter("streamflow_turns_total", "Turns made durable.")
DEAD_LETTERS: Final = Counter("streamflow_dead_letters_total", "Records that could not be read or applied.")
LATE_OUTCOMES: Final = Counter(
    "streamflow_late_outcomes_total", "Outcomes from step queues that came late or twice, and were dropped."
)
FENCED: Final = Counter("streamflow_fenced_total", "Partitions given up because another owner wrote there.")
LOOP_BLOCKED: Final = Counter(
    "streamflow_event_loop_blocked_total", "Times that a step kept the worker's event loop for too long."
)
DECIDE_DURATION: Final = Distribution(DECIDE_BUCKETS)
APPEND_DURATION: Final = Distribution(APPEND_BUCKETS)
TIMER_LATENESS: Final = Distribution(LATENESS_BUCKETS)
RESTORE_DURATION: Final = Distribution(RESTORE_BUCKETS)

_DISTRIBUTIONS: Final = (
    ("streamflow_decide_duration_seconds", "One pass of deciding on all that has arrived.", DECIDE_DURATION),
    ("streamflow_append_duration_seconds", "One append to the history, until it is durable.", APPEND_DURATION),
    ("streamflow_timer_lateness_seconds", "From a timer's instant until its run's owner took it in.", TIMER_LATENESS),
    ("streamflow_restore_duration_seconds", "From a partition's assignment until it is active.", RESTORE_DURATION),
)
_steps: Final[dict[str, StepTally]] = {}
_readers: Final[set[Callable[[], Reading]]] = set()


def step_tally(name: str) -> StepTally:
    """The numbers of the step that is registered under this name."""
    found = _steps.get(name)
    if found is None:
        name = name if len(_steps) < NAMES_MAX else UNKNOWN
        found = _steps.setdefault(name, StepTally())
    return found


def watch(read: Callable[[], Reading]) -> None:
    """Show these gauges until `unwatch`; those of several workers in a process add up."""
    _readers.add(read)


def unwatch(read: Callable[[], Reading]) -> None:
    """Show them no more. Idempotent."""
    _readers.discard(read)


class _Collector:
    """What is not kept by prometheus_client itself."""

    def collect(self) -> Iterator[Metric]:
        yield from _collect_steps()
        for name, text, distribution in _DISTRIBUTIONS:
            family = HistogramMetricFamily(name, text)
            family.add_metric([], distribution.buckets(), distribution.total)
            yield family
        yield from _collect_gauges([read() for read in list(_readers)])
        info = GaugeMetricFamily("streamflow_build_info", "What runs here.", labels=["version", "python"])
        info.add_metric([_version(), platform.python_version()], 1)
        yield info


def _collect_steps() -> Iterator[Metric]:
    attempts = CounterMetricFamily(
        "streamflow_step_attempts", "Attempts of steps that ended.", labels=["step", "outcome"]
    )
    timeouts = CounterMetricFamily("streamflow_step_timeouts", "Attempts cut off by their timeout.", labels=["step"])
    durations = HistogramMetricFamily("streamflow_step_duration_seconds", "How long attempts ran.", labels=["step"])
    for name, tally in list(_steps.items()):
        for outcome in OUTCOMES:
            attempts.add_metric([name, outcome], getattr(tally, outcome))
        timeouts.add_metric([name], tally.timeouts)
        durations.add_metric([name], tally.duration.buckets(), tally.duration.total)
    yield from (attempts, timeouts, durations)


def _collect_gauges(readings: Sequence[Reading]) -> Iterator[Metric]:
    partitions = {**dict.fromkeys(PARTITION_STATES, 0), **_sum(reading.partitions for reading in readings)}
    blocked = sum(reading.blocked_runs for reading in readings)
    running = sum(reading.running_steps for reading in readings)
    waiting = sum(reading.waiting_steps for reading in readings)
    command_lag = _sum(reading.command_lag for reading in readings)
    outbox_lag = _sum(reading.outbox_lag for reading in readings)
    queue_lag = _sum(reading.queue_lag for reading in readings)
    yield _gauge("streamflow_owned_partitions", "Partitions that this worker has.", partitions, "state")
    yield _gauge("streamflow_command_lag_records", "Commands not carried out yet.", command_lag, "partition")
    yield _gauge("streamflow_outbox_lag_records", "Records on their way to other topics.", outbox_lag, "partition")
    yield _gauge("streamflow_queue_lag_records", "Attempts on a queue, not done with.", queue_lag, "queue")
    yield GaugeMetricFamily("streamflow_blocked_runs", "Blocked runs of this worker's active partitions.", blocked)
    yield GaugeMetricFamily("streamflow_running_steps", "Attempts under way.", running)
    yield GaugeMetricFamily("streamflow_waiting_steps", "Attempts that wait for a free slot.", waiting)


def _sum(each: Iterable[Mapping[str, int] | Mapping[int, int]]) -> dict[str, int]:
    total: Tally[str] = Tally()
    for values in each:
        for label, value in values.items():
            total[str(label)] += value
    return total


def _gauge(name: str, text: str, values: Mapping[str, int], label: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


@cache
def _version() -> str:
    try:
        return importlib.metadata.version("streamflow-engine")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN  # run from its source, and not installed


REGISTRY.register(_Collector())
