"""What is said of a question that failed: whether the cluster answered, and with what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from confluent_kafka import KafkaError, KafkaException

from streamflow.errors import StreamflowError
from streamflow.logs import kafka_patience
from streamflow.logs.kafka_patience import failed, patiently
from streamflow.logs.kafka_topics import Topics
from streamflow.logs.kafka_url import parse_kafka

URL = parse_kafka("kafka://127.0.0.1:1")
ANSWERED = (
    KafkaError.FENCED_LEADER_EPOCH, KafkaError.UNKNOWN, KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError._UNKNOWN_PARTITION,
)  # fmt: skip
UNHEARD = (
    KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
)  # fmt: skip


def raising(code: int) -> Callable[[float], None]:
    def ask(seconds: float) -> None:
        raise KafkaException(KafkaError(code, "the reason"))

    return ask


@pytest.mark.parametrize("code", ANSWERED)
def test_an_error_of_a_broker_is_an_answer(code: int):
    error = KafkaError(code, "the reason")
    said = str(failed(URL, error, "topic shop.history"))
    assert "answered with an error (topic shop.history: the reason): try again" in said
    assert "cannot be reached" not in said


@pytest.mark.parametrize("code", UNHEARD)
def test_librdkafkas_own_errors_and_those_of_security_are_none(code: int):
    said = str(failed(URL, KafkaError(code, "the reason")))
    assert "cannot be reached (the reason)" in said and "security settings" in said


def test_why_patience_ended_is_what_was_said_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kafka_patience, "READ_SECONDS", 0.1)
    for ask, said in (
        (raising(KafkaError.LEADER_NOT_AVAILABLE), "answered with an error (topic x, for 0.1 s: the reason)"),
        (raising(KafkaError._TRANSPORT), "cannot be reached (topic x, for 0.1 s: the reason)"),
        (raising(KafkaError.INVALID_GROUP_ID), "answered with an error (topic x: the reason)"),
        (lambda seconds: None, "cannot be reached (topic x: no answer within 0.1 s)"),
    ):
        with pytest.raises(StreamflowError) as caught:
            patiently(URL, ask, about="topic x")
        assert said in str(caught.value)


def test_trimming_that_a_broker_refuses_is_not_said_to_be_for_want_of_one():
    topics = Topics(URL, "shop")
    topics._said = "127.0.0.1:1: connection refused"
    refused = KafkaException(KafkaError(KafkaError.FENCED_LEADER_EPOCH, "Leader epoch is older"))
    said = str(topics._failed("history[0] cannot be trimmed to 7", refused))
    assert "answered with an error (history[0] cannot be trimmed to 7: Leader epoch is older)" in said
    unheard = str(topics._failed("x", KafkaException(KafkaError(KafkaError._TIMED_OUT, "timed out"))))
    assert "cannot be reached (x: timed out: 127.0.0.1:1: connection refused)" in unheard
