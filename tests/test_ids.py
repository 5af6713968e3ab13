"""Ids, and the hash by which every language finds a run's partition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.errors import InvalidArguments
from streamflow.ids import check_app, check_id, check_queue, murmur2, partition_of

JAVA_VECTORS = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}
"""From the tests of Kafka's own `Utils.murmur2`, as Java's signed ints."""


@pytest.mark.parametrize(("key", "expected"), JAVA_VECTORS.items())
def test_the_hash_is_that_of_javas_default_partitioner(key, expected):
    assert murmur2(key.encode()) == expected % 2**32


@given(st.text(max_size=40), st.integers(min_value=1, max_value=1000))
def test_a_partition_is_the_one_that_kafkas_own_client_chooses(key, partitions):
    kafka = pytest.importorskip("confluent_kafka")
    if not hasattr(kafka, "murmur2"):
        pytest.skip("this confluent_kafka does not export murmur2")
    assert partition_of(key, partitions) == kafka.murmur2(key.encode(), partitions)


@given(st.binary(max_size=40))
def test_the_hash_has_32_bits(key):
    assert 0 <= murmur2(key) < 2**32


@given(st.text(max_size=20), st.integers(min_value=1, max_value=64))
def test_a_partition_is_one_of_those_there_are(key, partitions):
    assert 0 <= partition_of(key, partitions) < partitions


@pytest.mark.parametrize("id", ["a", "x" * 255, "ä" * 127, "order/7:b", "\0"])
def test_an_id_of_1_to_255_bytes_is_taken_as_it_is(id):
    assert check_id(id, what="workflow id") == id


@pytest.mark.parametrize(
    ("id", "why"),
    [
        ("", "must not be empty: give 1 to 255 bytes of UTF-8"),
        ("x" * 256, "found 256: shorten or hash it"),
        ("ä" * 128, "found 256"),
        (7, r"must be a str, found int: pass str\(value\)"),
        (None, "found NoneType"),
        ("\ud800", "is not valid UTF-8"),
    ],
)
def test_another_id_is_refused_with_what_it_was_for(id, why):
    with pytest.raises(InvalidArguments, match=f"workflow id.*{why}"):
        check_id(id, what="workflow id")


@pytest.mark.parametrize("name", ["shop", "a", "a" * 64, "shop-2.eu_west"])
def test_an_app_name_can_prefix_a_topic(name):
    assert check_app(name) == name


@pytest.mark.parametrize("name", ["gpu", "gpu-a100.eu_west"])
def test_a_queue_name_can_end_a_topic(name):
    assert check_queue(name) == name


@pytest.mark.parametrize("name", ["", "a" * 65, "GPU", "a b", 7])
def test_another_queue_name_is_refused(name):
    with pytest.raises(ValueError, match="queue must match"):
        check_queue(name)


@pytest.mark.parametrize("name", ["", "a" * 65, "Shop", "my shop", "shop/a", "ä", 7, None])
def test_another_app_name_is_refused(name):
    with pytest.raises(ValueError, match="app name must match"):
        check_app(name)
