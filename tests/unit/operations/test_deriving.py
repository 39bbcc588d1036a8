"""Deriving raw records in memory: which configuration reads which message, what is told, and that it is what the stages say."""

from types import SimpleNamespace
from typing import Any

import pytest

from preservarium.domain.quality.checks import CheckCompiler
from preservarium.domain.quality.validation import Limits, new_state, validate
from preservarium.operations.changes.deriving import Configuration, Deriver, Registry, Span
from preservarium.operations.changes.shadow_rows import Encoder
from preservarium.settings import Settings, load
from preservarium.streaming.records import raw_line

S = 1_000_000
BEGIN = 1_767_225_600 * S


def parser(version: int, scale: float) -> dict[str, Any]:
    source = {"fields": [{"name": "t", "path": "t", "scale": scale}, {"name": "kwh", "path": "kwh"}]}
    return {
        "name": "p",
        "version": version,
        "kind": "json",
        "status": "active",
        "source": source,
        "hash": f"{version}" * 64,
        "rev": version,
    }


DOCUMENTS: Any = {
    "datatype": {
        "t": {"name": "t", "kind": "number", "unit": "°C", "fail_span": {"min": -50, "max": 90}, "rev": 1},
        "kwh": {"name": "kwh", "kind": "number", "unit": "kW.h", "counter": {}, "rev": 1},
    },
    "parser": {"p": parser(1, 1.0)},
    "type": {"T": {"name": "T", "manufacturer": "m", "parser": "p", "rules": ["hot"], "rev": 1}},
    "rule": {
        "hot": {
            "name": "hot",
            "component_type": "t",
            "kind": "high",
            "severity": "major",
            "threshold": 40,
            "deadband": 1,
            "rev": 1,
        }
    },
}
CANDIDATE: Any = {"parser": {"p": parser(2, 0.1)}}
DEVICES: Any = {"aa:bb:cc:dd:ee:01": {"device_id": "aa:bb:cc:dd:ee:01", "type": "T", "rev": 1}}


def record(n: int, device: str, payload: Any, *, generation: int = 0) -> Any:
    headers = (("generation", b"%d" % generation),) if generation else ()
    line = raw_line(device, payload, received_at=BEGIN + n * 60 * S, connector="c", mode="LAN")
    return SimpleNamespace(
        offset=n, timestamp=(BEGIN + n * 60 * S) // 1_000, key=device.encode(), value=line, headers=headers
    )


async def derived(
    records: list[Any], span: Span, settings: Settings | None = None
) -> tuple[list[Any], list[Any], Deriver]:
    settings = settings or load()
    told: list[Any] = []
    alarms: list[Any] = []
    deriver = Deriver(
        settings, Configuration(settings, Registry(DOCUMENTS, CANDIDATE), alarms=True), Configuration(settings, Registry(DOCUMENTS), alarms=True),
        DEVICES, span, told.append, alarms.extend,
    )  # fmt: skip
    for start in range(0, len(records), 3):
        await deriver.take(records[start : start + 3], 0)
    await deriver.finish()
    await deriver.close()
    return told, alarms, deriver


def values(told: list[Any], name: str) -> list[Any]:
    return [
        reading["value"] for message in told for reading in message["readings"] if reading["component_type"] == name
    ]


async def test_the_candidate_reads_its_time_and_what_stands_the_rest() -> None:
    records = [
        record(n, "AABBCCDDEE01" if n % 2 else "aa:bb:cc:dd:ee:01", {"t": 20 + n, "kwh": 100 + n}) for n in range(10)
    ]
    records.insert(4, record(4, "stranger", {"t": 1}))
    records.insert(6, record(5, "aa:bb:cc:dd:ee:01", {"t": 1}, generation=3))
    minute = 60 * S
    told, _, deriver = await derived(records, Span(BEGIN + 4 * minute, BEGIN + 7 * minute, BEGIN + 9 * minute))
    assert values(told, "t") == pytest.approx([2.4, 2.5, 2.6, 27, 28])
    assert [message["parser"] for message in told] == ["p@2"] * 3 + ["p@1"] * 2
    assert {message["device_id"] for message in told} == {"aa:bb:cc:dd:ee:01"}
    # The counter has its past in what was read before.
    assert values(told, "kwh_consumption") == [1.0] * 5
    assert deriver.counts.messages == 9
    assert deriver.counts.seen == {"aa:bb:cc:dd:ee:01"}


