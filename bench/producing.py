"""The producer that feeds what is measured."""

import time
from collections.abc import Callable

from confluent_kafka import Producer


def producer_of(brokers: str) -> Producer:
    """Compressed and with a little linger, as a producer in the field has it: a sparing one takes less from the cores."""
    return Producer(
        {"bootstrap.servers": brokers, "linger.ms": 20, "compression.type": "lz4", "queue.buffering.max.messages": 1_000_000}
    )  # fmt: skip


def paced(producer: Producer, produce: Callable[[int], None], first: int, end: int, rate: float) -> None:
    """Give each number from `first` to below `end` to `produce`, so many a second, and wait until all are with Kafka."""
    n, began = first, time.monotonic()
    while n < end:
        due = min(end, first + 1 + int(min((time.monotonic() - began) * rate, end)))
        while n < due:
            produce(n)
            n += 1
        producer.poll(0)
        time.sleep(0.005)
    producer.flush()
