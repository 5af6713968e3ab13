"""Local, disposable state: one ordered key-value store per partition, moved together with its applied offset.

`base.Store` is the port, `memory.MemoryStore` and `rocks.open_rocks` are its adapters, `slots.lease_slot` finds the
directory that this worker process may use. RocksDB is loaded only when `streamflow.store.rocks` is imported.
"""
