"""Questions to the cluster that are asked again while it is being rearranged: they change nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from confluent_kafka import KafkaError, KafkaException

from streamflow.errors import Unavailable
from streamflow.logs.kafka_access import DENIED, denied
from streamflow.logs.kafka_url import KafkaUrl, answered, unreachable

READ_SECONDS: Final = 30.0
"""How long the cluster may take to answer a question before it counts as `Unavailable`; its asker then tries again."""

QUESTION_SECONDS: Final = 3.0
"""How long one question may wait before it is asked anew: those on one client wait for each other, and who closes
waits for the one that is under way."""

AGAIN_SECONDS: Final = 0.05

GONE_SECONDS: Final = 5.0
"""A broker that has just begun does not know all topics yet: only after so long is one not there."""

REFUSED: Final = frozenset({
    KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._AUTHENTICATION,
    KafkaError.INVALID_GROUP_ID, KafkaError.TOPIC_EXCEPTION, KafkaError.UNSUPPORTED_VERSION,
    KafkaError._INVALID_ARG, KafkaError._STATE,
})  # fmt: skip
"""Asking again gives the same answer. All else is asked again: there are more names for a partition or a group that is
being made or moves than anybody has listed, those of librdkafka's own among them."""

UNKNOWN: Final = frozenset({
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION,
    KafkaError.UNKNOWN_TOPIC_ID,
})  # fmt: skip
"""There is no such topic."""

UNHEARD: Final = frozenset({
    KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError.UNSUPPORTED_SASL_MECHANISM, KafkaError.ILLEGAL_SASL_STATE,
})  # fmt: skip
"""Answers to who asks, not to what was asked: the security settings do not fit."""

_T = TypeVar("_T")


def failed(url: KafkaUrl, error: KafkaError, about: str = "") -> Unavailable:
    """The error of a call: what the cluster answered, or that it did not."""
    text = f"{about}: {error.str()}" if about else error.str()
    return answered(url.url, text) if is_an_answer(error) else unreachable(url.url, text)


def is_an_answer(error: KafkaError) -> bool:
    """Whether a broker said so; the names below its own are librdkafka's, but for a topic that the cluster lacks."""
    if error.code() in UNHEARD:
        return False
    return error.code() >= KafkaError.UNKNOWN or error.code() in UNKNOWN


def patiently(url: KafkaUrl, ask: Callable[[float], _T | None], *, about: str) -> _T:
    """The answer of `ask(seconds)`; raises `Unavailable` when there is none within `READ_SECONDS`. Blocks."""
    began = time.monotonic()
    deadline = began + READ_SECONDS
    found: KafkaError | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            answer = ask(min(left, QUESTION_SECONDS))
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            if reason.code() in UNKNOWN and time.monotonic() - began > GONE_SECONDS:
                raise Unavailable(
                    f"{url.url}: {about} is not there (any more): was it deleted? Restore it, for what was in it is "
                    f"kept nowhere else"
                ) from None
            if reason.code() in DENIED:
                raise denied(url.url, f"{about} cannot be used ({reason.str()})") from None
            if reason.code() in REFUSED:
                raise failed(url, reason, about) from None
            found = reason
        else:
            if answer is not None:
                return answer
        time.sleep(AGAIN_SECONDS)
    if found is not None:
        raise failed(url, found, f"{about}, for {READ_SECONDS:g} s")
    raise unreachable(url.url, f"{about}: no answer within {READ_SECONDS:g} s")
