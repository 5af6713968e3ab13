"""Seeds: the kept ones hold, the same seed is the same story everywhere, and a failure is made small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamflow.cli.main import cli
from streamflow.sim.rules import Violated
from streamflow.sim.search import minimise, play
from tests.sim.mutants import take_a_failed_append_for_a_good_one

HERE = Path(__file__).parent
KEPT = [int(line.split()[0]) for line in (HERE / "seeds.txt").read_text().splitlines() if line[:1].isdigit()]


@pytest.mark.parametrize("seed", KEPT)
def test_a_seed_that_once_failed_holds(seed: int):
    assert play(seed).failure is None


def test_the_same_seed_is_the_same_story_in_two_processes():
    found = []
    for hashing in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", "from streamflow.sim.search import play; print([play(s).trace for s in range(4)])"],
            env={**os.environ, "PYTHONHASHSEED": hashing},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        found.append(json.loads(ran.stdout))
    assert found[0] == found[1] == [play(seed).trace for seed in range(4)]
    assert len(set(found[0])) == 4


def test_a_world_has_twenty_faults_and_more():
    assert all(len(play(seed).faults) >= 15 for seed in range(4))  # those after the last result do not happen


def test_a_failing_seed_is_shown_with_the_faults_that_are_enough():
    with take_a_failed_append_for_a_good_one():
        failures = (found for seed in range(20) if (found := play(seed)).failure is not None)
        verdict = next(found for found in failures if len(found.faults) > 3)
        smaller = minimise(verdict)
    assert smaller.kind == verdict.kind
    assert len(smaller.faults) < len(verdict.faults)
    assert smaller.last


def test_the_command_says_what_broke_and_exits_with_one(monkeypatch: pytest.MonkeyPatch):
    def broken(self: object, workflow_id: str, result: object, encoded: bytes) -> None:
        raise Violated(f"run {workflow_id}: made up (2)")

    monkeypatch.setattr("streamflow.sim.rules.Rules.seen", broken)
    ran = CliRunner().invoke(cli, ["sim", "--seed", "3"])
    assert ran.exit_code == 1
    assert "seed 3" in ran.output and "made up (2)" in ran.output and "streamflow sim --seed 3" in ran.output


def test_the_command_tells_the_story_of_one_seed():
    ran = CliRunner().invoke(cli, ["sim", "--seed", "3"])
    assert ran.exit_code == 0, ran.output
    assert "seed 3: all invariants held" in ran.output


def test_the_command_plays_many_seeds_as_json():
    ran = CliRunner().invoke(cli, ["sim", "--seeds", "0..5", "--jobs", "2", "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["worlds"] == 6 and found["failed"] == []


@pytest.mark.parametrize("wrong", ["9..3", "x", "1..", "-1..2"])
def test_seeds_that_are_no_range_are_refused(wrong: str):
    ran = CliRunner().invoke(cli, ["sim", f"--seeds={wrong}"])
    assert ran.exit_code == 2
    assert "expected two numbers" in ran.output
