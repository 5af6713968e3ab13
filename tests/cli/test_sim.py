"""The command `sim`, with worlds that end as they are told to. Real ones: tests/sim."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from streamflow import __version__
from streamflow.cli import sim as module
from streamflow.cli.main import cli
from streamflow.sim import search
from streamflow.sim.search import Verdict
from streamflow.sim.situations import SITUATIONS, WORLDS_MIN

EVERYTHING = dict.fromkeys(SITUATIONS, 1)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["sim", *args])


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let each world end so; gives the seeds that were played. A failing one needs its fault number 2."""

    def end(*failing: int, marks: dict[str, int] = EVERYTHING) -> list[int]:
        played: list[int] = []

        def play(seed: int, *, without: frozenset[int] = frozenset()) -> Verdict:
            played.append(seed)
            faults = [f"{number}: at 0.000 s something" for number in range(4) if number not in without]
            verdict = Verdict(seed=seed, failure=None, faults=faults, marks=marks, without=sorted(without))
            if seed in failing and 2 not in without:
                verdict.failure, verdict.kind, verdict.rule = f"{len(faults)} faults (3)", "Violated", "3"
            return verdict

        monkeypatch.setattr(search, "play", play)
        return played

    return end


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--seed", "1", "--seeds", "1..2"], "--seed and --seeds both say"),
        (["--seed", "1", "--minutes", "1"], "--seed and --minutes both say"),
        (["--seeds", "1..2", "--minutes", "1"], "--seeds and --minutes both say"),
        (["--fresh", "3", "--seeds", "1..2"], "--seeds and --fresh both say"),
        (["--without", "1,2"], "name it with --seed"),
        (["--seed", "1", "--without", "1,x"], "expected the numbers of faults, as in 3,7,9"),
        (["--minutes", "nan"], "expected a number above 0"),
        (["--minutes", "inf"], "expected a number above 0"),
        (["--minutes", "0"], "expected a number above 0"),
        (["--minutes", "soon"], "expected a number above 0"),
        (["--seeds", "0.." + "9" * 5_000], "expected two numbers"),
        (["--seed", "1", "--without", "9" * 5_000], "expected the numbers of faults"),
        (["--jobs", "0"], "1<=x<=256"),
        (["--jobs", "100000"], "1<=x<=256"),
    ],
)
def test_a_wrong_call_is_exit_code_2(args: list[str], said: str):
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_without_seeds_the_first_hundred_are_played(worlds: Callable[..., list[int]]):
    played = worlds()
    assert run("--jobs", "1").exit_code == 0
    assert played == list(range(100))


def test_minutes_end(worlds: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch):
    played = worlds()
    ticks = count(0.0, 10.0)  # each look at the clock takes ten seconds
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(ticks), time_ns=lambda: 5_000_000))
    result = run("--minutes", "1", "--jobs", "1")
    assert result.exit_code == 0
    assert played == [5, 6, 7, 8, 9]
    assert "fresh seeds from 5 on" in result.stderr


def test_however_few_minutes_a_world_is_played(worlds: Callable[..., list[int]]):
    played = worlds()
    assert run("--minutes", "1e-9", "--jobs", "1").exit_code == 0
    assert len(played) == 1


def test_who_is_interrupted_sums_up(worlds: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch):
    worlds(1)

    def interrupted(seeds: range, *, jobs: int) -> Iterator[Verdict]:
        yield from map(search.play, seeds[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "search", interrupted)
    result = run("--seeds", "0..99")
    assert result.exit_code != 0
    assert "\n3 worlds in " in result.stdout and "FAILED streamflow sim --seed 1" in result.stdout


def test_fresh_seeds_are_drawn_from_the_time_and_printed(
    worlds: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
):
    played = worlds()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0, time_ns=lambda: 77_000_000))
    result = run("--fresh", "3", "--jobs", "1")
    assert played == [77, 78, 79]
    assert "streamflow sim --seeds 77..79" in result.stderr


