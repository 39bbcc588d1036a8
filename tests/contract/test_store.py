"""What every store of readings promises (preservarium/stores/base.py), asked of each."""

import random
from typing import Any

import orjson
import pytest
from sink_support import DAY_US, NOW_US, SECOND_US, message

from preservarium.domain.readings.stored import parse_messages
from preservarium.errors import ReasonCode, Retry
from preservarium.stores.base import Move, Moved

T = "iot_validated_data"


async def test_every_column_comes_back(under_test):
    sent = message(
        "a1", {"value": 21.5, "flags": ["spike", 'odd "name", really'], "quality": 3}, {"value_text": "open, ünlocked", "unit": ""},
        {"value": None, "quality": 9}, {"value": 7, "timestamp": NOW_US - 5 * SECOND_US - 1}, offset=41, experiment_id="x9",
        generation=2,
    )  # fmt: skip
    result = await under_test.store.write([sent], {})
    assert (result.accepted, result.duplicates, result.rejected) == (4, 0, [])
    rows = await under_test.rows()
    common = {
        "device_id": "a1", "connector_mode": "LoRaWAN", "component_type": "temperature", "topic": "devices/1/up",
        "received_at": NOW_US + 250_000, "raw_partition": 3, "raw_offset": 41, "raw_index": 0, "parser": "decentlab@1",
        "config_rev": 7, "generation": 2, "experiment_id": "x9",
    }  # fmt: skip
    plain = {"unit": "Cel", "value_text": None, "quality": 1, "flags": None, "timestamp": NOW_US}
    assert rows == [
        common | plain | {"pin_position": "0", "value": 21.5, "quality": 3, "flags": ["spike", 'odd "name", really']},
        common | plain | {"pin_position": "1", "value": None, "value_text": "open, ünlocked", "unit": ""},
        common | plain | {"pin_position": "2", "value": None, "quality": 9},
        common | plain | {"pin_position": "3", "value": 7.0, "timestamp": NOW_US - 5 * SECOND_US - 1},
    ]


@pytest.mark.parametrize("together", [True, False])
async def test_raw_coordinates_of_every_size_come_back(under_test, together):
    partitions = [0, 255, 256, 4_095, 4_096, 32_767]
    sent = [message("a", 1.5, at=NOW_US + n, offset=2**62 + n, raw_partition=p) for n, p in enumerate(partitions)]
    for part in [sent] if together else [[one] for one in sent]:
        assert (await under_test.store.write(part, {})).accepted == len(part)
    rows = await under_test.rows()
    assert [(r["raw_partition"], r["raw_offset"], r["value"]) for r in rows] == [
        (p, 2**62 + n, 1.5) for n, p in enumerate(partitions)
    ]


async def test_typed_messages_are_stored_as_dictionaries_are(under_test):
    sent = [
        message("a", 21.5, {"value_text": "open", "unit": ""}, {"value": None, "quality": 9, "flags": ["gap"]}),
        message("a", {"value": 4, "timestamp": NOW_US - 7}, offset=1, clock="received", attempt=2, experiment_id=None),
        message("a", {"value": 5.5, "revised": True}, offset=2, generation=3, experiment_id="x9"),
        message("b", at=NOW_US + 1),
    ]
    await under_test.store.write(sent, {})
    rows = await under_test.rows()
    assert len(rows) == 4
    again = parse_messages(orjson.dumps([m | {"device_id": "c" + m["device_id"]} for m in sent]))
    assert (await under_test.store.write(again, {})).accepted == 5
    assert [r | {"device_id": r["device_id"][1:]} for r in await under_test.rows() if r["device_id"] != "a"] == rows


async def test_what_is_refused_is_named_as_it_was_sent_whatever_form_it_had(under_test):
    (good,) = parse_messages(orjson.dumps([message("t", 1.0, 1e308)]))
    broken = message("a", 1.0, {"quality": "good"}, {"value": float("nan")}, 4.0)
    result = await under_test.store.write([good, broken, message("b", {"unit": 5}), good], {(T, 0): Move(None, 1)})
    assert [(r.message, r.reading, r.code) for r in result.rejected] == [
        (1, 1, ReasonCode.STORE_REJECTED),
        (1, 2, ReasonCode.VALUE_NOT_FINITE),
        (2, 0, ReasonCode.STORE_REJECTED),
    ]
    assert (result.accepted, result.duplicates) == (4, 2)


