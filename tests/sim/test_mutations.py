"""The simulator finds each mistake of mutants.py.

A mutation that survives is a hole in the simulator, to be closed before the mutation is taken out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

import tests.sim.mutants  # its mutations enter themselves in the list
import tests.sim.mutants_bounds
import tests.sim.mutants_kept
import tests.sim.mutants_reading
import tests.sim.mutants_seen
import tests.sim.mutants_timing  # noqa: F401
from streamflow.core.partition import Partition
from streamflow.errors import Unavailable
from streamflow.sim.search import play
from tests.sim.mutating import MISTAKES, MUTATIONS, Mutation, swap

SEEDS: Final = 2_000
"""Seeds, from 0 on, within which each must be found; most are found by the first few.

The search begins with the seed that found it when the mutation was written, goes on to the last and then through those
before: whichever finds it is one of these seeds, and where none does all have been played.
"""


KEPT: Final = [
    (int(line.split()[0]), line.split()[1])
    for line in Path(__file__).with_name("seeds.txt").read_text().splitlines()
    if line[:1].isdigit()
]
KEPT_SEARCHED: Final = 40
"""Seeds that are looked through for one that takes the place of a kept one."""


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_found(mutation: Mutation):
    MISTAKES.clear()
    first = mutation.seeds - 1
    seeds = (*range(first, SEEDS), *range(first))
    with mutation.patch():
        found = next((verdict for verdict in map(play, seeds) if verdict.failure is not None), None)
    assert found is not None, f"survived {SEEDS} seeds"
    assert MISTAKES == []
    assert found.rule in mutation.found_by, f"seed {found.seed}, {found.kind}: {found.failure}"


@pytest.mark.parametrize(("seed", "name"), KEPT)
def test_a_kept_seed_holds_and_finds_its_mutation(seed: int, name: str):
    mutation = next(each for each in MUTATIONS if each.name == name)
    assert play(seed).failure is None
    with mutation.patch():
        found = play(seed)
        if found.failure is None:
            others = (other for other in range(KEPT_SEARCHED) if play(other).failure is not None)
            pytest.fail(f"seed {seed} is another story now, and does not find {name}; seed {next(others, None)} does")
    assert found.rule in mutation.found_by, found.failure


def test_there_are_kept_seeds():
    assert len(KEPT) >= 5


def test_there_are_mutations_of_all_parts_and_no_two_alike():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 26
    rules = {rule for mutation in MUTATIONS for rule in mutation.found_by}
    assert rules >= {"1", "2", "3", "4", "5", "6", "7", "8", "outcome", "refused", "endless"}


def test_a_mutation_that_is_broken_itself_is_told_from_a_broken_product():
    def breaks(self: Partition) -> None:
        self.title  # type: ignore[attr-defined]

    def passes_on(self: Partition) -> None:
        raise Unavailable("the log is away")

    MISTAKES.clear()
    with swap(Partition, "close", passes_on), pytest.raises(Unavailable):
        Partition.close(None)  # type: ignore[arg-type]
    assert MISTAKES == []
    with swap(Partition, "close", breaks), pytest.raises(AttributeError):
        Partition.close(None)  # type: ignore[arg-type]
    assert len(MISTAKES) == 1 and "title" in MISTAKES[0]
