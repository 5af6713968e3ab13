"""What the commands that talk to an app share: --url, --app, --json, a client, and a word when no worker answers."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import click

from streamflow.cli.output import Output
from streamflow.cli.words import Clock, clock

if TYPE_CHECKING:
    from streamflow import Client, Handle

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

URL_DEFAULT: Final = "sqlite:///streamflow.db"

PATIENCE_SECONDS: Final = 2.0
"""How long an answer may take before stderr says what it is waiting for."""


@dataclass(frozen=True)
class Session:
    """A client of one app for the time of one command, and where to write what it finds."""

    client: Client
    app: str
    url: str
    output: Output

    @property
    def place(self) -> str:
        """The URL as it may be shown: without its options, which may hold a password."""
        return place_of(self.url)

    def handle(self, id: str) -> Handle[Any]:
        """The run of that id."""
        return self.client.handle(id)

    def clock(self) -> Clock:
        """The present, short on a terminal."""
        return clock(short=self.output.is_terminal)

    async def answer(self, question: Awaitable[T]) -> T:
        """The answer; when it takes long, stderr says that a worker has to give it."""
        hint = self._hint_soon()
        try:
            return await question
        finally:
            hint.cancel()

    async def answers(self, stream: AsyncIterator[T]) -> AsyncIterator[T]:
        """The same for a stream, up to its first item."""
        hint = self._hint_soon()
        try:
            async for each in stream:
                hint.cancel()
                yield each
        finally:
            hint.cancel()

    def _hint_soon(self) -> asyncio.TimerHandle:
        text = f"No answer yet: is a worker of app {self.app} running on {self.place}? (streamflow worker MODULE:APP)"
        return asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self.output.say, text)


def place_of(url: str) -> str:
    """Where the log is, without the options of its URL, which may hold a password."""
    return url.partition("?")[0]


def url_option(function: F) -> F:
    """The option --url."""
    return _url_option("The log: sqlite:///FILE or kafka://HOST:PORT. Also $STREAMFLOW_URL.", _check_url)(function)


def kafka_url_option(function: F) -> F:
    """The option --url of what is about Kafka alone; whoever takes it says so of other logs."""
    return _url_option("The cluster: kafka://HOST:PORT. Also $STREAMFLOW_URL.", None)(function)


def _url_option(text: str, check: Callable[[click.Context, click.Parameter, str], str] | None) -> Callable[[F], F]:
    return click.option(
        "--url",
        envvar="STREAMFLOW_URL",
        default=URL_DEFAULT,
        show_default=True,
        metavar="URL",
        callback=check,
        help=text,
    )


def json_option(function: F) -> F:
    """The option --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def app_option(function: F) -> F:
    """The option --app."""
    return click.option(
        "--app",
        envvar="STREAMFLOW_APP",
        metavar="NAME",
        callback=_check_app,
        help="The app's name, or MODULE:APP. Also $STREAMFLOW_APP.",
    )(function)


def connected(function: Callable[Concatenate[Session, P], Awaitable[int | None]]) -> Callable[..., None]:
    """Make an async function of a `Session` the body of a command; what it returns is the exit code."""

    @app_option
    @url_option
    @json_option
    @functools.wraps(function)
    def command(app: str, url: str, as_json: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        output = Output(as_json=as_json)
        name, connect = _connector(url, app)

        async def talk() -> int:
            async with connect() as client:
                return await function(Session(client, name, url, output), *args, **kwargs) or 0

        if code := asyncio.run(talk()):
            raise click.exceptions.Exit(code)

    return command


def _connector(url: str, app: str) -> tuple[str, Callable[[], AbstractAsyncContextManager[Client]]]:
    """The app's name, and how to connect: through its code where that is named, which then checks arguments."""
    if ":" in app:
        from streamflow.cli.apps import load_app

        loaded = load_app(app)
        return loaded.name, lambda: loaded.connect(url)
    import streamflow as sf

    return app, lambda: sf.connect(url, app=app)


def _check_app(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if not value:
        raise click.UsageError("Which app? Say --app shop, or set STREAMFLOW_APP=shop.", ctx)
    if ":" not in value:
        from streamflow.ids import check_app

        try:
            check_app(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None
    return value


def _check_url(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value.startswith("memory:"):
        raise click.BadParameter(
            "a memory:// log lives inside one process, where no other command can reach it: use sqlite:///FILE",
            ctx,
            param,
        )
    return value
