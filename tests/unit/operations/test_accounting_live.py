"""The count of a run while it goes: what the accounting says at its end, from the same records."""

import random

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium import topics
from preservarium.operations.accounting import Ledger, Window
from preservarium.operations.accounting_live import Count, Tally
from preservarium.streaming import records
from preservarium.streaming.stage import Batch

NOW_US = 1_760_000_000_000_000
WINDOW = Window(
    {
        topics.RAW.name: {0: 100, 1: 0}, topics.STANDARDIZED.name: {0: 50, 1: 0},
        topics.VALIDATED.name: {0: 10, 1: 0}, topics.ERRORS.name: {0: 0},
    }
)  # fmt: skip


class Rec:
    def __init__(self, offset, value, key=b"d1"):
        self.offset, self.value, self.key = offset, value, key
        self.timestamp, self.headers = NOW_US // 1000, ()


def tally():
    return Tally(WINDOW, ("postgres", "clickhouse"), payload_bytes_max=10_000, store_failed=False)


def message(offset, index=0, *, partition=0, readings=None, **more):
    found = readings or [{"component_type": c, "pin_position": "-1", "value": 1.0, "unit": ""} for c in ("t", "h")]
    return {
        "device_id": "d1", "connector_mode": "HTTP", "topic": "", "timestamp": NOW_US + offset * 100 + index, "received_at": NOW_US,
        "raw_partition": partition, "raw_offset": offset, "raw_index": index, "parser": "p@1", "config_rev": 1, "generation": 0,
        "readings": [dict(r) for r in found], **more,
    }  # fmt: skip


def record(offset, *lines):
    return Rec(offset, b"\n".join(orjson.dumps(line) for line in lines))


def raw(offset, *payloads):
    lines = [records.raw_line("d1", p, received_at=NOW_US, connector="http", mode="HTTP") for p in payloads]
    return Rec(offset, b"\n".join(lines))


def test_a_record_that_packs_messages_is_as_many_and_an_event_of_the_network_alone_is_none():
    one = tally()
    packed = raw(100, {"t": 1}, {"t": 2}, {"t": 3})
    torn = Rec(101, b'{"device": "d1", "payload": {"t": 1}}\n{"device": "d1", "pay')
    pretty = Rec(102, orjson.dumps({"device": "d1", "payload": {"t": 1}}, option=orjson.OPT_INDENT_2))
    one.take(Batch(topics.RAW.name, 0, [packed, torn, pretty, raw(103, b""), Rec(104, b'{\n "t": 1\n}')]))
    assert one.count().messages == 3 + 2 + 1 + 0 + 1


def test_what_an_earlier_run_left_and_what_a_crash_repeats_do_not_count():
    one = tally()
    left = [message(98), message(99)]
    one.take(Batch(topics.STANDARDIZED.name, 0, [record(50, *left), record(51, message(100), message(101))]))
    one.take(Batch(topics.STANDARDIZED.name, 0, [record(52, message(100), message(101), message(102))]))
    one.take(
        Batch(
            topics.VALIDATED.name,
            0,
            [record(10, *left), record(11, message(100)), record(12, message(100), message(101))],
        )
    )
    assert one.count() == Count(0, 6, 4, {"postgres": 0, "clickhouse": 0}, 0)
    one.committed("postgres", {0: 12})
    one.committed("clickhouse", {0: 13, 5: 7})
    assert one.count().stored == {"postgres": 2, "clickhouse": 4}
    one.committed("postgres", {0: 12})
    one.committed("postgres", {0: 13})
    assert one.count().stored == {"postgres": 4, "clickhouse": 4}


def test_a_replay_is_none_of_the_run():
    one = tally()
    one.take(Batch(topics.VALIDATED.name, 0, [record(11, message(100, generation=3))]))
    assert one.count() == Count(stored={"postgres": 0, "clickhouse": 0})


