"""What a cluster says of itself to a client: who is there, and who leads a partition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

ANSWER_SECONDS: Final = 1.0
"""How long one answer may take; whoever needs it asks again."""
NO_LEADER: Final = -1


class Probe:
    """A client that asks, and keeps what it is told by the library to itself: refused connections are expected."""

    def __init__(self, bootstrap: str) -> None:
        from confluent_kafka.admin import AdminClient

        settings: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            "log_level": 0,
            "error_cb": lambda _: None,
            # A node that starts is tried again soon, not after seconds.
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 200,
            # One that is stopped holds what it was asked for so long; after that another one is asked.
            "socket.timeout.ms": 2_000,
        }
        self._client: AdminClient = AdminClient(settings)

    def nodes(self) -> list[int]:
        """The numbers of the nodes that the cluster counts in, in order; none when nobody answers."""
        from confluent_kafka import KafkaException

        try:
            return sorted(self._client.list_topics(timeout=ANSWER_SECONDS).brokers)
        except KafkaException:
            return []

    def leader_of(self, topic: str, partition: int) -> int | None:
        """The number of the node that leads it; None while none does, or nobody answers."""
        from confluent_kafka import KafkaException

        try:
            found = self._client.list_topics(topic, timeout=ANSWER_SECONDS).topics[topic].partitions.get(partition)
        except KafkaException:
            return None
        return None if found is None or found.leader == NO_LEADER else int(found.leader)
