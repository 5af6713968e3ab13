"""`streamflow bench`: six workloads on fresh logs, a worker in another process, medians of several repetitions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import click

from streamflow.cli.output import Cell, Output
from streamflow.errors import InvalidUrl, StreamflowError

if TYPE_CHECKING:
    from streamflow.cli.bench_stand import Figures
    from streamflow.cli.bench_workloads import Figure, Workload

NAMES: Final = ("W1", "W2", "W3", "W4", "W5", "W6")

SCALE_MAX: Final = 1_000
"""Ten million parked runs."""

CLIENT_SHARE_MAX: Final = 0.85
"""A client that uses more than this of a core may be what limits the figure."""


def _parse_names(ctx: click.Context, param: click.Parameter, value: str | None) -> Sequence[str]:
    if value is None:
        return NAMES
    names = [name.strip().upper() for name in value.split(",")]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise click.BadParameter(
            f"no workload {', '.join(map(repr, unknown))}: choose of {','.join(NAMES)}", ctx, param
        )
    return names


def _parse_scale(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not 0 < value <= SCALE_MAX:
        raise click.BadParameter(f"expected more than 0 and at most {SCALE_MAX}, found {value:g}", ctx, param)
    return value


def _parse_url(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and value.startswith("memory:"):
        raise click.BadParameter("a log in memory is one process's alone, and the worker is another one", ctx, param)
    return value


def _made(ctx: click.Context, param: click.Parameter, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"{folder} cannot be made: {error.strerror}", ctx, param) from None
    return folder.resolve()


@click.command()
@click.option(
    "--url",
    callback=_parse_url,
    help="A log to use instead of fresh SQLite files; each repetition makes topics of its own on it.",
)
@click.option("--only", "names", metavar="W1,W2", callback=_parse_names, help="These workloads alone.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Repetitions; medians are shown.")
@click.option("--scale", type=float, callback=_parse_scale, default=1.0, show_default=True, help="Times as many runs.")
@click.option(
    "--dir",
    "parent",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where to make the temporary folders: the disk that is measured.  [default: the system's]",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path, file_okay=False),
    callback=_made,
    help="Run the workers under cProfile (slower), and keep what it writes in this folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all figures of all repetitions as JSON.")
def bench(
    url: str | None,
    names: Sequence[str],
    runs: int,
    scale: float,
    parent: Path | None,
    profile: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast streamflow is on this machine.

    W1 latency, W2 throughput, W3 fan-out, W4 parked runs, W5 timers, W6 recovery after SIGKILL. The client is this
    process, the worker another one, the log a fresh SQLite file with synchronous=FULL; every result is checked.

    \b
    Examples:
      streamflow bench
      streamflow bench --only W1,W2 --runs 1
      streamflow bench --json > figures.json
    """
    from streamflow.cli.bench_machine import describe
    from streamflow.cli.bench_workloads import WORKLOADS
    from streamflow.cli.worker_process import Workers

    output = Output(as_json=as_json)
    with _temporary(parent) as folder:
        machine = describe(Path(folder))
    if url is not None and url.startswith("kafka://"):
        from streamflow.cli.bench_kafka import raw_limits, with_partitions

        url = with_partitions(url)
        machine["kafka"] = raw_limits(url)
    measured: dict[str, list[Figures]] = {}
    failures: list[str] = []
    for name in names:
        for repetition in range(1, runs + 1):
            output.say(f"{name} {WORKLOADS[name].title}: {repetition} of {runs}")
            stats = None if profile is None else profile / f"{name}-{repetition}.prof"
            try:
                with _temporary(parent) as folder, Workers() as workers:
                    figures = _measure(WORKLOADS[name], Path(folder), url, scale, workers, stats)
            except InvalidUrl:
                raise
            except StreamflowError as error:
                # The others are worth measuring; this one has no figures any more, since medians need all.
                failures.append(f"{name}, repetition {repetition}: {error}")
                measured.pop(name, None)
                break
            measured.setdefault(name, []).append(figures)
    medians = {name: _medians(figures) for name, figures in measured.items()}
    notes = _notes(medians, scale, profile, machine)
    if as_json:
        output.document({
            "machine": machine,
            "settings": {"url": url, "runs": runs, "scale": scale, "profile": profile is not None},
            "workloads": {
                name: {"title": WORKLOADS[name].title, "medians": medians[name], "runs": measured[name]}
                for name in measured
            },
            "notes": notes,
            "failures": failures,
        })  # fmt: skip
    else:
        _show(output, machine, {name: WORKLOADS[name] for name in measured}, measured, notes)
    for failure in failures:
        output.say(f"FAILED: {failure}")
    if failures:
        raise click.exceptions.Exit(1)


