"""Who sends without being registered: counting, the payloads that are kept, and which parsers understand them."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from preservarium.domain.readings.address import canonical_address
from preservarium.errors import ReasonCode
from preservarium.operations import unknown_devices
from preservarium.operations.dlq import Letter
from preservarium.operations.unknown_devices import Matcher, Tally, Unknown, document, message_of, payload_text, tally
from preservarium.registry.file import read
from preservarium.sandbox.pool import Fault, Outcome
from preservarium.streaming.records import error_line, raw_line

ROOT = Path(__file__).resolve().parents[3]
NOW_US = 1_795_993_300_000_000
#: A Decentlab DL-PR26, out of the published examples.
PAYLOADS = [orjson.loads(line) for line in (ROOT / "tests/cases/decentlab/payloads.jsonl").read_bytes().splitlines()]


def letter(device: str, raw: bytes, at: int = NOW_US) -> Letter:
    line = error_line(
        "normalize", ReasonCode.UNKNOWN_DEVICE, f"device {device} is not registered", topic="iot_raw_data", partition=0, offset=5, raw=raw,
        device_id=device, raw_partition=0, raw_offset=5, raw_index=0, now_us=at,
    )  # fmt: skip
    return Letter("0:1", dict(line))


def envelope(device: str, payload: Any, **more: Any) -> bytes:
    return raw_line(device, payload, received_at=NOW_US, connector="mqtt", mode="LoRaWAN", **more)


async def letters(*given: Letter) -> Any:
    for one in given:
        yield one


async def test_an_address_is_counted_in_every_spelling_and_the_last_payloads_are_kept():
    eui = "70B3D57ED005B89B"
    given = [letter(eui, envelope(eui, bytes([i]), port=2), NOW_US + i) for i in range(5)]
    given += [letter("70-b3-d5-7e-d0-05-b8-9b", b'{"t": 1}', NOW_US + 9), letter("box", b"\x01\x02", NOW_US)]
    found = await tally(letters(*given), 100_000)
    first, second = found.without([])
    assert (first.device, first.count, first.first_seen, first.last_seen) == (
        "70-b3-d5-7e-d0-05-b8-9b",
        6,
        NOW_US,
        NOW_US + 9,
    )
    assert [raw["payload"] for raw in first.samples] == [b"\x03", b"\x04", {"t": 1}]
    assert (first.samples[0]["port"], first.samples[0]["mode"]) == (2, "LoRaWAN")
    assert (second.device, second.count, second.samples[0]["payload"]) == ("box", 1, b"\x01\x02")
    # Registered meanwhile, in whatever spelling.
    assert [u.device for u in found.without([eui.lower()])] == ["box"]


@pytest.mark.parametrize(
    "change",
    [{"topic": "mqtt:x"}, {"device_id": None}, {"message": "x [5 of 9 bytes kept]"}, {"raw": None, "raw_b64": "?"}, {"raw": '{"device": 5, "payload": 1}'}, {"raw": '{"device": "d", "payload": null}'}],
)  # fmt: skip
def test_a_letter_without_its_message_is_counted_and_not_tried(change):
    line = {k: v for k, v in {**letter("d", b"\x01").line, "raw": "{}", **change}.items() if v is not None}
    assert message_of(Letter("0:1", line), 100_000) is None
    found = Tally()
    found.add(line, None)
    assert [u.count for u in found.without([])] == ([1] if line.get("device_id") else [])


def test_of_a_flood_of_addresses_and_of_payloads_no_more_is_kept_than_fits(monkeypatch):
    monkeypatch.setattr(unknown_devices, "ADDRESSES_MAX", 3)
    monkeypatch.setattr(unknown_devices, "SAMPLE_BYTES_MAX", 25)
    found = Tally()
    sample: Any = {"payload": b"x"}
    for i in range(5):
        for _ in range(4):
            found.add({"device_id": f"d{i}", "first_seen": NOW_US}, sample, 10)
    assert [u.count for u in found.without([])] == [4, 4, 4]
    assert found.others == 8
    assert found.bytes <= 25
    assert found.bytes == sum(sum(u.sizes) for u in found.by_address.values())


class Scripts:
    """A sandbox in whose place a function stands."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.calls = 0

    async def run(self, calls: Any) -> list[Outcome]:
        self.calls += len(calls)
        return [self.made(call) for call in calls]


@pytest.fixture(scope="module")
def sample() -> Any:
    return read(ROOT / "examples/registry.yaml").documents


def unknown(*payloads: Any) -> Unknown:
    found = Unknown("d")
    for payload in payloads:
        raw = message_of(letter("d", envelope("d", payload)), 100_000)
        assert raw is not None
        found.samples.append(raw)
    return found


def nothing(call: Any) -> Outcome:
    return Outcome(None, Fault(ReasonCode.SCRIPT_FAULT, "no"))


