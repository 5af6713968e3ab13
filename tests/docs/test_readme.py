"""The README is true: its code runs, its commands and limits exist, and what it promises first happens."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from prometheus_client import Counter

import streamflow as sf
from streamflow import config, metrics
from streamflow.cli.main import cli
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
    shown = CliRunner().invoke(cli, [line[0], "--help"])
    assert shown.exit_code == 0
    for option in [word for word in line if word.startswith("--")]:
        assert option in shown.output


def test_every_command_has_help_and_takes_json():
    assert len(COMMANDS) > 10
    for name in COMMANDS:
        shown = CliRunner().invoke(cli, [name, "--help"])
        assert shown.exit_code == 0 and "--json" in shown.output and "Example" in shown.output, name


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (driver.ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line[0] for line in shell_lines("make")} | set(re.findall(r"`make (\w+)`", README))
    assert {"demo", "test"} <= named <= targets


def test_every_metric_is_in_the_readme():
    counters = [value for value in vars(metrics).values() if isinstance(value, Counter)]
    names = {f"`{family.name}_total`" for counter in counters for family in counter.describe()}
    assert {row[0] for row in table("metric")} == names


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
    """The README's example and commands; its one step also notes that it ran."""
    source = (folder / "hello.py").read_text()
    noted = source.replace('    return f"Hello', '    open("ran", "a").write(f"{name}\\n")\n    return f"Hello')
    assert noted != source
    (folder / "hello.py").write_text(noted)
    worker, start, watch = shell_lines("streamflow")

    async def kill_it_asleep(victim: driver.Process) -> None:
        async with sf.connect(f"sqlite:///{folder}/hello.db", app="hello") as client:
            async for status in client.handle("first").watch():
                if any(waiting.startswith("sleep") for waiting in status.waiting_on):
                    victim.send(signal.SIGKILL)
                    return

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
