"""`topics`: makes what is missing, names what is wrong with its repair, describes; and says that it is for Kafka."""

from __future__ import annotations

import json
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import pytest
from click.testing import CliRunner, Result
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported by its stubs only since 2.17
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from streamflow.cli import topics as command
from streamflow.cli.main import cli
from streamflow.logs import kafka_access, kafka_url
from streamflow.logs.base import TOPICS

DEADLINE_SECONDS = 20.0
Run = Callable[..., Result]


@pytest.fixture
def name() -> str:
    return f"topics-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def admin(kafka: str, name: str) -> Iterator[AdminClient]:
    """An administrator, who deletes the app's topics at the end."""
    client = AdminClient({"bootstrap.servers": kafka})
    yield client
    mine = [topic for topic in client.list_topics(timeout=10).topics if topic.startswith(f"{name}.")]
    for future in (client.delete_topics(mine) if mine else {}).values():
        future.result(10)


@pytest.fixture
def run(kafka: str, name: str, admin: AdminClient) -> Run:
    """Runs a command of `topics` on an app of its own."""
    return lambda *args, url=f"kafka://{kafka}": invoke([*args, "--app", name, "--url", url])


def invoke(args: Sequence[str]) -> Result:
    return CliRunner().invoke(cli, ["topics", *args], prog_name="streamflow", env={"COLUMNS": "100"})


def until(true: Callable[[], bool]) -> None:
    """What a broker acknowledged is known to all of it a moment later."""
    give_up_at = time.monotonic() + DEADLINE_SECONDS
    while not true():
        assert time.monotonic() < give_up_at


def delete(admin: AdminClient, topic: str) -> None:
    admin.delete_topics([topic])[topic].result(10)
    until(lambda: topic not in admin.list_topics(timeout=10).topics)


