"""Bytes: the log's Avro records (`avro`), their framing (`envelope`), older versions (`upcast`), user payloads."""

from streamflow.codec.envelope import DecodeError, EncodeError, UnknownSchema

__all__ = ["DecodeError", "EncodeError", "UnknownSchema"]
