"""The command `worker`: serve an app until SIGTERM or Ctrl-C, then stop gracefully.

The first signal stops: what is under way becomes durable if it is quick about it, and the partitions go to other
workers at once. A second signal exits without waiting; nothing is lost by that either: the next owner goes on from the
log.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Generator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

from streamflow.cli.apps import load_app
from streamflow.cli.output import Output
from streamflow.cli.session import json_option, place_of, url_option
from streamflow.ids import check_queue

if TYPE_CHECKING:
    from streamflow import App

PROCESSES_MAX: Final = 256
"""More on one machine is a typing error: each costs some 60 MB."""
PORT_MAX: Final = 65_535
LEVELS: Final = ("debug", "info", "warning", "error")
STUBBORN_SECONDS: Final = 1.0
"""How long steps that were cancelled may still run at exit."""
COLLECTOR_THRESHOLDS: Final = (20_000, 20, 100)
"""Objects allocated between collections of the youngest, and how many of those between collections of the older."""
_COLOURS: Final = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31;1"}


@click.command("worker", short_help="Serve an app: run its workflows and steps until stopped.")
@click.argument("spec", metavar="MODULE:APP")
@click.option(
    "--processes",
    type=click.IntRange(1, PROCESSES_MAX),
    default=1,
    show_default=True,
    help="Workers in processes of their own under this one, which starts those that die again.",
)
@click.option(
    "--max-parallel-steps", type=click.IntRange(min=1), help="Steps at once in one process; the app's default."
)
@click.option(
    "--queue",
    "queues",
    metavar="Q",
    multiple=True,
    callback=lambda context, parameter, names: _queue_names(names),
    help="Run the steps of this queue, and nothing else: no partitions are owned. May be given several times.",
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Local state; it can be rebuilt from the log.  "
    "[default: beside the SQLite file; on Kafka .streamflow in this folder]",
)
@click.option(
    "--no-create-topics", is_flag=True, help="Refuse to start when topics are missing, instead of making them."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, PORT_MAX),
    help="Show Prometheus metrics there, on all interfaces; 0 takes a free port. Of several processes each takes the "
    "next one.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="What stderr shows, unless the app sets up logging itself.",
)
@click.option("--stop-with-stdin", is_flag=True, hidden=True, help="Stop when stdin ends: the parent is gone.")
@url_option
@json_option
def worker(
    spec: str,
    processes: int,
    max_parallel_steps: int | None,
    queues: tuple[str, ...],
    state_dir: Path | None,
    no_create_topics: bool,
    metrics_port: int | None,
    log_level: str,
    stop_with_stdin: bool,
    url: str,
    as_json: bool,
) -> None:
    """Serve an app: run its workflows and steps until SIGTERM or Ctrl-C, which stop gracefully.

    MODULE is imported with the current folder on the path; a file works as well (shop.py:app). Start as many workers as
    you like, on one log: they share the partitions. One process uses one core; --processes starts several. A second
    Ctrl-C exits at once.

    With --queue it is a step worker: it takes the steps of these queues from the workers that own the runs, wherever
    they are, and runs nothing else. Some worker without --queue must run, too.

    \b
    Example:
      streamflow worker shop:app
      streamflow worker shop:app --queue gpu --max-parallel-steps 2
      streamflow worker shop/flows.py:app --url sqlite:////var/lib/shop.db --max-parallel-steps 16
      streamflow worker shop:app --processes 4 --url kafka://broker:9092 --metrics-port 9464
    """
    app = load_app(spec)
    _log_to_stderr(log_level.upper())
    _check_ports(metrics_port, processes)
    if not stop_with_stdin:  # a parent has said it already
        _check_queues(app, queues, Output(as_json=as_json))
    if processes > 1:
        from streamflow.cli.worker_fleet import serve_all

        options = ["--log-level", log_level]
        options += [] if max_parallel_steps is None else ["--max-parallel-steps", str(max_parallel_steps)]
        options += [word for queue in queues for word in ("--queue", queue)]
        options += [] if state_dir is None else ["--state-dir", str(state_dir)]
        options += ["--no-create-topics"] if no_create_topics else []
        options += ["--json"] if as_json else []
        code = serve_all(
            spec,
            processes,
            options,
            app=app.name,
            url=url,
            place=place_of(url),
            create=not no_create_topics,
            metrics_port=metrics_port,
            output=Output(as_json=as_json),
        )
        raise click.exceptions.Exit(code)
    _tune_collector()
    asyncio.run(
        _serve(
            app,
            url,
            Output(as_json=as_json),
            state_dir=state_dir,
            max_parallel_steps=max_parallel_steps,
            queues=queues,
            create=not no_create_topics,
            metrics_port=metrics_port,
            stop_with_stdin=stop_with_stdin,
        )
    )


def _check_ports(first: int | None, processes: int) -> None:
    if first is not None and (last := first + processes - 1) > PORT_MAX:
        raise click.BadParameter(
            f"{processes} processes need the ports {first} to {last}, and {PORT_MAX} is the last: choose a lower one",
            param_hint="--metrics-port",
        )


def _check_queues(app: App, queues: Sequence[str], output: Output) -> None:
    """Refuse what can run nothing, and warn of queues that may be typing errors, before topics are made for them.

    No more than a warning: a call may name any queue with `options(queue=…)`, which nobody knows before it is made.
    """
    if queues and not app.steps:
        raise click.BadParameter(
            f"app {app.name} has no steps, and a step worker runs nothing else: name the app that has them, or leave "
            f"--queue out",
            param_hint="--queue",
        )
    named = sorted({step.queue for step in app.steps.values() if step.queue is not None})
    for queue in queues:
        if queue not in named:
            output.say(
                f"Warning: no step of app {app.name} names the queue {queue}; its steps name "
                f"{', '.join(named) or 'none'}. This worker gets only what calls put there with options(queue="
                f"{queue!r}): is it a typing error?"
            )


def _queue_names(names: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(check_queue(name) for name in names)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _tune_collector() -> None:
    """Look for cyclic garbage seldom: thousands of live runs are long-lived objects that each full collection visits.

    The engine frees runs by reference counts alone; measured with 10,000 parked runs, the default thresholds spent a
    quarter of the worker's time here, in pauses of up to 0.2 s. Only this command sets it: its process is ours.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