async def test_unit_and_topic_of_a_row_are_its_own_even_where_the_series_began_with_others(under_test):
    await under_test.store.write([message("a1", 1.0)], {})
    await under_test.store.write([message("a1", {"value": 294.1, "unit": "K"}, at=NOW_US + 1, topic="other")], {})
    assert [(r["value"], r["unit"], r["topic"]) for r in await under_test.rows()] == [
        (1.0, "Cel", "devices/1/up"),
        (294.1, "K", "other"),
    ]


async def test_writing_the_same_again_changes_nothing(under_test):
    messages = [message(f"d{i}", *range(5), at=NOW_US + i) for i in range(20)]
    first = await under_test.store.write(messages, {})
    rows = await under_test.rows()
    again = await under_test.store.write(messages, {})
    assert (first.accepted, again.accepted, again.duplicates) == (100, 0, 100)
    assert await under_test.rows() == rows


async def test_a_stored_row_stays_and_new_ones_beside_it_are_stored(under_test):
    await under_test.store.write([message("a", 1.0)], {})
    result = await under_test.store.write([message("a", 2.0), message("b", 3.0)], {})
    assert (result.accepted, result.duplicates, len(result.rejected)) == (1, 0, 1)
    assert [r["value"] for r in await under_test.rows()] == [1.0, 3.0]


async def test_of_equal_keys_in_one_write_the_first_stays_and_other_values_are_told(under_test):
    sent = [message("a", 1.0), message("a", 2.0), message("a", 1.0), message("a", 3.0), message("b", 5.0)]
    told: list[Any] = []

    async def tell(rejected):
        told[:] = rejected

    result = await under_test.store.write(sent, {}, before_commit=tell)
    assert (result.accepted, result.duplicates) == (2, 1)
    assert [r["value"] for r in await under_test.rows()] == [1.0, 5.0]
    assert [(r.message, r.reading, r.code) for r in told] == [(1, 0, "same_instant"), (3, 0, "same_instant")]
    assert result.rejected == told
    assert "1.0 stands" in told[0].text


async def test_another_value_of_an_instant_that_is_stored_is_told(under_test):
    await under_test.store.write([message("a", 1.0), message("b", 2.0), message("c", {"value_text": "x"})], {})
    result = await under_test.store.write(
        [message("b", 2.0), message("a", 1.5), message("c", {"value_text": "y"}), message("d", 4.0)], {}
    )
    assert (result.accepted, result.duplicates) == (1, 1)
    assert [(r.message, r.code) for r in result.rejected] == [(1, "same_instant"), (2, "same_instant")]
    assert [r["value"] for r in await under_test.rows()] == [1.0, 2.0, None, 4.0]


@pytest.mark.parametrize("replays", [0, 1, 2])
async def test_second_values_are_told_whatever_was_written_before(under_test, replays):
    stored = [message(f"d{i}", float(i), {"value_text": f"{i}"}) for i in range(9)]
    await under_test.store.write(stored, {})
    for _ in range(replays):
        assert (await under_test.store.write(stored, {})).duplicates == 18
    again = [*stored[:4], message("d4", 4.5, {"value_text": "4"}), message("d5", 5.0, {"value_text": "x"})]
    result = await under_test.store.write([*again, message("d4", 4.5, at=NOW_US + 1), message("new", 1.0)], {})
    assert (result.accepted, result.duplicates) == (2, 10)
    assert [(r.message, r.reading, r.code) for r in result.rejected] == [(4, 0, "same_instant"), (5, 1, "same_instant")]
    assert ["4.0 stands" in result.rejected[0].text, "'5' stands" in result.rejected[1].text] == [True, True]
    # All of them stand: nothing is stored, and the second values are told all the same.
    result = await under_test.store.write(again, {})
    assert (result.accepted, result.duplicates, len(result.rejected)) == (0, 10, 2)
    assert len(await under_test.rows()) == 20


