"""What the tests of notices share: transitions, events, and the group stage with its table in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
from quality_support import World, batch, catalogue, lines, live, record

from preservarium import topics
from preservarium.domain.alarms.machine import SUPERSEDED, TRANSITION_NAMES
from preservarium.domain.notices import Event
from preservarium.notices.grouping import Grouping
from preservarium.streaming.stage import Effects, Tick

S = 1_000_000
US = 1_700_000_000 * S
#: Each transition of an alarm has an id of its own.
NAMES = ("raised", *sorted({*TRANSITION_NAMES.values(), SUPERSEDED} - {"raised"}))


def transition(number: int = 1, **fields: Any) -> dict[str, Any]:
    """A line of iot_alerts: alarm `number` of the rule `hot`, of a device of its own."""
    name = fields.get("transition", "raised")
    return {
        "alarm_id": f"{number:032x}", "transition_id": f"{NAMES.index(name):08x}{number + 1000:024x}", "sequence": 1, "device_id": f"dev-{number}",
        "device_name": "Attic", "rule": "hot", "rule_rev": 1, "component_type": "temp", "pin_position": "-1",
        "severity": "major", "transition": "raised", "state": "unacknowledged", "occurred_at": US, "detected_at": US,
        "cleared_at": None, "transition_at": US, "value": 31.5, "unit": "°C", "threshold": 30.0,
        "message": f"alarm {number}", "recipients": ["ops"], "actor": None, "comment": None, "raw_partition": 1,
        "raw_offset": number, "raw_index": 0, "generation": 0, **fields,
    }  # fmt: skip


def event(line: dict[str, Any], offset: int, *, after_s: float = 0, below: bool = False, **labels: str) -> Event:
    """What the route stage makes of a transition."""
    known = {"device": line["device_id"], "rule": line["rule"], "severity": line["severity"], "alarm": line["alarm_id"]}
    return {
        "recipient": "ops", "source": "3", "offset": offset, "index": 0, "after_s": after_s, "below": below,
        "labels": {**known, **labels}, "transition": line,
    }  # fmt: skip


@dataclass
class Memory:
    """A state table in memory."""

    world: World
    name: str = "notice_states"

    def get(self, partition: int, key: bytes) -> bytes | None:
        return self.world.tables.get((self.name, partition, key))

    def items(self, partition: int) -> Iterator[tuple[bytes, bytes]]:
        for (table, where, key), value in list(self.world.tables.items()):
            if (table, where) == (self.name, partition):
                yield key, value


@dataclass
class GroupStage:
    """The group stage of one partition; `sent` is the topic `notices`, what a crash repeated included."""

    recipient: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    partition: int = 3

    def __post_init__(self) -> None:
        ops = {"name": "ops", "channel": "mail", "address": "ops@example.org", **self.recipient}
        self.world = World(catalogue(("recipient", ops)))
        self.sent: list[dict[str, Any]] = []
        self.offset = 0
        self.start()

    def start(self) -> None:
        """A new process: nothing is remembered but the table."""
        self.stage = Grouping(Memory(self.world), self.world.documents, live(notices=self.settings), self.world.clock)
        self.first = True

    @property
    def now_us(self) -> int:
        return self.world.clock.now_us()

    def advance(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    def go_to(self, at_us: int) -> None:
        self.advance((at_us - self.now_us) / 1e6)

    async def hear(self, *events: Event, crash: bool = False) -> None:
        effects = await self.stage(batch(topics.NOTICE_EVENTS, *(record(i, e) for i, e in enumerate(events))))
        if crash:
            self.start()
        else:
            self.carry_out(effects)

    def carry_out(self, effects: Effects) -> None:
        self.sent += lines(self.world.carry_out(effects, self.partition), topics.NOTICES)

    async def tick(self, crash: str = "", behind: bool = False) -> bool:
        """One tick; whether it crashed.

        `crash`: where there is something to carry out, do it not at all (before), but for the state (sent), or with the
        first half of the state (between).
        """
        effects = await self.stage.tick(Tick(self.partition, self.now_us, self.first, behind))
        self.first = False
        crashes = bool(crash and (effects.sends or (effects.puts and crash != "sent")))
        if crashes:
            self.sent += lines(effects.sends if crash != "before" else [], topics.NOTICES)
            if crash == "between":
                for table, items in effects.puts.items():
                    for key, value in list(items.items())[: (len(items) + 1) // 2]:
                        assert value is not None
                        self.world.tables[table, self.partition, key] = value
            self.start()
        else:
            self.carry_out(effects)
        return crashes

    async def run(self, seconds: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """Let time pass; what was sent meanwhile."""
        before = len(self.sent)
        for _ in range(round(seconds / step_s)):
            self.advance(step_s)
            await self.tick()
        return self.sent[before:]

    def deliveries(self) -> list[dict[str, Any]]:
        """What whoever skips known ids sees."""
        return list({d["delivery_id"]: d for d in reversed(self.sent)}.values())[::-1]

    def document(self, recipient: str = "ops") -> dict[str, Any]:
        value = self.world.tables["notice_states", self.partition, recipient.encode()]
        found: dict[str, Any] = orjson.loads(value)
        return found
