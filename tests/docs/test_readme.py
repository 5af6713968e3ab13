"""The README is true: its code runs, its commands and limits exist, and what it promises first happens."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from confluent_kafka import ConsumerGroupTopicPartitions
from confluent_kafka.admin import AdminClient

import streamflow as sf
from streamflow import config
from streamflow.cli.main import cli
from streamflow.logs.kafka_url import parse_kafka
from tests import metering
from tests.cli import driver

README = (driver.ROOT / "README.md").read_text()
COMMANDS = cli.list_commands(click.Context(cli))
LINE_OF_FIRST_CODE_MAX = 25


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def python_files() -> dict[str, str]:
    """The Python blocks by the name in their first line; the first block is the example, which is named beside it."""
    first, *others = blocks("python")
    named = {match[1]: block for block in others if (match := re.match(r"# (\w+\.py)\n", block))}
    assert len(named) == len(others), "each block but the first begins with the name of its file"
    return {"hello.py": first, **named}


def shell_lines(command: str) -> list[list[str]]:
    """The lines of the shell blocks that call that command, split as a shell does."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    words = [shlex.split(line.removesuffix("&"), comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == [command]]


def table(header: str) -> list[list[str]]:
    """The cells of the table whose first column has that header."""
    found = re.search(rf"^\| {header} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert found is not None, f"no table of {header}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]


def python(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=driver.environment(),
        capture_output=True,
        text=True,
        timeout=driver.DEADLINE_SECONDS,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of the README."""
    for name, text in python_files().items():
        (tmp_path / name).write_text(text)
    return tmp_path


# ----------------------------------------------------------------------------------------------------------- it is code


def test_code_comes_early():
    before, fence, _ = README.partition("```python\n")
    assert fence and before.count("\n") + 1 <= LINE_OF_FIRST_CODE_MAX


def test_the_example_prints_what_the_readme_says(folder: Path):
    expected = README.partition("run `python hello.py`:\n\n```\n")[2].partition("```")[0]
    done = python(folder, "hello.py")
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


@pytest.mark.parametrize("name", [name for name in python_files() if not name.startswith("test_")])
def test_the_other_programs_run(folder: Path, name: str):
    done = python(folder, "-W", "error", name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in python_files() if name.startswith("test_")])
def test_the_tests_pass(folder: Path, name: str):
    done = python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", name)
    assert done.returncode == 0, done.stdout


def test_the_programs_are_well_typed_and_formatted(folder: Path):
    names = ["hello.py", "shop.py", "drive.py"]
    for command in (["mypy", "--strict", *names], ["ruff", "format", "--check", "--line-length=120", "."]):
        done = python(folder, "-m", *command)
        assert done.returncode == 0, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------- what it names


def test_every_command_is_in_the_readme_and_every_command_there_exists():
    listed = [re.fullmatch(r"`streamflow (\w+)`", row[0]) for row in table("command")]
    assert sorted(match[1] for match in listed if match) == sorted(COMMANDS)
    assert {match[1] for match in re.finditer(r"`streamflow (\w+)", README)} <= set(COMMANDS)


@pytest.mark.parametrize("line", shell_lines("streamflow"), ids=lambda line: line[0])
def test_the_options_of_the_commands_exist(line: Sequence[str]):
    group = isinstance(cli.get_command(click.Context(cli), line[0]), click.Group)
    shown = CliRunner().invoke(cli, [*line[: 2 if group else 1], "--help"])
    assert shown.exit_code == 0
    for option in [word for word in line if word.startswith("--")]:
        assert option in shown.output


def test_every_command_has_help_and_takes_json():
    assert len(COMMANDS) > 10
    for name in COMMANDS:
        shown = CliRunner().invoke(cli, [name, "--help"])
        assert shown.exit_code == 0 and "--json" in shown.output and "Example" in shown.output, name


def production() -> tuple[dict[str, str], list[list[str]]]:
    """The variables and the commands of the section on production."""
    (block,) = [block for block in blocks("sh") if "kafka://" in block]
    lines = [shlex.split(line.partition(" &")[0], comments=True) for line in block.splitlines()]
    variables = dict(line[1].split("=", 1) for line in lines if line[0] == "export")
    return variables, [line for line in lines if line[0] != "export"]


def test_the_url_of_production_is_one():
    variables, _ = production()
    with pytest.raises(sf.InvalidArguments, match=r"sasl\.password\.file cannot be read: .*: /run/secrets/kafka"):
        parse_kafka(variables["STREAMFLOW_URL"])


def test_the_way_into_production_works(kafka: str, folder: Path):
    """Its commands, in order, with a broker and an app of our own; Kafka's own tool stands in no jar."""
    variables, commands = production()
    name = f"readme-{uuid.uuid4().hex[:8]}"
    (folder / "shop.py").write_text((folder / "shop.py").read_text().replace('App("shop"', f'App("{name}"'))
    env = variables | {"STREAMFLOW_APP": name, "STREAMFLOW_URL": f"kafka://{kafka}"}
    workers = []
    groups = [line[-1].replace("shop", name) for line in commands if line[0] == "kafka-consumer-groups.sh"]
    admin = AdminClient({"bootstrap.servers": kafka})
    try:
        for program, *args in commands:
            if args[0] == "worker":
                workers = [driver.Process(folder, *args, env=env) for _ in range(2)]
                for worker in workers:
                    worker.wait_for(f"Serving app {name}", stream="stderr")
            elif program == "streamflow":
                args = args[: args.index(">")] if ">" in args else args
                done = driver.run(folder, *args, env=env)
                assert done.returncode == 0, done.stderr
        order = '{"id": "o-1", "total": 40}'
        started = driver.run(folder, "start", "fulfil", order, "--id", "o-1", env=env)
        assert started.returncode == 0, started.stderr
        assert driver.run(folder, "signal", "o-1", "approved", "true", env=env).returncode == 0
        assert driver.run(folder, "result", "o-1", env=env).stdout.strip() == '"parcel o-1"'
        assert groups == [name, f"{name}.outbox"]
        deadline = time.monotonic() + driver.DEADLINE_SECONDS
        for group in groups:  # workers tell their group from time to time
            while not _committed(admin, group):
                assert time.monotonic() < deadline, f"{group} has no offset to lag behind"
    finally:
        for worker in workers:
            worker.send(signal.SIGTERM)
        codes = [worker.wait() for worker in workers]
        mine = [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith(f"{name}.")]
        for future in (admin.delete_topics(mine) if mine else {}).values():
            future.result(10)
    assert codes == [0, 0]


def _committed(admin: AdminClient, group: str) -> int:
    """The offsets that the group has committed, added up."""
    asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group]
    return sum(max(0, place.offset) for place in asked.result(driver.DEADLINE_SECONDS).topic_partitions)


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (driver.ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line[0] for line in shell_lines("make")} | set(re.findall(r"`make (\w+)`", README))
    assert {"demo", "test"} <= named <= targets


