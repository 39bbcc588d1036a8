"""Windows made of stored readings are those that the stage makes of the messages, bit by bit."""

import random
from typing import Any

import pytest

from preservarium.domain.windows import (
    MADE_REVISION,
    Nature,
    Plan,
    Stored,
    counts,
    new_state,
    observe,
    of_stored,
    parse_specs,
    silence,
)

S = 1_000_000
BEGIN = 1_700_000_000 // 86_400 * 86_400 * S


def plan(text: str) -> Plan:
    return Plan(parse_specs(text), lateness_us=60 * S, horizon_us=100_000 * S, series_max=10, panes_max=10_000)


def message(at: int, number: int, readings: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device_id": "d", "connector_mode": "LAN", "timestamp": at, "generation": 0, "raw_partition": 0, "raw_offset": number, "raw_index": 0,
        "readings": readings,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("windows", "nature"), [
    ("60s,1h", Nature()), ("1h/5m,90s", Nature()), ("1h,24h/1h", Nature(counts=True)), ("60s,1h", Nature(circular=360.0)),
])  # fmt: skip
def test_the_same_windows(seed: int, windows: str, nature: Nature) -> None:
    chance = random.Random(seed)
    the_plan, state = plan(windows), new_state()
    stored: list[Stored] = []
    live: dict[str, dict[str, Any]] = {}
    at = BEGIN
    for number in range(300):
        at += chance.choice([0, 1, 20, 45, 130]) * S
        value = chance.choice([chance.uniform(-1e6, 1e6), -0.0, 0.1, 1e15, float(number)])
        quality = chance.choice([1, 1, 1, 2, 3, 4, 9])
        flags = chance.choice([(), (), ("gross_range",), ("unit_unknown",)])
        instant = at - chance.choice([0, 0, 0, 600]) * S + number  # µs apart: one row of each instant
        reading = {
            "component_type": "x",
            "pin_position": "-1",
            "unit": "u",
            "value": value,
            "quality": quality,
            "timestamp": instant,
            "flags": [*flags],
        }
        readings, eaten = [reading], None
        if nature.counts and quality in (1, 2, 3) and not flags:
            eaten = chance.uniform(0, 9)
            readings.append({**reading, "component_type": "x_consumption", "value": eaten, "derived": True})
        stored.append(Stored(instant, value, quality, flags, False, eaten))
        for record in observe(message(at, number, readings), state, the_plan, lambda _name: nature).windows:
            live[record["window_id"]] = record
    for record in silence("d", state, at + 10**12, the_plan, lambda _name: nature):
        live[record["window_id"]] = record
    of_series = [record for record in live.values() if record["component_type"] == "x"]
    assert len(of_series) > 3
    chance.shuffle(stored)
    for record in of_series:
        spec = next(s for s in the_plan.specs if (s.size_s, s.hop_s) == (record["size_s"], record["hop_s"]))
        made = of_stored(
            stored, ("d", "LAN", "x", "-1", "u"), spec, record["window_start"] // S, lambda _name: nature, generation=0,
            revision=MADE_REVISION, why="replay",
        )  # fmt: skip
        assert made is not None
        apart = {"revision", "closed_by"}
        assert {k: repr(v) for k, v in made.items() if k not in apart} == {
            k: repr(v) for k, v in record.items() if k not in apart
        }


def test_what_counts() -> None:
    assert counts(Stored(0, 1.0, 1))
    assert not counts(Stored(0, None, 1))
    assert not counts(Stored(0, 1.0, 4))
    assert counts(Stored(0, 1.0, 4, revised=True)), "a verdict that came later takes nothing out"
    assert not counts(Stored(0, 1.0, 3, ("unit_unknown",)))
    assert (
        of_stored(
            [Stored(0, None, 9)],
            ("d", "m", "x", "p", "u"),
            parse_specs("60s")[0],
            0,
            lambda _n: None,
            generation=0,
            revision=1,
            why="",
        )
        is None
    )
