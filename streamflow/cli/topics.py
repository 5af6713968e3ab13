"""The commands `topics create`, `topics check` and `topics describe`: what an app has on a Kafka cluster.

They do what a worker does when it starts, one by one and for people: make what is missing, check what is there. They
never change a topic that exists.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from streamflow.cli.output import Cell, Output
from streamflow.cli.session import app_option, json_option, kafka_url_option, place_of

if TYPE_CHECKING:
    from streamflow.logs.kafka_topics import Described, Topics, Wrong
    from streamflow.logs.kafka_url import KafkaUrl

F = TypeVar("F", bound=Callable[..., Any])

ROLES: Final = ("worker", "client", "step-worker", "projection")
"""As in logs/kafka_access.py, which `--help` must not load."""
PARTITIONS_MAX: Final = 1_000
REPLICATION_MAX: Final = 32_767
SHOWN_SETTINGS: Final = ("cleanup.policy", "retention.ms", "min.insync.replicas", "max.message.bytes")
_PRINCIPAL: Final = re.compile(r"[A-Za-z]+:.+")


@click.group(
    "topics", short_help="Create, check or describe the topics of an app on Kafka.", invoke_without_command=False
)
def topics() -> None:
    """Create, check or describe the topics of an app on Kafka. Each takes --url, --app and --json.

    A worker makes missing topics when it starts; where it may not (--no-create-topics), an administrator does so here.

    \b
    Example:
      streamflow topics create --app shop --url kafka://broker:9092
      streamflow topics check --app shop --url kafka://broker:9092
    """


def _common(function: F) -> F:
    """The options of all three, outermost last."""
    return app_option(kafka_url_option(json_option(function)))


def _connect(url: str, app: str, *, partitions: int | None = None, replication: int | None = None) -> Topics:
    """A connection to the cluster of that URL."""
    parsed = _parse(url, partitions, replication)
    from streamflow.logs.kafka_topics import Topics

    return Topics(parsed, _name_of(app))


def _parse(url: str, partitions: int | None = None, replication: int | None = None) -> KafkaUrl:
    from importlib.util import find_spec

    from streamflow.logs.kafka_url import kafka_missing, parse_kafka

    if not url.startswith("kafka://"):
        raise click.UsageError(
            f"the topics of {place_of(url)} are made by its workers, and have no settings: this command is for Kafka, "
            f"--url kafka://HOST:PORT",
            click.get_current_context(silent=True),
        )
    if find_spec("confluent_kafka") is None:
        raise kafka_missing()
    parsed = parse_kafka(url, partitions)
    if None not in (replication, parsed.replication) and replication != parsed.replication:
        raise click.UsageError(f"the URL says replication={parsed.replication}, the option {replication}: drop one")
    return parsed if replication is None else parsed._replace(replication=replication)


def _name_of(app: str) -> str:
    if ":" not in app:
        return app
    from streamflow.cli.apps import load_app

    return load_app(app).name


# ------------------------------------------------------------------------------------------------------------- create


@topics.command("create", short_help="Make the topics that are missing.")
@click.option(
    "--partitions", type=click.IntRange(1, PARTITIONS_MAX), help="Of each topic, fixed for ever.  [default: 12]"
)
@click.option(
    "--replication",
    type=click.IntRange(1, REPLICATION_MAX),
    help="Copies of each record, of topics that are made now.  [default: 3, or as many as there are brokers]",
)
@click.option("--acls", is_flag=True, help="Print the commands that grant each role its rights; create nothing.")
@click.option("--role", "roles", type=click.Choice(ROLES), multiple=True, help="With --acls: only this role's.")
@click.option(
    "--principal",
    "principals",
    metavar="TYPE:NAME",
    multiple=True,
    help="With --acls: who gets them.  [default: User:worker, User:client, ...]",
)
@_common
def create(
    app: str,
    url: str,
    as_json: bool,
    partitions: int | None,
    replication: int | None,
    acls: bool,
    roles: tuple[str, ...],
    principals: tuple[str, ...],
) -> None:
    """Make the topics that are missing, with their settings; those that exist are checked and left as they are.

    With --acls nothing is created and the cluster is not asked: the commands go to stdout, for an administrator to run.

    \b
    Example:
      streamflow topics create --app shop --url kafka://broker:9092 --partitions 24
      streamflow topics create --app shop --url kafka://broker:9092 --acls --role worker --principal User:shop
    """
    output = Output(as_json=as_json)
    if acls:
        _print_acls(output, _parse(url), _name_of(app), roles or ROLES, principals)
        return
    if roles or principals:
        raise click.UsageError("--role and --principal go with --acls", click.get_current_context(silent=True))
    connection = _connect(url, app, partitions=partitions, replication=replication)
    made, found = asyncio.run(_make(connection))
    _say_kept_copies(output, connection, [found[topic] for topic in found if topic not in made])
    if as_json:
        output.document({
            "app": connection.app,
            "created": [found[topic].name for topic in made],
            "topics": [_as_json(each) for each in found.values()],
        })  # fmt: skip
        return
    for topic in made:
        output.text(found[topic].name)
    number = next(iter(found.values())).partitions
    output.say(
        f"Created {len(made)} of {len(found)} topics of app {connection.app}, {number} partitions each"
        if made
        else f"All {len(found)} topics of app {connection.app} are there, {number} partitions each, and fit"
    )


async def _make(connection: Topics) -> tuple[list[str], dict[str, Described]]:
    from streamflow.logs.base import TOPICS

    before = await connection.ids()
    _, found = await connection.open(create=True)
    return [topic for topic in TOPICS if topic not in before], found


def _say_kept_copies(output: Output, connection: Topics, kept: Sequence[Described]) -> None:
    """Topics that exist keep the copies that they have, whatever was asked for: moving data is the operator's to do."""
    wanted = connection.url.replication
    others = [f"{topic.name} ({topic.replication})" for topic in kept if wanted not in (None, topic.replication)]
    if others:
        output.say(
            f"Not changed to {wanted} {'copy' if wanted == 1 else 'copies'} of each record, since they exist: "
            f"{', '.join(others)}. kafka-reassign-partitions.sh changes it"
        )


