"""Questions to the cluster that are asked again while it is being rearranged: they change nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from confluent_kafka import KafkaError, KafkaException

from streamflow.errors import Unavailable
from streamflow.logs.kafka_access import DENIED, denied
from streamflow.logs.kafka_url import KafkaUrl, unreachable

READ_SECONDS: Final = 30.0
"""How long the cluster may take to answer a question before it counts as `Unavailable`; its asker then tries again."""

AGAIN_SECONDS: Final = 0.05

REARRANGED: Final = frozenset({
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.REPLICA_NOT_AVAILABLE,
    KafkaError.OFFSET_NOT_AVAILABLE, KafkaError.KAFKA_STORAGE_ERROR, KafkaError.NETWORK_EXCEPTION,
    KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.UNSTABLE_OFFSET_COMMIT, KafkaError.REQUEST_TIMED_OUT, KafkaError._TRANSPORT, KafkaError._TIMED_OUT,
    KafkaError._ALL_BROKERS_DOWN, KafkaError._WAIT_COORD, KafkaError._WAIT_CACHE,
})  # fmt: skip
"""A partition or a group is being made, or moves to another broker."""

UNKNOWN: Final = frozenset({
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION,
    KafkaError.UNKNOWN_TOPIC_ID,
})  # fmt: skip
"""There is no such topic."""

_T = TypeVar("_T")


def patiently(url: KafkaUrl, ask: Callable[[float], _T | None], *, about: str) -> _T:
    """The answer of `ask(seconds)`; raises `Unavailable` when there is none within `READ_SECONDS`. Blocks."""
    deadline = time.monotonic() + READ_SECONDS
    found = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            answer = ask(left)
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            if reason.code() in UNKNOWN:
                raise Unavailable(
                    f"{url.url}: {about} is not there (any more): was it deleted? Restore it, for what was in it is "
                    f"kept nowhere else"
                ) from None
            if reason.code() in DENIED:
                raise denied(url.url, f"{about} cannot be used ({reason.str()})") from None
            if reason.code() not in REARRANGED:
                raise unreachable(url.url, f"{about}: {reason.str()}") from None
            found = reason.str()
        else:
            if answer is not None:
                return answer
        time.sleep(AGAIN_SECONDS)
    raise unreachable(url.url, f"{about}: {found} within {READ_SECONDS:g} s")