def test_every_metric_is_in_the_readme():
    rows = {row[0].strip("`"): row for row in table("metric")}
    families = {metering.full_name(family): family for family in metering.families()}
    assert rows.keys() == families.keys()
    for name, family in families.items():
        assert rows[name][1] == family.type
        said = set(re.findall(r"`(\w+)`", rows[name][2])) - {"queue="}
        assert {label for sample in family.samples for label in sample.labels} - {"le"} <= said, name


def test_the_limits_exist_and_are_so():
    for name, default, _ in table("limit"):
        place = config.LIMITS if name.strip("`").islower() else config
        assert getattr(place, name.strip("`")) == float(default.replace(",", "")), name


def test_the_files_that_it_names_exist():
    named = re.findall(r"`(streamflow/[\w/.]+)`|`(LICENSE)`", README)
    assert named
    for path in filter(None, [part for parts in named for part in parts]):
        assert (driver.ROOT / path).is_file(), path


# ----------------------------------------------------------------------------------------------------- what it promises


def test_a_new_users_workflow_survives_kill_9(folder: Path):
    """The README's example and commands; its one step also notes that it ran, and it sleeps long enough for a kill."""
    source = (folder / "hello.py").read_text()
    noted = source.replace('    return f"Hello', '    open("ran", "a").write(f"{name}\\n")\n    return f"Hello')
    assert noted != source
    asleep = noted.replace("asyncio.sleep(1)", "asyncio.sleep(5)")
    assert asleep != noted
    (folder / "hello.py").write_text(asleep)
    worker, start, watch = shell_lines("streamflow")[:3]

    async def kill_it_asleep(victim: driver.Process) -> None:
        async with sf.connect(f"sqlite:///{folder}/hello.db", app="hello") as client:
            async for status in client.handle("first").watch():
                if any(waiting.startswith("sleep") for waiting in status.waiting_on):
                    victim.send(signal.SIGKILL)
                    return
        raise AssertionError("the run ended before it was seen asleep: nothing was killed")

    async def steps() -> list[sf.StepView]:
        async with sf.connect(f"sqlite:///{folder}/hello.db", app="hello") as client:
            handle = client.handle("first")
            assert await handle.result(timeout=driver.DEADLINE_SECONDS) == ["Hello, Ada", "Hello, Grace"]
            return (await handle.steps()).items

    first = driver.Process(folder, *worker)
    try:
        first.wait_for("Serving app hello", stream="stderr")
        started = driver.run(folder, *start)
        assert (started.returncode, started.stdout) == (0, "first\n"), started.stderr
        asyncio.run(kill_it_asleep(first))
        assert first.wait() == -signal.SIGKILL
    finally:
        first.close()
    second = driver.Process(folder, *worker)
    try:
        found = asyncio.run(steps())
        watched = driver.run(folder, *watch)
    finally:
        second.close()
    assert watched.returncode == 0 and "completed" in watched.stdout
    assert [(step.kind, step.state) for step in found] == [("step", "completed")] * 2 + [("sleep", "completed")]
    assert sorted((folder / "ran").read_text().split()) == ["Ada", "Grace"], "each step ran once"
