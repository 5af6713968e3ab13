"""A `kafka://` URL taken apart: where the brokers are, what is ours, and what goes to librdkafka as it is.

    kafka://host:9092,host2:9092                     plain text
    kafka://host:9093?security.protocol=SSL&ssl.ca.location=/etc/ca.pem
    kafka://host:9093?…&sasl.password.env=PASSWORD   the value of a setting from an environment variable
    kafka://host:9093?…&sasl.password.file=/run/p    … or from a file, without its last line break
    kafka://host:9092?schema.registry.url=http://host:8081&basic.auth.user.info.env=REGISTRY_USER

Values are percent-encoded: a `+`, `&`, `#`, `%` or `?` of a password is written %2B, %26, %23, %25 or %3F.

Ours: `partitions` and `replication` (when topics are created) and those of a schema registry, which no log asks:
`schema.registry.url` (several with commas), `schema.registry.ssl.ca.location`, and
`basic.auth.user.info=USER:PASSWORD` or `bearer.auth.token`. All others are settings of librdkafka (its
CONFIGURATION.md), for every producer, consumer and admin client alike. Settings on which correctness rests cannot be
given.

No secret is ever shown: of a URL only what is known to be harmless appears in errors, logs and output (`SHOWN`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, NoReturn
from urllib.parse import parse_qsl, urlsplit

from streamflow.codec.registry import RegistrySettings
from streamflow.errors import InvalidUrl, StreamflowError, Unavailable

PORT_DEFAULT: Final = 9092
PARTITIONS_MAX: Final = 1_000
"""Each partition costs an idle owner a claim, two followed topics and two small stores."""

SHOWN: Final = frozenset({
    "partitions", "replication", "security.protocol", "sasl.mechanism", "sasl.mechanisms", "sasl.username",
    "sasl.oauthbearer.method", "sasl.oauthbearer.client.id", "sasl.oauthbearer.scope",
    "ssl.endpoint.identification.algorithm", "enable.ssl.certificate.verification", "client.id", "client.rack", "debug",
    "broker.address.family",
})  # fmt: skip
SHOWN_ENDS: Final = (".location", ".ms", ".bytes", ".kbytes")
"""The settings whose values are shown, wherever a URL is. All others are ***, also those that nobody knows: the rest of
a password whose `&` was not encoded looks like one."""

FILES: Final = frozenset({
    "sasl.oauthbearer.assertion.file", "sasl.oauthbearer.assertion.private.key.file",
    "sasl.oauthbearer.assertion.jwt.template.file",
})  # fmt: skip
"""librdkafka's own settings that end as our suffix does: it reads these files itself."""

_NAME: Final = re.compile(r"[a-z][a-z0-9._]*")
_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*")
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f]")
"""Characters that the library drops from a URL without a word."""
_PORT: Final = re.compile(r"[0-9]{1,5}")
_REST: Final = re.compile(r"(beginning at:? ?).*", re.DOTALL)

REGISTRY: Final[Mapping[str, str]] = {
    "schema.registry.url": "urls",
    "basic.auth.user.info": "user_info",
    "bearer.auth.token": "token",
    "schema.registry.ssl.ca.location": "ca",
}
"""Settings of a schema registry, and what the registry's client calls them."""
KEPT: Final = frozenset({
    "bootstrap.servers", "metadata.broker.list", "group.id", "group.instance.id", "group.protocol", "acks",
    "request.required.acks", "enable.idempotence", "transactional.id", "max.in.flight",
    "max.in.flight.requests.per.connection", "enable.auto.commit", "auto.commit.enable", "enable.auto.offset.store",
    "auto.offset.reset", "partition.assignment.strategy", "isolation.level", "enable.partition.eof",
    "message.max.bytes", "allow.auto.create.topics", "partitioner", "error_cb", "logger", "oauth_cb", "stats_cb",
})  # fmt: skip
"""What streamflow sets itself: the fence and the order of records rest on these."""

COMMON: Final[Mapping[str, object]] = {
    "client.id": "streamflow",
    "socket.keepalive.enable": True,
    # A broker that restarts is found again within a second, not within ten.
    "reconnect.backoff.ms": 50,
    "reconnect.backoff.max.ms": 1_000,
    "allow.auto.create.topics": False,
}


