"""How RocksDB is set up: small, checked, and sharing one cache and one memory budget within the process.

A worker opens one store per partition and one per timer index, so what can be shared is. Measurements in DESIGN.md.
"""

from __future__ import annotations

from typing import Final

from rocksdict import (
    BlockBasedOptions,
    Cache,
    ChecksumType,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    WriteBufferManager,
)

WRITE_BUFFER_BYTES: Final = 8 << 20
"""One memtable. Also about how much of the log is read again after a power loss, and replayed locally after a kill."""

WRITE_BUFFERS_MAX: Final = 3
"""One being filled, two being flushed: writers are stopped only when the disk is two buffers behind."""

PROCESS_WRITE_BUFFERS_BYTES: Final = 32 << 20
"""All memtables of all stores together; above it the fullest is flushed early, nobody is stopped."""

PROCESS_CACHE_BYTES: Final = 32 << 20
"""Uncompressed blocks, indexes and filters of all stores together. The page cache holds the rest."""

OPEN_FILES_MAX: Final = 128
"""File handles per store: sixteen stores stay below a limit of 4,096."""

TARGET_FILE_BYTES: Final = 16 << 20
INFO_LOG_BYTES: Final = 1 << 20
SYNC_EVERY_BYTES: Final = 1 << 20
"""Background writing goes to disk in steps of this, instead of one burst that stalls everybody's fsync."""

BLOOM_BITS: Final = 10
"""1 % false positives: a `get` of a missing key reads no data block."""

_cache = Cache(PROCESS_CACHE_BYTES)
_write_buffers = WriteBufferManager(PROCESS_WRITE_BUFFERS_BYTES, False)


def options(*, create: bool) -> Options:
    """Options to open a store; `create` only where no database can be."""
    table = BlockBasedOptions()
    table.set_block_cache(_cache)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    table.set_bloom_filter(BLOOM_BITS, False)
    table.set_format_version(5)
    table.set_checksum_type(ChecksumType.xxh3())
    o = Options(raw_mode=True)
    o.create_if_missing(create)
    o.set_error_if_exists(create)
    o.set_block_based_table_factory(table)
    o.set_write_buffer_size(WRITE_BUFFER_BYTES)
    o.set_max_write_buffer_number(WRITE_BUFFERS_MAX)
    o.set_write_buffer_manager(_write_buffers)
    o.set_target_file_size_base(TARGET_FILE_BYTES)
    o.set_max_bytes_for_level_base(4 * TARGET_FILE_BYTES)
    o.set_level_compaction_dynamic_level_bytes(True)
    # Payloads are JSON: a third of the disk and of the page cache for no time that could be measured.
    o.set_compression_type(DBCompressionType.lz4())
    o.set_paranoid_checks(True)
    # The first inconsistency in the write-ahead log ends it: what is before it is a prefix.
    o.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
    o.set_max_open_files(OPEN_FILES_MAX)
    o.set_bytes_per_sync(SYNC_EVERY_BYTES)
    o.set_max_background_jobs(2)
    o.set_keep_log_file_num(2)
    o.set_max_log_file_size(INFO_LOG_BYTES)
    o.set_stats_dump_period_sec(0)
    o.set_stats_persist_period_sec(0)
    return o
