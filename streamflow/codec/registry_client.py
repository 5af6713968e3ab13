"""A schema registry asked over HTTP, in the few requests of Confluent's REST protocol that are needed.

The standard library is enough for them; the client of confluent-kafka would bring five more packages. Calls block, so
they are made in threads.
"""

from __future__ import annotations

import base64
import json
import ssl
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from streamflow.codec.envelope import Schema
from streamflow.codec.registry import COMPATIBILITY, RegistryRefused, RegistrySettings
from streamflow.errors import InvalidUrl, Unavailable

ANSWER_SECONDS: Final = 5.0
"""How long a registry may be silent. It serves schemas from memory, in milliseconds."""
ANSWER_BYTES_MAX: Final = 1_000_000
"""The largest answer that is read: our largest schema has 20 kB."""
SCHEMA_CHARACTERS_MAX: Final = 64 * 1024
"""The longest schema that is taken, three times our largest. So many are kept (`SCHEMAS_MAX`) that they could fill the
memory: parsed, one has thirty times its text."""
NOT_FOUND: Final = 404
REFUSALS: Final = frozenset({400, NOT_FOUND, 409, 422})
"""Answers about what was asked for. All else is about us (credentials), or the registry's own trouble, and may pass."""


class RegistryClient:
    """See `streamflow.codec.registry.Registry`."""

    def __init__(self, settings: RegistrySettings) -> None:
        self.name = ",".join(settings.urls)
        self._urls = settings.urls
        accepted = "application/vnd.schemaregistry.v1+json"
        self._headers = {"Accept": f"{accepted}, application/json", "Content-Type": accepted}
        if settings.user_info is not None:
            self._headers["Authorization"] = "Basic " + base64.b64encode(settings.user_info.encode()).decode()
        elif settings.token is not None:
            self._headers["Authorization"] = f"Bearer {settings.token}"
        try:
            context = ssl.create_default_context(cafile=settings.ca)
        except OSError as error:
            raise InvalidUrl(f"schema.registry.ssl.ca.location={settings.ca} cannot be used: {error}") from None
        # Credentials are sent to where the URL says, and nowhere else.
        self._opener = build_opener(HTTPSHandler(context=context), _NoRedirects())

    def schema(self, schema_id: int) -> Schema:
        return _schema_of(self._ask("GET", f"/schemas/ids/{schema_id}"))

    def register(self, subject: str, schema: str) -> int:
        # Asked before told: a registry that has all of it already is only read, and a compatibility that somebody has
        # set for the subject stays.
        place = quote(subject, safe="")
        body = {"schema": schema, "schemaType": "AVRO"}
        try:
            self._ask("GET", f"/config/{place}")
        except RegistryRefused as error:
            if error.status != NOT_FOUND:
                raise
            self._ask("PUT", f"/config/{place}", {"compatibility": COMPATIBILITY})
        try:
            return self._id(self._ask("POST", f"/subjects/{place}", body))
        except RegistryRefused as error:
            if error.status != NOT_FOUND:
                raise
        return self._id(self._ask("POST", f"/subjects/{place}/versions", body))

    def _id(self, answer: dict[str, Any]) -> int:
        found = answer.get("id")
        if not isinstance(found, int) or not 0 <= found < 1 << 32:
            raise RegistryRefused(200, f"expected the id of a schema, found {found!r}")
        return found

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        failures = []
        for url in self._urls:
            data = None if body is None else json.dumps(body).encode()
            request = Request(url.rstrip("/") + path, data, self._headers, method=method)  # noqa: S310 - http(s) alone
            try:
                with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
                    return _parsed(url, answer.read(ANSWER_BYTES_MAX + 1))
            except HTTPError as error:
                with error:
                    text = _refusal(error)
                if error.code not in REFUSALS:
                    failures.append(f"{url} answered HTTP {error.code}: {text}")
                    continue
                raise RegistryRefused(error.code, text) from None
            except (OSError, HTTPException, Unavailable) as error:
                failures.append(f"{url}: {error.reason if isinstance(error, URLError) else error}")
        raise Unavailable(f"the schema registry cannot be asked ({'; '.join(failures)})")


def schema_in(url: str, answer: bytes) -> Schema:
    """The schema in a registry's answer. Raises `Unavailable` for no answer of one, `RegistryRefused` for no Avro."""
    return _schema_of(_parsed(url, answer))


def _schema_of(answer: dict[str, Any]) -> Schema:
    kind = answer.get("schemaType", "AVRO")
    if kind != "AVRO":
        raise RegistryRefused(200, f"it is of type {str(kind)[:80]}, expected AVRO")
    if answer.get("references"):
        raise RegistryRefused(200, "it refers to other subjects: register the schema in one piece")
    text = answer.get("schema")
    if isinstance(text, str) and len(text) > SCHEMA_CHARACTERS_MAX:
        raise RegistryRefused(200, f"it has {len(text):,} characters, expected at most {SCHEMA_CHARACTERS_MAX:,}")
    try:
        return json.loads(answer["schema"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RegistryRefused(200, f"it is not JSON ({error!r})") from None


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _parsed(url: str, answer: bytes) -> dict[str, Any]:
    try:
        found = json.loads(answer[: ANSWER_BYTES_MAX + 1])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unavailable(f"{url} answered something else than a JSON object of at most {ANSWER_BYTES_MAX:,} bytes")
    return found


def _refusal(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read(ANSWER_BYTES_MAX))["message"])
    except (OSError, HTTPException, KeyError, TypeError, ValueError, RecursionError):
        return str(error.reason)
