"""The replaced sink's design: kafka-python, a pydantic model a message, psycopg2 execute_batch of 100 rows.

One reading a message from `decoded_iot_data`, wide table with its primary key and three indexes. Two of its defects are
left out in its favour and for a fair count: it starts at the earliest offset, and it does not stop at a duplicate.
Run by bench/e2e.py and bench/sink.py with its settings in the environment; bench/sink.py uses its parts alone besides.
"""

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import psycopg2
from kafka import KafkaConsumer
from psycopg2.extras import execute_batch
from pydantic import BaseModel, Field, field_validator

BATCH = 100
TABLE = "iot_measurements_old"
SCHEMA = """
CREATE TABLE IF NOT EXISTS {table} (
    timestamp TIMESTAMPTZ NOT NULL, device_id VARCHAR(50) NOT NULL, connector_mode VARCHAR(50) NOT NULL,
    component_type VARCHAR(50) NOT NULL, pin_position VARCHAR(10), value DOUBLE PRECISION, unit VARCHAR(20), topic VARCHAR(255),
    PRIMARY KEY (timestamp, device_id, connector_mode, component_type, pin_position));
CREATE INDEX IF NOT EXISTS {table}_device ON {table} (device_id, timestamp DESC);
CREATE INDEX IF NOT EXISTS {table}_component ON {table} (component_type, timestamp DESC);
CREATE INDEX IF NOT EXISTS {table}_mode ON {table} (connector_mode, timestamp DESC);
"""


class IotMeasurement(BaseModel):
    timestamp: datetime
    device_id: str = Field(alias="mac_address")
    connector_mode: str = Field("unknown", alias="mode")
    component_type: str = Field("unknown", alias="data_point_label")
    pin_position: str = Field("-1", alias="pin")
    value: float | None = None
    unit: str = ""
    topic: str = Field("", alias="original_topic")

    @field_validator("timestamp", mode="before")
    @classmethod
    def convert_timestamp(cls, v):
        return datetime.fromtimestamp(v, UTC) if isinstance(v, int | float) else v

    @field_validator("value", mode="before")
    @classmethod
    def convert_value(cls, v):
        return float(v) if v is not None else None


class Writer:
    """Rows gathered until there are 100, then inserted and committed."""

    def __init__(self, dsn: str) -> None:
        self.connection = psycopg2.connect(dsn)
        self._columns = list(IotMeasurement.model_fields)
        self._rows: list[tuple] = []
        values = ", ".join(["%s"] * len(self._columns))
        self._statement = f"INSERT INTO {TABLE} ({', '.join(self._columns)}) VALUES ({values}) ON CONFLICT DO NOTHING"

    def add(self, message: dict[str, Any]) -> None:
        m = IotMeasurement(**message)
        self._rows.append(tuple(getattr(m, c) for c in self._columns))
        if len(self._rows) >= BATCH:
            self.flush()

    def flush(self) -> None:
        with self.connection.cursor() as cursor:
            execute_batch(cursor, self._statement, self._rows, page_size=BATCH)
        self.connection.commit()
        self._rows.clear()

    @property
    def waiting(self) -> bool:
        return bool(self._rows)


def write_all(dsn: str, messages: Iterable[dict[str, Any]]) -> None:
    """The database's part alone: from parsed messages to committed rows."""
    writer = Writer(dsn)
    for message in messages:
        writer.add(message)
    writer.flush()
    writer.connection.close()


def main() -> None:
    writer = Writer(os.environ["PEER_POSTGRES"])
    consumer = KafkaConsumer(
        os.environ["PEER_PREFIX"] + "decoded_iot_data",
        bootstrap_servers=os.environ["PEER_BROKER"],
        auto_offset_reset="earliest",
        enable_auto_commit=True,
        group_id=os.environ["PEER_PREFIX"] + "timescale_sink_group",
        value_deserializer=json.loads,
    )
    while True:
        polled = consumer.poll(timeout_ms=1000)
        for messages in polled.values():
            for message in messages:
                writer.add(message.value)
        if writer.waiting and not polled:
            writer.flush()


if __name__ == "__main__":
    main()
