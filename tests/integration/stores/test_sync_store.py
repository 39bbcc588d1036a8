"""Inserts into ClickHouse's engine: each batch once, whatever becomes of answers, and what the tokens' window forgets."""

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sink_support import DAY_US, NOW_US, FakeRecord, batch, live, message, record

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.domain.commands.device import DeviceCommands, Turn, downlink_id
from preservarium.domain.commands.lines import parse_line
from preservarium.domain.commands.profile import Profile
from preservarium.errors import Retry
from preservarium.operations.derived import MEASUREMENT_DAYS, drifts
from preservarium.stages.sync import AGGREGATES, ALARM_EVENTS, ANOMALIES, COMMAND_EVENTS, EventSync, ReadingSync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.maintenance import Maintenance
from preservarium.stores.migrate import DEDUP_BLOCKS, migrate_clickhouse

T = topics.VALIDATED.name


@pytest.fixture
async def settings(clickhouse: str, clickhouse_database: str) -> Any:
    settings = live(
        clickhouse={"url": clickhouse, "database": clickhouse_database, "timeout_s": 10}, breaker={"failures_max": 1000}
    )
    await migrate_clickhouse(settings())
    return settings


@pytest.fixture
async def store(settings: Any) -> AsyncIterator[ClickHouseStore]:
    made = ClickHouseStore(settings)
    yield made
    await made.close()


@pytest.fixture
def sync(settings: Any, store: ClickHouseStore) -> ReadingSync:
    return ReadingSync(store, settings, clock=ManualClock(NOW_US))


async def command(store: ClickHouseStore, text: str) -> None:
    await store.query("SELECT 1")  # connects where it is not
    await store._client.command(text)


async def count(store: ClickHouseStore, table: str = "measurements") -> tuple[int, int]:
    """Rows, and rows after merging."""
    return (
        (await store.query(f"SELECT count() FROM {table}"))[0][0],
        (await store.query(f"SELECT count() FROM {table} FINAL"))[0][0],
    )


def records(start: int, end: int) -> list[FakeRecord]:
    return [record(i, message(f"d{i % 5}", float(i), float(-i), at=NOW_US + i, offset=i)) for i in range(start, end)]


async def test_every_column_arrives(store, sync):
    sent = message(
        "a1", {"value": 21.5, "flags": ["spike", "gross_range"], "quality": 3}, {"value_text": "open, ünlocked", "unit": ""},
        {"value": None, "quality": 9}, {"value": 7, "timestamp": NOW_US - 5_000_001}, offset=41, experiment_id="x9", generation=2,
    )  # fmt: skip
    await sync([batch(T, 2, [record(9, sent)])])
    rows = await store.query(
        "SELECT toUnixTimestamp64Micro(timestamp), device_id, connector_mode, component_type, pin_position, value, unit, topic,"
        " value_text, quality, flags, toUnixTimestamp64Micro(received_at), raw_partition, raw_offset, raw_index, parser,"
        " config_rev, generation, experiment_id FROM measurements ORDER BY pin_position"
    )
    same = (NOW_US + 250_000, 3, 41, 0, "decentlab@1", 7, 2, "x9")
    who = ("a1", "LoRaWAN", "temperature")
    assert [tuple(r) for r in rows] == [
        (NOW_US, *who, "0", 21.5, "Cel", "devices/1/up", "", 3, "spike,gross_range", *same),
        (NOW_US, *who, "1", None, "", "devices/1/up", "open, ünlocked", 1, "", *same),
        (NOW_US, *who, "2", None, "Cel", "devices/1/up", "", 9, "", *same),
        (NOW_US - 5_000_001, *who, "3", 7.0, "Cel", "devices/1/up", "", 1, "", *same),
    ]


async def test_a_batch_that_is_repeated_is_stored_once_without_merging(store, sync):
    batches = [batch(T, p, records(100 * p, 100 * p + 50)) for p in range(3)]
    for _ in range(3):
        await sync(batches)
    assert await count(store) == (300, 300)


