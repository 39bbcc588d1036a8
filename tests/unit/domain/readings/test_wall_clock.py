"""Instants of a wall clock: what an offset says, both changes of the clock, and how it is told which pass is meant."""

from datetime import datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.decoders.base import Decoded
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.domain.decoders.scripts import compile_script
from preservarium.domain.readings.normalize import compile_device, normalize
from preservarium.domain.readings.wall_clock import Twice, WallClock, wall_clock
from preservarium.domain.registry.documents import MODELS
from preservarium.errors import Reject

BERLIN = wall_clock("Europe/Berlin")
HOUR = 3_600_000_000


def us(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp()) * 1_000_000


#: 2026-10-25 01:00Z: 03:00 in Berlin becomes 02:00.
FIRST, SECOND = us("2026-10-25T00:30:00+00:00"), us("2026-10-25T01:30:00+00:00")


@pytest.mark.parametrize(
    ("given_as", "at"),
    [
        ("2026-07-01T12:00:00", us("2026-07-01T10:00:00+00:00")),
        ("2026-12-01 12:00:00", us("2026-12-01T11:00:00+00:00")),
        ("20261201T120000", us("2026-12-01T11:00:00+00:00")),
        # What says its offset, and what counts since the epoch, needs no clock.
        ("2026-07-01T12:00:00Z", us("2026-07-01T12:00:00+00:00")),
        ("2026-07-01T12:00:00-05:00", us("2026-07-01T17:00:00+00:00")),
        (1_782_900_000, 1_782_900_000_000_000),
        ("1782900000", 1_782_900_000_000_000),
        ("1782900000.5", 1_782_900_000_500_000),
        # An hour that the clock skips is counted on from before the change.
        ("2026-03-29T02:30:00", us("2026-03-29T01:30:00+00:00")),
    ],
)
def test_what_is_meant(given_as, at):
    found = BERLIN.instant(given_as, None, us("2026-12-01T12:00:00+00:00"))
    assert found == at
    assert type(found) is int


@pytest.mark.parametrize("given_as", ["soon", "", None, True, [], "2026-13-01T00:00:00"])
def test_what_is_no_instant(given_as):
    assert BERLIN.instant(given_as, None, 0) is None


@pytest.mark.parametrize(
    ("received_at", "before", "at"),
    [
        # Live: the nearer pass, also where the device's clock is some minutes off.
        (FIRST, None, FIRST),
        (FIRST + 60_000_000, None, FIRST),
        (SECOND, None, SECOND),
        (SECOND - 5 * 60_000_000, None, SECOND),
        # Too late for anybody to know: the first.
        (SECOND + 3 * HOUR, None, FIRST),
        # By order.
        (SECOND + 3 * HOUR, FIRST - HOUR, FIRST),
        (SECOND + 3 * HOUR, FIRST, FIRST),
        (SECOND + 3 * HOUR, FIRST + 60_000_000, SECOND),
        (FIRST, SECOND - 60_000_000, SECOND),
    ],
)
def test_a_time_that_comes_twice(received_at, before, at):
    found = BERLIN.instant("2026-10-25T02:30:00", None, received_at, before)
    assert found == at
    assert type(found) is Twice


