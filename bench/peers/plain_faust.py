"""The plain Faust peer: what the Faust guide teaches. One event a message, one agent a stage.

It does the same work as Preservarium's stages on the JSON devices of the benchmark: decode by a path mapping, range
check, threshold alarm with dead-band in a RocksDB table, a message's rows into PostgreSQL with one executemany, and, since
nothing else would be of use there, batches into ClickHouse. It has no lineage, no de-duplication, no error topic. Run by bench/e2e.py with its settings in the environment.
"""

import os
from datetime import UTC, datetime

import asyncpg
import clickhouse_connect
import faust
import orjson

PREFIX = os.environ["PEER_PREFIX"]
PARTITIONS = int(os.environ["PEER_PARTITIONS"])

app = faust.App(
    f"{PREFIX}plain",
    broker=f"kafka://{os.environ['PEER_BROKER']}",
    store="rocksdb://",
    datadir=os.environ["PEER_DATADIR"],
    topic_partitions=PARTITIONS,
    topic_allow_declare=True,
    producer_linger=0.02,
    stream_buffer_maxsize=16384,
    web_enabled=False,
)

raw = app.topic(f"{PREFIX}iot_raw_data", value_type=bytes, value_serializer="raw", key_type=bytes, key_serializer="raw")
standardized = app.topic(f"{PREFIX}plain_standardized", value_type=bytes, value_serializer="raw", key_type=bytes)
validated = app.topic(f"{PREFIX}plain_validated", value_type=bytes, value_serializer="raw", key_type=bytes)
alarms = app.Table(f"{PREFIX}plain_alarms", default=dict, partitions=PARTITIONS)

FIELDS = orjson.loads(os.environ["PEER_FIELDS"])  # field -> [component_type, unit, low, high, threshold, dead-band]
INSERT = (
    "INSERT INTO peer_measurements (timestamp, device_id, connector_mode, component_type, pin_position, value, unit, topic) "
    "VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING"
)
pool: asyncpg.Pool | None = None
clickhouse = None


def rows_of(m):
    at = datetime.fromtimestamp(m["timestamp"] / 1e6, UTC)
    return [
        (
            at,
            m["device_id"],
            m["connector_mode"],
            r["component_type"],
            r["pin_position"],
            r["value"],
            r["unit"],
            m["topic"],
        )
        for r in m["readings"]
    ]


@app.agent(raw)
async def normalize(stream):
    async for event in stream.events():
        message = orjson.loads(event.value)
        payload = message["payload"]
        readings = [
            {"component_type": FIELDS[f][0], "pin_position": "-1", "value": float(v), "unit": FIELDS[f][1]}
            for f, v in payload.items()
            if f in FIELDS
        ]
        out = {
            "device_id": message["device"],
            "connector_mode": message["mode"],
            "topic": message["topic"],
            "timestamp": message["received_at"],
            "readings": readings,
        }
        await standardized.send(key=event.key, value=orjson.dumps(out))


@app.agent(standardized)
async def validate(stream):
    spans = {v[0]: (v[2], v[3]) for v in FIELDS.values()}
    async for event in stream.events():
        message = orjson.loads(event.value)
        for reading in message["readings"]:
            low, high = spans[reading["component_type"]]
            reading["quality"] = 1 if low <= reading["value"] <= high else 4
        await validated.send(key=event.key, value=orjson.dumps(message))


@app.agent(validated)
async def alarm(stream):
    rules = {v[0]: (v[4], v[5]) for v in FIELDS.values() if v[4] is not None}
    async for event in stream.events():
        message = orjson.loads(event.value)
        key = message["device_id"]
        state = None
        for reading in message["readings"]:
            rule = rules.get(reading["component_type"])
            if rule is None:
                continue
            if state is None:
                state = dict(alarms[key])
            active = state.get(reading["component_type"], False)
            now = reading["value"] > (rule[0] - rule[1] if active else rule[0])
            if now != active:
                state[reading["component_type"]] = now
                alarms[key] = state


@app.agent(validated)
async def sink(stream):
    global pool
    if pool is None:
        pool = await asyncpg.create_pool(os.environ["PEER_POSTGRES"], min_size=1, max_size=2)
    async for value in stream:
        m = orjson.loads(value)
        await pool.executemany(INSERT, rows_of(m))


@app.agent(validated)
async def sync(stream):
    global clickhouse
    if clickhouse is None:
        clickhouse = await clickhouse_connect.get_async_client(dsn=os.environ["PEER_CLICKHOUSE"])
    # The one exception to one event a message: ClickHouse takes no single rows at any useful rate.
    async for batch in stream.take(5_000, within=0.5):
        rows = [row for value in batch for row in rows_of(orjson.loads(value))]
        await clickhouse.insert(
            "peer_measurements",
            rows,
            column_names=[
                "timestamp",
                "device_id",
                "connector_mode",
                "component_type",
                "pin_position",
                "value",
                "unit",
                "topic",
            ],
            settings={"async_insert": 0},
        )


if __name__ == "__main__":
    app.main()
