"""Questions about topics where the one broker that a client is connected to stands still."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException

from streamflow.errors import Unavailable
from streamflow.logs import kafka_topics
from streamflow.logs.kafka_topics import Topics
from streamflow.logs.kafka_url import parse_kafka


class StuckAdmin:
    """What librdkafka does while its only connection is to a broker that stands still."""

    asked = 0

    def list_topics(self, timeout: float) -> None:
        type(self).asked += 1
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    def poll(self, seconds: float) -> int:
        return 0


class AnsweredAdmin:
    """A client that found a broker that answers."""

    def list_topics(self, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(topics={"shop.steps.gpu": None, "shop.history": None, "other.steps.cpu": None})


@pytest.fixture(autouse=True)
def short_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_topics, "FIRST_QUESTION_SECONDS", 0.05)
    monkeypatch.setattr(kafka_topics, "FIRST_PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(kafka_topics, "ADMIN_SECONDS", 0.5)


def test_a_client_that_hears_nothing_gives_way_to_one_with_other_connections(monkeypatch: pytest.MonkeyPatch):
    clients = iter([StuckAdmin(), AnsweredAdmin()])
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: next(clients))
    assert Topics(parse_kafka("kafka://127.0.0.1:9"), "shop").queues() == ["steps.gpu"]


def test_where_nobody_answers_it_is_said_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StuckAdmin, "asked", 0)
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: StuckAdmin())
    with pytest.raises(Unavailable, match=r"the Kafka cluster cannot be reached .*Timed out"):
        Topics(parse_kafka("kafka://127.0.0.1:9"), "shop").queues()
    assert StuckAdmin.asked > 3
