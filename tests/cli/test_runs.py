"""The commands that talk to an app, as real processes against a real worker: data, talk and exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import uuid
from datetime import datetime
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from streamflow.cli import inspect
from streamflow.cli.main import cli
from tests.cli import driver
from tests.cli.conftest import Shop
from tests.cli.driver import Process, Starter


@pytest.fixture
def id() -> str:
    return f"run-{uuid.uuid4().hex[:8]}"


class Ran(NamedTuple):
    stdout: str
    stderr: str


def unhinted(lines: list[str]) -> list[str]:
    """What was said without the hint that an answer takes long: a busy machine may earn it at any command."""
    return [line for line in lines if not line.startswith("No answer yet:")]


def sf(shop: Shop, *args: str, code: int = 0, stdin: str = "", inside: bool = True) -> Ran:
    """Run a command to its end, in this process or in one of its own, which takes longer; without that hint."""
    if inside:
        result = CliRunner().invoke(cli, args, env=dict(shop.env), input=stdin, prog_name="streamflow")
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        stdout, stderr, exit_code = result.stdout, result.stderr, result.exit_code
    else:
        process = driver.run(shop.folder, *args, env=shop.env, stdin=stdin)
        stdout, stderr, exit_code = process.stdout, process.stderr, process.returncode
    ran = Ran(stdout, "".join(unhinted(stderr.splitlines(keepends=True))))
    assert exit_code == code, f"{args}: exit code {exit_code}: {ran}"
    assert "\x1b" not in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr or "-v" in args
    return ran


def data(ran: Ran) -> Any:
    assert ran.stdout.count("\n") == 1
    return json.loads(ran.stdout)


def cut(table: str) -> list[list[str]]:
    """The cells of a plain table."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]


def test_a_run_from_start_to_cleanup(served: Shop, id: str) -> None:
    assert sf(served, "start", "fulfil", '"o-1"', "7", "--id", id, inside=False).stdout == f"{id}\n"

    follower = Process(served.folder, "watch", id, env=served.env)
    follower.wait_for("waiting on signal approved")
    status = sf(served, "status", id, inside=False).stdout.splitlines()
    assert status[0].split() == ["id", id]
    assert "state       running" in status
    assert 'progress    {"done": 1, "total": 2}' in status
    assert "waiting on  signal approved" in status
    assert 'arguments   ["o-1", 7]' in status
    assert any(re.fullmatch(r"started     \S+T\S+ \((now|.+ ago)\)", line) for line in status)

    sent = sf(served, "signal", id, "approved", '"by Ann"', inside=False)
    assert (sent.stdout, sent.stderr) == ("", f"Signal approved sent to {id}.\n")
    assert data(sf(served, "result", id, inside=False)) == {"payment": "paid 7 for o-1", "note": "by Ann"}
    assert follower.wait() == 0
    assert "completed" in follower.stdout[-1] and "by Ann" in follower.stdout[-1]
    assert all(datetime.fromisoformat(line.split()[0]).tzinfo for line in follower.stdout)

    assert data(sf(served, "cleanup", id, "--json", inside=False)) == {"id": id, "cleaned": True}
    gone = sf(served, "status", id, code=1, inside=False)
    assert gone.stdout == "" and gone.stderr.startswith("Error: ") and id in gone.stderr


def test_json_everywhere(served: Shop, id: str) -> None:
    started = {"id": id, "workflow": "fulfil", "attached": False}
    assert data(sf(served, "start", "fulfil", '"o-1"', "--id", id, "--json")) == started
    assert data(sf(served, "start", "fulfil", '"o-1"', "--id", id, "--json")) == started | {"attached": True}
    follower = Process(served.folder, "watch", id, "--json", env=served.env)
    follower.wait_for("signal approved")
    assert data(sf(served, "signal", id, "approved", "--json")) == {"id": id, "signal": "approved", "accepted": True}
    assert data(sf(served, "result", id, "--json"))["note"] is None
    assert follower.wait() == 0
    changes = [json.loads(line) for line in follower.stdout]
    assert changes[-1]["state"] == "completed" and changes[-1]["result"]["payment"] == "paid 5 for o-1"
    assert [each["turn"] for each in changes] == sorted(each["turn"] for each in changes)

    status = data(sf(served, "status", id, "--json"))
    assert (status["id"], status["state"], status["args"]) == (id, "completed", ["o-1"])
    assert status["answered"] is True
    assert datetime.fromisoformat(status["closed_at"]) >= datetime.fromisoformat(status["started_at"])
    steps = data(sf(served, "steps", id, "--json"))
    assert [(step["number"], step["name"], step["kind"]) for step in steps["items"]] == [
        (0, "charge", "step"),
        (1, "approved", "signal"),
    ]
    assert steps["cursor"] is None
    history = data(sf(served, "history", id, "--json"))
    assert [history[0]["type"], history[-1]["type"]] == ["RunCreated", "RunCompleted"]
    listed = data(sf(served, "list", "--json"))
    assert id in [each["id"] for each in listed["items"]]


