"""Who did what when, and what became of it: operators' actions and commands as events of the hash-chained event store.

The stream of an action, also of a refused one, is `alarm/<device>`, that of a command `command/<command id>`. A row and its event
are one transaction, and a row that is there already makes no event: however often a record is read, it is in the chain once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from preservarium import topics
from preservarium.errors import Retry
from preservarium.stores import events
from preservarium.stores.event_tables import EventStore, EventTable, document, instant, text

ALARM_OPERATIONS: Final = EventTable(
    topics.ALARM_ANSWERS,
    "alarm_operations",
    ("action_id",),
    (
        text("action_id"), text("device_id"), text("rule"), text("pin_position"), text("alarm_id"), text("action"), text("actor"),
        text("comment"), instant("at"), instant("until", default=None), text("outcome"), text("code"), text("reason"), text("state"),
        instant("answered_at"), document("detail", ""),
    ),
)  # fmt: skip

#: Who is named where nobody in particular acted: the system did.
SYSTEM: Final = "preservarium"


@dataclass(frozen=True, slots=True)
class Fact:
    """What is told of a row."""

    stream: str
    type: str
    actor: str


def stream_of(device_id: str) -> str:
    """The stream of a device's alarms."""
    return f"alarm/{device_id}"


def command_stream(command_id: str) -> str:
    """The stream of a command."""
    return f"command/{command_id}"


def _action(row: Mapping[str, Any]) -> Fact:
    kind = "action_done" if row["outcome"] == "done" else "action_refused"
    return Fact(stream_of(row["device_id"]), kind, row["actor"])


def _command(row: Mapping[str, Any]) -> Fact:
    return Fact(command_stream(row["command_id"]), row["event"], row["actor"] or SYSTEM)


#: Tables whose rows are told in the event store: what of them. A row has `detail`, its event as it came, and `at`.
TOLD: Final[Mapping[str, Callable[[Mapping[str, Any]], Fact]]] = {
    "alarm_operations": _action,
    "command_events": _command,
}


class Journal(EventStore):
    """Stores the events of one of the tables of `TOLD`, and tells them in the event store."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Every table that is written to."""
        return (*super().tables, "event_store")

    async def _inserted(self, connection: Any, rows: list[tuple[Any, ...]]) -> None:
        told = TOLD[self.declared.table]
        names = [column.name for column in self.declared.columns]
        found = [(told(row), row) for row in (dict(zip(names, values, strict=True)) for values in rows)]
        heads = await events.heads(connection, list(dict.fromkeys(fact.stream for fact, _ in found)))
        versions = {stream: version for stream, (version, _) in heads.items()}
        new = []
        for fact, row in found:
            version = versions.get(fact.stream, 0)
            versions[fact.stream] = version + 1
            event = events.NewEvent(fact.stream, version, fact.type, orjson.loads(row["detail"]))
            new.append((event, fact.actor, events.microseconds(row["at"])))
        try:
            await events.append_all(connection, new)
        except events.ConflictError as e:
            # Only a writer that lost the partition can be in the way; the offsets will say who.
            raise Retry(str(e)) from e
