"""What the tests of validate, alarm and notify share: records, batches, a catalogue and a device look-up in memory."""

from dataclasses import dataclass, field
from typing import Any

import orjson

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.validation import Limits, new_state, validate
from preservarium.registry.catalogue import Catalogue
from preservarium.settings import LiveSettings, load
from preservarium.streaming.stage import Batch, Effects
from preservarium.topics import Topic

S = 1_000_000
T = 1_700_000_000 * S


@dataclass(frozen=True)
class Rec:
    """A Kafka record."""

    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    timestamp: int = 1_700_000_000_000


def live(**sections: Any) -> LiveSettings:
    return LiveSettings(load(**sections))


def catalogue(*documents: tuple[str, dict[str, Any]]) -> Catalogue:
    """A catalogue that was read to its end."""
    made = Catalogue()
    for kind, document in documents:
        offer(made, kind, **document)
    made._ready.set()
    return made


def offer(to: Catalogue, section: str, /, **document: Any) -> None:
    """Put a document in, one revision after what is there."""
    document["rev"] = to.rev + 1
    assert to.offer(section, document)


@dataclass
class World:
    """Tables and devices of one worker, in memory; carries out effects as the feeds do."""

    documents: Catalogue
    devices: dict[str, Any] = field(default_factory=dict)
    tables: dict[tuple[str, int, bytes], bytes] = field(default_factory=dict)
    clock: ManualClock = field(default_factory=ManualClock)
    offset: int = 0

    def known(self, partition: int, device_id: str) -> Any:
        return self.devices.get(device_id)

    def carry_out(self, effects: Effects, partition: int) -> list[Any]:
        """Write the state, run what comes after; the sends."""
        for table, items in effects.puts.items():
            for key, value in items.items():
                assert value is not None
                self.tables[table, partition, key] = value
        for callback in effects.after:
            callback()
        return effects.sends


@dataclass
class StateTable:
    """A state table of a world, for stages that ask for one."""

    world: World
    name: str

    def get(self, partition: int, key: bytes) -> bytes | None:
        return self.world.tables.get((self.name, partition, key))

    def items(self, partition: int) -> Any:
        kept = list(self.world.tables.items())
        return ((key, value) for (name, p, key), value in kept if name == self.name and p == partition)


def message(
    offset: int, *readings: dict[str, Any], device: str = "dev-1", at: float | None = None, **fields: Any
) -> Any:
    at_us = T + round((offset if at is None else at) * S)
    return {
        "device_id": device, "connector_mode": "MQTT", "topic": "t/1", "timestamp": at_us, "received_at": at_us,
        "raw_partition": 3, "raw_offset": offset, "raw_index": 0, "parser": "p@1", "config_rev": 1, "generation": 0,
        "readings": list(readings), **fields,
    }  # fmt: skip


def reading(value: Any, component_type: str = "temp", unit: str = "°C", **fields: Any) -> dict[str, Any]:
    return {"component_type": component_type, "pin_position": "-1", "value": value, "unit": unit, **fields}


def record(offset: int, *lines: Any, key: bytes | None = b"dev-1", **headers: bytes) -> Rec:
    value = b"\n".join(x if isinstance(x, bytes) else orjson.dumps(x) for x in lines)
    return Rec(offset, key, value, tuple(headers.items()))


def batch(topic: Topic, *records: Rec, partition: int = 3) -> Batch:
    return Batch(topic.name, partition, records)


def lines(sends: list[Any], topic: Topic) -> list[Any]:
    """Parsed lines of the records sent to a topic."""
    return [orjson.loads(x) for s in sends if s.topic is topic for x in s.value.split(b"\n")]


def errors(sends: list[Any]) -> list[tuple[str, str]]:
    return [(e["code"], e["message"]) for e in lines(sends, topics.ERRORS)]


class Meter:
    """A counter's readings, judged one after the other."""

    limits = Limits(future_skew_us=300 * S, store_failed=False, series_max=3)

    def __init__(self, **counter: Any) -> None:
        self.datatype = {
            "name": "meter", "rev": 1, "kind": "number", "unit": "m³", "counter": counter, "fail_span": {"min": 0, "max": 1e6},
        }  # fmt: skip
        self.checks = compile_checks(None, lambda name: self.datatype if name == "meter" else None)  # type: ignore[arg-type, return-value]
        self.state, self.offset = new_state(), 0

    def reads(self, seconds: float, value: Any, **fields: Any) -> list[Any]:
        """What validate tells of one reading, `seconds` after T: at most one reading of consumption."""
        self.offset += 1
        one = message(
            self.offset,
            reading(value, "meter", "m³", **fields),
            timestamp=T + round(seconds * S),
            received_at=T + 10**6 * S,
        )
        self.outcome = validate(one, self.checks, self.state, self.limits)
        return [r for r in one["readings"] if r.get("derived")]

    def all(self, *values: Any) -> list[tuple[float, list[str]]]:
        """(consumption, flags) of readings a minute apart, but for the first."""
        told = [r for value in values for r in self.reads((self.offset + 1) * 60, value)]
        return [(round(r["value"], 9), r.get("flags", [])) for r in told]