async def test_an_answer_that_was_lost(store, sync, monkeypatch):
    insert, calls = ClickHouseStore.insert, []

    async def lost(self: Any, *args: Any, **kwargs: Any) -> None:
        await insert(self, *args, **kwargs)
        calls.append(1)
        if len(calls) % 2:
            raise Retry("the answer was lost")

    monkeypatch.setattr(ClickHouseStore, "insert", lost)
    for start in range(0, 200, 20):
        part = [batch(T, 0, records(start, start + 20))]
        with pytest.raises(Retry):
            await sync(part)
        await sync(part)
    assert await count(store) == (400, 400)


async def test_one_batch_over_many_days_is_one_insert(store, sync):
    """More days than the server's default of partitions for an insert, as in a back-fill; repeated, too."""
    lines = [message("a", 1.0, at=NOW_US - i * DAY_US, offset=i) for i in range(150)]
    for _ in range(2):
        await sync([batch(T, 0, [record(0, *lines)])])
    assert await count(store) == (150, 150)


async def test_the_window_of_tokens_counts_blocks_and_forgets(store, sync):
    """What happens beyond it, so that its size is a decision: the repeated batch is stored again, and merging mends it."""
    window = 20
    await store.query("SELECT 1")
    await store._client.command(
        f"ALTER TABLE measurements MODIFY SETTING non_replicated_deduplication_window = {window}"
    )
    first = [batch(T, 0, records(0, 1))]
    await sync(first)
    for i in range(1, window):
        await sync([batch(T, 0, records(i, i + 1))])
    await sync(first)
    assert await count(store) == (2 * window, 2 * window)
    for i in range(window, 3 * window):
        await sync([batch(T, 0, records(i, i + 1))])
    # The rows of an earlier batch again, as they would come from a partition that was away for longer than the window.
    await sync(first)
    await sync([batch(T, 0, records(1, 2))])
    stored, merged = await count(store)
    assert (stored > 6 * window, merged) == (True, 6 * window)


async def test_of_equal_keys_the_later_generation_stays(store, sync):
    await sync(
        [
            batch(
                T,
                0,
                [
                    record(0, message("a", 1.0)),
                    record(1, message("a", 2.0, generation=1)),
                    record(2, message("a", 3.0, offset=2)),
                ],
            )
        ]
    )
    assert [r[0] for r in await store.query("SELECT value FROM measurements FINAL")] == [2.0]


async def test_a_later_verdict_replaces_the_reading_that_it_is_about(store, sync):
    first = message("a", {"value": 1.0, "quality": 1}, offset=1)
    verdict = message(
        "a", {"value": 1.0, "quality": 3, "flags": ["spike"], "revised": True}, offset=2, received_at=NOW_US + 900_000
    )
    await sync([batch(T, 0, [record(0, first), record(1, verdict)])])
    assert [r[0] for r in await store.query("SELECT quality FROM measurements FINAL")] == [3]
    assert [r[0] for r in await store.query("SELECT quality FROM latest_values FINAL")] == [3]


async def test_messages_that_were_put_into_order_keep_their_coordinates(store, sync):
    lines = [message("a", float(i), at=NOW_US + i, offset=9 - i, released=[20, i]) for i in range(3)]
    await sync([batch(T, 0, [record(0, *lines), record(1, *lines)])])
    rows = await store.query("SELECT raw_partition, raw_offset FROM measurements ORDER BY timestamp")
    assert [tuple(r) for r in rows] == [(3, 9), (3, 8), (3, 7)]


async def test_what_is_no_message_goes_to_the_errors_and_the_rest_is_stored(store, sync):
    bad = [
        message("a", "warm", offset=2),
        {"no": "message"},
        message("a", {"value": 1.0, "quality": "good"}, offset=2, raw_index=2),
    ]
    effects = await sync(
        [
            batch(
                T,
                0,
                [
                    record(0, message("a", 1.0)),
                    FakeRecord(1, b"{torn"),
                    record(2, *bad),
                    record(3, message("b", 1.0, offset=3)),
                ],
            )
        ]
    )
    assert await count(store) == (2, 2)
    assert sum(effects.refused.values()) == len(effects.sends) == 4
    assert {s.topic for s in effects.sends} == {topics.ERRORS}