class KafkaUrl(NamedTuple):
    """`url` is fit to be shown: without secrets. `settings` go to every librdkafka client."""

    url: str
    bootstrap: str
    settings: Mapping[str, object]
    partitions: int | None
    replication: int | None
    registry: RegistrySettings | None

    def config(self, *, defaults: Mapping[str, object] = MappingProxyType({}), **role: object) -> dict[str, Any]:
        """Settings for one client: defaults, the user's over them, and over those what its role needs.

        A role's names are written with `_` for `.`; those of callbacks (`error_cb`, `on_commit`) stay as they are.
        """
        kept = [name for name in role if name.endswith("_cb") or name.startswith("on_")]
        own = {name if name in kept else name.replace("_", "."): value for name, value in role.items()}
        return {**COMMON, **defaults, **self.settings, "bootstrap.servers": self.bootstrap, **own}

    @property
    def is_secured(self) -> bool:
        """Whether Kafka's own tools need a file with settings (`--command-config`) to get in."""
        return str(self.settings.get("security.protocol", "plaintext")).lower() != "plaintext"

    def redact(self, text: str) -> str:
        """A text of librdkafka's without the values that are not shown."""
        hidden = {str(value) for name, value in self.settings.items() if not _is_shown(name) and value}
        for secret in sorted(hidden, key=len, reverse=True):
            text = text.replace(secret, "***")
        return _REST.sub(r"\1***", text)  # it quotes the rest of an `oauthbearer.config` that it cannot read

    def __repr__(self) -> str:
        """Fit to be shown, too: a tuple's own would have the secrets in it."""
        return f"<KafkaUrl {self.url}>"


def parse_kafka(url: str, partitions: int | None = None) -> KafkaUrl:
    """Take a Kafka URL apart; `partitions` is the caller's wish, which the URL must not contradict."""
    # First of all, since a password may stand there; then nothing of the URL is shown.
    if "@" in url.partition("?")[0]:
        raise InvalidUrl("kafka://…: a kafka URL holds no user: write ?sasl.username=NAME&sasl.password.env=VARIABLE")
    if _CONTROLS.search(url):
        raise InvalidUrl("kafka://…: expected a URL without control characters: write them as %0A, %09 and so on")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidUrl("kafka://…: expected kafka://HOST:PORT,HOST:PORT, found no valid address") from None
    options = parse_qsl(parts.query, keep_blank_values=True)
    shown = _shown(parts.netloc, options)
    if parts.fragment or parts.path.strip("/"):
        raise InvalidUrl(
            f"{shown}: a kafka URL is kafka://HOST:PORT,HOST:PORT?setting=value, without a path or #: in a value write "
            f"# as %23"
        )
    settings: dict[str, object] = {}
    for name, value in options:
        base, _, source = name.rpartition(".")
        if source in ("env", "file") and base and name not in FILES:
            name, value = base, _secret(shown, base, source, value)
        if name in KEPT:
            raise InvalidUrl(f"{shown}: {name} is set by streamflow itself, order and fence rest on it: drop it")
        if name in settings:
            raise InvalidUrl(f"{shown}: {name} is given twice: drop one of them")
        settings[name] = value
    wanted = _whole(shown, "partitions", settings.pop("partitions", None), PARTITIONS_MAX)
    if None not in (wanted, partitions) and wanted != partitions:
        raise InvalidUrl(f"{shown}: the URL says partitions={wanted}, the caller {partitions}: drop one of them")
    registry = {ours: str(settings.pop(name)) for name, ours in REGISTRY.items() if name in settings}
    return KafkaUrl(
        url=shown,
        bootstrap=",".join(_address(shown, address) for address in parts.netloc.split(",")),
        settings=settings,
        partitions=wanted if wanted is not None else partitions,
        replication=_whole(shown, "replication", settings.pop("replication", None), 32_767),
        registry=_registry(shown, **registry) if registry else None,
    )


