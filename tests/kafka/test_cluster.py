"""A cluster starts, answers, loses a node, comes back with its data, and leaves nothing behind, whatever ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from streamflow.broker import Cluster
from streamflow.broker.settings import HOST, free_ports
from streamflow.errors import InvalidArguments, StreamflowError, Unavailable
from tests.cli import driver
from tests.kafka.stage import leader_of
from tests.waiting import until

ANSWER_SECONDS = 20.0


def create_topic(bootstrap: str, name: str, *, copies: int) -> None:
    """A topic of one partition."""
    client = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    made = client.create_topics([NewTopic(name, num_partitions=1, replication_factor=copies)])
    made[name].result(ANSWER_SECONDS)


def write(bootstrap: str, topic: str, value: bytes) -> None:
    """Append one record, and wait until all replicas in sync have it."""
    outcomes: list[object] = []
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "log_level": 0})
    producer.produce(topic, value, partition=0, on_delivery=lambda error, _: outcomes.append(error))
    assert producer.flush(ANSWER_SECONDS) == 0
    assert outcomes == [None]


def read(bootstrap: str, topic: str, count: int) -> list[bytes | None]:
    """The first records of partition 0."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "unused", "log_level": 0})
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        return [message.value() for message in consumer.consume(count, ANSWER_SECONDS)]
    finally:
        consumer.close()


def is_gone(pid: int) -> bool:
    """Whether that process has ended; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go between the two calls that reading takes
        return True


@pytest.fixture
def one(kafka_runtime: None, tmp_path: Path) -> Iterator[Cluster]:
    """One node, not started."""
    cluster = Cluster(tmp_path / "broker")
    yield cluster
    cluster.stop()


# ------------------------------------------------------------------------------------------------------------ one node


def test_one_node_answers_and_keeps_its_data_over_a_stop_and_a_kill(one: Cluster):
    one.start()
    create_topic(one.bootstrap, "kept", copies=1)
    write(one.bootstrap, "kept", b"before the stop")
    pid = one.node(1).pid
    assert leader_of(one, "kept") == 1 and one.leader_of("kept", 1) is None and one.leader_of("lost", 0) is None
    assert one.url == f"kafka://{one.bootstrap}" and one.node(1).memory_bytes() > 2**20
    one.stop()
    assert pid is not None and is_gone(pid) and not one.node(1).is_running

    again = Cluster(one.directory)
    with again:
        assert read(again.bootstrap, "kept", 1) == [b"before the stop"]
        write(again.bootstrap, "kept", b"before the kill")
        again.node(1).kill()
        again.check()
        again.node(1).start()
        again.wait()
        assert read(again.bootstrap, "kept", 2) == [b"before the stop", b"before the kill"]


def test_a_node_that_ends_by_itself_is_told_with_its_last_words(one: Cluster):
    one.start()
    with pytest.raises(StreamflowError, match="node 1 runs already"):
        one.node(1).start()
    for refused in (one.start, one.erase):
        with pytest.raises(InvalidArguments, match=r"stop\(\) it before"):
            refused()
    pid = one.node(1).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match=r"node 1 of the broker ended with exit code -9\. The end of .*node-1\.log"):
        one.wait([1, 2])
    with pytest.raises(StreamflowError, match="node 1 does not run"):
        one.node(1).pause()


def test_a_wrong_setting_is_told_with_what_the_broker_says_of_it(kafka_runtime: None, tmp_path: Path):
    cluster = Cluster(tmp_path, settings={"log.retention.ms": "soon"})
    with pytest.raises(Unavailable, match=r"(?s)node 1 of the broker could not be formatted.*Invalid value soon"):
        cluster.start()


def test_a_taken_port_is_told(one: Cluster):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        cluster = Cluster(one.directory, ports=[port])
        with pytest.raises(Unavailable, match=rf"port {port} on {HOST} is taken, which node 1 .* needs"):
            cluster.start()


def test_a_broker_outlives_the_thread_that_started_it_and_not_the_process(kafka_runtime: None, tmp_path: Path):
    program = """
import signal, sys, threading
from pathlib import Path
from streamflow.broker import Cluster
cluster = Cluster(Path(sys.argv[1]))
thread = threading.Thread(target=cluster.start)
thread.start()
thread.join()
cluster.wait()
print(cluster.node(1).pid, flush=True)
signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "broker")],
        stdout=subprocess.PIPE,
        env=driver.environment(),
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
    asyncio.run(until(lambda: is_gone(pid)))


# --------------------------------------------------------------------------------------------------------- three nodes


def test_three_nodes_go_on_without_one_and_take_it_back(kafka_cluster: Cluster):
    create_topic(kafka_cluster.bootstrap, "shared", copies=3)
    write(kafka_cluster.bootstrap, "shared", b"with all")
    leader = leader_of(kafka_cluster, "shared")
    kafka_cluster.node(leader).kill()
    rest = [each for each in (1, 2, 3) if each != leader]
    kafka_cluster.wait(rest)
    assert leader_of(kafka_cluster, "shared", rest) in rest
    write(kafka_cluster.bootstrap, "shared", b"without one")
    kafka_cluster.node(leader).start()
    kafka_cluster.wait()
    assert read(kafka_cluster.node(leader).address, "shared", 2) == [b"with all", b"without one"]


def test_a_paused_node_is_left_out_and_taken_back(kafka_cluster: Cluster):
    kafka_cluster.node(2).pause()
    try:
        assert kafka_cluster.node(2).is_running
        kafka_cluster.wait([1, 3])
    finally:
        kafka_cluster.node(2).resume()
    kafka_cluster.wait()


# --------------------------------------------------------------------------------------------------------- wrong calls


def test_two_nodes_are_refused(tmp_path: Path):
    with pytest.raises(InvalidArguments, match="1 or 3 nodes, not 2"):
        Cluster(tmp_path, nodes=2)
    with pytest.raises(InvalidArguments, match="3 nodes need 3 ports, found 1"):
        Cluster(tmp_path, nodes=3, ports=[9092])


def test_a_cluster_that_was_not_started_says_so(tmp_path: Path):
    with pytest.raises(InvalidArguments, match="never started"):
        _ = Cluster(tmp_path).bootstrap
    with pytest.raises(InvalidArguments, match="never started"):
        Cluster(tmp_path).leader_of("topic", 0)


def test_the_number_of_nodes_of_a_directory_is_fixed_until_it_is_erased(kafka_runtime: None, tmp_path: Path):
    for number in (1, 2, 3):
        (tmp_path / f"node-{number}").mkdir()
        (tmp_path / f"node-{number}/meta.properties").write_text("cluster.id=x\n")
    (tmp_path / "mine.txt").touch()
    cluster = Cluster(tmp_path)
    with pytest.raises(InvalidArguments, match="holds a broker of 3 nodes, asked for was 1"):
        cluster.start()
    cluster.erase()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_free_ports_differ_and_are_free():
    ports = free_ports(6)
    assert len(set(ports)) == 6
    for port in ports:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a broker does
            server.bind((HOST, port))


def test_several_may_draw_ports_at_once():
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.extend(free_ports(2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