def _print_acls(output: Output, url: KafkaUrl, app: str, roles: Sequence[str], principals: Sequence[str]) -> None:
    for principal in principals:
        if not _PRINCIPAL.fullmatch(principal):
            raise click.UsageError(
                f"--principal {principal!r}: expected TYPE:NAME, as in User:shop",
                click.get_current_context(silent=True),
            )
    from streamflow.logs.kafka_access import acl_commands

    commands = {
        role: acl_commands(role, app, principals or [f"User:{role}"], bootstrap=url.bootstrap, secured=url.is_secured)
        for role in roles
    }
    if output.as_json:
        output.document({"app": app, "roles": commands})
        return
    for role, lines in commands.items():
        output.text(f"# {role}")
        for line in lines:
            output.text(line)


# -------------------------------------------------------------------------------------------------------------- check


@topics.command("check", short_help="Name every wrong setting and the command that repairs it.")
@_common
def check(app: str, url: str, as_json: bool) -> None:
    """Name every wrong setting, with the command that repairs it. The exit code is 1 if there is any.

    \b
    Example:
      streamflow topics check --app shop --url kafka://broker:9092
      streamflow topics check --app shop --json | jq -r '.problems[].repair'
    """
    output = Output(as_json=as_json)
    connection = _connect(url, app)
    found = _all_topics(connection)
    problems = _problems(connection, found, url)
    if as_json:
        output.document({"app": connection.app, "problems": [each._asdict() for each in problems]})
    elif problems:
        for each in problems:
            output.text(f"{each.topic}: {each.setting} must be {each.expected}, found {each.found}")
            output.text(f"  {each.repair}")
        output.say(f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}")
    else:
        output.say(f"All {len(found)} topics of app {connection.app} are as they must be")
    if problems:
        raise click.exceptions.Exit(1)