def _registry(shown: str, urls: str = "", **more: str) -> RegistrySettings:
    found = tuple(url.strip() for url in urls.split(",") if url.strip())
    for url in found:
        if not _is_http(url):
            raise InvalidUrl(  # without the URL: there may be a password in it
                "kafka://…: schema.registry.url must be http(s)://HOST:PORT/PATH in plain ASCII, other characters "
                "percent-encoded, without a user, whose name and password go into basic.auth.user.info.env"
            )
    if not found:
        raise InvalidUrl(f"{shown}: settings of a schema registry, but no schema.registry.url: add it")
    if len(more.keys() & {"user_info", "token"}) > 1:
        raise InvalidUrl(f"{shown}: basic.auth.user.info and bearer.auth.token are given: drop one of them")
    token = more.get("token", "")
    if not (token.isascii() and token.isprintable()):
        raise InvalidUrl(f"{shown}: bearer.auth.token must be printable ASCII, as a header of HTTP is: check it")
    return RegistrySettings(found, **more)


def _is_http(url: str) -> bool:
    """Whether a registry can be asked there; what HTTP cannot carry would fail at the first request only."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    host = parts.scheme in {"http", "https"} and parts.hostname and "@" not in parts.netloc and port != 0
    return bool(host) and url.isascii() and url.isprintable() and " " not in url


def _address(shown: str, address: str) -> str:
    host, colon, port = address.rpartition(":") if not address.endswith("]") else (address, "", "")
    if not colon:
        host, port = address, str(PORT_DEFAULT)
    if not host or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise InvalidUrl(f"{shown}: expected HOST:PORT of a broker, found {address!r}")
    return f"{host}:{port}"


def _shown(addresses: str, options: list[tuple[str, str]]) -> str:
    """The URL without what must not be logged."""
    query = "&".join(
        f"{name if _NAME.fullmatch(name) else '***'}={value if _is_shown(name) else '***'}" for name, value in options
    )
    return f"kafka://{addresses}?{query}" if query else f"kafka://{addresses}"


def _is_shown(name: str) -> bool:
    return name in SHOWN or (name.endswith(SHOWN_ENDS) and bool(_NAME.fullmatch(name)))


def _secret(shown: str, name: str, source: str, value: str) -> str:
    if source == "env":
        # Who takes the one for the other writes the secret itself where its variable belongs.
        variable = value if _VARIABLE.fullmatch(value) else "of that name (not shown, since it does not look like one)"
        try:
            found = os.environ.get(value)
        except UnicodeError:  # no variable can have such a name
            found = None
        if not found:
            what = "not set" if found is None else "empty"
            raise InvalidUrl(f"{shown}: {name}.env: the environment variable {variable} is {what}: set it")
        return found
    try:
        text = Path(value).read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise InvalidUrl(f"{shown}: {name}.file cannot be read: {error.strerror}: {value}") from None
    except ValueError:
        raise InvalidUrl(f"{shown}: {name}.file holds no text in UTF-8: {value!r}") from None
    if not text:
        raise InvalidUrl(f"{shown}: {name}.file is empty: {value}")
    return text


def _whole(shown: str, name: str, found: object, most: int) -> int | None:
    if found is None:
        return None
    text = str(found)
    # No more digits than such a number may have: Python refuses to read thousands.
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
        raise InvalidUrl(f"{shown}: {name} must be a whole number of 1 to {most:,}, found {text[:80]!r}")
    return int(text)


def unreachable(url: str, error: object) -> Unavailable:
    """The cluster did not answer."""
    return Unavailable(
        f"{url}: the Kafka cluster cannot be reached ({error}): is a broker running there, and do the security "
        f"settings fit it?"
    )


def answered(url: str, error: object) -> Unavailable:
    """The cluster did answer, with an error."""
    return Unavailable(
        f"{url}: the Kafka cluster answered with an error ({error}): try again, since most pass while it is being "
        f"rearranged; of one that stays the broker's own log has the cause"
    )


def refused(url: KafkaUrl, error: Exception) -> NoReturn:
    """A librdkafka client could not be made: a setting that it does not know, or a value that it does not take."""
    found = error.args[0] if error.args else error
    text = url.redact(getattr(found, "str", lambda: str(found))())
    raise InvalidUrl(f"{url.url}: {text}: see librdkafka's CONFIGURATION.md for names and values") from None


def kafka_missing() -> StreamflowError:
    """The optional dependency is not there."""
    return StreamflowError("kafka:// needs the package confluent-kafka: pip install 'streamflow-engine[kafka]'")