def alter(admin: AdminClient, topic: str, setting: str, value: str) -> None:
    entry = ConfigEntry(setting, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(10)
    until(lambda: described(admin, topic, setting) == value)


def described(admin: AdminClient, topic: str, setting: str) -> str | None:
    """What a broker says the topic's setting is now."""
    (found,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    entry: ConfigEntry = found.result(10)[setting]
    return entry.value


def repair(admin: AdminClient, line: str) -> None:
    """Do what a printed `kafka-configs.sh --alter` does."""
    program, *words = shlex.split(line)
    named = {word: words[index + 1] for index, word in enumerate(words[:-1]) if word.startswith("--")}
    assert program == "kafka-configs.sh" and named["--entity-type"] == "topics", line
    alter(admin, named["--entity-name"], *named["--add-config"].split("="))


def test_create_makes_what_is_missing_and_nothing_twice(run: Run, name: str, admin: AdminClient):
    made = run("create", "--partitions", "3", "--replication", "1")
    assert made.exit_code == 0 and made.stdout.split() == [f"{name}.{topic}" for topic in TOPICS]
    assert "Created 6 of 6 topics" in made.stderr and "3 partitions each" in made.stderr
    again = run("create")
    assert (again.exit_code, again.stdout) == (0, "") and "All 6 topics" in again.stderr
    delete(admin, f"{name}.replies")
    found = json.loads(run("create", "--json").stdout)
    assert found["created"] == [f"{name}.replies"] and [each["partitions"] for each in found["topics"]] == [3] * 6
    other = run("create", "--partitions", "4")
    assert other.exit_code == 1 and "have 3 partitions, asked for 4" in other.stderr


def test_create_says_which_topics_keep_the_copies_that_they_have(run: Run, name: str, admin: AdminClient, kafka: str):
    assert "Not changed" not in run("create", "--partitions", "1", "--replication", "1").stderr
    assert "Not changed" not in run("create", "--replication", "1").stderr
    kept = run("create", "--replication", "2")
    assert (kept.exit_code, kept.stdout) == (0, "") and "All 6 topics" in kept.stderr
    assert f"Not changed to 2 copies of each record, since they exist: {name}.commands (1), " in kept.stderr
    assert "kafka-reassign-partitions.sh changes it" in kept.stderr
    by_url = run("create", "--json", url=f"kafka://{kafka}?replication=2")
    assert by_url.exit_code == 0 and f"{name}.dead-letters (1)." in by_url.stderr
    assert json.loads(by_url.stdout)["topics"][0]["replicas"] == 1


def test_check_names_each_wrong_setting_and_its_command_repairs_it(run: Run, name: str, admin: AdminClient):
    assert run("create", "--partitions", "2").exit_code == 0
    fine = run("check")
    assert (fine.exit_code, fine.stdout) == (0, "") and "are as they must be" in fine.stderr
    wrong = {
        ("history", "retention.ms"): ("1000", "-1"),
        ("history", "unclean.leader.election.enable"): ("true", "false"),
        ("commands", "max.message.bytes"): ("1000", "1048588"),
        ("timers", "cleanup.policy"): ("delete", "compact"),
    }
    for (topic, setting), (value, _) in wrong.items():
        alter(admin, f"{name}.{topic}", setting, value)
    found = run("check", "--json")
    problems = json.loads(found.stdout)["problems"]
    assert found.exit_code == 1
    assert {(each["topic"], each["setting"], each["found"], each["expected"]) for each in problems} == {
        (f"{name}.{topic}", setting, value, wanted) for (topic, setting), (value, wanted) in wrong.items()
    }
    text = run("check")
    assert text.exit_code == 1 and f"{name}.history: retention.ms must be -1, found 1000\n  kafka-conf" in text.stdout
    assert "4 problems" in text.stderr
    # What creates refuses them, too, and changes nothing.
    assert run("create").exit_code == 1
    for each in problems:
        repair(admin, each["repair"])
    assert run("check").exit_code == 0


def test_check_names_what_is_missing_and_what_has_other_partitions(run: Run, name: str, admin: AdminClient):
    nothing = json.loads(run("check", "--json").stdout)["problems"]
    assert [each["topic"] for each in nothing] == [f"{name}.{topic}" for topic in TOPICS]
    assert all(each["repair"].startswith(f"streamflow topics create --app {name} --url kafka://") for each in nothing)
    assert run("create", "--partitions", "2").exit_code == 0
    delete(admin, f"{name}.history")
    made = admin.create_topics([NewTopic(f"{name}.steps.gpu", num_partitions=3, replication_factor=1)])
    made[f"{name}.steps.gpu"].result(10)
    until(lambda: f"{name}.steps.gpu" in admin.list_topics(timeout=10).topics)
    found = {(each["topic"], each["setting"]): each for each in json.loads(run("check", "--json").stdout)["problems"]}
    assert "all runs are kept there" in found[f"{name}.history", "the topic"]["repair"]
    assert found[f"{name}.steps.gpu", "partitions"]["expected"] == "2"


def test_check_compares_the_urls_partitions(run: Run, kafka: str):
    assert run("create", "--partitions", "2").exit_code == 0
    said = run("check", url=f"kafka://{kafka}?partitions=4")
    assert said.exit_code == 1 and "partitions must be 4, found 2\n  drop partitions= from the URL" in said.stdout


def test_describe_shows_what_is_there(run: Run, name: str):
    none = run("describe")
    assert none.exit_code == 1 and f"holds no topics of app '{name}'" in none.stderr
    assert "or run streamflow topics create" in none.stderr
    assert run("create", "--partitions", "2").exit_code == 0
    header, *rows = run("describe").stdout.splitlines()
    assert header.split() == ["topic", "id", "partitions", "replicas", "start", "end", "settings"]
    assert [row.split()[0] for row in rows] == [f"{name}.{topic}" for topic in TOPICS]
    assert all(row.split()[2:6] == ["2", "1", "0", "0"] and "cleanup.policy=" in row for row in rows)
    found = json.loads(run("describe", "--json").stdout)
    assert found["app"] == name and found["topics"][0]["end"] == [0, 0]
    assert found["topics"][1]["settings"]["retention.ms"] == "-1"


# ---------------------------------------------------------------------------------------------------- without a broker


@pytest.mark.parametrize("url", ["sqlite:///shop.db", "memory://x", "sqlite:///shop.db?max_mib=1"])
@pytest.mark.parametrize("name_of", ["create", "check", "describe"])
def test_other_logs_have_no_topics_to_set_up(name_of: str, url: str):
    said = invoke([name_of, "--app", "shop", "--url", url])
    assert said.exit_code == 2
    assert "this command is for Kafka, --url kafka://HOST:PORT" in " ".join(said.stderr.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["create", "--role", "worker"], "--role and --principal go with --acls"),
        (["create", "--principal", "User:x"], "--role and --principal go with --acls"),
        (["create", "--acls", "--principal", "x"], "expected TYPE:NAME, as in User:shop"),
        (["create", "--acls", "--role", "king"], "'king' is not one of"),
        (["create", "--partitions", "0"], "--partitions"),
        (["create", "--replication", "2", "--url", "kafka://a?replication=3"], "URL says replication=3, the option"),
    ],
)
def test_a_wrong_call(args: list[str], said: str):
    url = [] if "--url" in args else ["--url", "kafka://127.0.0.1:1"]
    ran = invoke([*args, "--app", "shop", *url])
    assert ran.exit_code == 2 and said in " ".join(ran.stderr.split())


def test_acls_are_printed_for_the_roles_and_principals_that_are_asked_for():
    url = "kafka://b:1?security.protocol=SASL_SSL&sasl.password=hunter2"
    args = ["create", "--acls", "--app", "shop", "--url", url, "--role", "client"]
    said = invoke([*args, "--principal", "User:a b", "--principal", "User:c"])
    assert said.exit_code == 0 and "hunter2" not in said.output
    head, *lines = said.stdout.splitlines()
    assert head == "# client"
    begin = (
        "kafka-acls.sh --bootstrap-server b:1 --command-config client.properties --add --allow-principal 'User:a b' "
    )
    assert all(line.startswith(f"{begin}--allow-principal User:c --operation ") for line in lines)
    assert any(line.endswith("--operation Write --topic shop.commands") for line in lines)
    found = json.loads(invoke([*args[:-2], "--json"]).stdout)["roles"]
    assert list(found) == list(kafka_access.ROLES) and all("User:projection" in line for line in found["projection"])


def test_what_help_must_not_load_is_repeated_rightly():
    assert command.ROLES == kafka_access.ROLES
    assert command.PARTITIONS_MAX == kafka_url.PARTITIONS_MAX


@pytest.mark.parametrize("each", ["create", "check", "describe"])
def test_each_has_help_with_an_example_and_json(each: str):
    said = invoke([each, "--help"])
    assert said.exit_code == 0 and "--json" in said.stdout and f"  streamflow topics {each}" in said.stdout
