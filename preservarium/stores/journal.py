"""Who did what when: each operator's action, also a refused one, as an event of the hash-chained event store.

The stream is `alarm/<device>`. An action's row in `alarm_operations` and its event are one transaction, and a row that
is there already makes no event: however often a record is read, an action is in the chain once.
"""

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

_NAMES: Final = [column.name for column in ALARM_OPERATIONS.columns]


def stream_of(device_id: str) -> str:
    """The stream of a device's alarms."""
    return f"alarm/{device_id}"


class Journal(EventStore):
    """Stores answers, and what they tell in the event store."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Every table that answers are written to."""
        return (*super().tables, "event_store")

    async def _insert(self, connection: Any, items: list[tuple[tuple[Any, ...], tuple[int, tuple[Any, ...]]]]) -> int:
        # In the order of the topic: it becomes the order of the chain.
        rows = [row for _, (_, row) in sorted(items, key=lambda item: item[1][0])]
        columns = map(list, zip(*rows, strict=True))
        new = {r[0] for r in await connection.fetch(f"{self.declared.insert} RETURNING action_id", *columns)}
        for row in rows:
            answer = dict(zip(_NAMES, row, strict=True))
            if answer["action_id"] in new:
                await self._tell(connection, answer)
        return len(new)

    async def _tell(self, connection: Any, answer: dict[str, Any]) -> None:
        stream = stream_of(answer["device_id"])
        version = (await events.heads(connection, [stream])).get(stream, (0, events.GENESIS))[0]
        kind = "action_done" if answer["outcome"] == "done" else "action_refused"
        event = events.NewEvent(stream, version, kind, orjson.loads(answer["detail"]))
        try:
            await events.append(connection, [event], actor=answer["actor"], at_us=events.microseconds(answer["at"]))
        except events.ConflictError as e:
            # Only a writer that lost the partition can be in the way; the offsets will say who.
            raise Retry(str(e)) from e