def test_messages_that_were_put_into_order_are_told_by_their_release():
    one = tally()
    lines = [message(105, released=[110, 0]), message(103, released=[110, 1]), message(104, released=[111, 0])]
    one.take(Batch(topics.VALIDATED.name, 0, [record(10, *lines), record(11, lines[2])]))
    assert one.count().validated == 6


def test_readings_that_a_store_refused_are_not_stored():
    one = tally()
    one.take(Batch(topics.VALIDATED.name, 0, [record(10, message(100), message(101))]))
    one.committed("postgres", {0: 11})
    bad = message(101)
    bad["readings"].pop()
    line = records.error_line(
        "sink", "store_rejected", "no", topic=topics.VALIDATED.name, partition=0, offset=10, raw=orjson.dumps(bad),
        raw_partition=0, raw_offset=101, raw_index=0, now_us=NOW_US,
    )  # fmt: skip
    one.take(Batch(topics.ERRORS.name, 0, [record(0, line), record(1, {**line, "last_seen": 5})]))
    assert (one.count().stored["postgres"], one.count().errors) == (3, 1)


KINDS = [
    {"component_type": "t", "pin_position": "-1", "value": 1.0, "unit": ""},
    {"component_type": "x", "pin_position": "-1", "value_text": "on", "unit": ""},
    {"component_type": "f", "pin_position": "-1", "value": 9.0, "unit": "", "quality": 4},
    {"component_type": "m", "pin_position": "-1", "unit": "", "quality": 9},
    {"component_type": "c", "pin_position": "-1", "value": 1.0, "unit": "", "derived": True},
    {"component_type": "s", "pin_position": "-1", "value": 1.0, "unit": "", "revised": True, "timestamp": NOW_US - 5},
]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique_by=lambda r: r["component_type"]), min_size=1, max_size=3), max_size=8),
    st.integers(0, 100),
)  # fmt: skip
def test_it_says_what_the_accounting_says(sent, seed):
    chance = random.Random(seed)
    one, ledger = tally(), Ledger(WINDOW, None)
    lines_of = [
        [message(100 + o, i, readings=found) for i, found in enumerate(packed)] for o, packed in enumerate(sent)
    ]
    raws = [raw(100 + o, *({"n": i} for i in range(len(lines)))) for o, lines in enumerate(lines_of)]
    one.take(Batch(topics.RAW.name, 0, raws))
    ledger.add_raw(Batch(topics.RAW.name, 0, raws), payload_bytes_max=10_000)
    offset = 10
    for lines in lines_of:
        # A crash repeats what came last.
        for _ in range(chance.choice((1, 1, 2))):
            for topic, add in (
                (topics.STANDARDIZED, ledger.add_standardized),
                (topics.VALIDATED, ledger.add_validated),
            ):
                made = [
                    {
                        **m,
                        "readings": [
                            r
                            for r in m["readings"]
                            if topic is topics.VALIDATED or not (r.get("derived") or r.get("revised"))
                        ],
                    }
                    for m in lines
                ]
                one.take(Batch(topic.name, 0, [record(offset, *made)]))
                add(made)
            offset += 1
    one.committed("postgres", {0: offset})
    account, count = ledger.account(), one.count()
    assert (count.messages, count.standardized, count.validated) == tuple(
        account.facts[name] for name in ("raw_messages", "standardized", "validated")
    )
    assert count.stored == {"postgres": account.facts["to_store"], "clickhouse": 0}


def test_the_memory_of_what_is_not_stored_goes_with_it():
    one = tally()
    for n in range(1_000):
        one.take(Batch(topics.VALIDATED.name, 0, [record(10 + n, message(100 + n))]))
    for store in ("postgres", "clickhouse"):
        one.committed(store, {0: 1_010})
    assert all(not waiting.ends and not waiting.counts for waiting in one._waiting.values())
    assert one.count().stored == {"postgres": 2_000, "clickhouse": 2_000}
