"""Seeds: the kept ones hold, the same seed is the same story everywhere, and a failure is made small."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from itertools import count, islice

import pytest
from click.testing import CliRunner

from streamflow.cli.main import cli
from streamflow.sim import search as module
from streamflow.sim.rules import Violated
from streamflow.sim.search import CHUNK_SEEDS, Verdict, minimise, play, search
from streamflow.sim.simulation import Simulation
from streamflow.sim.world import Stuck, TooLong, World
from tests.sim.mutants import take_a_failed_append_for_a_good_one


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


def test_nothing_is_left_of_a_world(monkeypatch: pytest.MonkeyPatch):
    """A search plays thousands in one process."""
    made: list[weakref.ref[World]] = []
    usual = World.__init__

    def begin(self: World, seed: int) -> None:
        usual(self, seed)
        made.append(weakref.ref(self))

    monkeypatch.setattr(World, "__init__", begin)
    play(3)
    gc.collect()
    assert [world() for world in made] == [None]


def test_a_world_has_twenty_faults_and_more():
    faults = [len(play(seed).faults) for seed in range(4)]
    assert sum(faults) >= 20 * len(faults), faults  # those after the last result do not happen


def test_a_failing_seed_is_shown_with_the_faults_that_are_enough():
    with take_a_failed_append_for_a_good_one():
        failures = (found for seed in range(20) if (found := play(seed)).failure is not None)
        verdict = next(found for found in failures if len(found.faults) > 3)
        smaller = minimise(verdict)
        again = play(smaller.seed, without=frozenset(smaller.without))
    assert (smaller.kind, smaller.rule) == (verdict.kind, verdict.rule)
    assert len(smaller.faults) < len(verdict.faults)
    assert smaller.last
    assert smaller.failed_first == verdict.failure
    assert (again.failure, again.faults, again.trace) == (smaller.failure, smaller.faults, smaller.trace)


def test_another_failure_is_not_what_was_looked_for(monkeypatch: pytest.MonkeyPatch):
    """Fault 3 breaks one rule; without it, fault 5 breaks another."""

    def told(seed: int, *, without: frozenset[int] = frozenset()) -> Verdict:
        left = [number for number in range(8) if number not in without]
        rule = "1" if 3 in left else "7" if 5 in left else ""
        return Verdict(
            seed=seed,
            failure=f"of {len(left)} faults ({rule})" if rule else None,
            kind="Violated" if rule else "",
            rule=rule,
            faults=[f"{number}: at 1.000 s something" for number in left],
            without=sorted(without),
        )

    monkeypatch.setattr(module, "play", told)
    smaller = minimise(told(17))
    assert smaller.faults == ["3: at 1.000 s something"]
    assert smaller.without == [0, 1, 2, 4, 5, 6, 7]
    assert (smaller.failure, smaller.failed_first) == ("of 1 faults (1)", "of 8 faults (1)")


@pytest.mark.parametrize(
    ("error", "rule"),
    [
        (Violated("history[0] 7: it is closed twice (5)"), "5"),
        (Violated("run a: planned was cancel, a client was told (3) and more"), "outcome"),
        (Violated("the driver was refused: Unavailable()"), "refused"),
        (Stuck("nothing is left to happen"), "endless"),
        (TooLong("after 100,000 steps"), "endless"),
        (KeyError("a"), "KeyError"),
    ],
)
def test_a_verdict_names_what_noticed_it(error: Exception, rule: str, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Simulation) -> None:
        raise error

    monkeypatch.setattr(Simulation, "run", fails)
    verdict = play(1)
    assert (verdict.kind, verdict.rule) == (type(error).__name__, rule)


def test_no_more_seeds_are_taken_than_are_about_to_be_played():
    taken = 0

    def seeds() -> Iterator[int]:
        nonlocal taken
        for seed in count():
            taken += 1
            yield seed

    found = search(seeds(), jobs=2)
    assert [verdict.seed for verdict in islice(found, 2)] == [0, 1]
    found.close()  # type: ignore[attr-defined]
    assert taken <= (2 * 2 + 1) * CHUNK_SEEDS


def test_who_is_killed_leaves_no_process_behind():
    """Those of the pool have its output: it ends when the last of them has."""
    text = "for each in search(count(), jobs=2): print(each.seed, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"from itertools import count\nfrom streamflow.sim.search import search\n{text}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,  # what is left of it says that semaphores leak
        text=True,
    ) as asked:
        try:
            assert asked.stdout is not None
            assert asked.stdout.readline() == "0\n"
        finally:
            asked.kill()
        asked.communicate(timeout=60)


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
