"""Who should own which partition: one pure rule for every log that has no group coordinator of its own.

Every member computes the same assignment from the same facts (who lives, who holds what), so nobody has to lead. The
rule keeps what members hold as far as an even share allows, hence a newcomer takes only its share, and a hand-over
that is half done does not change the plan for the other half.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def assign(partitions: int, members: Iterable[str], holders: Mapping[int, str]) -> dict[int, str]:
    """The member that should own each partition; empty without members. Shares differ by one at most."""
    names = sorted(set(members))
    if not names:
        return {}
    held: dict[str, list[int]] = {name: [] for name in names}
    for partition in range(partitions):
        if (holder := holders.get(partition)) in held:
            held[holder].append(partition)
    base, extra = divmod(partitions, len(names))
    # The larger shares go to those who hold most, so that fewer partitions move; names break ties.
    ranked = sorted(names, key=lambda name: (-len(held[name]), name))
    share = {name: base + (rank < extra) for rank, name in enumerate(ranked)}
    plan = {partition: name for name in names for partition in held[name][: share[name]]}
    free = iter([partition for partition in range(partitions) if partition not in plan])
    for name in names:
        for _ in range(share[name] - min(len(held[name]), share[name])):
            plan[next(free)] = name
    assert len(plan) == partitions, (plan, partitions)
    return plan


class Share:
    """One member's view: what it holds, less what it must give up or lost.

    A partition that its consumer took and that vanished comes back only after `release`: otherwise a member that is
    still stopping it would take its own late `release` for that of the new tenure. What the consumer never took, being
    busy while it came and went, nobody will stop and release: it is given up at once, as a stray.
    """

    def __init__(self) -> None:
        self.shown: frozenset[int] = frozenset()
        self.stopping: set[int] = set()
        self._taken: set[int] = set()

    def update(self, held: Iterable[int], planned: Iterable[int]) -> bool:
        """Take in what is held and planned for this member now; True when `shown` changed."""
        wanted = frozenset(held) & frozenset(planned)
        self.stopping |= (self.shown - wanted) & self._taken
        before, self.shown = self.shown, wanted - self.stopping
        return self.shown != before

    def strays(self, held: Iterable[int]) -> frozenset[int]:
        """What is held and neither shown nor being stopped: to be given up at once."""
        return frozenset(held) - self.shown - self.stopping

    def take(self) -> frozenset[int]:
        """The consumer takes what is shown now."""
        self._taken |= self.shown
        return self.shown

    def release(self, partition: int) -> None:
        """The member has stopped the partition (of its own accord if it was still shown)."""
        self.stopping.discard(partition)
        self._taken.discard(partition)
        self.shown -= {partition}