def test_waiting_for_a_start_shows_progress_on_stderr_and_the_result_on_stdout(served: Shop) -> None:
    ran = sf(served, "start", "add", "2", "-5", "--wait")
    assert ran.stdout == "-3\n"
    assert "completed" in ran.stderr.splitlines()[-1]
    lines = sf(served, "start", "add", "1", "-", "--wait", "--json", stdin="41").stdout.splitlines()
    assert json.loads(lines[-1])["result"] == 42


def test_a_failed_run_is_exit_code_1_with_its_error(served: Shop, id: str) -> None:
    failed = sf(served, "start", "broken", '"no stock"', "--id", id, "--wait", code=1)
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith(f"Error: workflow {id} failed: ")
    assert "no stock" in failed.stderr

    result = sf(served, "result", id, code=1)
    assert result.stdout == "" and result.stderr.startswith(f"Error: workflow {id} failed: ")
    assert "no stock" in result.stderr and result.stderr.count("\n") == 1
    watched = sf(served, "watch", id, "--json", code=1)
    assert json.loads(watched.stdout.splitlines()[-1])["state"] == "failed"
    assert "no stock" in sf(served, "watch", id, code=1).stdout

    traced = sf(served, "result", id, "-v", code=1).stderr
    assert 'shop.py", line' in traced and "in broken" in traced
    assert 'shop.py", line' in sf(served, "watch", id, "-v", code=1).stderr
    assert 'shop.py", line' in sf(served, "status", id, "-v").stdout

    table = cut(sf(served, "steps", id).stdout)
    assert table[0] == ["#", "name", "kind", "state", "attempts", "duration", "error"]
    assert table[1][:5] == ["0", "refuse", "step", "failed", "2"]
    assert table[1][-1] == "ValueError: no stock"

    history = sf(served, "history", id).stdout.splitlines()
    assert history[0].split() == ["turn", "at", "event", "fields"]
    retried = next(line for line in history if "StepAttemptFailed" in line)
    assert "attempt=1" in retried and "error=ValueError: no stock" in retried


def test_cancel_and_terminate(served: Shop, id: str) -> None:
    sf(served, "start", "patient", "3600", "--id", f"{id}-c")
    sf(served, "cancel", f"{id}-c")
    assert "was cancelled" in sf(served, "result", f"{id}-c", code=1).stderr
    assert sf(served, "cancel", f"{id}-c", code=1).stderr.startswith("Error: ")

    sf(served, "start", "patient", "3600", "--id", f"{id}-t")
    assert "sleep until 2" in sf(served, "status", f"{id}-t").stdout
    kept = sf(served, "cleanup", f"{id}-t", code=1)
    assert kept.stdout == "" and "--force" in kept.stderr
    sf(served, "terminate", f"{id}-t", "--reason", "no longer needed")
    assert "no longer needed" in sf(served, "watch", f"{id}-t", code=1).stdout
    assert "no longer needed" in sf(served, "status", f"{id}-t").stdout
    sf(served, "start", "patient", "3600", "--id", f"{id}-f")
    assert sf(served, "cleanup", f"{id}-f", "--force").stderr == f"{id}-f is deleted.\n"


def test_list_filters_and_pages(served: Shop, id: str) -> None:
    for number in range(3):
        sf(served, "start", "add", "1", "1", "--id", f"{id}-{number}", "--wait")
    first = sf(served, "list", "--workflow", "add", "--state", "completed", "--limit", "2")
    table = cut(first.stdout)
    assert table[0] == ["id", "workflow", "state", "created", "took", "detail"]
    assert [row[0] for row in table[1:]] == [f"{id}-2", f"{id}-1"]
    assert [row[1:3] for row in table[1:]] == [["add", "completed"]] * 2
    cursor = first.stderr.removeprefix("There are more: --cursor ").strip()
    more = sf(served, "list", "--workflow", "add", "--state", "completed", "--limit", "1", "--cursor", cursor)
    assert cut(more.stdout)[1][0] == f"{id}-0"
    oldest = data(sf(served, "list", "--workflow", "add", "--order", "asc", "--json"))["items"]
    assert [each["id"] for each in oldest][-3:] == [f"{id}-0", f"{id}-1", f"{id}-2"]
    nothing = sf(served, "list", "--workflow", "nothing")
    assert (nothing.stdout, nothing.stderr) == ("", "No such runs.\n")


def test_when_and_whether_to_start(served: Shop, id: str) -> None:
    sf(served, "start", "add", "1", "1", "--id", id, "--delay", "1h")
    status = sf(served, "status", id).stdout
    assert "scheduled" in status and "start until 2" in status and ("(in 1 h)" in status or "(in 59 min" in status)
    assert id in sf(served, "start", "add", "1", "1", "--id", id, "--if-exists", "error", code=1).stderr
    attached = sf(served, "start", "add", "1", "1", "--id", id)
    assert attached.stdout == f"{id}\n" and f"Run {id} exists already: attached to it" in attached.stderr
    sf(served, "start", "add", "1", "1", "--id", f"{id}-at", "--at", "2099-01-01T00:00:00+02:00")
    assert "2098-12-31T22:00:00" in sf(served, "status", f"{id}-at").stdout
    sf(served, "start", "patient", "3600", "--id", f"{id}-limit", "--timeout", "50ms", "--wait", code=1)
    both = sf(served, "start", "add", "--delay", "1", "--at", "2099-01-01T00:00Z", code=2)
    assert "give one" in both.stderr


