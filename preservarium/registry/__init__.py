"""How what people edit reaches the workers: a file, the event store, the relay, the catalogue in memory.

`file` reads (what is wrong, `preservarium/domain/registry/checks.py` says) and `yaml_tree` is its YAML, `apply` stores, `relay` makes
Kafka records of the outbox, `catalogue` and `device_lookup` are a worker's side, `compiled` keeps what devices compile to, `codecs` and
`proving` are for parsers that are scripts.

May import streaming, stores, sandbox, the domain and the ground.
"""
