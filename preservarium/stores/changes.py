"""Changes in PostgreSQL: the row of each, the rows that it makes of rows, and its words in the event store.

Functions work on a connection of asyncpg that the caller has; instants are µs since the epoch, UTC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import orjson

from preservarium.errors import PreservariumError
from preservarium.stores import events
from preservarium.stores.events import NewEvent, instant, microseconds

#: Rows of one transaction, and of one insert into ClickHouse: some 100 ms, so that live writes never wait long.
SLOT_ROWS: Final = 2_000
#: Rows of a change. A hundred million rows are a matter for a new generation, not for a change that can be taken back row by row.
ROWS_MAX: Final = 10_000_000
#: Changes that are listed.
LISTED_MAX: Final = 1_000
#: One promotes or takes back at a time: changes may touch the same rows.
LOCK: Final = 7_236_481_305

_STREAM: Final = "change/"


class ChangeError(PreservariumError):
    """It cannot be done with this change; the message says why, and what can be done."""


class State(StrEnum):
    """How far a change is."""

    DERIVING = "deriving"
    READY = "ready"
    PROMOTING = "promoting"
    PROMOTED = "promoted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class Change:
    """A change as it is noted."""

    change_id: int
    kind: str  #: replay or correction
    state: State
    generation: int
    attempt: int
    plan: Mapping[str, Any]  #: what was asked for
    summary: Mapping[str, Any]  #: what was found, and what became of it
    created_at: int
    created_by: str
    updated_at: int

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "change_id": self.change_id,
            "kind": self.kind,
            "state": str(self.state),
            "generation": self.generation,
            "created_at": self.created_at,
            "created_by": self.created_by,
            "updated_at": self.updated_at,
            "plan": self.plan,
            "summary": self.summary,
        }


_COLUMNS: Final = "change_id, kind, state, generation, attempt, plan, summary, created_at, created_by, updated_at"


def _change(row: Any) -> Change:
    return Change(
        row["change_id"], row["kind"], State(row["state"]), row["generation"], row["attempt"], orjson.loads(row["plan"]),
        orjson.loads(row["summary"]), microseconds(row["created_at"]), row["created_by"], microseconds(row["updated_at"]),
    )  # fmt: skip


async def find(connection: Any, change_id: int) -> Change:
    """A change.

    Raises:
        ChangeError: there is none of that number.
    """
    row = await connection.fetchrow(f"SELECT {_COLUMNS} FROM changes WHERE change_id = $1", change_id)
    if row is None:
        message = (
            f"there is no change {change_id}: `preservarium replay list` and `preservarium correct list` show them"
        )
        raise ChangeError(message)
    return _change(row)


async def listed(connection: Any, kind: str) -> list[Change]:
    """Changes of a kind, the newest first."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM changes WHERE kind = $1 ORDER BY change_id DESC LIMIT $2", kind, LISTED_MAX
    )
    return [_change(row) for row in rows]


async def highest_generation(connection: Any) -> int:
    """The highest generation that a change has taken; 0 where there is none."""
    found: int | None = await connection.fetchval("SELECT max(generation) FROM changes")
    return found or 0


async def create(
    connection: Any, kind: str, plan: Mapping[str, Any], generation: int, *, actor: str, at_us: int
) -> Change:
    """Note a new change, and say so in the event store.

    Raises:
        ChangeError: somebody else took the generation meanwhile.
    """
    import asyncpg

    try:
        async with connection.transaction():
            row = await connection.fetchrow(
                f"INSERT INTO changes (kind, state, generation, plan, created_by) VALUES ($1, 'deriving', $2, $3, $4) RETURNING {_COLUMNS}",
                kind, generation, orjson.dumps(plan).decode(), actor,
            )  # fmt: skip
            made = _change(row)
            await say(
                connection,
                made.change_id,
                "asked",
                {"kind": kind, "generation": generation, "plan": plan},
                actor=actor,
                at_us=at_us,
            )
    except asyncpg.UniqueViolationError:
        message = "somebody else opened a change or a generation at the same moment: try again"
        raise ChangeError(message) from None
    return made


async def say(connection: Any, change_id: int, kind: str, data: Mapping[str, Any], *, actor: str, at_us: int) -> None:
    """Add an event to the change's stream; in the caller's transaction."""
    stream = f"{_STREAM}{change_id}"
    heads = await events.heads(connection, [stream])
    await events.append(
        connection, [NewEvent(stream, heads.get(stream, (0, b""))[0], kind, data)], actor=actor, at_us=at_us
    )


async def history(connection: Any, change_id: int) -> list[events.Event]:
    """What happened to a change, and by whom."""
    return await events.read(connection, f"{_STREAM}{change_id}")


