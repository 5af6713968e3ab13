"""`streamflow demo`, small but real: processes, a SIGKILL, the check from the log; and its ends, good and bad."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from streamflow.cli.demo import _in_words, demo
from streamflow.cli.demo_show import Summary, find_problems
from streamflow.cli.demo_view import LiveView, PlainView, Scene, SilentView, choose_view
from streamflow.cli.evidence import Findings, Line, examine, read_history, read_lines
from streamflow.cli.worker_process import WorkerDied, Workers, run
from streamflow.logs.open import open_log

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "streamflow", "demo"]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def findings(**changes: object) -> Findings:
    well = {
        "lost": [],
        "run_again": [],
        "unknown": [],
        "unperformed": [],
        "runs": 12,
        "runs_completed": 12,
        "steps": 36,
        "failed_attempts": 4,
        "repeated_attempts": 2,
    }
    return Findings(**(well | changes))  # type: ignore[arg-type]


def summary(**changes: object) -> Summary:
    values = {
        "orders": 12,
        "seconds": 5.0,
        "killed_worker": 4711,
        "killed_after_seconds": 2.0,
        "taken_over_seconds": 0.4,
        "cut_off_attempts": 3,
        "records": 90,
        "partitions": 4,
        "findings": findings(),
    }
    return Summary(**(values | changes))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ for real


@pytest.mark.slow
def test_the_demo_completes_and_its_own_check_can_fail(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    ran = subprocess.run(
        [*COMMAND, "--orders", "12", "--json", "--dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert found["ok"]
    assert found["problems"] == []
    assert found["orders"] == found["completed"] == 12
    assert found["steps"] == 36
    assert (found["steps_lost"], found["completed_steps_run_again"]) == (0, 0)
    assert found["killed_worker"]
    assert found["taken_over_seconds"] > 0
    assert Path(found["folder"]) == folder
    assert not is_alive(found["killed_worker"])
    spoil(folder)


def spoil(folder: Path) -> None:
    """What the demo left behind passes its check; the same with one fact changed does not."""

    async def read_again():
        log = await open_log(f"sqlite:///{folder / 'shop.db'}", app="shop", create=False)
        try:
            return await read_history(log)
        finally:
            await log.close()

    history, lines = asyncio.run(read_again()), read_lines(folder / "steps.txt")
    assert find_problems(12, examine(history, lines), killed=True) == []
    last = lines[-1]
    again = Line(last.workflow_id, last.number, 1, "started", last.at_ms + 60_000, last.pid)
    assert "completed steps run again" in find_problems(12, examine(history, [*lines, again]), killed=True)[0]
    unknown = Line("order-0001", 99, 1, "started", last.at_ms, last.pid)
    assert "does not know" in find_problems(12, examine(history, [*lines, unknown]), killed=True)[0]
    missing = [line for line in lines if line.workflow_id != last.workflow_id]
    assert "nobody performed" in find_problems(12, examine(history, missing), killed=True)[0]
    step = history.runs["order-0001"].steps[0]
    outcomes, step.outcomes = step.outcomes, []
    assert "steps lost" in find_problems(12, examine(history, lines), killed=True)[0]
    step.outcomes = outcomes * 2
    assert "steps lost" in find_problems(12, examine(history, lines), killed=True)[0]
    step.outcomes = outcomes
    del history.runs["order-0001"]
    assert "12 orders were placed" in find_problems(12, examine(history, lines), killed=True)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_workers_too(tmp_path: Path, number: signal.Signals, code: int) -> None:
    workers: list[int] = []
    said = []
    signalled = False
    with subprocess.Popen(
        [*COMMAND, "--orders", "5000"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            workers += map(int, re.findall(r"worker (\d+) started", line))
            if " owns " in line and not signalled:  # the second such line may be on its way when the first is read
                assert all(map(is_alive, workers))
                process.send_signal(number)
                signalled = True
    assert process.returncode == code, "".join(said)
    assert len(workers) == 2, "".join(said)
    assert not any(map(is_alive, workers))
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith("streamflow-demo")] == []


# ------------------------------------------------------------------------------------------------------- words and ends


def test_what_is_left_to_do_is_said() -> None:
    text = "\n".join(_in_words(summary(), None))
    assert "12 of 12 completed" in text
    assert "0 steps lost" in text
    assert "0 completed steps run again" in text
    assert "FAILED" not in text
    assert "streamflow demo --keep" in text
    kept = "\n".join(_in_words(summary(), "sqlite:////tmp/a b/shop.db"))
    assert "streamflow list --url 'sqlite:////tmp/a b/shop.db' --app shop" in kept


def test_a_broken_promise_is_said() -> None:
    bad = findings(lost=["step 1 of a", "step 2 of a", "step 3 of a", "step 4 of a"], runs_completed=11)
    problems = find_problems(12, bad, killed=True)
    assert problems == [
        "12 orders were placed, the log has 12, 11 completed",
        "4 steps lost: step 1 of a, step 2 of a, step 3 of a, ...",
    ]
    text = "\n".join(_in_words(summary(findings=bad, problems=problems), None))
    assert re.search(r"FAILED +11 of 12 completed", text)
    assert re.search(r"FAILED +4 steps lost", text)
    assert find_problems(12, findings(), killed=False) == ["no worker was killed, so this run shows nothing"]


def test_a_broken_promise_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def perform(self: object) -> Summary:
        return summary(problems=["1 steps lost: step 1 of a"])

    monkeypatch.setattr("streamflow.cli.demo_show.Show.perform", perform)
    ran = CliRunner().invoke(demo, ["--orders", "12", "--json"])
    assert ran.exit_code == 1
    assert json.loads(ran.stdout)["problems"] == ["1 steps lost: step 1 of a"]
    said = CliRunner().invoke(demo, ["--orders", "12", "--dir", str(tmp_path / "new")])
    assert said.exit_code == 1
    assert "FAILED  1 steps lost" in said.stdout
    assert str(tmp_path) in said.stdout


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    ran = CliRunner().invoke(demo, ["--dir", str(tmp_path)])
    assert ran.exit_code == 2
    assert "is not empty" in ran.output


def test_a_worker_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    async def main(workers: Workers) -> None:
        workers.start("no.such.module:app", "sqlite:///x.db", tmp_path / "worker.log")
        await workers.watch()

    with Workers() as workers, pytest.raises(WorkerDied, match=r"ended with exit code 2; it wrote:[^$]*no module 'no'"):
        run(main(workers))


# ---------------------------------------------------------------------------------------------------------- the views

SCENE = Scene(
    seconds=1.5,
    orders=12,
    phases=Counter({"completed": 3, "waiting": 2}),
    steps=20,
    failed_attempts=4,
    workers=[(11, "running"), (12, "killed")],
    last_orders=["order-0001"],
)


def test_a_terminal_gets_a_live_picture() -> None:
    shown = StringIO()
    with LiveView(Console(file=shown, force_terminal=True, width=100, highlight=False)) as view:
        view.tell(1.0, "worker 12 killed with SIGKILL")
        view.show(SCENE)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    for expected in ("3 of 12 orders completed", "worker 12: killed", "killed with SIGKILL", "order-0001", "waiting"):
        assert expected in text


def test_a_pipe_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView() as view:
        view.show(SCENE)
        view.show(SCENE)  # within the same second: not again
        view.tell(1.6, "worker 12 killed with SIGKILL")
    assert capsys.readouterr().out.splitlines() == [
        "  1.5 s  orders: 0 working, 0 backing off, 0 sleeping, 2 waiting, 3 completed; 20 steps done",
        "  1.6 s  worker 12 killed with SIGKILL",
    ]


def test_json_gets_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(choose_view(as_json=True), SilentView)
    with choose_view(as_json=True) as view:
        view.tell(0, "something")
        view.show(SCENE)
    assert capsys.readouterr().out == ""
    assert isinstance(choose_view(as_json=False), PlainView)
