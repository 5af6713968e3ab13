"""docker-compose.yml and deploy/, as far as that goes without Docker: names exist, and a broker takes the settings."""

from __future__ import annotations

import base64
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported by its stubs only since 2.17
    AdminClient,
    ConfigResource,
    ResourceType,
)

import streamflow as sf
from streamflow.broker import KAFKA_VERSION, Cluster
from streamflow.broker.settings import HOST, free_ports
from streamflow.cli.main import cli
from streamflow.serve import URL_VARIABLE
from tests.cli import driver

COMPOSE: dict[str, Any] = yaml.safe_load((driver.ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (driver.ROOT / "deploy" / "Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
PIN = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")


def parse(command: click.Command, args: Sequence[str], parent: click.Context | None = None) -> None:
    """Parse as the command line does, without doing anything; raises what a wrong call raises."""
    if isinstance(command, click.Group):
        found = command.get_command(click.Context(command), args[0])
        assert found is not None, args
        parse(found, args[1:], click.Context(command, parent=parent, info_name=command.name))
    else:
        command.make_context(command.name, list(args), parent=parent)


def test_images_are_pinned():
    images = [service["image"] for service in SERVICES.values() if "image" in service]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(images) == 4 and all(PIN.fullmatch(image) for image in images)
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"


@pytest.mark.parametrize("name", OURS)
def test_our_commands_parse(name: str, monkeypatch: pytest.MonkeyPatch):
    service = OURS[name]
    assert 'ENTRYPOINT ["streamflow"]' in DOCKERFILE
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, value)
    parse(cli, service["command"])


def test_the_commands_in_the_comments_parse(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STREAMFLOW_APP", "hello")
    text = (driver.ROOT / "docker-compose.yml").read_text()
    said = re.findall(r"^#   docker compose run --rm client (.*)$", text, re.MULTILINE)
    assert said
    for line in said:
        parse(cli, shlex.split(line))


def test_our_variables_are_read():
    known = {URL_VARIABLE}
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        known |= {str(each.envvar) for each in command.params if each.envvar}
    assert {variable for service in OURS.values() for variable in service["environment"]} <= known


def test_services_wait_for_what_exists():
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] in {"service_healthy", "service_completed_successfully"}
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
    kafka = SERVICES["kafka"]
    assert kafka["volumes"] == [f"{next(iter(COMPOSE['volumes']))}:{kafka['environment']['KAFKA_LOG_DIRS']}"]


def test_the_image_is_made_of_files_that_exist():
    for service in OURS.values():
        assert service["build"]["context"] == "." and (driver.ROOT / service["build"]["dockerfile"]).is_file()
    copied = [line.split() for line in re.findall(r"^COPY (?:--\S+ )?(.*)$", DOCKERFILE, re.MULTILINE)]
    sources = [source for words in copied for source in words[:-1]]
    assert {"streamflow", "schemas", "deploy/app"} <= set(sources)
    ignored = (driver.ROOT / ".dockerignore").read_text().split()
    for source in sources:
        assert (driver.ROOT / source).exists() and source not in ignored


def test_the_app_is_there_under_its_name():
    path = driver.ROOT / "deploy" / "app" / "hello.py"
    spec = spec_from_file_location("deployed_hello", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    assert isinstance(module.app, sf.App)
    assert "welcome" in module.app.workflows
    assert module.app.name == SERVICES["worker"]["environment"]["STREAMFLOW_APP"]
    assert SERVICES["worker"]["command"][1] == "hello:app"


# ------------------------------------------------------------------------------------------------------------- a broker


def properties(inside: int, outside: int, controller: int) -> dict[str, str]:
    """What the image makes of its variables, with addresses and a folder of this machine."""
    found = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): value
        for name, value in SERVICES["kafka"]["environment"].items()
        if name.startswith("KAFKA_")
    }
    text = {"kafka:": f"{HOST}:", "localhost:": f"{HOST}:", "://:": f"://{HOST}:"}
    ports = {"19092": str(inside), "9092": str(outside), "9093": str(controller)}
    for name in ("listeners", "advertised.listeners", "controller.quorum.voters"):
        for old, new in text.items():
            found[name] = found[name].replace(old, new)
        found[name] = re.sub(r"\b(19092|9092|9093)\b", lambda match: ports[match[0]], found[name])
    del found["log.dirs"]
    return found


@pytest.fixture
def composed(kafka_runtime: None, tmp_path: Path) -> Iterator[Cluster]:
    ports = free_ports(3)
    with Cluster(tmp_path / "kafka", ports=[ports[1]], settings=properties(*ports)) as cluster:
        yield cluster


def test_a_broker_starts_with_these_settings_and_knows_each(composed: Cluster):
    admin = AdminClient({"bootstrap.servers": composed.bootstrap})
    resource = ConfigResource(ResourceType.BROKER, "1")
    entries = admin.describe_configs([resource])[resource].result(20)
    wanted = properties(0, 0, 0)
    assert set(wanted) <= set(entries), "each is a name that the broker knows"
    for name in ("auto.create.topics.enable", "offsets.topic.replication.factor", "listener.security.protocol.map"):
        assert entries[name].value == wanted[name]
    made = CliRunner().invoke(cli, [*SERVICES["topics"]["command"], "--app", "hello", "--url", composed.url])
    assert made.exit_code == 0 and "Created 6 of 6 topics" in made.stderr


def test_the_clusters_id_is_one():
    cluster_id = SERVICES["kafka"]["environment"]["CLUSTER_ID"]
    assert len(base64.urlsafe_b64decode(f"{cluster_id}==")) == 16