async def becomes(
    connection: Any,
    change: Change,
    state: State,
    *,
    expected: Sequence[State],
    event: str = "",
    data: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    actor: str = "",
    at_us: int = 0,
    attempt: bool = False,
) -> Change:
    """Have a change be in another state, with an event where one is named: one transaction.

    Raises:
        ChangeError: it is in none of the states expected.
    """
    async with connection.transaction():
        row = await connection.fetchrow(
            f"UPDATE changes SET state = $2, summary = summary || $3::jsonb, updated_at = now(), attempt = attempt + $5"
            f" WHERE change_id = $1 AND state = ANY ($4) RETURNING {_COLUMNS}",
            change.change_id, str(state), orjson.dumps(dict(summary or {})).decode(), [str(one) for one in expected], int(attempt),
        )  # fmt: skip
        if row is None:
            now = await find(connection, change.change_id)
            message = f"change {change.change_id} is {now.state}: it would have to be {' or '.join(map(str, expected))}"
            raise ChangeError(message)
        if event:
            await say(connection, change.change_id, event, dict(data or {}), actor=actor, at_us=at_us)
        return _change(row)


# --- the rows of a change

#: The columns of `change_row`, in its order.
ROW_COLUMNS: Final = (
    "received_at", "raw_offset", "value", "derivation_id", "raw_index", "generation", "raw_partition", "quality", "value_text", "flags",
    "unit", "topic", "ingested_at", "revised",
)  # fmt: skip
#: A row of `measurements` as one of `change_row`.
AS_ROW: Final = f"ROW({', '.join(f'm.{name}' for name in ROW_COLUMNS)})::change_row"


async def lay_out(connection: Any, change_id: int) -> int:
    """Cut the rows of a change into slots, each of which is carried out as a whole; how many rows they are.

    Raises:
        ChangeError: they are too many.
    """
    async with connection.transaction():
        rows: int = await connection.fetchval("SELECT count(*) FROM change_rows WHERE change_id = $1", change_id)
        if rows > ROWS_MAX:
            message = (
                f"{rows:,} rows are more than one change may have ({ROWS_MAX:,}): name fewer devices or a shorter time"
            )
            raise ChangeError(message)
        await connection.execute(
            "UPDATE change_rows c SET slot = n.slot FROM ("
            " SELECT series_id, timestamp, (row_number() OVER (ORDER BY series_id, timestamp) - 1) / $2 AS slot FROM change_rows WHERE change_id = $1"
            ") n WHERE c.change_id = $1 AND c.series_id = n.series_id AND c.timestamp = n.timestamp",
            change_id, SLOT_ROWS,
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO change_slots (change_id, slot) SELECT DISTINCT change_id, slot FROM change_rows WHERE change_id = $1 ON CONFLICT DO NOTHING",
            change_id,
        )
    await connection.execute("ANALYZE change_rows")
    return rows


@dataclass(frozen=True, slots=True)
class After:
    """A row as it is to stand; `values` None: none is to stand there."""

    series_id: int
    at: int
    values: tuple[Any, ...] | None  #: in the order of ROW_COLUMNS; instants as datetimes


async def put_rows(connection: Any, change_id: int, rows: Sequence[After]) -> None:
    """Note rows of a change; what stands now is noted as what stood."""
    for start in range(0, len(rows), SLOT_ROWS):
        part = rows[start : start + SLOT_ROWS]
        await connection.executemany(
            f"INSERT INTO change_rows (change_id, series_id, timestamp, before, after) SELECT $1, $2, $3,"
            f" (SELECT {AS_ROW} FROM measurements m WHERE m.series_id = $2 AND m.timestamp = $3), $4::change_row",
            [(change_id, row.series_id, instant(row.at), row.values) for row in part],
        )


async def overlapping(connection: Any, change_id: int, *, later: bool) -> list[int]:
    """Changes that stand, and have a row in common with this one; of those made later only, where asked."""
    rows = await connection.fetch(
        "SELECT DISTINCT o.change_id FROM change_rows c JOIN change_rows o ON o.series_id = c.series_id AND o.timestamp = c.timestamp"
        " JOIN changes x ON x.change_id = o.change_id WHERE c.change_id = $1 AND c.swapped AND o.swapped AND o.change_id <> $1"
        " AND x.state IN ('promoting', 'promoted', 'rolling_back') AND (NOT $2 OR x.generation > (SELECT generation FROM changes WHERE change_id = $1))"
        " ORDER BY 1 LIMIT 20",
        change_id, later,
    )  # fmt: skip
    return [row[0] for row in rows]


async def discard(connection: Any, change: Change, *, actor: str, reason: str, at_us: int) -> Change:
    """Let a change go that was never carried out: its rows are deleted, its words stay.

    Raises:
        ChangeError: it was carried out.
    """
    made = await becomes(
        connection, change, State.DISCARDED, expected=(State.DERIVING, State.READY, State.ROLLED_BACK), event="discarded",
        data={"reason": reason}, actor=actor, at_us=at_us,
    )  # fmt: skip
    async with connection.transaction():
        for table in ("change_rows", "change_slots", "change_windows", "change_window_rows", "change_alarm_events", "change_alarms",
                      "shadow_rows", "shadow_alarms"):  # fmt: skip
            await connection.execute(f"DELETE FROM {table} WHERE change_id = $1", change.change_id)
    return made
