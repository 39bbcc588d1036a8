"""The sink's stages over the shipped fake: offsets, chunks, error lines. No server."""

import orjson
import pytest
from sink_support import NOW_US, FakeRecord, batch, live, message, record

from preservarium import topics
from preservarium.errors import Retry
from preservarium.stages.sink import LegacySink, ReadingSink
from preservarium.stores.memory import MemoryStore

T = topics.VALIDATED.name


class Kafka:
    """Where error lines go."""

    def __init__(self) -> None:
        self.lines = []
        self.down = False

    async def publish(self, sends):
        if self.down:
            raise Retry("Kafka is down")
        assert {s.topic for s in sends} == {topics.ERRORS}
        self.lines += [orjson.loads(s.value) for s in sends]


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def kafka():
    return Kafka()


def stage(store, kafka, cls=ReadingSink, topic=T, **sink):
    return cls("sink", topic, store, kafka.publish, live(sink=sink))


async def test_readings_and_offsets_are_stored_and_nothing_else_is_caused(store, kafka):
    sink = stage(store, kafka)
    assert await sink.on_assigned([0, 3]) == {0: 0, 3: 0}
    effects = await sink(
        [
            batch(T, 0, [record(7, message("a", 1.0, 2.0)), record(9, message("a", 3.0, at=NOW_US + 1))]),
            batch(T, 3, [record(0, message("b", 4.0), message("c", 5.0))]),
        ]
    )
    assert len(store.rows) == 5
    assert store.positions == {(T, 0): 10, (T, 3): 1}
    assert (effects.sends, effects.puts, effects.refused, kafka.lines) == ([], {}, {}, [])


async def test_what_the_store_holds_is_skipped_wherever_kafka_stands(store, kafka):
    store.positions[T, 0] = 2
    sink = stage(store, kafka)
    assert await sink.on_assigned([0]) == {0: 2}
    await sink([batch(T, 0, [record(i, message("a", float(i), at=NOW_US + i)) for i in range(4)])])
    assert sorted(r["value"] for r in store.rows.values()) == [2.0, 3.0]
    assert store.positions == {(T, 0): 4}