def _problems(connection: Topics, found: dict[str, Described], url: str) -> list[Wrong]:
    from streamflow.logs.base import COMMANDS, HISTORY, TOPICS
    from streamflow.logs.kafka_topics import Wrong

    create = f"streamflow topics create --app {connection.app} --url {place_of(url)}"
    problems = []
    numbers = {each.name: each.partitions for each in found.values()}
    # The partitions of where runs are decided count, for records lie there.
    wanted = next((found[topic].partitions for topic in (HISTORY, COMMANDS) if topic in found), None)
    if wanted is not None and connection.url.partitions not in (None, wanted):
        problems.append(
            Wrong(
                connection.name(HISTORY), "partitions", str(connection.url.partitions), str(wanted),
                "drop partitions= from the URL: the number is fixed",
            )
        )  # fmt: skip
    for topic in TOPICS:
        if topic not in found:
            lost = topic == HISTORY and bool(found)
            repair = "restore it: all runs are kept there. Or delete the app's other topics to begin anew"
            problems.append(Wrong(connection.name(topic), "the topic", "there", "none", repair if lost else create))
    for topic, each in found.items():
        if wanted is not None and numbers[each.name] != wanted:
            repair = f"delete it and run: {create}: a topic of another number of partitions cannot be repaired"
            problems.append(Wrong(each.name, "partitions", str(wanted), str(each.partitions), repair))
        problems += connection.wrong(topic, each)
    return problems


# ----------------------------------------------------------------------------------------------------------- describe


@topics.command("describe", short_help="Show the topics: partitions, copies, settings, offsets.")
@_common
def describe(app: str, url: str, as_json: bool) -> None:
    """Show the topics: id, partitions, copies, records, start and end offsets (summed up), settings.

    \b
    Example:
      streamflow topics describe --app shop --url kafka://broker:9092
      streamflow topics describe --app shop --json | jq '.topics[] | {name, end}'
    """
    output = Output(as_json=as_json)
    connection = _connect(url, app)
    found = _all_topics(connection)
    if not found:
        from streamflow.logs.checks import no_app

        raise no_app(connection.url.url, connection.app)
    offsets = connection.offsets(found)
    if as_json:
        output.document({
            "app": connection.app,
            "topics": [
                _as_json(each) | {"start": offsets[topic][0], "end": offsets[topic][1]}
                for topic, each in found.items()
            ],
        })  # fmt: skip
        return
    rows = [
        [
            Cell(each.name, "bold"),
            Cell(_id_of(each), "dim"),
            Cell(str(each.partitions)),
            Cell(str(each.replication)),
            Cell(f"{sum(offsets[topic][0]):,}"),
            Cell(f"{sum(offsets[topic][1]):,}"),
            Cell(" ".join(f"{name}={each.settings[name]}" for name in SHOWN_SETTINGS if name in each.settings)),
        ]
        for topic, each in found.items()
    ]
    columns = ("topic", "id", "partitions", "replicas", "start", "end", "settings")
    output.table(columns, rows, right=("partitions", "replicas", "start", "end"))


def _all_topics(connection: Topics) -> dict[str, Described]:
    """Those of the app that are there, its step queues too."""
    from streamflow.logs.base import TOPICS

    return connection.describe([*TOPICS, *connection.queues()], settings=True)


def _id_of(topic: Described) -> str:
    """As Kafka's own tools write it."""
    return topic.id.translate(str.maketrans("+/", "-_"))


def _as_json(topic: Described) -> dict[str, Any]:
    return {
        "name": topic.name,
        "id": _id_of(topic),
        "partitions": topic.partitions,
        "replicas": topic.replication,
        "settings": {name: topic.settings[name] for name in sorted(topic.settings)},
    }