async def test_a_number_is_another_value_than_none_or_a_text(under_test):
    await under_test.store.write([message("a", 1.0, {"value": None}, {"value_text": "1.0"}, {"value": None})], {})
    again = message("a", {"value": None}, 0.0, 1.0, {"value": None})
    result = await under_test.store.write([again], {})
    assert (result.accepted, result.duplicates, [r.reading for r in result.rejected]) == (0, 1, [0, 1, 2])


async def test_what_was_overwritten_on_purpose_is_no_second_value_when_it_comes_again(under_test):
    await under_test.store.write([message("a", 1.0), message("b", 1.0)], {})
    await under_test.store.write([verdict(7.0, 3, offset=2), message("b", 8.0, generation=1)], {})
    result = await under_test.store.write([message("a", 1.0), message("b", 1.0)], {})
    assert (result.accepted, result.duplicates, result.rejected) == (0, 2, [])
    assert [r["value"] for r in await under_test.rows()] == [7.0, 8.0]


async def test_a_later_generation_overwrites_and_an_earlier_one_does_not(under_test):
    await under_test.store.write([message("a", 1.0), message("b", 1.0)], {})
    result = await under_test.store.write([message("a", 2.0, generation=1)], {})
    assert result.accepted == 1
    result = await under_test.store.write([message("a", 3.0, generation=1), message("a", 4.0)], {})
    assert (result.accepted, result.duplicates) == (0, 2)
    assert [(r["value"], r["generation"]) for r in await under_test.rows()] == [(2.0, 1), (1.0, 0)]


def verdict(value: float, quality: int, **fields: Any) -> Any:
    """A reading of series a once more, with a later verdict."""
    reading = {"value": value, "quality": quality, "flags": ["spike"], "timestamp": NOW_US, "revised": True}
    return message("a", reading, at=NOW_US + fields["offset"], **fields)


async def test_a_later_verdict_on_a_stored_reading_overwrites_it(under_test):
    store = under_test.store
    await store.write([message("a", 9.0, offset=1), message("b", 1.0)], {})
    result = await store.write([verdict(9.0, 3, offset=2), message("b", 2.0, at=NOW_US + 1)], {})
    assert (result.accepted, result.duplicates) == (2, 0)
    rows = await under_test.rows()
    assert [(r["device_id"], r["value"], r["quality"], r["flags"], r["raw_offset"]) for r in rows] == [
        ("a", 9.0, 3, ["spike"], 2), ("b", 1.0, 1, None, 0), ("b", 2.0, 1, None, 0),
    ]  # fmt: skip
    # The reading comes again, as after an offset was set back: the verdict stays.
    assert (await store.write([message("a", 9.0, offset=1)], {})).duplicates == 1
    assert (await store.write([verdict(9.0, 3, offset=2)], {})).duplicates == 1
    assert await under_test.rows() == rows


async def test_reading_and_verdict_in_one_write(under_test):
    result = await under_test.store.write([message("a", 9.0, offset=1), verdict(9.0, 4, offset=2)], {})
    assert (result.accepted, result.duplicates) == (2, 0)
    assert [(r["quality"], r["raw_offset"]) for r in await under_test.rows()] == [(4, 2)]


@pytest.mark.parametrize("seed", range(12))
async def test_what_stays_does_not_depend_on_the_order_of_arrival(under_test, seed):
    """The highest generation, in it a revision, of several the last received; cut into writes at random, some twice."""
    rng = random.Random(seed)
    sent = [
        message("a", 1.0, offset=1),
        verdict(1.0, 3, offset=2),
        verdict(1.0, 4, offset=3),
        message("a", 5.0, offset=4, generation=1),
        verdict(5.0, 3, offset=6, generation=1, received_at=NOW_US + 60),
        # Of another raw partition: its offset is lower, and it was received later.
        verdict(5.0, 4, offset=5, generation=1, received_at=NOW_US + 70, raw_partition=1),
    ]
    sent = rng.sample([*sent, *rng.sample(sent, 3)], 9)
    while sent:
        size = rng.randrange(1, 5)
        await under_test.store.write(sent[:size], {})
        del sent[:size]
    rows = await under_test.rows()
    assert [(r["value"], r["quality"], r["raw_offset"], r["generation"]) for r in rows] == [(5.0, 4, 5, 1)]