async def test_a_call_that_failed_half_way_goes_on_where_the_store_stands(store, kafka):
    sink = stage(store, kafka, rows_max=2, batches_max=1)
    await sink.on_assigned([0])
    batches = [batch(T, 0, [record(i, message("a", float(i), at=NOW_US + i)) for i in range(6)])]
    write, calls = store.write, []

    async def flaky(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Retry("down")
        return await write(*args, **kwargs)

    store.write = flaky
    with pytest.raises(Retry):
        await sink(batches)
    assert (len(store.rows), store.positions) == (2, {(T, 0): 2})
    await sink(batches)  # even where nobody asked on_assigned in between
    assert (len(store.rows), store.positions) == (6, {(T, 0): 6})
    assert len(calls) == 4


async def test_a_commit_whose_answer_was_lost_is_not_repeated(store, kafka):
    sink = stage(store, kafka)
    await sink.on_assigned([0])
    write, batches = store.write, [batch(T, 0, [record(0, message("a", 1.0))])]

    async def lost(*args, **kwargs):
        await write(*args, **kwargs)
        raise Retry("connection lost")

    store.write = lost
    with pytest.raises(Retry):
        await sink(batches)

    async def never(*args, **kwargs):
        raise AssertionError

    store.write = never
    await sink(batches)
    assert store.positions == {(T, 0): 1}


async def test_a_writer_that_is_behind_goes_on_from_where_the_other_is(store, kafka):
    sink = stage(store, kafka)
    await sink.on_assigned([0])
    store.positions[T, 0] = 2  # another worker
    batches = [batch(T, 0, [record(i, message("a", float(i), at=NOW_US + i)) for i in range(4)])]
    with pytest.raises(Retry):
        await sink(batches)
    assert store.rows == {}
    await sink(batches)
    assert sorted(r["value"] for r in store.rows.values()) == [2.0, 3.0]


@pytest.mark.parametrize(("rows_max", "batches_max"), [(10, 1), (5, 2)])
async def test_flights_are_cut_by_rows_and_a_huge_record_is_several_transactions(store, kafka, rows_max, batches_max):
    sink = stage(store, kafka, rows_max=rows_max, batches_max=batches_max)
    sizes, moved = [], []
    write = store.write

    async def watched(messages, moves, **kwargs):
        sizes.append(sum(len(m.readings) for m in messages))
        moved.append({key: (move.expected, move.next) for key, move in moves.items()})
        return await write(messages, moves, **kwargs)

    store.write = watched
    store.positions[T, 0] = 0
    await sink.on_assigned([0, 1])
    await sink(
        [
            batch(T, 0, [record(0, message("a", *range(4))), record(1, message("b", *range(25)), message("c", *range(7))), record(2, message("d", 1.0))]),
            batch(T, 1, [record(5, message("e", *range(9)))]),
        ]
    )  # fmt: skip
    assert max(sizes) <= 10
    assert sum(sizes) == len(store.rows) == 46
    assert store.positions == {(T, 0): 3, (T, 1): 6}
    # While the pieces of offset 1 are stored, the offset stays before it, and a stale writer would still be found out.
    assert moved[1:4] == [{(T, 0): (1, 1)}] * 3
    before = dict(store.rows)
    store.positions[T, 0] = 1  # a crash before the last piece
    await sink.on_assigned([0])
    await sink(
        [batch(T, 0, [record(1, message("b", *range(25)), message("c", *range(7))), record(2, message("d", 1.0))])]
    )
    assert store.rows == before


async def test_refused_readings_become_error_lines_with_their_coordinates(store, kafka):
    sink = stage(store, kafka)
    bad = message("a", 1.0, {"value_text": "x" * 20_000}, 3.0, offset=77)
    effects = await sink([batch(T, 2, [record(10, message("b", 1.0), bad), record(11, message("c", 1.0))])])
    assert len(store.rows) == 4
    (line,) = kafka.lines
    assert (line["stage"], line["code"], line["topic"], line["partition"], line["offset"], line["index"]) == (
        "sink", "store_rejected", T, 2, 10, 1,
    )  # fmt: skip
    assert (line["raw_partition"], line["raw_offset"], line["raw_index"], line["device_id"]) == (3, 77, 0, "a")
    assert (line["parser"], line["config_rev"]) == ("decentlab@1", 7)
    assert orjson.loads(line["raw"])["readings"] == bad["readings"][1:2]
    assert effects.refused == {"store_rejected": 1}


async def test_an_error_line_holds_what_came_and_not_only_what_is_stored(store, kafka):
    sink = stage(store, kafka, rows_max=3, batches_max=1)
    sent = message("a", 1.0, 2.0, 3.0, 4.0, {"value_text": "x" * 20_000, "derived": True}, 6.0, clock="received")
    await sink([batch(T, 0, [record(0, sent)])])
    assert len(store.rows) == 5
    (line,) = kafka.lines
    assert orjson.loads(line["raw"]) == sent | {"readings": [sent["readings"][4]]}


async def test_records_and_lines_that_are_no_messages(store, kafka):
    sink = stage(store, kafka)
    effects = await sink(
        [
            batch(T, 0, [
                FakeRecord(0, b"{torn"), record(1, message("a", 1.0), {"no": "readings"}, {"readings": {"0": 1}}), FakeRecord(2, None),
                record(3, message("b", 2.0)), FakeRecord(4, b"[1]"),
            ])
        ]
    )  # fmt: skip
    assert {key[0] for key in store.rows} == {"a", "b"}
    assert [(line["offset"], line["index"]) for line in kafka.lines] == [(0, 0), (1, 1), (1, 2), (2, 0), (4, 0)]
    assert sum(effects.refused.values()) == 5
    assert store.positions == {(T, 0): 5}


async def test_a_reading_is_refused_alone_where_only_its_line_is_too_deep_to_be_shown_as_it_came(store, kafka):
    sink = stage(store, kafka)
    sent = message("a", 1.0, {"value": 2.0, "timestamp": 0}, x="deep")
    deep = orjson.dumps(sent).replace(b'"deep"', b"[" * 100 + b"]" * 100)
    await sink([batch(T, 0, [FakeRecord(0, deep), record(1, message("b", 3.0))])])
    assert sorted(row["value"] for row in store.rows.values()) == [1.0, 3.0]
    (line,) = kafka.lines
    assert (line["code"], line["device_id"], line["raw_offset"]) == ("timestamp_invalid", "a", 0)
    assert [r["value"] for r in orjson.loads(line["raw"])["readings"]] == [1.0, 2.0]


@pytest.mark.parametrize(
    "part",
    [b'"x":' + b"[" * 100_000 + b"]" * 100_000, b'"topic":"\xff"', b'"topic":"\\ud800"', b'"value":NaN', b'"timestamp":1e400', b'"a":1},{"b":2'],
    ids=["depth", "bytes", "surrogate", "nan", "infinite", "two"],
)  # fmt: skip
async def test_a_record_that_no_parser_takes_is_told_and_takes_no_other_with_it(store, kafka, part):
    sink = stage(store, kafka)
    whole = orjson.dumps(message("bad", 1.0))
    records = [
        record(0, message("a", 1.0)),
        FakeRecord(1, whole[:-1] + b"," + part + b"}"),
        record(2, message("b", 2.0)),
    ]
    await sink([batch(T, 0, records)])
    assert {key[0] for key in store.rows} == {"a", "b"}
    assert [(line["offset"], line["index"]) for line in kafka.lines] == [(1, 0)]
    assert store.positions == {(T, 0): 3}


async def test_nothing_is_stored_before_its_error_lines_are_acknowledged(store, kafka):
    sink = stage(store, kafka)
    kafka.down = True
    batches = [batch(T, 0, [FakeRecord(0, b"{torn"), record(1, message("a", 1.0, {"value": 1.0, "timestamp": 0}))])]
    with pytest.raises(Retry):
        await sink(batches)
    assert (store.rows, store.positions) == ({}, {})
    kafka.down = False
    await sink(batches)
    assert (len(store.rows), store.positions, len(kafka.lines)) == (1, {(T, 0): 2}, 2)


async def test_a_batch_of_nothing_moves_the_offset(store, kafka):
    sink = stage(store, kafka)
    await sink([batch(T, 0, [record(0, message("a"))])])
    assert (store.rows, store.positions) == ({}, {(T, 0): 1})


async def test_the_old_services_messages(store, kafka):
    sink = stage(store, kafka, LegacySink, topics.DECODED.name)
    old = {"mac_address": "f2", "mode": "LoRa", "data_point_label": "Temperature", "pin": "A0", "value": "21.5", "unit": "C",
           "original_topic": "t", "timestamp": NOW_US // 1_000_000}  # fmt: skip
    effects = await sink(
        [
            batch(topics.DECODED.name, 1, [
                record(4, old), record(5, old | {"value": "warm"}), FakeRecord(6, b"\xff\xfe"),
                record(7, old | {"pin": 2}, {"mac_address": "f3"}), FakeRecord(8, None),
            ])
        ]
    )  # fmt: skip
    rows = sorted(store.rows.values(), key=lambda r: r["raw_offset"])
    assert [(r["device_id"], r["component_type"], r["pin_position"], r["value"], r["quality"]) for r in rows] == [
        ("f2", "Temperature", "A0", 21.5, 2),
        ("f2", "Temperature", "2", 21.5, 2),
    ]
    assert [(line["code"], line["offset"], line["index"]) for line in kafka.lines] == [
        ("legacy_invalid", 5, 0), ("legacy_invalid", 6, 0), ("legacy_invalid", 7, 1), ("legacy_invalid", 8, 0),
    ]  # fmt: skip
    assert effects.refused == {"legacy_invalid": 4}
    assert store.positions == {(topics.DECODED.name, 1): 9}