@given(
    st.integers(us("2000-01-01T00:00:00+00:00") // 1_000_000, us("2099-12-31T00:00:00+00:00") // 1_000_000),
    st.sampled_from(["Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "UTC", "Asia/Kolkata"]),
)
def test_what_the_wall_shows_live_is_read_back(seconds, name):
    clock = wall_clock(name)
    shown = datetime.fromtimestamp(seconds, clock._zone).replace(tzinfo=None).isoformat()
    found = clock.instant(shown, None, seconds * 1_000_000)
    # Lord Howe puts its clock back by half an hour, and nearer is nearer there, too.
    assert found == seconds * 1_000_000


@pytest.mark.parametrize("name", ["Europe/Berln", "", "../etc/passwd", 5, None])
def test_a_zone_that_is_none(name):
    with pytest.raises(ValueError, match="no time zone"):
        WallClock(name)


# --- through the parsers ---------------------------------------------------------------------------------------------


def raw(payload: Any, received_at: int = SECOND + 3 * HOUR) -> Any:
    return {
        "device": "d1", "received_at": received_at, "connector": "x", "mode": "", "topic": "", "port": None, "payload": payload, "meta": {},
        "experiment_id": None, "raw_partition": 0, "raw_offset": 0, "raw_index": 0, "generation": 0,
    }  # fmt: skip


def parser(kind: str, source: Any) -> Any:
    return {"name": "p", "version": 1, "rev": 1, "status": "active", "hash": "h", "kind": kind, "source": source}


TIMES = ["01:30", "02:00", "02:30", "02:00", "02:30", "03:00"]
#: In minutes since midnight UTC of that day, the day before for the first.
MINUTES = [-30, 0, 30, 60, 90, 120]
MIDNIGHT = us("2026-10-25T00:00:00+00:00")


def rows() -> list[dict[str, Any]]:
    return [{"at": f"2026-10-25 {at}:00", "t": i} for i, at in enumerate(TIMES)]


def minutes(found: Any) -> list[int]:
    assert all(type(f) is Decoded for f in found)
    assert [type(f.timestamp) is Twice for f in found] == [False, True, True, True, True, False]
    return [(f.timestamp - MIDNIGHT) // 60_000_000 for f in found]


@pytest.mark.parametrize(
    ("kind", "source", "payload"),
    [
        ("json", {"time": "at"}, rows()),
        ("json", {"each": [{"path": "rows[*]", "time": "at", "fields": [{"path": "t"}]}]}, {"rows": rows()}),
        ("network", {"time": "at"}, rows()),
        ("csv", {"time": "at"}, "at,t\n" + "\n".join(f"{r['at']},{r['t']}" for r in rows())),
    ],
)
def test_in_a_payload_the_hour_that_comes_twice_is_resolved_by_order(kind, source, payload):
    for doc, variables in (
        (parser(kind, {**source, "time_zone": "Europe/Berlin"}), {}),
        (parser(kind, source), {"time_zone": "Europe/Berlin"}),
    ):
        assert minutes(compile_parser(doc, variables).decode(raw(payload))) == MINUTES


def test_in_what_a_python_script_returns_likewise():
    script = compile_script(parser("python", "x"), {"time_zone": "Europe/Berlin"})
    items = [{"name": "t", "value": r["t"], "timestamp": r["at"]} for r in rows()]
    assert minutes(script.fields(orjson.dumps(items).decode(), SECOND + 3 * HOUR)) == MINUTES


def test_the_device_counts_before_its_type_and_its_type_before_the_parser():
    doc = parser("json", {"time": "at", "time_zone": "Asia/Tokyo"})
    for device, kind, hour in (
        ({}, {}, 3),
        ({}, {"time_zone": "Europe/Berlin"}, 10),
        ({"time_zone": "UTC"}, {"time_zone": "Europe/Berlin"}, 12),
    ):
        compiled = compile_device(
            {"device_id": "d1", "rev": 1, "type": "t", "enabled": True, **device}, {"name": "t", "rev": 1, "manufacturer": "m", "parser": "p", **kind},
            doc, lambda name: None,
        )  # fmt: skip
        message, _ = normalize(raw({"at": "2026-07-01T12:00:00", "t": 5}), compiled, 0)
        assert message["timestamp"] == us(f"2026-07-01T{hour:02d}:00:00+00:00")
        assert "flags" not in message["readings"][0]


@pytest.mark.parametrize(
    "payload", [{"at": "2026-10-25T02:30:00", "t": 5}, {"at": "2026-10-25T02:30:00", "t": 5, "nested": {"x": 1}}]
)
def test_what_is_ambiguous_is_told_by_a_flag(payload):
    compiled = compile_device(
        {"device_id": "d1", "rev": 1, "type": "t", "enabled": True, "time_zone": "Europe/Berlin"},
        {"name": "t", "rev": 1, "manufacturer": "m", "parser": "p"}, parser("json", {"time": "at"}), lambda name: None,
    )  # fmt: skip
    message, refused = normalize(raw(payload, SECOND), compiled, 0)
    assert (message["timestamp"], refused) == (SECOND, ())
    assert all(r["flags"] == ["time_ambiguous"] for r in message["readings"])
    assert orjson.loads(orjson.dumps(message))["timestamp"] == SECOND


@pytest.mark.parametrize("kind", ["json", "csv", "network"])
def test_a_parser_of_no_zone_is_refused_in_words(kind):
    for doc, variables in (
        (parser(kind, {"time_zone": "Berlin"}), {}),
        (parser(kind, {"time_zone": [1]}), {}),
        (parser(kind, {}), {"time_zone": 7}),
    ):
        with pytest.raises(Reject, match="there is no time zone"):
            compile_parser(doc, variables)


def test_the_registry_knows_its_zones():
    device = {"device_id": "d1", "type": "t", "time_zone": "Europe/Berlin"}
    assert MODELS["device"].model_validate(device).time_zone == "Europe/Berlin"  # type: ignore[attr-defined]
    kind = {"name": "t", "manufacturer": "m", "parser": "p"}
    for model, document in (("device", device), ("type", kind)):
        with pytest.raises(ValueError, match="no time zone"):
            MODELS[model].model_validate({**document, "time_zone": "Berlin"})
