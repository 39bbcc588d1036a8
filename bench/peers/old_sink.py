"""The replaced sink's design: kafka-python, a pydantic model a message, psycopg2 execute_batch of 100 rows.

One reading a message from `decoded_iot_data`, wide table with its primary key and three indexes. Two of its defects are
left out in its favour and for a fair count: it starts at the earliest offset, and it does not stop at a duplicate.
Run by bench/e2e.py with its settings in the environment.
"""

import json
import os
from datetime import UTC, datetime

import psycopg2
from kafka import KafkaConsumer
from psycopg2.extras import execute_batch
from pydantic import BaseModel, Field, field_validator

BATCH = 100


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


def main() -> None:
    columns = list(IotMeasurement.model_fields)
    statement = (
        f"INSERT INTO iot_measurements_old ({', '.join(columns)}) VALUES ({', '.join(['%s'] * len(columns))}) "
        "ON CONFLICT DO NOTHING"
    )
    connection = psycopg2.connect(os.environ["PEER_POSTGRES"])
    consumer = KafkaConsumer(
        os.environ["PEER_PREFIX"] + "decoded_iot_data",
        bootstrap_servers=os.environ["PEER_BROKER"],
        auto_offset_reset="earliest",
        enable_auto_commit=True,
        group_id=os.environ["PEER_PREFIX"] + "timescale_sink_group",
        value_deserializer=json.loads,
    )
    rows: list[tuple] = []

    def flush() -> None:
        with connection.cursor() as cursor:
            execute_batch(cursor, statement, rows, page_size=BATCH)
        connection.commit()
        rows.clear()

    while True:
        polled = consumer.poll(timeout_ms=1000)
        for messages in polled.values():
            for message in messages:
                m = IotMeasurement(**message.value)
                rows.append(tuple(getattr(m, c) for c in columns))
                if len(rows) >= BATCH:
                    flush()
        if rows and not polled:
            flush()


if __name__ == "__main__":
    main()
