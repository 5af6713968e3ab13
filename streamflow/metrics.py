"""Metric names and units, in one place. Labels come from closed sets; a run's id is never a label."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter

LOOP_BLOCKED: Final = Counter(
    "streamflow_event_loop_blocked_total", "Times that a step kept the worker's event loop for too long."
)
STEPS_RUN: Final = Counter("streamflow_step_attempts_total", "Attempts that ended, by outcome.", ["outcome"])
RUNS_BLOCKED: Final = Counter("streamflow_runs_blocked_total", "Runs whose code did not fit their history.")
DEAD_LETTERS: Final = Counter("streamflow_dead_letters_total", "Commands that could not be decoded or applied.")
LATE_OUTCOMES: Final = Counter(
    "streamflow_late_outcomes_total", "Outcomes from step queues that came late or twice, and were dropped."
)
FENCED: Final = Counter("streamflow_fenced_total", "Partitions given up because another owner wrote there.")