def test_with_the_code_at_hand_arguments_are_checked_before_they_are_sent(served: Shop, id: str) -> None:
    wrong = sf(served, "start", "add", '"one"', "1", "--id", id, "--app", "shop:app", code=1, inside=False)
    assert wrong.stderr.startswith("Error: ") and "argument a" in wrong.stderr
    assert sf(served, "start", "add", "1", "1", "--app", "shop.py:app", "--wait", inside=False).stdout == "2\n"
    assert id in sf(served, "status", id, code=1).stderr


def test_a_signal_with_an_error_or_sent_twice(served: Shop, id: str) -> None:
    sf(served, "start", "fulfil", '"o"', "--id", id)
    refused = sf(served, "signal", id, "approved", "1", "--error", "no", code=2)
    assert "not both" in refused.stderr
    sf(served, "signal", id, "other", "1", "--signal-id", "s-1")
    sf(served, "signal", id, "other", "1", "--signal-id", "s-1")
    assert sf(served, "history", id).stdout.count("SignalReceived") == 1
    sf(served, "signal", id, "approved", "--error", "fraud")
    assert "fraud" in sf(served, "result", id, code=1).stderr


def test_a_result_that_takes_too_long(served: Shop, id: str) -> None:
    sf(served, "start", "patient", "3600", "--id", id)
    late = sf(served, "result", id, "--timeout", "50ms", code=1)
    assert late.stderr == f"Error: {id} is still open after 50 ms; it goes on\n"


def test_ctrl_c_is_quiet(served: Shop, id: str) -> None:
    sf(served, "start", "patient", "3600", "--id", id)
    follower = Process(served.folder, "watch", id, env=served.env)
    follower.wait_for("running")
    follower.send(signal.SIGINT)
    assert follower.wait() == 130
    assert unhinted(follower.stderr) == []


def test_a_reader_that_goes_away_is_quiet(served: Shop, id: str) -> None:
    sf(served, "start", "fulfil", '"o"', "--id", id)
    reader = subprocess.Popen(
        [*driver.COMMAND, "history", id],
        cwd=served.folder,
        env=driver.environment(served.env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    reader.stdout.close()
    _, said = reader.communicate(timeout=driver.DEADLINE_SECONDS)
    assert unhinted(said.splitlines()) == []


def test_text_of_others_cannot_steer_the_terminal(served: Shop, id: str) -> None:
    sf(served, "start", "broken", json.dumps("\x1b[2J\nhidden"), "--id", id, "--wait", code=1)
    for command, code in (("status", 0), ("steps", 0), ("history", 0), ("result", 1)):
        assert "hidden" in "".join(sf(served, command, id, code=code))  # which looks for escapes
    assert "\\x1b[2J hidden" in sf(served, "list").stdout


def test_without_a_worker_it_says_what_it_waits_for(launch: Starter, shop: Shop) -> None:
    worker = launch("worker", "shop:app")
    worker.wait_for("Serving", stream="stderr")
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    asking = launch("start", "add", "1", "2", "--wait")
    hint = asking.wait_for("No answer yet", stream="stderr")
    assert "shop" in hint and "streamflow worker" in hint
    launch("worker", "shop:app")
    assert asking.wait() == 0, asking.said
    assert asking.stdout == ["3"]


def test_without_a_worker_the_last_published_status_is_shown(
    launch: Starter, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "STATUS_SECONDS", 0.1)
    worker = launch("worker", "shop:app")
    worker.wait_for("Serving", stream="stderr")
    follower = launch("start", "fulfil", '"o-1"', "--id", "left", "--wait")
    follower.wait_for("waiting on signal approved", stream="stderr")
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    shown = sf(shop, "status", "left")
    assert "state       running" in shown.stdout and "waiting on  signal approved" in shown.stdout
    assert shown.stderr.startswith("No worker of app shop answered within 0.1 s: this is the last published status of")
    asked = sf(shop, "status", "left", "--json")
    assert (data(asked)["state"], data(asked)["answered"]) == ("running", False) and asked.stderr == shown.stderr
    unknown = sf(shop, "status", "unknown", code=1)
    assert unknown.stdout == "" and unknown.stderr.count("\n") == 1
    assert "no worker answered for run unknown within 0.1 s, and no status of it is published" in unknown.stderr


def test_a_log_that_does_not_exist_is_one_line(shop: Shop) -> None:
    ran = sf(shop, "status", "x", code=1)
    assert ran.stderr.startswith("Error: ") and ran.stderr.count("\n") == 1 and "shop.db" in ran.stderr