async def test_offsets_move_with_the_rows(under_test):
    store = under_test.store
    assert await store.offsets(T, [0, 5]) == {0: None, 5: None}
    await store.write([message("a", 1.0)], {(T, 0): Move(None, 10), (T, 5): Move(None, 3)})
    assert await store.offsets(T, [0, 5, 6]) == {0: 10, 5: 3, 6: None}
    await store.write([], {(T, 0): Move(10, 12)})
    assert await store.offsets(T, [0, 5]) == {0: 12, 5: 3}
    assert await store.offsets("another", [0]) == {0: None}


@pytest.mark.parametrize(
    "moves",
    [
        {(T, 0): Move(9, 20)},
        {(T, 0): Move(11, 20)},
        {(T, 0): Move(None, 20)},
        {(T, 1): Move(5, 20)},
        {(T, 0): Move(10, 20), (T, 1): Move(4, 9)},
        {(T, 0): Move(10, 20), (T, 2): Move(7, 9)},
    ],
)
async def test_a_stale_writer_writes_nothing(under_test, moves):
    store = under_test.store
    await store.write([], {(T, 0): Move(None, 10), (T, 2): Move(None, 8)})
    with pytest.raises(Moved) as e:
        await store.write([message("a", 1.0)], moves)
    held = {(T, 0): 10, (T, 1): None, (T, 2): 8}
    assert e.value.positions == {key: held[key] for key in moves}
    assert await under_test.rows() == []
    assert await store.offsets(T, [0, 1, 2]) == {0: 10, 1: None, 2: 8}


BAD: list[tuple[dict[str, Any], ReasonCode]] = [
    ({"value": float("nan")}, ReasonCode.VALUE_NOT_FINITE),
    ({"value": float("inf")}, ReasonCode.VALUE_NOT_FINITE),
    ({"value": float("-inf")}, ReasonCode.VALUE_NOT_FINITE),
    ({"value": "21.5"}, ReasonCode.STORE_REJECTED),
    ({"value": 10**400}, ReasonCode.STORE_REJECTED),
    ({"value": [1]}, ReasonCode.STORE_REJECTED),
    ({"value_text": "a\0b"}, ReasonCode.STORE_REJECTED),
    ({"value_text": "a\ud800"}, ReasonCode.STORE_REJECTED),
    ({"value_text": "x" * 20_000}, ReasonCode.STORE_REJECTED),
    ({"value_text": 5}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "component_type": "a\0"}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "component_type": "x" * 3000}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "component_type": None}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "pin_position": 3}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "pin_position": ["3"]}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "unit": None}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "flags": "spike"}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "flags": ["a\0"]}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "quality": None}, ReasonCode.STORE_REJECTED),
    ({"value": 1.0, "timestamp": None}, ReasonCode.TIMESTAMP_INVALID),
    ({"value": 1.0, "timestamp": "2026-01-01"}, ReasonCode.TIMESTAMP_INVALID),
    ({"value": 1.0, "timestamp": 1.5}, ReasonCode.TIMESTAMP_INVALID),
    ({"value": 1.0, "timestamp": 0}, ReasonCode.TIMESTAMP_INVALID),
    ({"value": 1.0, "timestamp": 2**70}, ReasonCode.TIMESTAMP_INVALID),
    ({"value": 1.0, "timestamp": NOW_US - 91 * DAY_US}, ReasonCode.LATE_BEYOND_RETENTION),
    ({"value": 1.0, "timestamp": NOW_US + 2 * DAY_US}, ReasonCode.TIMESTAMP_FUTURE),
]


