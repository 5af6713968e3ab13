"""A `kafka://` URL taken apart: what each part means, what is refused and in which words, and that no secret shows."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import pytest
from confluent_kafka import KafkaException, Producer
from hypothesis import given
from hypothesis import strategies as st

from streamflow.codec.registry import RegistrySettings
from streamflow.errors import InvalidUrl, StreamflowError
from streamflow.logs import open_log
from streamflow.logs.kafka_url import FILES, KEPT, KafkaUrl, parse_kafka, refused, unreachable

SECRET = "hunter2-0815"


def test_the_addresses_are_those_of_the_brokers():
    assert parse_kafka("kafka://a").bootstrap == "a:9092"
    assert parse_kafka("kafka://a,b:1,[::1],[::1]:2/").bootstrap == "a:9092,b:1,[::1]:9092,[::1]:2"


def test_ours_and_librdkafkas_settings_are_told_apart():
    url = parse_kafka("kafka://a?partitions=3&replication=2&schema.registry.url=http://r&linger.ms=5&client.id=x")
    assert (url.partitions, url.replication, url.registry) == (3, 2, RegistrySettings(("http://r",)))
    assert url.settings == {"linger.ms": "5", "client.id": "x"}
    assert parse_kafka("kafka://a", 7).partitions == 7


def test_the_users_settings_win_over_defaults_and_lose_to_the_role():
    config = parse_kafka("kafka://a?linger.ms=5&client.id=x&batch.size=1").config(
        defaults={"linger.ms": 0, "lingering": 1}, batch_size=2, error_cb=len
    )
    assert config["linger.ms"] == "5" and config["client.id"] == "x" and config["lingering"] == 1
    assert config["batch.size"] == 2 and config["error_cb"] is len
    assert config["bootstrap.servers"] == "a:9092" and config["allow.auto.create.topics"] is False


@pytest.mark.parametrize(
    ("query", "secured"),
    [("", False), ("security.protocol=PLAINTEXT", False), ("security.protocol=ssl", True), ("sasl.username=x", False)],
)
def test_whether_tools_need_a_file_with_settings(query: str, secured: bool):
    assert parse_kafka(f"kafka://a?{query}").is_secured is secured


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"kafka://user:{SECRET}@a", "holds no user: write ?sasl.username=NAME&sasl.password.env=VARIABLE"),
        (f"kafka://user:{SECRET}/x@a", "holds no user"),
        (f"kafka://user:{SECRET}#x@a?partitions=2", "holds no user"),
        ("kafka://a/topic", "kafka://a: a kafka URL is kafka://HOST:PORT,HOST:PORT?setting=value, without a path"),
        (f"kafka://a?sasl.password={SECRET}#x", "sasl.password=***: a kafka URL is"),
        (f"kafka://a#{SECRET}", "in a value write # as %23"),
        ("kafka://", "kafka://: expected HOST:PORT of a broker, found ''"),
        ("kafka://a,,b", "expected HOST:PORT of a broker, found ''"),
        ("kafka://a:x", "expected HOST:PORT of a broker, found 'a:x'"),
        ("kafka://a:0", "expected HOST:PORT of a broker, found 'a:0'"),
        ("kafka://a:65536", "expected HOST:PORT of a broker, found 'a:65536'"),
        (f"kafka://[::1?sasl.password={SECRET}", "expected kafka://HOST:PORT,HOST:PORT, found no valid address"),
        ("kafka://a?partitions=0", "partitions must be a whole number of 1 to 1,000, found '0'"),
        ("kafka://a?partitions=1001", "partitions must be a whole number of 1 to 1,000, found '1001'"),
        ("kafka://a?replication=two", "replication must be a whole number of 1 to 32,767, found 'two'"),
        ("kafka://a?linger.ms=1&linger.ms=2", "linger.ms is given twice: drop one of them"),
        (f"kafka://a?sasl.password={SECRET}&sasl.password.env=HOME", "sasl.password is given twice"),
        ("kafka://a?sasl.password.env=NO_SUCH_1", "the environment variable NO_SUCH_1 is not set: set it"),
        ("kafka://a?sasl.password.env=EMPTY_1", "the environment variable EMPTY_1 is empty: set it"),
        (f"kafka://a?sasl.password.env={SECRET}", "(not shown, since it does not look like one) is not set"),
        ("kafka://a?sasl.password.file=/no/such", "sasl.password.file cannot be read: No such file or directory: /no"),
        ("kafka://a?sasl.password.file=%00", "sasl.password.file holds no text in UTF-8: '\\x00'"),
        *[
            (f"kafka://a?{name}=x", f"{name} is set by streamflow itself, order and fence rest")
            for name in sorted(KEPT)
        ],
        *[(f"kafka://a?{name}.env=HOME", f"{name} is set by streamflow itself") for name in ("acks", "group.id")],
    ],
)
def test_what_is_wrong_is_said(url: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EMPTY_1", "")
    with pytest.raises(InvalidUrl) as caught:
        parse_kafka(url)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value) and str(caught.value).startswith("kafka://")


def test_the_caller_must_not_contradict_the_url():
    with pytest.raises(InvalidUrl, match="the URL says partitions=2, the caller 3: drop one of them"):
        parse_kafka("kafka://a?partitions=2", 3)


@pytest.mark.parametrize("content", [b"\xff", b"\n"])
def test_a_file_without_a_text_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(InvalidUrl, match=r"sasl\.password\.file (holds no text in UTF-8|is empty): "):
        parse_kafka(f"kafka://a?sasl.password.file={tmp_path}/secret")


def test_what_librdkafka_refuses_is_said_without_secrets():
    for query, said in (
        (f"sasl.passwort={SECRET}", 'No such configuration property: "sasl.passwort"'),
        (f"sasl.mechanism=OAUTHBEARER&sasl.oauthbearer.method=oidc&sasl.oauthbearer.client.secret={SECRET}", "oauth"),
        (f"ssl.key.pem={SECRET}&security.protocol=ssl", "ssl.key.pem"),
        (f"security.protocol={SECRET}", "security.protocol"),
    ):
        url = parse_kafka(f"kafka://127.0.0.1:1?{query}")
        with pytest.raises(InvalidUrl, match=r"see librdkafka's CONFIGURATION\.md") as caught:
            make(url)
        assert said in str(caught.value)
        assert SECRET not in str(caught.value) or query.startswith("security.protocol")


def make(url: KafkaUrl) -> None:
    try:
        Producer(url.config())
    except KafkaException as error:
        refused(url, error)


def test_the_rest_of_a_setting_that_librdkafka_quotes_is_cut_off():
    url = parse_kafka("kafka://a?sasl.oauthbearer.config=principal%3Dme%20hunter2")
    found = url.redact("Unrecognized sasl.oauthbearer.config beginning at: hunter2")
    assert found == "Unrecognized sasl.oauthbearer.config beginning at: ***"


def test_a_scheme_with_a_typing_error_shows_no_options():
    for url in (f"kafak://a?sasl.password={SECRET}", f"kafka+ssl://me:{SECRET}@a", f"kafka:a?sasl.password={SECRET}"):
        with pytest.raises(InvalidUrl, match="must start with") as caught:
            asyncio.run(open_log(url, app="shop"))
        assert SECRET not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- secrets


def test_secrets_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KAFKA_PASSWORD", SECRET)
    (tmp_path / "secret").write_text(f"{SECRET}\r\n", encoding="utf-8")
    for source in ("sasl.password.env=KAFKA_PASSWORD", f"sasl.password.file={tmp_path}/secret"):
        url = parse_kafka(f"kafka://a?security.protocol=SASL_SSL&sasl.username=me&{source}")
        assert url.settings["sasl.password"] == SECRET
        assert url.url == f"kafka://a?security.protocol=SASL_SSL&sasl.username=me&{source.partition('=')[0]}=***"
        assert SECRET not in repr(url) + str(url) + f"{url}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_files_that_librdkafka_reads_itself_are_left_to_it(name: str):
    assert parse_kafka(f"kafka://a?{name}=/no/such").settings == {name: "/no/such"}


def test_what_is_not_known_to_be_harmless_is_hidden():
    shown = parse_kafka(f"kafka://a:1?sasl.password=a&{SECRET}&Rest%26=x&ssl.ca.location=/ca.pem&linger.ms=5").url
    assert shown == "kafka://a:1?sasl.password=***&***=***&***=***&ssl.ca.location=/ca.pem&linger.ms=5"


SECRETS = ("sasl.password", "ssl.key.password", "ssl.key.pem", "ssl.keystore.password",
           "sasl.oauthbearer.client.secret", "sasl.oauthbearer.config",
           "sasl.oauthbearer.assertion.private.key.passphrase", "schema.registry.url")  # fmt: skip
FAULTS = ("", "&partitions=x", "&replication=-1", "&acks=0", "&linger.ms=1&linger.ms=2", "#x", "&x.env=NO_SUCH_1",
          "&x.file=/no/such")  # fmt: skip


@given(
    secret=st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=30),
    name=st.sampled_from(SECRETS),
    way=st.sampled_from(("plain", "env")),
    fault=st.sampled_from(FAULTS),
    place=st.sampled_from(("a", "a:x", "a/b", "[::1", "me@a")),
)
def test_no_secret_is_ever_shown(secret: str, name: str, way: str, fault: str, place: str):
    # Marked, so that it cannot be a part of what is rightly shown.
    secret = f"\u00a7{secret}\u00a7"
    query = f"{name}={quote(secret, safe='')}" if way == "plain" else f"{name}.env=OUR_SECRET_1"
    with mock.patch.dict(os.environ, {"OUR_SECRET_1": secret}):
        try:
            url = parse_kafka(f"kafka://{place}?{query}{fault}")
        except StreamflowError as error:
            texts = [str(error), repr(error)]
        else:
            assert secret in {*url.settings.values(), url.registry}
            texts = [url.url, repr(url), str(url), str(unreachable(url.url, "x"))]
            # What librdkafka is not given it cannot repeat.
            texts += [url.redact(f"about {secret}.")] if name in url.settings else []
    for text in texts:
        assert secret not in text and quote(secret, safe="") not in text
