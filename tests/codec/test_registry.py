"""What is known of a registry's schemas, with a registry that does as it is told."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time

import pytest

from streamflow.codec import registry as module
from streamflow.codec.envelope import CONFLUENT, SINGLE_OBJECT
from streamflow.codec.registry import SCHEMAS_MAX, RegistryRefused, Schemas
from streamflow.errors import InvalidArguments, Unavailable


class Told:
    """Answers from a list, the last for ever; an exception is raised."""

    name = "http://told"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.threads = set()

    def _next(self, *question):
        self.asked.append(question)
        self.threads.add(threading.current_thread())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def schema(self, schema_id):
        return self._next(schema_id)

    def register(self, subject, schema):
        return self._next(subject, json.loads(schema))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(module, "RETRY_SECONDS_MAX", 0.002)


def framed(schema_id):
    return CONFLUENT + schema_id.to_bytes(4, "big")


def test_a_schema_is_fetched_once_and_in_a_thread():
    told = Told({"type": "string"})
    schemas = Schemas(told)
    assert schemas.missing(framed(5)) == 5
    asyncio.run(schemas.fetch(5, "somebody"))
    assert schemas.missing(framed(5)) is None
    assert schemas.schema_of(5) == {"type": "string"}
    assert told.asked == [(5,)]
    assert threading.main_thread() not in told.threads


@pytest.mark.parametrize("value", [None, b"", b"\0\0\0", SINGLE_OBJECT + bytes(8), b"{}"])
def test_what_is_in_no_confluent_framing_needs_no_schema(value):
    assert Schemas(Told("null")).missing(value) is None


def test_an_id_that_was_not_fetched_is_a_lookup_error():
    with pytest.raises(LookupError, match="http://told: it was not asked"):
        Schemas(Told("null")).schema_of(7)


def test_an_unknown_id_is_remembered_for_a_while(monkeypatch):
    told = Told(RegistryRefused(404, "Schema 7 not found."))
    schemas = Schemas(told)
    asyncio.run(schemas.fetch(7, "somebody"))
    assert schemas.missing(framed(7)) is None
    with pytest.raises(LookupError, match=r"http://told: HTTP 404: Schema 7 not found\."):
        schemas.schema_of(7)
    later = time.monotonic() + module.UNKNOWN_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert schemas.missing(framed(7)) == 7


def test_a_silent_registry_is_asked_again_and_each_time_is_told(caplog):
    told = Told(Unavailable("no route"), Unavailable("no route"), {"type": "long"})
    schemas = Schemas(told)
    with caplog.at_level(logging.WARNING, "streamflow.registry"):
        asyncio.run(schemas.fetch(5, "partition 3: the command at offset 17"))
    assert schemas.schema_of(5) == {"type": "long"}
    assert [record.message.partition("; trying")[0] for record in caplog.records] == [
        "partition 3: the command at offset 17 waits for the schema with id 5: no route"
    ] * 2


def test_a_registry_that_never_answers_is_given_up_in_time(monkeypatch, caplog):
    forever = threading.Event()
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.01)

    class Silent(Told):
        def schema(self, schema_id):
            if len(self.asked) == 0:
                self.asked.append(schema_id)
                forever.wait(20)
            return "null"

    async def main():
        try:
            await Schemas(Silent("null")).fetch(5, "somebody")
        finally:
            forever.set()

    asyncio.run(main())
    assert "did not answer within 0.01 s" in caplog.text


def test_the_cache_is_bounded():
    schemas = Schemas(Told("null"))

    async def fetch_all():
        for schema_id in range(SCHEMAS_MAX + 1):
            await schemas.fetch(schema_id, "somebody")

    asyncio.run(fetch_all())
    assert schemas.missing(framed(0)) == 0
    assert schemas.missing(framed(1)) is None


def test_the_public_schemas_are_registered_under_the_apps_subjects(monkeypatch):
    told = Told(Unavailable("not yet"), 1, 2, 3)
    schemas = Schemas(told)
    assert schemas.ids == {}
    asyncio.run(schemas.register("shop"))
    assert schemas.ids == {"commands": 1, "status": 2, "history": 3}
    assert [subject for subject, _ in told.asked] == ["shop.commands-value"] * 2 + [
        "shop.status-value",
        "shop.history-value",
    ]
    assert told.asked[0][1]["name"] == "Command"
    assert schemas.missing(framed(2)) is None  # nobody has to be asked for what was registered
    assert schemas.schema_of(2)["name"] == "Status"


def test_a_refusal_names_the_subject_and_what_to_do():
    schemas = Schemas(Told(RegistryRefused(409, "incompatible")))
    with pytest.raises(InvalidArguments, match=r"http://told refuses Command\.avsc .* shop\.commands-value: HTTP 409"):
        asyncio.run(schemas.register("shop"))


def test_a_registry_that_stays_away_ends_the_start():
    told = Told(Unavailable("no route"))
    with pytest.raises(Unavailable, match=r"no route: the subject shop\.commands-value must be registered"):
        asyncio.run(Schemas(told).register("shop"))
    assert len(told.asked) == module.START_ATTEMPTS
