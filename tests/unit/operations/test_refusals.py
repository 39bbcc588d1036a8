"""Refusals in memory: counted by cause over time, bounded, found by device; and what to do about each code."""

import base64
from types import SimpleNamespace

import orjson
import pytest

from preservarium.errors import ReasonCode
from preservarium.operations import refusals as module
from preservarium.operations.refusals import BUCKET_S, BUCKETS, REMEDIES, S_US, SPAN_S, Refusals, bytes_of, meanings

T = 1_760_000_400 * S_US  # the begin of a bucket
EUI = "70B3D57ED0AA0001"


def record(offset, at_us=T, partition=0, **line):
    line = {
        "stage": "normalize",
        "code": "decode_failed",
        "message": "no",
        "device_id": "d",
        "last_seen": at_us,
        **line,
    }
    return SimpleNamespace(partition=partition, offset=offset, timestamp=at_us // 1_000, value=orjson.dumps(line))


def ids(found):
    return [kept.id for kept in found[0]]


def test_every_code_has_a_meaning_and_something_to_do():
    assert set(REMEDIES) == set(ReasonCode)
    assert set(meanings()) == {code.value for code in ReasonCode}
    assert all(text.endswith(".") and len(text) > 20 for text in REMEDIES.values())


def test_causes_are_counted_over_time_those_of_the_last_hour_first():
    refusals = Refusals()
    refusals.take([record(n, T - n * BUCKET_S * S_US) for n in range(10)])
    refusals.take([record(20, T + 5 * S_US, stage="validate", code="value_range")] * 1)
    refusals.take([record(21 + n, T - 7_200 * S_US, code="no_parser") for n in range(50)])
    refusals.take([record(90, T - (SPAN_S + BUCKET_S) * S_US, code="store_rejected")])
    causes = {cause["code"]: cause for cause in refusals.causes(T + 10 * S_US)}
    assert list(causes) == ["decode_failed", "value_range", "no_parser"]
    first = causes["decode_failed"]
    assert (first["day"], first["hour"], first["last_at"]) == (10, 4, T)
    assert len(first["counts"]) == BUCKETS
    assert first["counts"][-11:] == [0, *[1] * 10]
    assert (causes["no_parser"]["day"], causes["no_parser"]["hour"]) == (50, 0)
    assert first["meaning"].startswith("the parser says")
    assert "preservarium decode" in first["remedy"]
    # A day later nothing is left of them.
    assert refusals.causes(T + 2 * SPAN_S * S_US) == []


def test_the_newest_are_found_by_cause_and_by_any_spelling_of_a_device_in_pages_without_gap():
    refusals = Refusals()
    refusals.take(
        [record(n, device_id=EUI if n % 2 else "other", stage="sink" if n % 3 else "normalize") for n in range(12)]
    )
    refusals.take([record(3)])  # came again
    assert ids(refusals.newest(limit=3)) == ["0:11", "0:10", "0:9"]
    seen, before = [], None
    while True:
        page, before = refusals.newest(device_id="70:b3:d5:7e:d0:aa:00:01", before=before, limit=4)
        seen += [kept.id for kept in page]
        if before is None:
            break
    assert seen == [f"0:{n}" for n in (11, 9, 7, 5, 3, 1)]
    assert ids(refusals.newest(stage="normalize", limit=9)) == ["0:9", "0:6", "0:3", "0:0"]
    assert ids(refusals.newest(stage="normalize", device_id=EUI, limit=9)) == ["0:9", "0:3"]
    assert ids(refusals.newest(code="no_parser", limit=9)) == []
    assert refusals.get("0:3").line["device_id"] == EUI
    assert refusals.get("9:9") is None


def test_a_flood_of_one_cause_does_not_wash_the_others_away_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "KEPT_MAX", 100)
    refusals = Refusals()
    refusals.take([record(n, code="no_parser", device_id=f"p{n}") for n in range(10)])
    refusals.take([record(100 + n, device_id=f"f{n}") for n in range(1_000)])
    assert len(refusals._ids) == 100
    assert len(refusals._devices) == 100
    assert len(ids(refusals.newest(code="no_parser", limit=50))) == 10
    assert {cause["code"]: cause["day"] for cause in refusals.causes(T)} == {"decode_failed": 1_000, "no_parser": 10}
    monkeypatch.setattr(module, "KEPT_BYTES_MAX", 20_000)
    refusals.take([record(5_000, raw="x" * 9_000), record(5_001, raw="y" * 9_000)])
    assert refusals._bytes == sum(len(kept.value) for kept in refusals._ids.values()) <= 20_000
    assert {kept.id for kept in refusals._ids.values()} >= {"0:5001"}
    refusals.clear()
    assert (refusals._bytes, refusals.newest(limit=5), refusals.since_us) == (0, ([], None), None)


def test_causes_and_buckets_of_a_foreign_writer_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "CAUSES_MAX", 5)
    refusals = Refusals()
    refusals.take([record(n, code=f"made-up-{n}") for n in range(50)])
    refusals.take([record(100 + n, T + n * BUCKET_S * S_US, code="made-up-1") for n in range(5 * BUCKETS)])
    assert len(refusals._causes) == 5
    assert all(len(cause.buckets) <= 2 * BUCKETS for cause in refusals._causes.values())
    assert refusals.causes(T)[0]["remedy"] == ""


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"7",
        b'"x"',
        b'{"stage": "s"}',
        b'{"code": "c"}',
        b'{"stage": "s", "code": "c", "last_seen": "soon"}',
    ],
)
def test_what_is_no_line_of_ours_is_left_out(value):
    refusals = Refusals()
    refusals.take([SimpleNamespace(partition=0, offset=1, timestamp=5, value=value)])
    assert refusals.newest(limit=5) == ([], None)


def test_devices_that_the_registry_does_not_know_are_counted_once(monkeypatch):
    monkeypatch.setattr(module, "UNKNOWN_MAX", 3)
    refusals = Refusals()
    refusals.take([record(n, code="unknown_device", device_id=("a", "b")[n % 2]) for n in range(9)])
    assert refusals.unknown(T) == 2
    refusals.take([record(20 + n, code="unknown_device", device_id=f"c{n}") for n in range(9)])
    assert refusals.unknown(T) == 3
    assert refusals.unknown(T + (SPAN_S + 1) * S_US) == 0


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ({"raw": "grün"}, "grün".encode()), ({"raw_b64": base64.b64encode(b"\xff\x00").decode()}, b"\xff\x00"), ({"raw": ""}, b""),
        ({}, None), ({"raw_b64": "?"}, None), ({"raw_b64": 5}, None), ({"raw": None}, None),
    ],
)  # fmt: skip
def test_the_bytes_of_a_line(line, found):
    assert bytes_of(line) == found
