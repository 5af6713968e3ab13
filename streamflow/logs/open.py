"""Which adapter a URL means, and what its options are.

    sqlite:///orders.db            a file in the current directory     ?synchronous=full|normal|off
    sqlite:////var/lib/orders.db   an absolute path                    ?max_mib=N   ?partitions=N
    memory://name                  topics of this process, by name     ?partitions=N
    kafka://host:9092,…            a Kafka cluster

A path is percent-decoded, so that `?`, `#` and `%` can be written as %3F, %23 and %25.
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from streamflow.errors import InvalidUrl
from streamflow.ids import check_app
from streamflow.logs.base import Log

PARTITIONS_DEFAULT: Final = 4
"""Enough for a few workers on one host; each costs a claim and an idle task."""

PARTITIONS_MAX: Final = 256
"""What both local adapters can number (eight bits of a SQLite row id)."""

NAME_BYTES_MAX: Final = 240
PATH_BYTES_MAX: Final = 4_000
"""Of the file and of its path: what systems take, less the endings of the files that SQLite and we put beside it."""

DIGITS_MAX: Final = 12
"""Of a number in a URL: a million terabytes."""

CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f]")
"""Characters that the library drops from a URL without a word, so that it would name something else."""

SYNCHRONOUS: Final = ("full", "normal", "off")


class LocalUrl(NamedTuple):
    """A `sqlite://` or `memory://` URL taken apart. `partitions` is None when the URL does not say."""

    url: str
    place: str
    partitions: int | None
    synchronous: str
    max_mib: int | None


async def open_log(url: str, *, app: str, create: bool = True, partitions: int | None = None) -> Log:
    """Open the log at `url` for `app`, creating its topics when they are missing and `create` allows it.

    `partitions` counts at creation only (default 4); a log that has another number already refuses it. Raises
    `InvalidUrl` (the URL or an option of it), `Unavailable` (cannot be reached now) or `CorruptLog` (not ours).
    """
    check_app(app)
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme == "sqlite":
        from streamflow.logs.sqlite import open_sqlite

        return await open_sqlite(parse(url, partitions), app=app, create=create)
    if scheme == "memory":
        from streamflow.logs.memory import open_memory

        return open_memory(parse(url, partitions), app=app, create=create)
    if scheme == "kafka":
        from importlib.util import find_spec

        from streamflow.logs.kafka_url import kafka_missing, parse_kafka

        if find_spec("confluent_kafka") is None:
            raise kafka_missing()
        from streamflow.logs.kafka import open_kafka

        return await open_kafka(parse_kafka(url, partitions), app=app, create=create)
    # Its options may hold a password, also where the scheme has a typing error.
    place = url.partition("?")[0]
    shown = f"{scheme}://…" if "@" in place else place
    raise InvalidUrl(f"log URL must start with sqlite://, memory:// or kafka://, found {shown!r}")


def parse(url: str, partitions: int | None = None) -> LocalUrl:
    """Take a local URL apart; `partitions` is the caller's wish, which the URL must not contradict."""
    if found := CONTROLS.search(url):
        code = f"%{ord(found[0]):02X}"
        raise InvalidUrl(f"{url!r}: expected a URL without control characters, found {found[0]!r}: write {code}")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidUrl(f"{url}: a bracket in a path is written %5B or %5D") from None
    known = {"sqlite": ("partitions", "synchronous", "max_mib"), "memory": ("partitions",)}[parts.scheme]
    if parts.fragment:
        raise InvalidUrl(f"{url}: a log URL has no #fragment: write # in a path as %23")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in known:
            raise InvalidUrl(f"{url}: unknown option {name!r}: known are {', '.join(known)}")
    synchronous = options.get("synchronous", "full").lower()
    if synchronous not in SYNCHRONOUS:
        raise InvalidUrl(f"{url}: synchronous must be one of {', '.join(SYNCHRONOUS)}, found {synchronous!r}")
    return LocalUrl(
        url=url,
        place=_place(url, parts.scheme, parts.netloc, parts.path),
        partitions=_partitions(url, options.get("partitions"), partitions),
        synchronous=synchronous,
        max_mib=_positive(url, "max_mib", options["max_mib"]) if "max_mib" in options else None,
    )


def _place(url: str, scheme: str, netloc: str, path: str) -> str:
    if scheme == "memory":
        return unquote(netloc + path).strip("/")
    if netloc:
        raise InvalidUrl(
            f"{url}: write sqlite:///{netloc}{path} (three slashes) for a relative path, four for an absolute one"
        )
    try:
        place = unquote(path, errors="strict").removeprefix("/")
        raw = os.fsencode(place)
    except UnicodeError:
        raise InvalidUrl(f"{url}: the path is not valid UTF-8: name the file otherwise") from None
    if "\0" in place:
        raise InvalidUrl(f"{url}: a file's name has no NUL (%00): drop it")
    if len(raw) > PATH_BYTES_MAX or any(len(name) > NAME_BYTES_MAX for name in raw.split(b"/")):
        raise InvalidUrl(
            f"{url[:200]}…: a path has at most {PATH_BYTES_MAX} bytes, and {NAME_BYTES_MAX} in each name: shorten it"
        )
    if not place or place.endswith("/"):
        raise InvalidUrl(f"{url}: names no file: write sqlite:///orders.db")
    if place == ":memory:":
        raise InvalidUrl(f"{url}: a log without a file is memory://, not SQLite's :memory:")
    return place


def _partitions(url: str, in_url: str | None, wanted: int | None) -> int | None:
    if in_url is None:
        number = wanted
    else:
        number = _positive(url, "partitions", in_url)
        if wanted not in (None, number):
            raise InvalidUrl(f"{url}: the URL says partitions={number}, the caller {wanted}: drop one of them")
    if number is not None and not 1 <= number <= PARTITIONS_MAX:
        raise InvalidUrl(f"{url}: partitions must be 1 to {PARTITIONS_MAX}, found {number}")
    return number


def _positive(url: str, name: str, text: str) -> int:
    # No more digits than such a number may have: Python refuses to read thousands.
    if not (text.isascii() and text.isdigit() and len(text) <= DIGITS_MAX and int(text) > 0):
        raise InvalidUrl(f"{url}: {name} must be a whole number above 0, found {text[:80]!r}")
    return int(text)