async def test_a_server_that_is_down_is_retried_and_a_missing_table_waited_for(settings, store):
    gone = live(clickhouse={"url": "http://127.0.0.1:9", "timeout_s": 2})
    down = ClickHouseStore(gone)
    with pytest.raises(Retry):
        await ReadingSync(down, gone)([batch(T, 0, records(0, 2))])
    await down.close()
    await command(store, "DROP TABLE measurements SYNC")
    with pytest.raises(Retry):
        await ReadingSync(store, settings)([batch(T, 0, records(0, 2))])
    await migrate_clickhouse_again(store)
    await ReadingSync(store, settings)([batch(T, 0, records(0, 2))])
    assert await count(store) == (4, 4)


async def migrate_clickhouse_again(store: ClickHouseStore) -> None:
    await command(store, "TRUNCATE TABLE schema_migrations")
    await migrate_clickhouse(store._settings())


async def test_alarm_transitions(store, settings):
    def transition(number: int, **fields: Any) -> dict[str, Any]:
        return {
            "alarm_id": "a1", "transition_id": f"t{number}", "device_id": "d1", "rule": "too hot", "rule_rev": 3,
            "component_type": "temperature", "pin_position": "0", "severity": "major", "transition": "raised",
            "state": "unacknowledged", "occurred_at": NOW_US, "detected_at": NOW_US + number, "cleared_at": None, "value": 41.0,
            "unit": "Cel", "threshold": 40.0, "message": "hot", "recipients": [], "raw_partition": 1, "raw_offset": number,
            "raw_index": 0, "generation": 0,
        } | fields  # fmt: skip

    stage = EventSync(ALARM_EVENTS, store, settings)
    part = [
        batch(
            topics.ALERTS.name,
            0,
            [record(0, transition(1)), record(1, transition(2, cleared_at=NOW_US + 5), transition(3, value=None))],
        )
    ]
    for _ in range(2):
        await stage(part)
    assert await count(store, "alarm_events") == (3, 3)


def window(start: int, revision: int, total: float, **fields: Any) -> dict[str, Any]:
    return {
        "window_id": f"w{start}", "revision": revision, "device_id": "d1", "connector_mode": "LoRaWAN",
        "component_type": "temperature", "pin_position": "0", "unit": "Cel", "window_start": start, "window_end": start + 10,
        "size_s": 3600, "hop_s": 3600, "count": 2, "min": 1.0, "max": 2, "mean": 1.5, "sum": total, "last": 2.0,
        "last_at": start + 9, "closed_by": "watermark", "generation": 0,
    } | fields  # fmt: skip


async def test_of_a_window_the_highest_revision_stays_whenever_it_came(store, settings):
    stage = EventSync(AGGREGATES, store, settings)
    part = [batch(topics.AGGREGATES.name, 0, [record(0, window(NOW_US, 2, 7.0)), record(1, window(NOW_US, 1, 5.0))])]
    for _ in range(2):
        await stage(part)
    await stage([batch(topics.AGGREGATES.name, 0, [record(2, window(NOW_US, 0, 3.0), window(NOW_US + 10, 0, 1.0))])])
    rows = await store.query("SELECT revision, sum, consumption FROM aggregates FINAL ORDER BY window_start")
    assert [tuple(r) for r in rows] == [(2, 7.0, None), (0, 1.0, None)]
    # A replay's windows come in a later generation, and begin with revision 0 again.
    await stage([batch(topics.AGGREGATES.name, 0, [record(3, window(NOW_US, 0, 9.0, generation=1, consumption=4.0))])])
    rows = await store.query("SELECT revision, sum, consumption FROM aggregates FINAL ORDER BY window_start LIMIT 1")
    assert [tuple(r) for r in rows] == [(0, 9.0, 4.0)]


async def test_anomalies(store, settings):
    line = {
        "anomaly_id": "a1", "device_id": "d1", "connector_mode": "LoRaWAN", "component_type": "temperature", "pin_position": "0",
        "state": "begins", "timestamp": NOW_US, "value": 41.0, "unit": "Cel", "expected": 20.5, "score": 9.25, "threshold": 6.0,
        "raw_partition": 1, "raw_offset": 7, "raw_index": 0, "generation": 0,
    }  # fmt: skip
    stage = EventSync(ANOMALIES, store, settings)
    part = [batch(topics.ANOMALIES.name, 0, [record(0, line), record(1, line | {"anomaly_id": "a2", "state": "ends"})])]
    for _ in range(2):
        await stage(part)
    assert await count(store, "anomalies") == (2, 2)
    refused = await stage([batch(topics.ANOMALIES.name, 0, [record(2, line | {"score": "high"})])])
    assert refused.refused == {"store_rejected": 1}


