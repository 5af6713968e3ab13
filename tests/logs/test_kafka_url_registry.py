"""The settings of a schema registry in a `kafka://` URL."""

from __future__ import annotations

import pytest

from streamflow.codec.registry import RegistrySettings
from streamflow.errors import InvalidArguments
from streamflow.logs.kafka_url import parse_kafka
from streamflow.serve import schemas_of


def test_they_are_taken_apart_and_kept_from_librdkafka(monkeypatch, tmp_path):
    monkeypatch.setenv("WHO", "me:secret")
    (tmp_path / "token").write_text("abc\n")
    found = parse_kafka(
        "kafka://h?linger.ms=1&schema.registry.url=http://a:1/x,https://b&basic.auth.user.info.env=WHO"
        "&schema.registry.ssl.ca.location=/ca.pem"
    )
    assert found.registry == RegistrySettings(("http://a:1/x", "https://b"), user_info="me:secret", ca="/ca.pem")
    assert found.settings == {"linger.ms": "1"}
    assert "secret" not in found.url
    by_token = parse_kafka(f"kafka://h?schema.registry.url=http://a&bearer.auth.token.file={tmp_path}/token")
    assert by_token.registry == RegistrySettings(("http://a",), token="abc")
    assert parse_kafka("kafka://h").registry is None


def test_secrets_are_not_shown():
    found = parse_kafka("kafka://h?schema.registry.url=http://a&bearer.auth.token=abc")
    assert found.url == "kafka://h?schema.registry.url=***&bearer.auth.token=***"


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("schema.registry.url=a:1", r"must be http\(s\)://HOST:PORT/PATH"),
        ("schema.registry.url=http://me:secret@a", "without a user"),
        ("schema.registry.url=", "no schema.registry.url: add it"),
        ("basic.auth.user.info=x:y", "no schema.registry.url: add it"),
        ("schema.registry.url=http://a&basic.auth.user.info=x&bearer.auth.token=y", "drop one of them"),
    ],
)
def test_what_makes_no_sense_is_refused(query, why):
    with pytest.raises(InvalidArguments, match=why) as refused:
        parse_kafka(f"kafka://h?{query}")
    assert "secret" not in str(refused.value)


def test_who_serves_and_connects_makes_a_client_of_it():
    assert schemas_of("sqlite:///x.db") is None
    assert schemas_of("kafka://h") is None
    found = schemas_of("kafka://h?schema.registry.url=http://a:1")
    assert found is not None
    assert found.name == "http://a:1"