async def test_the_makers_own_parser_is_among_those_that_take_it_and_the_best_is_plausible(sample):
    cases = PAYLOADS[::23]
    found = await Matcher(sample, Scripts(nothing)).fits([unknown(bytes.fromhex(case["hex"])) for case in cases])
    for case, fits in zip(cases, found, strict=True):
        # Decentlab's payloads say which sensors are there, and not of which type the device is: several types may take one.
        assert any(f"decentlab-{case['device'].lower()}" in fit.types for fit in fits), case["device"]
        assert (fits[0].taken, fits[0].tried) == (1, 1)
        assert fits[0].plausible > 0, case["device"]


async def test_a_parser_that_takes_all_comes_before_one_that_takes_some(sample):
    given = [
        unknown({"air_temperature": 21.5, "humidity": 48}, {"air_temperature": 21.6, "humidity": 47}, b"\xff\xff\xff")
    ]
    (fits,) = await Matcher(sample, Scripts(nothing)).fits(given)
    assert fits
    assert [fit.rank[0] for fit in fits] == sorted((fit.rank[0] for fit in fits), reverse=True)
    assert all(0 < fit.taken <= fit.tried == 3 for fit in fits)


DATATYPES = [
    {"name": "t", "kind": "number", "unit": "°C", "fail_span": {"min": -60, "max": 85}},
    {"name": "h", "kind": "number", "unit": "%"},
]


def parser(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "version": 1, "kind": "json", "status": "active", "hash": "h", "source": {}, **more}


async def test_plausible_readings_decide_between_parsers_that_take_it():
    documents = {
        "datatype": DATATYPES,
        "parser": [
            parser("all"), parser("scaled", source={"fields": [{"path": "t", "scale": 100}]}), parser("t-alone", source={"fields": [{"path": "t"}]}),
            parser("other", source={"fields": [{"path": "x"}]}), parser("old", status="retired"), parser("broken", source={"fields": 5}),
            parser("wants", source={"fields": [{"path": "q", "required": True}]}),
        ],
        "type": [{"name": "board", "manufacturer": "m", "parser": "all"}, {"name": "board-2", "manufacturer": "m", "parser": "all"}],
    }  # fmt: skip
    (fits,) = await Matcher(documents, None).fits([unknown({"t": 21.5, "h": 48}, {"t": 22, "h": 49})])
    assert [(fit.parser, fit.taken, fit.readings, fit.plausible) for fit in fits] == [
        ("all", 2, 4, 4),
        ("t-alone", 2, 2, 2),
        ("scaled", 2, 2, 0),
    ]
    assert fits[0].types == ("board", "board-2")
    assert dict(fits[0].shown) == {"t": 22, "h": 49}


async def test_scripts_are_tried_in_the_sandbox_and_what_faults_is_left_out():
    documents = {
        "datatype": DATATYPES,
        "parser": [parser("js", kind="javascript", source="good"), parser("js2", kind="javascript", source="bad")],
    }

    def made(call: Any) -> Outcome:
        return Outcome('{"data": {"t": 21.5}}') if call.script.source == "good" else nothing(call)

    scripts = Scripts(made)
    (fits,) = await Matcher(documents, scripts).fits([unknown(b"\x01\x02")])
    assert [(fit.parser, fit.plausible) for fit in fits] == [("js", 1)]
    assert scripts.calls == 2
    assert await Matcher(documents, None).fits([unknown(b"\x01\x02")]) == [[]]


async def test_tries_are_limited(monkeypatch):
    monkeypatch.setattr(unknown_devices, "TRIES_MAX", 3)
    documents = {"parser": [parser(f"p{i}") for i in range(10)]}
    fits = await Matcher(documents, None).fits([unknown({"t": 1}), unknown({"t": 1})])
    assert [len(one) for one in fits] == [3, 0]


async def test_what_is_printed_is_json():
    one = unknown({"t": 21.5}, b"\x01\xff")
    one.count, one.first_seen, one.last_seen = 2, NOW_US, NOW_US
    (fits,) = await Matcher({"datatype": DATATYPES, "parser": [parser("all")]}, None).fits([one])
    found = orjson.loads(orjson.dumps(document(one, fits)))
    assert (found["device"], found["count"], found["hex"], found["mode"]) == ("d", 2, "01ff", "LoRaWAN")
    assert found["parsers"] == [
        {"parser": "all", "types": [], "taken": 1, "tried": 2, "readings": 1, "plausible": 1, "fields": {"t": 21.5}}
    ]
    assert payload_text(one.last, 10) == "01ff"
    assert payload_text(unknown({"text": "x" * 50}).last, 10) == '{"text":"…'
    assert payload_text(None, 10) == ""
    assert canonical_address(one.device) == "d"
