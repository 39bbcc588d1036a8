"""The registry as it was at an instant: what a message of then was decoded, mapped and checked with.

What has not changed since is read from the projections; of what has, the events up to the instant are folded. Everything goes by a
key, or by the time of the events. Functions work on a connection that the caller has, inside its transaction.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import orjson

from preservarium.domain.readings.address import canonical_address
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.stores import events
from preservarium.stores.registry import spelled

#: Streams of datatypes that may have changed since an instant.
CHANGED_MAX: Final = 10_000
#: Instants at which the registry changed that are kept in memory; of more, the first.
CHANGES_MAX: Final = 100_000
#: Events that decide how a message is read; the operators' are none of them.
_OF_READING: Final = "stream_id LIKE ANY ('{device/%,type/%,parser/%,datatype/%}')"


@dataclass(frozen=True, slots=True)
class Documents:
    """What decides how a device's messages are read."""

    device: DeviceDoc | None
    type: DeviceTypeDoc | None
    parser: ParserDoc | None
    datatypes: Mapping[str, DatatypeDoc]

    def datatype(self, name: str) -> DatatypeDoc | None:
        """The datatype of that name."""
        return self.datatypes.get(name)


class Past:
    """Documents as of instants; what they have in common is read once.

    Args:
        connection: of asyncpg. Not shared with another task while it is asked.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        #: instants of changes, ascending, and the last event's position as of each; the first is when it was prepared from
        self._changes: tuple[list[int], list[int]] | None = None
        self._datatypes: dict[int | None, Mapping[str, DatatypeDoc]] = {}
        self._now: dict[str, dict[str, Any]] | None = None
        self._parsers: dict[tuple[str, int], ParserDoc | None] = {}

    async def at(self, device_id: str, at_us: int | None, parser: str | None = None) -> Documents:
        """The documents of a device as of an instant.

        Args:
            device_id: in any spelling of its address.
            at_us: µs since the epoch, UTC; None: now.
            parser: name@version that read the message, where it is known; None: the version that was active then.
        """
        last = await self.last_change(at_us)
        device_id = await spelled(self._connection, device_id)
        device = await self._document("device", device_id, "devices", "device_id", at_us)
        if device is None and at_us is not None:
            # It may have been registered under another spelling, and removed since.
            device = await self._document("device", canonical_address(device_id), "devices", "device_id", at_us)
        kind = None if device is None else await self._document("type", device["type"], "device_types", "name", at_us)
        found: ParserDoc | None = None
        if parser is not None:
            name, _, version = parser.rpartition("@")
            found = await self._parser(name, int(version)) if version.isdigit() and len(version) < 10 else None
        elif kind is not None:
            found = await self._active(kind["parser"], at_us)
        return Documents(
            cast(DeviceDoc | None, device),
            cast(DeviceTypeDoc | None, kind),
            found,
            await self._datatypes_at(at_us, last),
        )

    async def prepare(self, from_us: int) -> None:
        """Read when the registry changed since an instant, so that `last_change` need not ask for each message."""
        rows = await self._connection.fetch(
            f"SELECT at, max(position) AS position FROM event_store WHERE at >= $1 AND {_OF_READING} GROUP BY at ORDER BY at LIMIT $2",
            events.instant(from_us), CHANGES_MAX,
        )  # fmt: skip
        before = await self._before(from_us - 1)
        self._changes = (
            [from_us, *(events.microseconds(row["at"]) for row in rows)],
            [
                before,
                *(row["position"] for row in rows),
            ],
        )

    async def last_change(self, at_us: int | None) -> int:
        """The position of the last event up to an instant: documents as of instants with the same one are the same.

        Args:
            at_us: µs since the epoch, UTC; None: now, or when it was prepared.
        """
        if self._changes is None:
            return await self._before(at_us)
        ats, positions = self._changes
        if at_us is None:
            return positions[-1]
        return positions[bisect_right(ats, at_us) - 1] if at_us >= ats[0] else await self._before(at_us)

    async def _before(self, at_us: int | None) -> int:
        found: int | None = await self._connection.fetchval(
            f"SELECT position FROM event_store WHERE ($1::timestamptz IS NULL OR at <= $1) AND {_OF_READING}"
            " ORDER BY at DESC, position DESC LIMIT 1",
            None if at_us is None else events.instant(at_us),
        )
        return found or 0

    async def _document(self, kind: str, name: str, table: str, key: str, at_us: int | None) -> dict[str, Any] | None:
        row = await self._connection.fetchrow(f"SELECT doc, rev, updated_at FROM {table} WHERE {key} = $1", name)
        if row is not None and (at_us is None or events.microseconds(row["updated_at"]) <= at_us):
            return {**orjson.loads(row["doc"]), "rev": row["rev"]}
        if at_us is None:
            return None
        state, _ = await events.state_at(self._connection, f"{kind}/{name}", until_us=at_us)
        return None if state is None else {**state, "rev": 0}  # an event does not say its revision

    async def _parser(self, name: str, version: int) -> ParserDoc | None:
        """A version of a parser: its source never changes."""
        if (name, version) not in self._parsers:
            row = await self._connection.fetchrow(
                "SELECT doc, rev FROM parsers WHERE name = $1 AND parser_version = $2", name, version
            )
            self._parsers[name, version] = (
                None if row is None else cast(ParserDoc, {**orjson.loads(row["doc"]), "rev": row["rev"]})
            )
        return self._parsers[name, version]

    async def _active(self, name: str, at_us: int | None) -> ParserDoc | None:
        rows = await self._connection.fetch(
            "SELECT doc, rev, updated_at FROM parsers WHERE name = $1 ORDER BY parser_version DESC", name
        )
        for row in rows:
            document = {**orjson.loads(row["doc"]), "rev": row["rev"]}
            if at_us is not None and events.microseconds(row["updated_at"]) > at_us:
                state, _ = await events.state_at(
                    self._connection, f"parser/{name}@{document['version']}", until_us=at_us
                )
                if state is None:
                    continue
                document = {**state, "rev": row["rev"]}
            if document["status"] == "active":
                return cast(ParserDoc, document)
        return None

    async def _datatypes_at(self, at_us: int | None, last: int) -> Mapping[str, DatatypeDoc]:
        key = None if at_us is None else last
        if key in self._datatypes:
            return self._datatypes[key]
        if self._now is None:
            rows = await self._connection.fetch("SELECT name, doc, rev FROM datatypes")
            self._now = {row["name"]: {**orjson.loads(row["doc"]), "rev": row["rev"]} for row in rows}
        found: dict[str, Any] = dict(self._now)
        if at_us is not None:
            rows = await self._connection.fetch(
                "SELECT DISTINCT stream_id FROM event_store WHERE at > $1 AND stream_id LIKE 'datatype/%' LIMIT $2",
                events.instant(at_us), CHANGED_MAX,
            )  # fmt: skip
            for row in rows:
                name = row["stream_id"].removeprefix("datatype/")
                state, _ = await events.state_at(self._connection, row["stream_id"], until_us=at_us)
                if state is None:
                    found.pop(name, None)
                else:
                    found[name] = {**state, "rev": 0}
        self._datatypes[key] = cast(Mapping[str, DatatypeDoc], found)
        return self._datatypes[key]
