"""What was sent: how far each table was read, and the version of each of its rows.

Both are written in one transaction, after Kafka has acknowledged the events; before they are sent, they are written as
pending. So after a crash it is known what may have been sent: a row of it that is unchanged is sent again under the same id,
one that changed under a greater one, and one that is gone is told as gone.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import orjson

from preservarium.extract.source import Order, Position, Table, Version

#: Keys asked about at once when all of them are compared.
PAGE_ROWS: Final = 2_000
#: Version of a row that is gone.
GONE: Final[Version] = (-1, 0)
#: A row that is gone is remembered for so long, so that its events, if it comes again, are newer than its deletion.
GONE_KEPT_S: Final = 7 * 86_400

#: Every row of a table is written: some minutes for ten million.
AGAIN_S: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class Sent:
    """The version of a row that was sent."""

    version: Version
    order: Order  #: of its last event
    key: str  #: of its records
    at_us: int | None  #: assigned_at of a task; of a row that is gone, when that was seen

    @property
    def gone(self) -> bool:
        """Whether its deletion was the last that was sent."""
        return self.version == GONE


@dataclass(frozen=True, slots=True)
class Pending:
    """An event that is being sent."""

    id: str  #: of the row
    sent: Sent  #: what the row's entry will be


class Ledger:
    """On a connection to our own database. Errors are asyncpg's."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def position(self, table: Table) -> tuple[Position | None, datetime | None]:
        """(where to go on, when all keys were last compared)."""
        row = await self._connection.fetchrow(
            "SELECT position, reconciled_at FROM extract_positions WHERE source = $1", table
        )
        return (None, None) if row is None else (orjson.loads(row[0]) or None, row[1])

    async def sent(self, table: Table, ids: Sequence[str]) -> dict[str, Sent]:
        """What was sent of these rows."""
        rows = await self._connection.fetch(
            "SELECT id, changed_us, place, order_us, order_place, key, at_us FROM extract_rows WHERE source = $1 AND id = ANY ($2::text[])",
            table,
            list(ids),
        )
        return {r[0]: Sent((r[1], r[2]), (r[3], r[4]), r[5], r[6]) for r in rows}

    async def pending(self, table: Table) -> list[Pending]:
        """What was planned and not recorded."""
        document = await self._connection.fetchval("SELECT pending FROM extract_positions WHERE source = $1", table)
        entries = orjson.loads(document) if document else []
        return [Pending(id, Sent((c, p), (o, q), key, at)) for id, key, at, c, p, o, q in entries]

    async def advance(
        self, table: Table, sent: Mapping[str, Sent], position: Position | None, plan: Sequence[Pending]
    ) -> None:
        """Keep what was sent, move on, and tell what is about to be sent: all of it or nothing, in one statement.

        Args:
            table: whose.
            sent: what Kafka has acknowledged, by id.
            position: where to go on; None: as before.
            plan: takes the place of the former plan; all that may have been sent and is not recorded must be in it.
        """
        rows = list(sent.values())
        document = orjson.dumps([(e.id, e.sent.key, e.sent.at_us, *e.sent.version, *e.sent.order) for e in plan])
        await self._connection.execute(
            "WITH kept AS (INSERT INTO extract_rows (source, id, changed_us, place, order_us, order_place, key, at_us)"
            " SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[], $8::bigint[])"
            " ON CONFLICT (source, id) DO UPDATE SET changed_us = excluded.changed_us, place = excluded.place,"
            " order_us = excluded.order_us, order_place = excluded.order_place, key = excluded.key, at_us = excluded.at_us)"
            " INSERT INTO extract_positions AS p (source, position, pending) VALUES ($1, coalesce($9::jsonb, 'null'), $10)"
            " ON CONFLICT (source) DO UPDATE SET position = coalesce($9::jsonb, p.position), pending = excluded.pending,"
            " updated_at = CASE WHEN $9::jsonb IS NULL THEN p.updated_at ELSE now() END",
            table, list(sent), [s.version[0] for s in rows], [s.version[1] for s in rows], [s.order[0] for s in rows],
            [s.order[1] for s in rows], [s.key for s in rows], [s.at_us for s in rows],
            None if position is None else orjson.dumps(position).decode(), document.decode() if plan else None,
        )  # fmt: skip

    async def reconciled(self, table: Table) -> None:
        """All keys were compared just now; what has been gone for long is forgotten."""
        await self._connection.execute(
            "DELETE FROM extract_rows WHERE source = $1 AND changed_us < 0 AND at_us < (extract(epoch FROM now()) - $2) * 1000000",
            table, GONE_KEPT_S,
        )  # fmt: skip
        await self._connection.execute(
            "INSERT INTO extract_positions (source, position, reconciled_at) VALUES ($1, 'null', now())"
            " ON CONFLICT (source) DO UPDATE SET reconciled_at = now()",
            table,
        )

    async def again(self, table: Table) -> int:
        """Have every row sent again, and all keys compared; returns the rows.

        Their events stay known: what is sent again is newer, and what has gone meanwhile is told.
        """
        async with self._connection.transaction():
            # No row of a source has such a version.
            done = await self._connection.execute(
                "UPDATE extract_rows SET place = -1 WHERE source = $1 AND changed_us >= 0", table, timeout=AGAIN_S
            )
            await self._connection.execute(
                "UPDATE extract_positions SET position = '{\"again\": true}', reconciled_at = NULL WHERE source = $1",
                table,
            )
        return int(done.rpartition(" ")[2])

    async def pages(self, table: Table) -> AsyncIterator[list[str]]:
        """Ids of all rows that were sent, a page at a time; pages may be forgotten while they are read."""
        last = ""
        while True:
            rows = await self._connection.fetch(
                "SELECT id FROM extract_rows WHERE source = $1 AND id > $2 AND changed_us >= 0 ORDER BY id LIMIT $3",
                table,
                last,
                PAGE_ROWS,
            )
            if not rows:
                return
            last = rows[-1][0]
            yield [r[0] for r in rows]