@pytest.mark.parametrize(("fields", "code"), BAD, ids=lambda v: None if isinstance(v, dict) else str(v))
async def test_a_bad_reading_takes_nothing_else_with_it(under_test, fields, code):
    good = [message(f"g{i}", 1.0, 2.0) for i in range(3)]
    result = await under_test.store.write([good[0], message("a", 1.0, fields, 3.0), *good[1:]], {(T, 0): Move(None, 4)})
    assert [(r.message, r.reading, r.code) for r in result.rejected] == [(1, 1, code)]
    assert (result.accepted, result.duplicates) == (8, 0)
    assert len(await under_test.rows()) == 8
    assert await under_test.store.offsets(T, [0]) == {0: 4}


@pytest.mark.parametrize(
    "fields",
    [
        {"device_id": ""},
        {"device_id": None},
        {"connector_mode": "\0"},
        {"topic": "a\0"},
        {"parser": None},
        {"config_rev": "7"},
        {"experiment_id": "a\0"},
    ],
)
async def test_a_bad_message_takes_no_other_with_it(under_test, fields):
    result = await under_test.store.write([message("g", 1.0), message("a", 1.0, 2.0) | fields, message("h", 1.0)], {})
    assert [(r.message, r.reading, r.code) for r in result.rejected] == [
        (1, 0, ReasonCode.STORE_REJECTED),
        (1, 1, ReasonCode.STORE_REJECTED),
    ]
    assert result.accepted == 2
    assert [r["device_id"] for r in await under_test.rows()] == ["g", "h"]


@pytest.mark.parametrize("k", [1, 7, 100])
async def test_k_bad_rows_anywhere_among_ten_thousand(under_test, k):
    rng = random.Random(k)
    bad = set(rng.sample(range(10_000), k))
    rejected, accepted = 0, 0
    for start in range(0, 10_000, 5_000):
        messages = [
            message(f"d{i % 50}", float("nan") if i in bad else float(i), at=NOW_US + i)
            for i in range(start, start + 5_000)
        ]
        result = await under_test.store.write(messages, {})
        rejected += len(result.rejected)
        accepted += result.accepted
        assert {start + r.message for r in result.rejected} == {i for i in bad if start <= i < start + 5_000}
    assert (rejected, accepted) == (k, 10_000 - k)
    assert len(await under_test.rows()) == 10_000 - k


async def test_any_order_of_suffix_replays_leaves_the_same_rows(under_test):
    """What redelivery does: each write may be repeated, from any earlier point, with other batch borders."""
    rng = random.Random(5)
    messages = [message(f"d{i % 7}", float(i), float(-i), at=NOW_US + i // 7, offset=i) for i in range(300)]
    position = 0
    while position < len(messages):
        start = max(0, position - rng.randrange(40))
        end = min(len(messages), start + rng.randrange(1, 60))
        await under_test.store.write(messages[start:end], {})
        position = max(position, end)
    rows = await under_test.rows()
    assert len(rows) == 600
    assert {(r["raw_offset"], r["value"]) for r in rows} == {(i, v) for i in range(300) for v in (float(i), float(-i))}


async def test_what_is_rejected_is_told_before_anything_is_committed(under_test):
    seen = []

    async def refuse(rejected):
        seen.append([(r.message, r.reading) for r in rejected])
        raise Retry("Kafka is down")

    messages = [message("a", 1.0, float("nan"), 2.0)]
    with pytest.raises(Retry, match="Kafka is down"):
        await under_test.store.write(messages, {(T, 0): Move(None, 4)}, before_commit=refuse)
    assert seen == [[(0, 1)]]
    assert await under_test.rows() == []
    assert await under_test.store.offsets(T, [0]) == {0: None}
    result = await under_test.store.write(messages, {(T, 0): Move(None, 4)})
    assert result.accepted == 2


async def test_nothing_to_write(under_test):
    result = await under_test.store.write([], {})
    assert (result.accepted, result.duplicates, result.rejected) == (0, 0, [])
    assert await under_test.store.offsets(T, []) == {}
