"""The soak: real workers, step workers and a client on a real three-node Apache Kafka, hurt by chance for minutes.

    python tests/e2e/soak.py --minutes 10 --seed 7

The minutes include start and check. Faults come by the seed (soak_faults.py) while a client (soak_driver.py) starts,
signals, cancels and terminates runs (soak_app.py), and workers (soak_worker.py) trim what deleted runs left behind;
then the faults stop, every accepted run must end, and the checker (checker.py), which shares no code with the product,
reads the topics, what soak_recorder.py read before it was trimmed, and all logs, and judges. The exit code is 1 if any
promise was broken; the folder with all that was written is kept then, and named.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it finds only its own folder

from streamflow.broker import Cluster
from streamflow.logs.base import steps_topic
from streamflow.logs.open import open_log
from tests.e2e.checker import Report, check, longest_pauses, pauses
from tests.e2e.checker_history import LOST, UNEXPLAINED, Violation
from tests.e2e.checker_promises import Policies
from tests.e2e.checker_topics import read_lines, read_topics
from tests.e2e.soak_app import (
    BACKOFF_FACTOR,
    BACKOFF_SECONDS,
    BACKOFF_SECONDS_MAX,
    JITTER,
    OVERRUN_SECONDS,
    QUEUE,
    RETENTION_SECONDS,
)
from tests.e2e.soak_driver import ENOUGH, JOURNAL
from tests.e2e.soak_faults import CLIENT, STEP_WORKER, STEP_WORKERS, WORKER, WORKERS, Fleet, now_ms, plan
from tests.e2e.soak_recorder import RECORDED, Recorder

PARTITIONS: Final = 6
MINUTES_MIN: Final = 2.0
RESERVE_SECONDS: Final = 70.0
"""What of the minutes is left for healing, the last runs and the check."""
DRAIN_SECONDS: Final = 180.0
"""How long the last runs may take to end once all faults are over. They sleep for seconds; a restore takes seconds."""
SETTLE_SECONDS: Final = 25.0
"""How long workers look on after the last run: a late status of a deposed owner is replaced at the second look, 10 s
after a take-over, which may itself come seconds after the last fault."""
PROGRESS_SECONDS: Final = 15.0
PAUSES_SHOWN: Final = 5
SHOWN_MAX: Final = 40
"""Violations that are printed; all of them are in the folder."""

# When a record was in the log, told by the broker: what a step did before is then a violation, not a matter of luck.
BROKER_SETTINGS: Final = {"log.message.timestamp.type": "LogAppendTime"}


TRIMS_MINUTES: Final = 4.0
"""A soak of so many minutes has runs whose retention is over, and enough of their records to be worth a trim."""

POLICIES: Final = Policies(
    timeouts={"overrun": round(1000 * OVERRUN_SECONDS)},
    initial=1000 * BACKOFF_SECONDS,
    factor=BACKOFF_FACTOR,
    max_delay=1000 * BACKOFF_SECONDS_MAX,
    jitter=JITTER,
    retention=round(1000 * RETENTION_SECONDS),
)


class Soak:
    """One soak, from its start to its verdict."""

    def __init__(self, *, minutes: float, seed: int, url: str | None, keep: bool = False) -> None:
        self.began = time.monotonic()
        self.minutes = minutes
        self.seed = seed
        self.url = url
        self.keep = keep
        self.folder = Path(tempfile.mkdtemp(prefix="streamflow-soak-"))
        self.app = f"soak-{seed}-{random.SystemRandom().randrange(10**6)}"
        self.seconds: dict[str, float] = {}
        self.late = False
        self.trimmed = 0

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def run(self) -> int:
        """The exit code."""
        print(f"soak of {self.minutes:g} min, seed {self.seed}, in {self.folder}", flush=True)
        (self.folder / "effects").mkdir()
        cluster = None if self.url is not None else Cluster(self.folder / "brokers", nodes=3, settings=BROKER_SETTINGS)
        try:
            if cluster is not None:
                cluster.start()
                self.say("three brokers answer")
            url = f"{self.url or (cluster.url if cluster else '')}"
            fleet = Fleet(
                self.folder, f"{url}{'&' if '?' in url else '?'}partitions={PARTITIONS}", self.app, self.seed,
                cluster, self.say,
            )  # fmt: skip
            try:
                asyncio.run(self.hurt(fleet))
            finally:
                fleet.kill()
            report = self.judge(fleet, bootstrap_of(url))
        except BaseException:
            print(f"seed {self.seed}: everything that was written is in {self.folder}", flush=True)
            raise
        finally:
            if cluster is not None:
                cluster.stop()
        self.show(fleet, report)
        if report.violations:
            print(f"FAILED: seed {self.seed}; everything that was written is in {self.folder}", flush=True)
            return 1
        if not self.keep:
            shutil.rmtree(self.folder)
        return 0

    async def hurt(self, fleet: Fleet) -> None:
        """Everything up, faults, everything up again, the last runs."""
        log = await open_log(fleet.url, app=self.app)  # makes the topics
        await log.end_offset(steps_topic(QUEUE), 0)  # and this one, before brokers are hurt
        await log.close()
        progress = self.folder / RECORDED
        self.recorder = Recorder(bootstrap_of(fleet.url), f"{self.app}.history", PARTITIONS, progress)
        self.recorder.start()
        for group, count in ((WORKER, WORKERS), (STEP_WORKER, STEP_WORKERS), (CLIENT, 1)):
            for _ in range(count):
                fleet.add(group)
        telling = asyncio.create_task(self.tell(fleet))
        try:
            until = self.began + 60 * self.minutes - RESERVE_SECONDS
            await fleet.hurt(plan(self.seed), until)
            self.say("the faults are over")
            (self.folder / ENOUGH).touch()
            healed = time.monotonic()
            self.late = not await fleet.until_done(DRAIN_SECONDS)
            self.seconds["from the last fault to the last run's end"] = time.monotonic() - healed
            self.say("runs are still open" if self.late else "all runs have ended")
            await fleet.settle(SETTLE_SECONDS)
            await fleet.stop()
        finally:
            telling.cancel()

    async def tell(self, fleet: Fleet) -> None:
        """How far it is, every so often."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)  # tidy: lines for people
            counts = Counter(line["what"] for line in read_lines(self.folder / JOURNAL))
            alive = sum(slot.process is not None and slot.process.is_alive for slot in fleet.slots)
            self.say(
                f"runs: {counts['started']} accepted, {counts['saw']} seen to their end; "
                f"{len(fleet.faults)} faults; {alive} processes"
            )

    def judge(self, fleet: Fleet, bootstrap: str) -> Report:
        """What the checker says, and what only we know."""
        began = time.monotonic()
        topics = read_topics(bootstrap, self.app)
        topics.history_left = topics.history
        topics.history = self.recorder.finish()
        self.trimmed = len(topics.history) - len(topics.history_left)
        effects = read_lines(*sorted((self.folder / "effects").iterdir()))
        said = {path.stem: path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log"))}
        report = check(topics, effects, read_lines(self.folder / JOURNAL), fleet.faults, POLICIES, said)
        if not self.trimmed and self.minutes >= TRIMS_MINUTES:
            report.violations.append(Violation(LOST, "no history was trimmed, although most of its runs were deleted"))
        if self.late:
            report.violations.append(Violation(LOST, f"runs were open {DRAIN_SECONDS:g} s after the last fault"))
        report.violations += [Violation(UNEXPLAINED, death) for death in fleet.deaths]
        self.seconds["reading and checking"] = time.monotonic() - began
        if self.url is not None:
            delete_topics(bootstrap, self.app)
        return report

    def show(self, fleet: Fleet, report: Report) -> None:
        """The table."""
        longest = longest_pauses(report.turn_times, fleet.faults)
        counts = Counter(fault["kind"] for fault in fleet.faults)
        rows = [
            ("runs accepted / closed", f"{report.accepted} / {report.closed}"),
            ("steps", f"{report.steps} ({report.retried} attempts failed, {report.repeated} ran again)"),
            ("history records trimmed, runs deleted", f"{self.trimmed}, {report.deleted}"),
            ("turns", f"{report.turns} ({report.claims} owners, {report.ignored} records of deposed ones)"),
            *((what, f"{seconds:.1f} s") for what, seconds in self.seconds.items()),
            ("faults", str(len(fleet.faults))),
            ("starts that found no broker", str(fleet.gave_up)),
        ]
        print()
        for what, value in rows:
            print(f"{what:42} {value}")
        print(f"\n{'fault':42} {'times':>5}  longest time without a turn of some partition")
        for kind in sorted(counts):
            print(f"{kind:42} {counts[kind]:5}  {longest[kind]:.1f} s")
        began_ms = now_ms() - (time.monotonic() - self.began) * 1000
        for partition, begin, end in pauses(report.turn_times, PAUSES_SHOWN):
            when = f"{(begin - began_ms) / 1000:.1f} s to {(end - began_ms) / 1000:.1f} s"
            print(f"{(end - begin) / 1000:5.1f} s without a turn: partition {partition}, {when}")
        print(f"\n{'violations':42}")
        for category, count in report.counts().items():
            print(f"{category:42} {count:5}")
        text = [f"{violation.category}: {violation.what}" for violation in report.violations]
        (self.folder / "violations.txt").write_text("\n".join(text))
        print("\n".join(text[:SHOWN_MAX]))
        if len(text) > SHOWN_MAX:
            print(f"… and {len(text) - SHOWN_MAX} more in {self.folder}/violations.txt")


def bootstrap_of(url: str) -> str:
    """The brokers of a kafka:// URL."""
    return url.partition("://")[2].partition("?")[0]


def delete_topics(bootstrap: str, app: str) -> None:
    """Leave a cluster that is not ours as it was."""
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": bootstrap})
    mine = [topic for topic in admin.list_topics(timeout=30).topics if topic.startswith(f"{app}.")]
    for future in (admin.delete_topics(mine) if mine else {}).values():
        future.result()


def main(args: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="A soak on a real Kafka, full of faults, and its check.")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, start and check included (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the faults and the runs (default: another each time)"
    )
    parser.add_argument("--url", default=None, help="kafka://… of a cluster that runs; its brokers are not hurt then")
    parser.add_argument("--keep", action="store_true", help="keep what was written, also when all was well")
    given = parser.parse_args(args)
    if given.minutes < MINUTES_MIN:
        parser.error(f"--minutes must be at least {MINUTES_MIN:g}: start, healing and check take one and a half")
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    return Soak(minutes=given.minutes, seed=seed, url=given.url, keep=given.keep).run()


if __name__ == "__main__":
    sys.exit(main())
