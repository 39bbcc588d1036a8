"""What the tests of validate, alarm and notify share: records, batches, a catalogue and a device look-up in memory."""

from dataclasses import dataclass, field
from typing import Any

import orjson

from preservarium import topics
from preservarium.catalogue import Catalogue
from preservarium.clock import ManualClock
from preservarium.settings import LiveSettings, load
from preservarium.stage import Batch, Effects
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
