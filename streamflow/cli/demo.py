"""`streamflow demo`: orders, flaky payments, a SIGKILL half-way, and what the log says about it afterwards."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Final

import click

from streamflow.cli.output import Output

if TYPE_CHECKING:
    from streamflow.cli.demo_show import Summary

ORDERS_DEFAULT: Final = 200
KAFKA_PARTITIONS: Final = 4


@click.command()
@click.option("--orders", type=click.IntRange(2, 5000), default=ORDERS_DEFAULT, show_default=True, help="How many.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="An empty or new folder for the log and all else; it is kept.  [default: a temporary one]",
)
@click.option("--kafka", is_flag=True, help="On a real Apache Kafka, which is started for it.")
@click.option("--keep", is_flag=True, help="Keep the temporary folder, to look at the orders afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary alone, as JSON.")
def demo(orders: int, folder: Path | None, kafka: bool, keep: bool, as_json: bool) -> None:
    """See a workflow survive its worker, on one SQLite file or on Kafka.

    Two worker processes fulfil orders: payments that fail and are tried again, steps side by side, durable timers, and
    a signal when a person approves. Half-way one worker is killed with SIGKILL; the other takes over, a new one joins.
    Then everything is checked from the log. Exit code 1 when a promise was broken.

    \b
    Examples:
      streamflow demo
      streamflow demo --keep
      streamflow demo --kafka
    """
    # Here, so that `--help` does not load a log and a client.
    from streamflow.cli.demo_show import Show
    from streamflow.cli.demo_view import choose_view
    from streamflow.cli.worker_process import Workers, run

    with ExitStack() as stack:
        place = _choose_folder(folder, keep, stack)
        url = _start_kafka(place / "kafka", stack) if kafka else None
        if not as_json:
            where = f"an Apache Kafka of its own ({url})" if kafka else "a new SQLite file"
            click.echo(f"{orders} orders on {where}, two workers; half-way one of them is killed.\n")
        workers = stack.enter_context(Workers())
        with choose_view(as_json=as_json) as view:
            show = Show(orders, place, workers, view, url)
            summary = run(show.perform())
        kept = folder is not None or keep
        if as_json:
            Output(as_json=True).document(_as_document(summary, place if kept else None))
        else:
            click.echo(
                "\n".join(
                    _in_words(summary, show.url if kept else None, place if kept and kafka else None, kafka=kafka)
                )
            )
    if summary.problems:
        raise click.exceptions.Exit(1)


def _start_kafka(folder: Path, stack: ExitStack) -> str:
    """A broker for as long as the demo lasts; the URL of a log on it."""
    from streamflow.broker import Cluster

    cluster = Cluster(folder, say=lambda text: click.echo(text, err=True))
    return f"{stack.enter_context(cluster).url}?partitions={KAFKA_PARTITIONS}"


def _choose_folder(folder: Path | None, keep: bool, stack: ExitStack) -> Path:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise click.BadParameter(f"{folder} is not empty: name a new folder", param_hint="--dir")
        return folder.resolve()
    if keep:
        return Path(mkdtemp(prefix="streamflow-demo-"))
    return Path(stack.enter_context(TemporaryDirectory(prefix="streamflow-demo-", ignore_cleanup_errors=True)))


def _as_document(summary: Summary, folder: Path | None) -> dict[str, object]:
    findings = summary.findings
    return {
        "ok": not summary.problems,
        "problems": summary.problems,
        "orders": summary.orders,
        "completed": findings.runs_completed,
        "steps": findings.steps,
        "steps_lost": len(findings.lost),
        "completed_steps_run_again": len(findings.run_again),
        "interrupted_attempts_repeated": findings.repeated_attempts,
        "failed_attempts_retried": findings.failed_attempts,
        "seconds": summary.seconds,
        "killed_worker": summary.killed_worker,
        "killed_after_seconds": summary.killed_after_seconds,
        "taken_over_seconds": summary.taken_over_seconds,
        "attempts_cut_off": summary.cut_off_attempts,
        "records": summary.records,
        "partitions": summary.partitions,
        "folder": None if folder is None else str(folder),
    }


def _in_words(summary: Summary, url: str | None, broker: Path | None = None, *, kafka: bool = False) -> Sequence[str]:
    """The end of the demo for people: what was checked, what came out, what to try next."""
    findings = summary.findings
    lines = [
        f"\nChecked from the log: {summary.records:,} records in {summary.partitions} partitions, read again from the",
        "first one, and compared with the lines that every step appended to a file when it ran:",
        _check(findings.runs_completed == summary.orders, f"{findings.runs_completed} of {summary.orders} completed"),
        _check(
            not findings.lost,
            f"{len(findings.lost)} steps lost: each of {findings.steps} scheduled steps has exactly one outcome",
        ),
        _check(not findings.run_again, f"{len(findings.run_again)} completed steps run again"),
    ]
    lines += [f"  FAILED  {problem}" for problem in summary.problems]
    lines += [
        "",
        f"  {findings.failed_attempts} failed payments were tried again. The kill cut off {summary.cut_off_attempts} "
        "steps in the middle;",
        f"  {findings.repeated_attempts} attempts ran a second time: cut off by the kill, or by the hand-over of a "
        "partition to another",
        "  worker, before their outcome was in the log.",
    ]
    if summary.taken_over_seconds is not None:
        lines.append(
            f"  Worker {summary.killed_worker} was killed after {summary.killed_after_seconds:.1f} s; "
            f"its orders had a new owner {summary.taken_over_seconds:.2f} s later."
        )
    lines += [f"  {summary.seconds:.1f} s in all.", "", *_what_next(url, broker, kafka=kafka)]
    return lines


def _check(ok: bool, text: str) -> str:
    return f"  {'ok' if ok else 'FAILED':8}{text}"


def _what_next(url: str | None, broker: Path | None, *, kafka: bool) -> list[str]:
    source = os.path.relpath(Path(__file__).with_name("demo_shop.py"))
    if url is None:
        again = "streamflow demo --keep" + (" --kafka" if kafka else "")
        return [f"The workflow is {source}. Next: {again}, then look at single orders."]
    where = f"--url {shlex.quote(url)} --app shop"
    port = "".join(character for character in url.partition("?")[0].rpartition(":")[2] if character.isdigit())
    first = (
        [] if broker is None else [f"  streamflow broker --dir {shlex.quote(str(broker / 'kafka'))} --port {port} &"]
    )
    return [
        f"The workflow is {source}. To look at the orders, start a worker:",
        *first,
        f"  streamflow worker streamflow.cli.demo_shop:app --url {shlex.quote(url)} &",
        f"  streamflow list {where}",
        f"  streamflow steps order-0003 {where}",
    ]
