"""Reading the metrics of this process, or a page of them, as a table of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import streamflow.metrics  # noqa: F401 - it registers them

Sample = tuple[str, frozenset[tuple[str, str]]]
"""A sample's name and its labels."""

PREFIX = "streamflow_"


def ours(families: Iterable[Metric]) -> list[Metric]:
    """The families that are streamflow's."""
    return [family for family in families if family.name.startswith(PREFIX)]


def families() -> list[Metric]:
    """Our families in this process, as a page of them says it."""
    return ours(REGISTRY.collect())


def full_name(family: Metric) -> str:
    """The name as Prometheus stores it; prometheus_client leaves the end of a counter's out."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def names() -> set[str]:
    """All names of samples, those of a histogram's parts included."""
    parts = ("_bucket", "_sum", "_count")
    found = {full_name(family) for family in families()}
    return found | {f"{family.name}{part}" for family in families() if family.type == "histogram" for part in parts}


def samples() -> dict[Sample, float]:
    """All of our numbers now."""
    return _samples(families())


def parsed(page: str) -> dict[Sample, float]:
    """All of our numbers on a page that was fetched."""
    return _samples(ours(text_string_to_metric_families(page)))


def _samples(found: Iterable[Metric]) -> dict[Sample, float]:
    # prometheus_client adds to each counter when it was made, as `…_created`.
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in found
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(found: Mapping[Sample, float], name: str, **labels: str) -> float:
    """One number; 0 where there is no such sample yet."""
    return found.get((PREFIX + name, frozenset(labels.items())), 0.0)
