"""The audit's books: what adds up and, above all, what must not."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium import topics
from preservarium.operations.accounting import Bag, Ledger, Window
from preservarium.operations.accounting_decode import RegistryDecode
from preservarium.sandbox.pool import SandboxPool
from preservarium.streaming import records
from preservarium.streaming.stage import Batch

NOW_US = 1_760_000_000_000_000
START = {topic.name: {0: 0, 1: 0} for topic in (topics.RAW, topics.STANDARDIZED, topics.VALIDATED, topics.ERRORS)}
START[topics.RAW.name] = {0: 100, 1: 200}


class Rec:
    def __init__(self, offset, value, key=None):
        self.offset, self.value, self.key = offset, value, key
        self.timestamp, self.headers = NOW_US // 1000, ()


def raw_batch(partition, offsets, device="d1"):
    return Batch(
        topics.RAW.name,
        partition,
        [
            Rec(
                o, records.raw_line(device, {"t": 1.0, "h": 2.0}, received_at=NOW_US + o, connector="http", mode="HTTP")
            )
            for o in offsets
        ],
    )


def decode(raw):
    return message(raw["raw_partition"], raw["raw_offset"], raw["raw_index"], device=raw["device"])


def message(partition, offset, index=0, *, device="d1", quality=None, generation=0):
    readings = [{"component_type": c, "pin_position": "-1", "value": 1.0, "unit": ""} for c in ("t", "h")]
    if quality:
        for reading in readings:
            reading["quality"] = quality
    return {
        "device_id": device, "connector_mode": "HTTP", "topic": "", "timestamp": NOW_US + offset * 10 + index,
        "received_at": NOW_US, "raw_partition": partition, "raw_offset": offset, "raw_index": index,
        "parser": "p@1", "config_rev": 1, "generation": generation, "readings": readings,
    }  # fmt: skip


def rows(*messages):
    return [
        (m["device_id"], m["connector_mode"], r["component_type"], r["pin_position"], m["timestamp"], r["value"], None)
        for m in messages
        for r in m["readings"]
    ]


def ledger_of(offsets=(100, 101, 102)):
    """A run of which everything arrived everywhere."""
    ledger = Ledger(Window(START), decode)
    ledger.add_raw(raw_batch(0, offsets), payload_bytes_max=1000)
    messages = [message(0, o) for o in offsets]
    ledger.add_standardized(messages)
    ledger.add_validated([message(0, o, quality=1) for o in offsets])
    for store in ("postgres", "clickhouse"):
        ledger.add_rows(store, rows(*messages))
    return ledger


def wrong(account):
    return {check["what"]: check["count"] for check in account.checks if check["count"]}


def test_a_complete_run_adds_up():
    account = ledger_of().account()
    assert account.adds_up
    assert account.facts["raw_messages"] == 3
    assert account.facts["readings_in"] == account.facts["standardized"] == account.facts["validated"] == 6
    assert account.facts["stored"] == {"postgres": 6, "clickhouse": 6}
    assert "adds up: yes" in account.lines()[-1]
    orjson.dumps(account.as_json())


def test_a_run_without_input_adds_up():
    account = Ledger(Window(START), decode).account()
    assert account.adds_up
    assert account.facts["raw_messages"] == 0


def test_a_raw_message_that_vanished_is_named():
    ledger = ledger_of()
    ledger.add_raw(raw_batch(1, [205]), payload_bytes_max=1000)
    account = ledger.account()
    assert not account.adds_up
    check = next(c for c in account.checks if c["what"].startswith("raw messages"))
    assert check["examples"] == ["1/205/0"]
    assert any("raw 1/205/0" in line for line in account.lines())


def test_a_raw_message_in_iot_errors_is_accounted_for():
    ledger = ledger_of()
    ledger.add_raw(raw_batch(1, [205], device="stranger"), payload_bytes_max=1000)
    ledger.add_errors(
        [
            records.error_line(
                "normalize", "unknown_device", "?", topic=topics.RAW.name, partition=1, offset=205, now_us=NOW_US
            )
        ]
    )
    account = ledger.account()
    assert account.adds_up
    assert account.facts["errors_by_code"] == {"normalize.unknown_device": 1}


def test_an_unreadable_line_counts_as_a_message():
    ledger = ledger_of()
    batch = Batch(topics.RAW.name, 0, [Rec(103, b'{"device": "d1", "payload": ')])
    ledger.add_raw(batch, payload_bytes_max=1000)
    assert ledger.account().facts["raw_messages"] == 4
    assert not ledger.account().adds_up


def test_a_reading_that_normalize_left_out_shows():
    ledger = Ledger(Window(START), decode)
    ledger.add_raw(raw_batch(0, [100]), payload_bytes_max=1000)
    short = message(0, 100)
    short["readings"].pop()
    ledger.add_standardized([short])
    ledger.add_validated([short])
    for store in ("postgres", "clickhouse"):
        ledger.add_rows(store, rows(short))
    assert wrong(ledger.account()) == {"readings that the raw messages hold and the standardized topic does not": 1}


def test_a_validated_reading_that_one_store_lacks_shows():
    ledger = ledger_of()
    ledger.add_raw(raw_batch(0, [103]), payload_bytes_max=1000)
    m = message(0, 103)
    ledger.add_standardized([m])
    ledger.add_validated([m])
    ledger.add_rows("postgres", rows(m))
    assert wrong(ledger.account()) == {"validated readings not in clickhouse": 2}


def refusal(stage, code, of, **fields):
    """An error line about readings of a message, as the stages write it."""
    return records.error_line(
        stage, code, "?", topic=topics.VALIDATED.name, partition=0, offset=9, now_us=NOW_US, raw=orjson.dumps(of),
        raw_partition=of["raw_partition"], raw_offset=of["raw_offset"], raw_index=of["raw_index"], **fields,
    )  # fmt: skip


def add(ledger, m, *stores):
    ledger.add_raw(raw_batch(m["raw_partition"], [m["raw_offset"]]), payload_bytes_max=1000)
    ledger.add_standardized([m])
    ledger.add_validated([m])
    for store in stores:
        ledger.add_rows(store, rows(m))


def test_a_reading_refused_by_a_store_is_accounted_for_in_that_store_only():
    ledger = ledger_of()
    m = message(0, 103)
    add(ledger, m)
    ledger.add_errors([refusal("sink", "store_rejected", m)])
    assert wrong(ledger.account()) == {"validated readings not in clickhouse": 2}


def test_one_refused_reading_does_not_excuse_the_others_of_its_message():
    ledger = ledger_of()
    m = message(0, 103)
    ledger.add_raw(raw_batch(0, [103]), payload_bytes_max=1000)
    ledger.add_standardized([m])
    ledger.add_errors([refusal("validate", "value_range", m | {"readings": m["readings"][:1]})])
    assert wrong(ledger.account()) == {"standardized readings neither validated nor in iot_errors": 1}
    ledger = ledger_of()
    add(ledger, m, "clickhouse")
    ledger.add_errors([refusal("sink", "store_rejected", m | {"readings": m["readings"][:1]})])
    assert wrong(ledger.account()) == {"validated readings not in postgres": 1}


def test_a_record_set_aside_excuses_what_it_held_and_one_cut_short_its_message():
    for raw in (b"\n".join(map(orjson.dumps, [message(0, 103), message(0, 104)])), b"x" * 700_000):
        ledger = ledger_of()
        for offset in (103, 104):
            ledger.add_raw(raw_batch(0, [offset]), payload_bytes_max=1000)
            ledger.add_standardized([message(0, offset)])
        line = records.error_line(
            "validate", "handler_failed", "?", topic=topics.STANDARDIZED.name, partition=0, offset=9, now_us=NOW_US,
            raw=raw, raw_partition=0, raw_offset=103, raw_index=0,
        )  # fmt: skip
        ledger.add_errors([line])
        lost = wrong(ledger.account())
        assert lost == ({} if len(raw) < 1000 else {"standardized readings neither validated nor in iot_errors": 2})


def test_the_key_of_another_does_not_excuse_a_reading():
    """F02: messages without a time of their own, one instant, one row."""
    ledger = ledger_of()
    for offset, value in ((103, 1.0), (104, 1.0), (105, 2.0)):
        m = message(0, offset) | {"timestamp": NOW_US + 9_000, "clock": "received"}
        m["readings"] = [r | {"value": value} for r in m["readings"]]
        add(ledger, m, *(("postgres", "clickhouse") if offset == 103 else ()))
    lost = wrong(ledger.account())
    assert lost.pop("validated readings not in postgres") == lost.pop("validated readings not in clickhouse") == 2
    (count,) = [n for text, n in lost.items() if text.startswith("messages without a time of their own that share")]
    assert count == 4  # two series, three messages


def test_a_device_that_says_the_same_again_loses_nothing_and_another_value_is_missing_until_it_is_told():
    again = message(0, 100) | {"raw_offset": 103, "clock": "device"}
    ledger = ledger_of()
    ledger.add_validated([again])
    assert "validated readings not in postgres" not in wrong(ledger.account())
    other = again | {"raw_offset": 104, "readings": [again["readings"][0] | {"value": 7.0}]}
    ledger.add_validated([other])
    assert wrong(ledger.account())["validated readings not in postgres"] == 1
    ledger.add_errors([refusal("sink", "same_instant", other), refusal("sync", "same_instant", other)])
    assert "validated readings not in postgres" not in wrong(ledger.account())


def test_a_value_overwritten_on_purpose_is_not_missing_and_the_one_that_overwrites_must_be_there():
    ledger = ledger_of()
    later = message(0, 100) | {"raw_offset": 103}
    later["readings"] = [later["readings"][0] | {"value": 7.0, "revised": True, "replaces": 1.0}]
    ledger.add_validated([later])
    ledger.stores.clear()
    for store in ("postgres", "clickhouse"):
        kept = [r for m in (message(0, o) for o in (100, 101, 102)) for r in rows(m)][1:]
        ledger.add_rows(store, kept)
    lost = wrong(ledger.account())
    assert lost.pop("validated readings not in postgres") == lost.pop("validated readings not in clickhouse") == 1
    for store in ("postgres", "clickhouse"):
        ledger.add_rows(store, rows(later))
    assert not any(text.startswith("validated readings not in") for text in wrong(ledger.account()))


def test_an_instant_that_was_moved_is_still_the_reading_that_came():
    ledger = ledger_of()
    m = message(0, 103)
    ledger.add_raw(raw_batch(0, [103]), payload_bytes_max=1000)
    ledger.add_standardized([m])
    moved = m | {"timestamp": m["timestamp"] + 1, "moved_from": m["timestamp"]}
    ledger.add_validated([moved])
    for store in ("postgres", "clickhouse"):
        ledger.add_rows(store, rows(moved))
    assert ledger.account().adds_up


def test_a_row_twice_in_a_store_shows():
    ledger = ledger_of()
    ledger.add_rows("clickhouse", rows(message(0, 101)))
    assert wrong(ledger.account()) == {"rows twice in clickhouse": 2}


def test_messages_sent_twice_between_stages_are_shown_and_harmless():
    ledger = ledger_of()
    ledger.add_standardized([message(0, 101)])
    account = ledger.account()
    assert account.adds_up
    assert account.facts["duplicates_between_stages"] == {"standardized": 1, "validated": 0, "errors": 0}


def test_a_message_that_came_twice_is_no_second_message_with_its_key():
    ledger = ledger_of()
    ledger.add_validated([message(0, 101, quality=1)])
    twin = message(0, 101) | {"raw_offset": 103}
    ledger.add_raw(raw_batch(0, [103]), payload_bytes_max=1000)
    ledger.add_standardized([message(0, 103)])
    ledger.add_validated([message(0, 103)])
    ledger.add_validated([twin])
    for store in ("postgres", "clickhouse"):
        ledger.add_rows(store, rows(message(0, 103)))
    account = ledger.account()
    assert account.adds_up
    assert account.facts["sent_again"] == 2


def test_an_error_line_that_came_twice_counts_once():
    ledger = ledger_of()
    line = records.error_line(
        "validate", "value_range", "t is 99", topic=topics.STANDARDIZED.name, partition=0, offset=9, now_us=NOW_US,
        raw_partition=0, raw_offset=100, raw_index=0,
    )  # fmt: skip
    ledger.add_errors([line, line, {**line, "message": "h is 99"}])
    facts = ledger.account().facts
    assert facts["errors"] == 2
    assert facts["duplicates_between_stages"]["errors"] == 1


def test_failed_values_are_not_expected_in_the_stores():
    ledger = Ledger(Window(START), decode)
    ledger.add_raw(raw_batch(0, [100]), payload_bytes_max=1000)
    ledger.add_standardized([message(0, 100)])
    ledger.add_validated([message(0, 100, quality=4)])
    ledger.add_rows("postgres", [])
    ledger.add_rows("clickhouse", [])
    account = ledger.account()
    assert account.adds_up
    assert account.facts["to_store"] == 0


def test_what_an_earlier_run_left_behind_is_left_out():
    ledger = ledger_of()
    ledger.add_standardized([message(0, 99)])
    ledger.add_validated([message(0, 99), message(0, 100, generation=3)])
    account = ledger.account()
    assert account.adds_up
    assert account.facts["raw_messages"] == 3
    assert account.facts["lines_of_earlier_runs"] == {topics.STANDARDIZED.name: 1, topics.VALIDATED.name: 2}


@given(st.sets(st.integers(100, 400), min_size=1, max_size=60), st.data())
def test_whatever_single_message_is_lost_at_whatever_stage_shows(offsets, data):
    lost = data.draw(st.sampled_from(sorted(offsets)))
    stage = data.draw(st.sampled_from(["standardized", "validated", "postgres", "clickhouse"]))
    kept = [message(0, o) for o in offsets if o != lost]
    everything = [message(0, o) for o in offsets]
    ledger = Ledger(Window(START), decode)
    ledger.add_raw(raw_batch(0, sorted(offsets)), payload_bytes_max=1000)
    ledger.add_standardized(kept if stage == "standardized" else everything)
    ledger.add_validated(kept if stage in ("standardized", "validated") else everything)
    for store in ("postgres", "clickhouse"):
        ledger.add_rows(store, rows(*(kept if stage in ("standardized", "validated", store) else everything)))
    assert not ledger.account().adds_up


@given(st.lists(st.integers(0, 50)), st.lists(st.integers(0, 50)), st.sets(st.integers(0, 50)))
def test_bags_compare_as_sets_do(mine, theirs, excused):
    a, b = Bag(), Bag()
    for key in mine:
        a.add(key, key)
    for key in theirs:
        b.add(key, key)
    c = a.compare(b, frozenset(excused))
    left = set(mine) - set(theirs)
    assert (c.both, c.missing, c.excused, c.extra) == (
        len(set(mine) & set(theirs)),
        len(left - excused),
        len(left & excused),
        len(set(theirs) - set(mine)),
    )
    assert len(a) == len(mine)
    assert a.distinct() == len(set(mine))


@pytest.mark.parametrize(("partition", "offset", "index"), [(0, 0, 0), (11, 123_456_789_012 % 2**36, 65_535)])
def test_an_identity_is_named_by_its_coordinates(partition, offset, index):
    ledger = Ledger(Window(START), None)
    assert ledger.name(ledger._identity(partition, offset, index)) == f"{partition}/{offset}/{index}"


async def test_what_scripts_decode_is_accounted_too():
    pytest.importorskip("quickjs")
    source = (
        "function decodeUplink(i) { if (i.bytes[0] > 200) throw new Error('x'); return {data: {t: i.bytes[0], h: 2}}; }"
    )
    documents = {
        "datatype": [],
        "parser": [{"name": "p", "version": 1, "rev": 1, "kind": "javascript", "status": "active", "source": source, "hash": ""}],
        "type": [{"name": "k", "rev": 1, "manufacturer": "m", "parser": "p"}],
        "device": [{"device_id": "d1", "rev": 1, "type": "k", "enabled": True}],
    }  # fmt: skip
    decoding = RegistryDecode(documents, SandboxPool(), readings_max=100)
    try:
        assert decoding.wants("d1")
        assert not decoding.wants("other")
        ledger = Ledger(Window(START), decoding, scripts=decoding)
        values = [
            records.raw_line("d1", bytes([n]), received_at=NOW_US + n, connector="http", mode="HTTP")
            for n in (1, 2, 250)
        ]
        batch = Batch(topics.RAW.name, 0, [Rec(100 + i, v) for i, v in enumerate(values)])
        ledger.add_raw(batch, payload_bytes_max=1000)
        assert len(ledger.decoded) == 0
        await ledger.run_scripts()
        assert len(ledger.decoded) == 4
    finally:
        await decoding.close()
