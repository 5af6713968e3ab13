"""Questions about topics where brokers stand still, answer late, or refuse."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from streamflow.errors import InvalidArguments, Unavailable
from streamflow.logs import kafka_topics
from streamflow.logs.kafka_topics import Topics
from streamflow.logs.kafka_url import parse_kafka

WAIT_SECONDS = 10


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


class MakingAdmin(AnsweredAdmin):
    """One whose broker says to each `create_topics` what the test has listed."""

    def __init__(self, *said: int) -> None:
        self.said = list(said)

    def create_topics(self, new: list[Any], request_timeout: float) -> dict[str, Future[None]]:
        future: Future[None] = Future()
        future.set_exception(KafkaException(KafkaError(self.said.pop(0))))
        return {topic.topic: future for topic in new}


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


def test_creation_that_was_not_answered_is_asked_again_and_may_have_been_done(monkeypatch: pytest.MonkeyPatch):
    admin = MakingAdmin(KafkaError._TIMED_OUT, KafkaError.TOPIC_ALREADY_EXISTS)
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: admin)
    topics = Topics(parse_kafka("kafka://127.0.0.1:9"), "shop")
    described: list[object] = []
    monkeypatch.setattr(topics, "_described", described.append)
    topics.create(["history"], 1, 1)
    assert admin.said == [] and described == [["history"]]


def test_creation_that_is_refused_is_asked_for_once(monkeypatch: pytest.MonkeyPatch):
    admin = MakingAdmin(KafkaError.TOPIC_EXCEPTION)
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: admin)
    with pytest.raises(InvalidArguments, match=r"topic shop\.history cannot be created: Broker: Invalid topic"):
        Topics(parse_kafka("kafka://127.0.0.1:9"), "shop").create(["history"], 1, 1)


def test_a_client_that_is_replaced_answers_those_who_wait_for_it(monkeypatch: pytest.MonkeyPatch):
    asked = threading.Event()

    class Asked(AdminClient):
        def delete_records(self, *places: Any, **options: Any) -> Any:
            futures = super().delete_records(*places, **options)
            asked.set()
            return futures

    monkeypatch.setattr(kafka_topics, "AdminClient", Asked)
    told: list[BaseException] = []

    def trim(topics: Topics) -> None:
        try:
            topics._delete_before("history", 0, 1)
        except Unavailable as error:
            told.append(error)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        topics = Topics(parse_kafka(f"kafka://127.0.0.1:{silent.getsockname()[1]}"), "shop")
        trimming = threading.Thread(target=trim, args=(topics,), daemon=True)
        trimming.start()
        assert asked.wait(WAIT_SECONDS)
        topics._replace(topics._admin)
        trimming.join(WAIT_SECONDS)
    assert len(told) == 1 and "history[0] cannot be trimmed to 1" in str(told[0])
