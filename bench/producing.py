"""The producer that feeds what is measured."""

from confluent_kafka import Producer


def producer_of(brokers: str) -> Producer:
    """Compressed and with a little linger, as a producer in the field has it: a sparing one takes less from the cores."""
    return Producer(
        {"bootstrap.servers": brokers, "linger.ms": 20, "compression.type": "lz4", "queue.buffering.max.messages": 1_000_000}
    )  # fmt: skip