def _temporary(parent: Path | None) -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="streamflow-bench-", dir=parent, ignore_cleanup_errors=True)


def _measure(
    workload: Workload, folder: Path, url: str | None, scale: float, workers: Any, profile: Path | None
) -> Figures:
    from streamflow.cli.bench_stand import stand
    from streamflow.cli.worker_process import run

    async def main() -> Figures:
        async with stand(folder, url=url, scale=scale, workers=workers, profile=profile) as made:
            return await workload.driver(made)

    return run(main())


def _medians(repetitions: Sequence[Figures]) -> Figures:
    """Of the figures that all repetitions have: some can be too small to be known."""
    known = [key for key in repetitions[0] if all(key in figures for figures in repetitions)]
    return {key: statistics.median(figures[key] for figures in repetitions) for key in known}


def _notes(medians: dict[str, Figures], scale: float, profile: Path | None, machine: dict[str, Any]) -> list[str]:
    """What whoever quotes the figures should know."""
    from streamflow.cli.bench_workloads import RESTORED

    notes = [
        f"{name}: the client used {figures['client_cpu_share']:.0%} of a core (the worker "
        f"{figures['worker_cpu_share']:.0%}): it, not the worker, may be the limit"
        for name, figures in medians.items()
        if figures["client_cpu_share"] > CLIENT_SHARE_MAX
    ]
    if "W4" in medians and RESTORED not in medians["W4"]:
        notes.append("W4: fewer than 50,000 records were restored, too few to tell their rate; --scale 10 measures it")
    if machine["file_system"] in {"tmpfs", "ramfs"}:
        notes.append("the log was in memory, where a commit costs nothing: name a folder on a disk with --dir")
    if scale != 1:
        notes.append(f"all counts were scaled by {scale:g}: not comparable with full runs")
    if profile is not None:
        notes.append(f"the workers ran under cProfile, which slows them down; see python -m pstats {profile}/*.prof")
    return notes


def _show(
    output: Output,
    machine: dict[str, Any],
    workloads: dict[str, Workload],
    measured: dict[str, list[Figures]],
    notes: Sequence[str],
) -> None:
    output.text(
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['file_system']}, {machine['system']}, SQLite {machine['sqlite']}, Python {machine['python']} "
        f"({machine['python_calls_per_second'] / 1e6:.1f} million calls/s)"
    )
    output.text(
        f"One durable SQLite commit: {machine['sqlite_commit_p50_ms']:.2f} ms p50, "
        f"{machine['sqlite_commit_p99_ms']:.2f} ms p99\n"
    )
    if "kafka" in machine:
        raw = machine["kafka"]
        output.text(
            f"Kafka without an engine: append {raw['append_p50_ms']:.2f} ms p50, {raw['append_p99_ms']:.2f} ms p99, "
            f"with reading it back {raw['append_and_read_back_p50_ms']:.2f} ms;\n"
            f"{raw['produced_records_per_second']:,.0f} records/s produced, {raw['consumed_records_per_second']:,.0f} "
            f"consumed. The limit that sets: W1 {raw['w1_ms']:.1f} ms, W2 {raw['w2_steps_per_second']:,.0f} steps/s\n"
        )
    rows: list[list[Cell]] = []
    for name, workload in workloads.items():
        title = Cell(f"{name} {workload.title}", "bold")
        for figure in workload.figures:
            if not all(figure.key in figures for figures in measured[name]):
                continue
            values = [figures[figure.key] for figures in measured[name]]
            rows.append([
                title,
                Cell(figure.label),
                Cell(_quantity(statistics.median(values), figure), "bold green"),
                Cell(", ".join(_quantity(value, figure) for value in values), "dim"),
            ])  # fmt: skip
            title = Cell(" ")
    output.table(["workload", "figure", "median", "runs"], rows, right=["median"])
    for note in notes:
        output.text(f"\nNote: {note}")


def _quantity(value: float, figure: Figure) -> str:
    if figure.unit == "B":
        return f"{value / 2**20:.0f} MiB" if value >= 10 * 2**20 else f"{value / 2**10:.1f} KiB"
    number = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    return f"{number} {figure.unit}".strip() if figure.unit != "/s" else f"{number}/s"
