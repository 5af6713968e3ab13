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


def test_a_client_that_hears_nothing_gives_way_to_one_with_other_connections(monkeypatch: pytest.MonkeyPatch):
    clients = iter([StuckAdmin(), AnsweredAdmin()])
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: next(clients))
    assert Topics(parse_kafka("kafka://127.0.0.1:9"), "shop").queues() == ["steps.gpu"]


def test_where_nobody_answers_it_is_said_after_several_questions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kafka_topics, "ADMIN_SECONDS", 0.5)
    monkeypatch.setattr(StuckAdmin, "asked", 0)
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: StuckAdmin())
    with pytest.raises(Unavailable, match=r"the Kafka cluster cannot be reached .*Timed out"):
        Topics(parse_kafka("kafka://127.0.0.1:9"), "shop").queues()
    assert StuckAdmin.asked > 1


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


def test_of_two_who_give_a_client_up_one_replaces_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: AnsweredAdmin())
    topics = Topics(parse_kafka("kafka://127.0.0.1:9"), "shop")
    given_up = topics._admin
    topics._replace(given_up)
    following = topics._admin
    topics._replace(given_up)
    assert given_up is not following is topics._admin


class SlowAdmin(AnsweredAdmin):
    """One whose cluster takes its time, by the clock of the test."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def list_topics(self, timeout: float) -> SimpleNamespace:
        self.clock.now += min(timeout, self.seconds)
        if timeout < self.seconds:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        return super().list_topics(timeout)

    def poll(self, seconds: float) -> int:
        return 0


class Clock:
    """Stands in the place of `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("seconds", "until"), [(0.1, 0.1), (0.9, 5.0), (1.7, 6.0), (3.0, 12.0), (4.0, 12.5)])
def test_a_cluster_that_is_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch, seconds: float, until: float):
    monkeypatch.undo()  # the real patience, by a clock that costs nothing
    clock = Clock()
    monkeypatch.setattr(kafka_topics, "time", clock)
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: SlowAdmin(clock, seconds))
    assert Topics(parse_kafka("kafka://127.0.0.1:9"), "shop").queues() == ["steps.gpu"]
    assert clock.now <= until


def test_a_cluster_that_never_answers_is_waited_for_until_it_has_given_a_dead_broker_up(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.undo()
    clock, asked = Clock(), list[float]()
    monkeypatch.setattr(kafka_topics, "time", clock)
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: AnsweredAdmin())
    topics = Topics(parse_kafka("kafka://127.0.0.1:9"), "shop")

    def ask(seconds: float) -> None:
        asked.append(clock.now)
        assert seconds > 0
        clock.now += seconds
        raise Unavailable("nobody answers")

    with pytest.raises(Unavailable):
        topics._asked(ask)
    assert len(asked) >= 4 and asked[-1] > 9
    assert 14 <= clock.now <= 16


def test_who_stood_still_between_two_questions_asks_once_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    clock, waits = Clock(), list[float]()
    monkeypatch.setattr(kafka_topics, "time", clock)
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda config: AnsweredAdmin())
    monkeypatch.setattr(clock, "sleep", lambda seconds: setattr(clock, "now", 60.0))
    topics = Topics(parse_kafka("kafka://127.0.0.1:9"), "shop")

    def ask(seconds: float) -> str:
        waits.append(seconds)
        if len(waits) == 1:
            raise Unavailable("nobody answers")
        return "answered"

    assert topics._asked(ask) == "answered"
    assert waits[1] > 0


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

    monkeypatch.setattr(kafka_topics, "ADMIN_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        topics = Topics(parse_kafka(f"kafka://127.0.0.1:{silent.getsockname()[1]}"), "shop")
        trimming = threading.Thread(target=trim, args=(topics,), daemon=True)
        trimming.start()
        assert asked.wait(WAIT_SECONDS)
        topics._replace(topics._admin)
        trimming.join(WAIT_SECONDS)
    assert len(told) == 1 and "history[0] cannot be trimmed to 1" in str(told[0])
