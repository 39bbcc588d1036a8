"""How records are shown: a line a message, decoded, instants with what they mean."""

from types import SimpleNamespace

import orjson
from hypothesis import given
from hypothesis import strategies as st

from preservarium.cli.instants import INSTANT_MAX_US, INSTANT_MIN_US, iso, readable, shown, told, with_iso
from preservarium.cli.topic_lines import Wanted, _matching, full_name, lines_of
from preservarium.domain.readings.instant import instant_us
from preservarium.settings import load

AT = 1_796_018_824_098_400


def record(value, key=b"dev-1", headers=()):
    return SimpleNamespace(offset=7, timestamp=1_796_018_824_144, key=key, value=value, headers=headers)


def test_a_record_of_several_messages_is_as_many_lines():
    lines = lines_of(record(b'{"a":1}\n{"a":2}\n'), 3)
    assert [(line.index, line.value) for line in lines] == [(0, {"a": 1}), (1, {"a": 2})]
    assert lines[0].text() == '2026-11-30T06:07:04.144Z  3:7  dev-1  {"a":1}'
    assert lines[1].text().split("  ")[1] == "3:7.1"
    assert lines[1].document("t") == {
        "topic": "t", "partition": 3, "offset": 7, "index": 1, "time": 1_796_018_824_144_000,
        "time_iso": "2026-11-30T06:07:04.144Z", "key": "dev-1", "value": {"a": 2},
    }  # fmt: skip


def test_instants_are_told_beside_the_raw_ones_and_what_a_device_says_is_left_alone():
    line = {
        "received_at": AT,
        "payload": {"t": AT},
        "meta": {"t": AT},
        "readings": [{"timestamp": AT, "value": 1.5}],
        "n": 5,
    }
    assert with_iso(line) == {
        "received_at": AT, "received_at_iso": "2026-11-30T06:07:04.098400Z", "payload": {"t": AT}, "meta": {"t": AT},
        "readings": [{"timestamp": AT, "timestamp_iso": "2026-11-30T06:07:04.098400Z", "value": 1.5}], "n": 5,
    }  # fmt: skip
    assert with_iso(with_iso(line)) == with_iso(line)


def test_what_is_no_json_is_shown_all_the_same():
    kinds = {b"21.4 \xc2\xb0C": ("value_text", "21.4 °C"), b"\xff\x00": ("value_b64", "/wA="), b"": ("value_text", "")}
    for value, (kind, text) in kinds.items():
        (line,) = lines_of(record(value), 0)
        assert (line.kind, line.value) == (kind, text)
        assert line.document("t")[kind] == text
        assert "\n" not in line.text()
    # One line that is torn: none of them is lost.
    (line,) = lines_of(record(b'{"a":1}\n{"a":'), 0)
    assert line.value == '{"a":1}\n{"a":'


def test_a_tombstone_and_a_record_without_a_key():
    (line,) = lines_of(record(None, key=None), 0)
    assert line.document("t")["value"] is None
    assert line.text().endswith("  -  null")


def test_headers_are_in_the_document():
    (line,) = lines_of(record(b"{}", headers=(("attempt", b"2"), ("bad", b"\xff"))), 0)
    assert line.document("t")["headers"] == {"attempt": "2", "bad": "\\xff"}


def test_names_of_ours_get_the_prefix_and_others_do_not(monkeypatch):
    monkeypatch.setenv("PRESERVARIUM_KAFKA__TOPIC_PREFIX", "site1.")
    monkeypatch.setenv("PRESERVARIUM_NORMALIZE__DECODED_TOPIC", "old.decoded")
    settings = load()
    assert full_name("iot_errors", settings) == "site1.iot_errors"
    assert full_name("decoded_iot_data", settings) == "old.decoded"
    assert full_name("site1.iot_errors", settings) == "site1.iot_errors"


@given(st.one_of(st.none(), st.binary(max_size=200)), st.one_of(st.none(), st.binary(max_size=20)))
def test_any_record_can_be_shown(value, key):
    for line in lines_of(record(value, key), 0):
        orjson.dumps(line.document("t"))
        line.text()


@given(st.integers(INSTANT_MIN_US, INSTANT_MAX_US - 1))
def test_an_instant_in_iso_is_the_same_instant(us):
    assert instant_us(iso(us)) == us


def test_instants_for_people():
    assert shown(AT) == "2026-11-30T06:07:04Z"
    assert shown(None) == shown("x") == ""
    assert told(AT) == f"{AT} (2026-11-30T06:07:04.098400Z)"
    assert told(5) == 5
    assert readable(f"timestamp {AT} is later than {AT + 1}") == (
        "timestamp 2026-11-30T06:07:04.098400Z is later than 2026-11-30T06:07:04.098401Z"
    )
    assert readable(f"({AT})") == "(2026-11-30T06:07:04.098400Z)"
    for text in ("", "0018b20000000003 is not there", f"id x{AT}", f"{AT}.5", "1234567890123456789", "900000000000000"):
        assert readable(text) == text
    assert readable(None) == ""
    assert told(True) is True


def test_a_key_is_an_address_in_any_spelling():
    records = [
        record(b"1", key=key) for key in (b"70B3D57ED0AA0001", b"70b3d57ed0aa0001", b"70b3d57ed0aa0002", b"dev-1", None)
    ]
    for asked in ("70:b3:d5:7e:d0:aa:00:01", "70B3D57ED0AA0001"):
        assert [line.key for line in _matching(records, 0, Wanted(key=asked))] == [
            "70B3D57ED0AA0001",
            "70b3d57ed0aa0001",
        ]
    assert [line.key for line in _matching(records, 0, Wanted(key="dev-1"))] == ["dev-1"]
    assert _matching(records, 0, Wanted(key="DEV-1")) == []