async def _serve(
    app: App,
    url: str,
    output: Output,
    *,
    state_dir: Path | None,
    max_parallel_steps: int | None,
    queues: Sequence[str],
    create: bool,
    metrics_port: int | None,
    stop_with_stdin: bool,
) -> None:
    from streamflow.logs import open_log
    from streamflow.serve import schemas_of, serve_metrics
    from streamflow.worker import Worker

    with _stop_on_signal() as stopping:
        if stop_with_stdin:
            from streamflow.cli.worker_fleet import call_when_stdin_ends

            call_when_stdin_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
        log = await open_log(url, app=app.name, create=create)
        try:
            worker = Worker(
                app,
                log,
                state_dir=state_dir,
                max_parallel_steps=max_parallel_steps,
                queues=queues,
                owns_partitions=not queues,
                schemas=schemas_of(url),
            )
            async with serve_metrics(metrics_port) as shown:
                try:
                    await worker.start()
                    _announce(app, url, log.partitions, queues, shown, output)
                    died = asyncio.create_task(worker.wait(), name="worker")
                    stopped = asyncio.create_task(stopping.wait(), name="stop signal")
                    await asyncio.wait((died, stopped), return_when=asyncio.FIRST_COMPLETED)
                    stopped.cancel()
                finally:
                    await worker.stop()
            await died  # what it died of, if it did
        finally:
            await log.close()
    output.say("Stopped.")
    await _leave_stubborn_steps()


async def _leave_stubborn_steps() -> None:
    """Exit even when steps ignore their cancellation: everything is durable and handed over, nobody waits for them."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left and (await asyncio.wait(left, timeout=STUBBORN_SECONDS))[1]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _announce(
    app: App, url: str, partitions: int, queues: Sequence[str], metrics_port: int | None, output: Output
) -> None:
    place = place_of(url)
    if output.as_json:
        line: dict[str, object] = {"app": app.name, "url": place, "partitions": partitions, "pid": os.getpid()}
        line |= {"queues": list(queues)} if queues else {}
        output.line(line if metrics_port is None else {**line, "metrics_port": metrics_port})
    serves = f"queues {', '.join(queues)}" if queues else f"a share of its {partitions} partitions"
    shows = "" if metrics_port is None else f", metrics on port {metrics_port}"
    output.say(
        f"Serving app {app.name} ({_count(app.workflows, 'workflow')}, {_count(app.steps, 'step')}) on {place}, "
        f"{serves}{shows}, pid {os.getpid()}; Ctrl-C stops gracefully"
    )


def _count(things: Sized, what: str) -> str:
    number = len(things)
    return f"{number} {what}" + ("" if number == 1 else "s")


@contextmanager
def _stop_on_signal() -> Generator[asyncio.Event, None, None]:
    """An event that SIGTERM or SIGINT sets; a second signal ends the process.

    Handlers of `signal`, not of the event loop: a step that blocks the loop must not hold up a second Ctrl-C.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        # Not through a buffered stream, which this may have interrupted in the middle of a write.
        os.write(2, b"Stopping: handing over what is under way (a second signal exits at once)\n")
        loop.call_soon_threadsafe(stopping.set)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Formatter(logging.Formatter):
    """One line a record; on a terminal warnings and errors are coloured."""

    def __init__(self, *, coloured: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S" if coloured else None)
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        colour = _COLOURS.get(record.levelno) if self._coloured else None
        return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def _log_to_stderr(level: str) -> None:
    """Send logs to stderr, unless the app has set up logging itself."""
    logging.getLogger("streamflow").setLevel(level)
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(coloured=sys.stderr.isatty() and not os.environ.get("NO_COLOR")))
    root.addHandler(handler)
    root.setLevel(level)