async def test_commands_and_their_events(store, settings):
    device, events = DeviceCommands("d1"), []
    asked = {"command": "set", "actor": "ann", "fields": {"on": 1}, "idempotency_key": "k"}
    events += device.request(
        parse_line(asked, device_id="d1", at=NOW_US, key="x"), Profile(topic="t"), Turn(NOW_US), "c0", 1, 0
    ).events
    word = {"kind": "report", "report": "sent", "downlink_id": downlink_id(events[0]["command_id"], 1)}
    events += device.report(
        parse_line(word, device_id="d1", at=NOW_US + 1, key="y"), Profile(topic="t"), Turn(NOW_US), "c0", 2, 0
    ).events
    stage = EventSync(COMMAND_EVENTS, store, settings)
    part = [batch(topics.COMMAND_EVENTS.name, 0, [record(0, *events[:3]), record(1, events[3], events[1])])]
    for _ in range(2):
        assert (await stage(part)).refused == {}
    rows = await store.query("SELECT event, actor, ended_at IS NULL FROM command_events FINAL ORDER BY sequence")
    assert rows == [("request", "ann", 1), ("hand_over", "", 1), ("publish", "", 1), ("confirm", "", 0)]
    found = await store.query(
        "SELECT command, state, sequence, requested_by, toUnixTimestamp64Micro(requested_at) FROM device_commands"
    )
    assert found == [("set", "successful", 4, "ann", NOW_US)]


async def test_last_values_and_daily_counts_follow_each_insert_once(store, sync):
    for _ in range(3):
        await sync([batch(T, 0, records(0, 20))])
    await sync([batch(T, 0, [record(20, message("d1", 7.0, at=NOW_US - 5, offset=20))])])
    rows = await store.query("SELECT device_id, pin_position, value FROM latest_values FINAL ORDER BY 1, 2 LIMIT 4")
    assert [tuple(r) for r in rows] == [("d0", "0", 15.0), ("d0", "1", -15.0), ("d1", "0", 16.0), ("d1", "1", -16.0)]
    assert (await store.query("SELECT sum(rows) FROM measurement_days"))[0][0] == 41


async def test_beyond_the_window_daily_counts_count_twice_and_are_counted_anew_by_a_repair(store, sync):
    await command(store, "ALTER TABLE measurements MODIFY SETTING non_replicated_deduplication_window = 0")
    await command(store, "ALTER TABLE measurement_days MODIFY SETTING non_replicated_deduplication_window = 0")
    for _ in range(2):
        await sync([batch(T, 0, records(0, 20))])
        sync._seen.clear()
    assert await count(store) == (80, 40)
    assert (await store.query("SELECT sum(rows) FROM measurement_days"))[0][0] == 80
    engine = Maintenance(store._settings())
    await engine.connect()
    try:
        day_us = NOW_US // DAY_US * DAY_US
        found = [each async for each in drifts(engine, MEASUREMENT_DAYS, [day_us], repair=True, settle_s=0)]
    finally:
        await engine.close()
    assert found
    assert (await store.query("SELECT sum(rows) FROM measurement_days"))[0][0] == 40


def test_the_window_of_tokens_covers_what_can_be_in_flight():
    """A batch is repeated by the partition's next owner, while the others go on: the most blocks that can come between."""
    s = live()()
    takeover_s = (
        s.kafka.session_timeout_s + 60 + s.clickhouse.timeout_s
    )  # found out, rebalanced, and the last insert's time
    inserts = s.kafka.partitions * takeover_s / s.sync.linger_s
    # Of live data an insert touches the present day, and around midnight the one before.
    assert inserts * 2 < DEDUP_BLOCKS


async def test_random_repetitions_with_the_same_borders(store, sync):
    rng = random.Random(2)
    borders = sorted(rng.sample(range(1, 500), 30))
    parts = [batch(T, 0, records(a, b)) for a, b in zip([0, *borders], [*borders, 500], strict=True)]
    for i, part in enumerate(parts):
        await sync([part])
        if rng.random() < 0.4:
            await sync([parts[rng.randrange(max(0, i - 3), i + 1)]])
    assert await count(store) == (1000, 1000)