def test_a_failing_seed_is_shown_with_the_command_that_plays_it_again(worlds: Callable[..., list[int]]):
    worlds(1)
    result = run("--seeds", "0..2", "--jobs", "1")
    assert result.exit_code == 1
    assert "seed 1 FAILED: streamflow sim --seed 1\n" in result.stderr
    shown = result.stdout.splitlines()
    assert "With all its faults: 4 faults (3)" in shown
    assert "Again with all its faults: streamflow sim --seed 1" in shown
    assert shown[-1] == "FAILED streamflow sim --seed 1 --without 0,1,3"
    (again,) = (line.removeprefix("Again: streamflow sim ") for line in shown if line.startswith("Again: "))
    replayed = run(*again.split())
    assert replayed.exit_code == 1
    assert "Violated: 1 faults (3)" in replayed.stdout and "  2: at 0.000 s something" in replayed.stdout
    assert f"Again: streamflow sim {again}" in replayed.stdout
    assert run("--seed", "1", "--without", "2").exit_code == 0


def test_where_all_fail_the_fewest_faults_are_looked_for_of_some(worlds: Callable[..., list[int]]):
    played = worlds(*range(50))
    result = run("--seeds", "0..49", "--jobs", "1", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["failed"]
    assert len(found) == 50
    assert [each["seed"] for each in found if each["without"]] == list(range(module.MINIMISED_MAX))
    assert found[0]["again"] == "streamflow sim --seed 0 --without 0,1,3"
    assert len(played) < 100


@pytest.mark.parametrize(("seeds", "missing"), [(WORLDS_MIN, ["gap", "snapshot"]), (WORLDS_MIN - 1, None)])
def test_what_a_search_never_met_is_said_loudly(
    seeds: int, missing: list[str] | None, worlds: Callable[..., list[int]]
):
    worlds(marks={name: 2 for name in SITUATIONS if name not in ("gap", "snapshot")})
    result = run("--seeds", f"0..{seeds - 1}", "--jobs", "1")
    assert result.exit_code == (1 if missing else 0)
    said = [line for line in result.stdout.splitlines() if line.startswith("NEVER OCCURRED")]
    assert said == [f"NEVER OCCURRED in {seeds} worlds: {name} ({SITUATIONS[name]})" for name in missing or ()]
    result = run("--seeds", f"0..{seeds - 1}", "--jobs", "1", "--json")
    assert result.exit_code == (1 if missing else 0)
    assert json.loads(result.stdout)["missing"] == (missing and {name: SITUATIONS[name] for name in missing})


def test_a_search_that_met_everything_is_well(worlds: Callable[..., list[int]]):
    worlds()
    result = run("--seeds", f"0..{WORLDS_MIN - 1}", "--jobs", "1", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["missing"], found["failed"], found["worlds"]) == ({}, [], WORLDS_MIN)


def test_one_world_is_no_worlds(worlds: Callable[..., list[int]]):
    worlds(marks={})
    last = run("--seed", "1").stdout.splitlines()[-1]
    assert last.startswith("1 world in ") and last.endswith(" s, 0 failed")
    worlds(marks={"gap": 1_000, "claim lost": 1})
    assert run("--seeds", "1..2", "--jobs", "1").stdout.endswith("0 failed; claim lost 2, gap 2,000\n")


# -- which code ran ----------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module lies in a folder of another repository, which does not track it."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "other").write_text("something else")
    git(tmp_path, "add", "other")
    commit(tmp_path)
    copy = shutil.copy(module.__file__, tmp_path)
    monkeypatch.setattr(module, "__file__", str(copy))
    return tmp_path


def git(folder: Path, *args: str) -> str:
    ran = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return ran.stdout.strip()


def commit(folder: Path) -> None:
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "one")


def test_the_commit_of_another_repository_is_not_ours(elsewhere: Path):
    assert module._code() == f"version {__version__}"
    git(elsewhere, "add", "sim.py")
    commit(elsewhere)
    assert module._code() == f"commit {git(elsewhere, 'rev-parse', '--short', 'HEAD')}"
    (elsewhere / "sim.py").write_text("changed")
    assert module._code() == f"commit {git(elsewhere, 'rev-parse', '--short', 'HEAD')}-dirty"


def test_without_git_the_version_is_said(worlds: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    worlds(1)
    result = run("--seed", "1")
    assert result.exit_code == 1 and result.exception is not None
    assert f"seed 1 (version {__version__}): Violated" in result.stdout
