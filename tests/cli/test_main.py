"""The group: every command has help with an example, what is wrong is one line, and `--help` loads nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from streamflow.cli import main
from streamflow.cli.main import COMMANDS, cli
from streamflow.errors import Unavailable
from tests.cli import driver

ENTRIES = {name: entry for section in COMMANDS.values() for name, entry in section.items()}
OF_ONE_APP = [name for name in ENTRIES if name not in {"demo", "worker", "broker", "topics", "bench", "sim"}]


def load(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)
    return command


@pytest.mark.parametrize("name", ENTRIES)
def test_every_command_has_help_with_an_example_and_json(name: str) -> None:
    said = CliRunner().invoke(cli, [name, "--help"], prog_name="streamflow")
    assert said.exit_code == 0
    assert re.search("Examples?:", said.output) and f"  streamflow {name}" in said.output
    assert "--json" in said.output
    assert load(name).name == name
    assert ENTRIES[name].summary.endswith(".")


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in {"demo", "bench"}])
def test_the_overview_says_what_the_command_says_of_itself(name: str) -> None:
    assert load(name).short_help == ENTRIES[name].summary


def test_the_overview_says_what_the_demo_says_of_itself() -> None:
    first = (load("demo").help or "").partition("\n")[0]
    assert first == ENTRIES["demo"].summary


@pytest.mark.parametrize("name", ENTRIES)
def test_every_option_is_explained(name: str) -> None:
    silent = [each.name for each in load(name).params if isinstance(each, click.Option) and not each.help]
    assert silent == []


def test_the_overview_names_every_command() -> None:
    said = CliRunner().invoke(cli, ["--help"])
    assert said.exit_code == 0
    for name, entry in ENTRIES.items():
        assert any(line.split()[:1] == [name] and entry.summary in line for line in said.output.splitlines())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["statsu"], "Did you mean status or start?"),
        (["frobnicate"], "No such command 'frobnicate'."),
        (["status"], "Missing argument 'ID'"),
        (["list", "--state", "done", "--app", "shop"], "'done' is not one of"),
        (["status", "x", "--app", "Shop!"], "app name must match"),
        (["status", "x", "--app", "shop", "--url", "memory://"], "sqlite:///FILE"),
        (["start", "add", "one", "--app", "shop"], "'one' is not JSON"),
        (["start", "add", "--delay", "soon", "--app", "shop"], "1h30m"),
        (["start", "add", "--at", "2031-05-01", "--app", "shop"], "zone"),
    ],
)
def test_a_wrong_call_is_exit_code_2_and_talk_goes_to_stderr(args: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgres://x", "log URL must start with sqlite://"),
        ("sqlite://shop.db", "write sqlite:///shop.db (three slashes)"),
        ("sqlite://[x", "a bracket in a path is written %5B or %5D"),
        ("sqlite:///x.db?sync=full", "unknown option 'sync'"),
        ("kafka://a:x", "expected HOST:PORT of a broker, found 'a:x'"),
        ("kafka://a?acks=0", "acks is set by streamflow itself"),
        ("kafka://a?no.such=1", 'No such configuration property: "no.such"'),
        ("kafka://a?schema.registry.url=ftp://x", "schema.registry.url must be http(s)://"),
    ],
)
@pytest.mark.parametrize(
    "args",
    [["status", "x", "--app", "shop"], ["topics", "check", "--app", "shop"], ["bench", "--only", "W1", "--runs", "1"]],
    ids=["a client", "topics", "bench"],
)
def test_a_url_that_cannot_be_is_a_wrong_call_on_one_line(args: list[str], url: str, said: str) -> None:
    result = CliRunner().invoke(cli, [*args, "--url", url])
    assert (result.exit_code, result.stdout) == (2, "")
    if args[0] == "topics" and not url.startswith("kafka:"):
        assert "this command is for Kafka" in " ".join(result.stderr.split())
        return
    talk, error, end = result.stderr.rpartition("Error: ")
    assert error and said in end and end.count("\n") == 1
    assert talk == "" or args[0] == "bench"


@pytest.mark.parametrize("name", OF_ONE_APP)
def test_a_missing_app_says_both_ways_to_name_it(name: str) -> None:
    needed = sum(isinstance(each, click.Argument) and each.required for each in load(name).params)
    result = CliRunner().invoke(cli, [name, *["x"] * needed])
    assert result.exit_code == 2
    assert "--app shop" in result.stderr and "STREAMFLOW_APP=shop" in result.stderr


def test_an_error_of_ours_is_one_line_any_other_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"ours": Unavailable("the log is away"), "bug": ZeroDivisionError("oops"), "ctrl-c": KeyboardInterrupt()}

    def fail() -> None:
        raise failures[what]

    command = click.Command("fail", callback=fail)
    monkeypatch.setattr(main.LazyGroup, "get_command", lambda *_: command)
    monkeypatch.setitem(main._ENTRIES, "fail", main.Entry("", "", ""))
    what = "ours"
    result = CliRunner().invoke(cli, ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: the log is away\n")
    what = "bug"
    assert isinstance(CliRunner().invoke(cli, ["fail"]).exception, ZeroDivisionError)
    what = "ctrl-c"
    result = CliRunner().invoke(cli, ["fail"])
    assert (result.exit_code, result.output) == (130, "")


def test_help_loads_nothing_heavy() -> None:
    heavy = "asyncio", "rich", "msgspec", "fastavro", "rocksdict", "sqlite3", "streamflow.worker", "streamflow.client"
    program = (
        "import sys; from streamflow.cli.main import cli\n"
        "try: cli(['--help'], 'streamflow')\n"
        f"except SystemExit: print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=driver.environment(), check=False
    )
    assert ran.stderr == "[]\n"


def test_help_answers_at_once(tmp_path: Path) -> None:
    # Two seconds on a busy machine stand for 0.1 s on an idle one: this catches a heavy import, not a slow machine.
    spent = []
    for _ in range(3):
        began = time.monotonic()
        assert driver.run(tmp_path, "--help").returncode == 0
        spent.append(time.monotonic() - began)
    assert min(spent) < 2


def test_the_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert result.exit_code == 0 and result.output.startswith("streamflow")