async def test_alarms_are_those_of_what_is_read() -> None:
    records = [record(n, "aa:bb:cc:dd:ee:01", {"t": t, "kwh": 1}) for n, t in enumerate([20, 50, 20, 500, 200])]
    everything = Span(BEGIN, BEGIN + 3_600 * S, BEGIN + 3_600 * S)
    _, alarms, _ = await derived(records, everything)
    assert [(line["transition"], line["value"]) for line in alarms] == [("raised", 50.0), ("cleared", 20.0)]
    nothing = Span(BEGIN + 3_600 * S, BEGIN + 3_600 * S, BEGIN + 3_600 * S)
    assert (await derived(records, nothing))[:2] == ([], [])


async def test_it_is_what_validate_says() -> None:
    records = [record(n, "aa:bb:cc:dd:ee:01", {"t": (n * 37) % 1200, "kwh": 100 + n // 3}) for n in range(60)]
    told, _, deriver = await derived(records, Span(BEGIN, BEGIN + 7_200 * S, BEGIN + 7_200 * S))
    compiler = CheckCompiler(DOCUMENTS["datatype"].get)
    checks = compiler.device(DEVICES["aa:bb:cc:dd:ee:01"], DOCUMENTS["type"]["T"])
    state, limits, expected = new_state(), Limits(future_skew_us=300 * S, store_failed=False, series_max=500), []
    normalizer = Configuration(load(), Registry(DOCUMENTS, CANDIDATE), alarms=False)
    from preservarium.domain.readings.normalize import normalize
    from preservarium.streaming.records import parse_raw

    for one in records:
        (raw,), _ = parse_raw(one, "iot_raw_data", 0, payload_bytes_max=10_000)
        message: Any = normalize(raw, normalizer.of(DEVICES["aa:bb:cc:dd:ee:01"]).compiled, 0).message  # type: ignore[arg-type]
        validate(message, checks, state, limits)
        expected.append(message["readings"])
    assert [message["readings"] for message in told] == expected
    assert deriver.counts.refused == sum(1 for n in range(60) if (n * 37) % 1200 * 0.1 > 90)


def test_what_postgresql_has_no_room_for_is_counted() -> None:
    encoder = Encoder(7, 0)
    reading = {"component_type": "t", "pin_position": "-1", "unit": "u", "value": 1.0, "quality": 1}
    message = {
        "device_id": "d", "connector_mode": "m", "topic": None, "parser": "p@1", "config_rev": 1, "timestamp": BEGIN, "received_at": BEGIN,
        "raw_partition": 0, "raw_offset": 1, "raw_index": 0,
        "readings": [
            reading, {**reading, "value": None, "value_text": "a\0b"}, {**reading, "timestamp": 5}, {**reading, "value": None, "value_text": "ä"},
            {**reading, "component_type": "\ud800"}, {**reading, "flags": ["stale"]}, {**reading, "value": None},
        ],
    }  # fmt: skip
    encoder.take(message)
    assert (encoder.rows, encoder.left_out) == (4, 3)
    content = encoder.message().getvalue()
    assert content.startswith(b"PGCOPY\n\xff\r\n\0")
    assert content.endswith(b"\xff\xff")
    assert encoder.rows == 0
    encoder.take({**message, "raw_partition": 1 << 40})
    assert (encoder.rows, encoder.left_out) == (0, 10)
