"""What is known in this process of the schemas in a schema registry: each is looked up once, off the event loop.

Rules:

- A registry is asked when a worker starts, and when a record brings an id that is not known yet. Nothing else waits
  for it: history, timers, replies, dead letters and the commands that streamflow writes name their schema themselves.
- That a registry does not answer says nothing about a record, so whoever needs it waits. That it answers that there is
  no such schema is the sender's mistake, and is remembered for a short while.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol, TypeVar

from streamflow.codec.envelope import CONFLUENT, CONFLUENT_SIZE, Schema, schema_folder, split
from streamflow.errors import InvalidArguments, Unavailable

T = TypeVar("T")
Item = TypeVar("Item")

log_ = logging.getLogger("streamflow.registry")

PUBLIC: Final[Mapping[str, str]] = {"commands": "Command", "status": "Status", "history": "History"}
"""The topics whose schemas a worker registers, as `<app>.<topic>-value`, and the names of those schemas."""

COMPATIBILITY: Final = "FULL_TRANSITIVE"
"""Every version reads every other: logs are kept for years, and workers of two versions run side by side. A new kind
of command or event cannot be so, since no older reader knows it; the refusal then says what to set instead."""

REQUEST_SECONDS: Final = 10.0
"""How long one request may take in all, whatever the registry sends meanwhile."""
START_ATTEMPTS: Final = 3
"""How often a starting worker asks, a second apart: a registry that restarts is back by then, or the worker says so."""
RETRY_SECONDS: Final = 1.0
RETRY_SECONDS_MAX: Final = 30.0
"""Pauses while a record waits for a registry that does not answer; each is announced by a warning."""
SCHEMAS_MAX: Final = 256
"""Schemas kept: one per version of a foreign producer; more are looked up again."""
UNKNOWN_SECONDS: Final = 5.0
"""For how long an id that the registry did not know is taken to be unknown still, so that a flood of garbage does not
become a flood of requests. Not longer: it may have been registered since."""


class RegistrySettings(NamedTuple):
    """`urls` are tried in turn; `user_info` is USER:PASSWORD, `token` a bearer token, `ca` a file of authorities."""

    urls: tuple[str, ...]
    user_info: str | None = None
    token: str | None = None
    ca: str | None = None


class RegistryRefused(Exception):
    """The registry answered, with a refusal: `status` is that of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class Registry(Protocol):
    """What is asked of a registry. Each call blocks, and raises `Unavailable` or `RegistryRefused`."""

    @property
    def name(self) -> str: ...

    def schema(self, schema_id: int) -> Schema:
        """The schema of that id; `RegistryRefused` when there is none that is usable."""
        ...

    def register(self, subject: str, schema: str) -> int:
        """The id of the schema under the subject, where it is now if it was not."""
        ...


class Schemas:
    """The schemas of one registry, by id. `schema_of` is what decoding takes: of what was fetched or registered."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.ids: Mapping[str, int] = {}
        """Of our own schemas, by topic, once they are registered."""
        self._known: OrderedDict[int, Schema] = OrderedDict()
        self._unknown: OrderedDict[int, tuple[str, float]] = OrderedDict()

    @property
    def name(self) -> str:
        """The registry, for people."""
        return self._registry.name

    def schema_of(self, schema_id: int) -> Schema:
        """The schema of an id that is known; `LookupError` says why it is not."""
        if schema_id in self._known:
            self._known.move_to_end(schema_id)
            return self._known[schema_id]
        why = self._unknown.get(schema_id, ("it was not asked for it", 0.0))[0]
        raise LookupError(f"{self.name}: {why}")

    def missing(self, value: bytes | None) -> int | None:
        """The id of the schema that must be fetched before `value` can be decoded, if there is one."""
        if value is None or not value.startswith(CONFLUENT) or len(value) < CONFLUENT_SIZE:
            return None
        key, _ = split(value)
        assert isinstance(key, int), key
        if key in self._known or (key in self._unknown and self._unknown[key][1] > time.monotonic()):
            return None
        return key

    async def fetch(self, schema_id: int, what: str) -> None:
        """Know that schema, or that there is none, waiting for as long as the registry cannot be asked.

        `what` waits meanwhile; warnings name it.
        """
        pause = RETRY_SECONDS
        while True:
            try:
                schema = await _in_time(self._registry.schema, schema_id)
            except RegistryRefused as refused:
                _keep(self._unknown, schema_id, (str(refused), time.monotonic() + UNKNOWN_SECONDS))
                return
            except Unavailable as error:
                log_.warning(
                    "%s waits for the schema with id %d: %s; trying again in %.0f s", what, schema_id, error, pause
                )
            else:
                _keep(self._known, schema_id, schema)
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_SECONDS_MAX)

    async def register(self, app: str) -> None:
        """Register the public schemas of an app.

        Raises `InvalidArguments` when the registry refuses one of them, `Unavailable` when it cannot be asked.
        """
        ids = {}
        for topic, name in PUBLIC.items():
            subject = f"{app}.{topic}-value"
            text = json.dumps(json.loads((schema_folder() / f"{name}.avsc").read_text(encoding="utf-8")))
            try:
                ids[topic] = schema_id = await self._register(subject, text)
            except RegistryRefused as refused:
                raise InvalidArguments(
                    f"the schema registry {self.name} refuses {name}.avsc for the subject {subject}: {refused}. If "
                    f"something else was registered there, delete the subject; if this version of streamflow adds a "
                    f"kind of command or event, set the subject's compatibility to BACKWARD_TRANSITIVE and leave it so"
                ) from None
            _keep(self._known, schema_id, json.loads(text))
        self.ids = ids

    async def _register(self, subject: str, schema: str) -> int:
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                return await _in_time(self._registry.register, subject, schema)
            except Unavailable as error:
                if attempt == START_ATTEMPTS:
                    raise Unavailable(
                        f"{error}: the subject {subject} must be registered before the worker starts; is the URL in "
                        f"schema.registry.url right?"
                    ) from None
                log_.warning("%s; trying again in %.0f s", error, RETRY_SECONDS)
            await asyncio.sleep(RETRY_SECONDS)
        raise AssertionError("every attempt returns or raises")


async def _in_time(ask: Callable[..., T], *args: object) -> T:
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            return await asyncio.to_thread(ask, *args)
    except TimeoutError:
        raise Unavailable(f"the schema registry did not answer within {REQUEST_SECONDS:g} s") from None


def _keep(items: OrderedDict[int, Item], key: int, item: Item) -> None:
    items[key] = item
    items.move_to_end(key)
    if len(items) > SCHEMAS_MAX:
        items.popitem(last=False)
