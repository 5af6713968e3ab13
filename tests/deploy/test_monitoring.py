"""What Prometheus and Grafana are given: it parses, and each metric and label that it names is one that there is.

The expressions were read by a parser of PromQL once; here their names are looked at, which is what changes.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from streamflow import metrics
from tests import metering
from tests.cli import driver

DEPLOY = driver.ROOT / "deploy"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((driver.ROOT / "docker-compose.yml").read_text())["services"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "streamflow.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [rule["expr"] for rule in RULES] + [target["expr"] for panel in PANELS for target in panel["targets"]]

NAME = re.compile(r"\bstreamflow_\w+")
GROUPED = re.compile(r"\bby \(([\w, ]*)\)")
SELECTED = re.compile(r'(\w+)=~?"([^"]*)"')
SECONDS = re.compile(r"(\d+)(s|m|h)")
TARGET_LABELS = {"instance", "job", "le"}
LABELS = {"workflow", "state", "step", "outcome", "partition", "queue"}
VALUES = {*metrics.PARTITION_STATES, *metrics.CLOSED_STATES, *metrics.OUTCOMES}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_what_there_is(expression: str):
    found = set(NAME.findall(expression))
    assert found and found <= metering.names()
    for name in found:
        if "quantile" in expression:
            assert name.endswith("_bucket") and "by (le" in expression
        of_changes = re.search(rf"(rate|increase)\({name}\b", expression)
        assert bool(of_changes) == name.endswith(("_total", "_bucket")), "counters by how they grow, gauges as they are"
    for labels in GROUPED.findall(expression):
        assert set(labels.split(", ")) <= TARGET_LABELS | LABELS
    for label, values in SELECTED.findall(expression):
        assert label in LABELS and set(values.split("|")) <= VALUES
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_a_rule_says_what_it_means(rule: dict[str, Any]):
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["alert"].startswith("Streamflow") and rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description"}
    assert SECONDS.fullmatch(rule.get("for", "1m"))
    grouped = {label for labels in GROUPED.findall(rule["expr"]) for label in labels.split(", ")}
    said = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    assert said <= grouped, "only what the expression keeps can be said"


def test_rules_have_names_of_their_own_and_cover_what_matters():
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    text = " ".join(rule["expr"] for rule in RULES)
    for name in ("blocked_runs", "owned_partitions", "command_lag_records", "fenced_total", "dead_letters_total"):
        assert f"streamflow_{name}" in text


def test_prometheus_scrapes_the_workers_of_the_compose_file():
    (job,) = PROMETHEUS["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    command = SERVICES["worker"]["command"]
    assert found["names"] == ["worker"] and found["type"] == "A"
    assert found["port"] == int(command[command.index("--metrics-port") + 1])
    assert PROMETHEUS["rule_files"] == ["alerts.yml"]
    assert PROMETHEUS["global"]["scrape_interval"] == DASHBOARD["refresh"]


def test_the_files_that_are_mounted_exist_and_are_found():
    mounts = dict(
        each.removesuffix(":ro").split(":") for name in ("prometheus", "grafana") for each in SERVICES[name]["volumes"]
    )
    assert all((driver.ROOT / source).exists() for source in mounts)
    assert mounts["./deploy/alerts.yml"] == "/etc/prometheus/alerts.yml", "beside the file that names it"
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "streamflow.yml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
    assert f"127.0.0.1:{port}:{port}" in SERVICES[host]["ports"]


def test_panels_lie_side_by_side():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in PANELS):
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not covered & places
        places |= covered
