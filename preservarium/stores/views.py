"""What people look at: alarms, their histories and commands. Read only, paged, bounded in time. Devices are in `device_reads`.

A small pool of its own, so that a busy console cannot take connections from the sink, nor a busy sink from the console.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
import orjson

from preservarium.domain.commands.machine import OVER
from preservarium.domain.readings.address import canonical_address, spellings
from preservarium.errors import Retry, reason
from preservarium.settings import Postgres as PostgresSettings
from preservarium.stores.connections import Pool
from preservarium.stores.registry import SPELLED

#: One page for the list and one for the alarms at the same time; more viewers wait a few milliseconds.
CONNECTIONS_MAX: Final = 2
#: The page asks every two seconds and gives up on an answer after eight.
STATEMENT_TIMEOUT_S: Final = 4.0

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_WANTED: Final = """
FROM alarms a LEFT JOIN devices d USING (device_id)
WHERE ($1::boolean IS NULL OR (a.cleared_at IS NULL) = $1) AND (cardinality($2::text[]) = 0 OR a.device_id = ANY ($2)) AND ($3 = '' OR a.rule = $3)
  AND (cardinality($4::text[]) = 0 OR a.severity = ANY ($4))
  AND ($5 = '' OR a.device_id ILIKE $6 OR d.name ILIKE $6 OR a.rule ILIKE $6 OR a.message ILIKE $6 OR a.device_id = ANY ($7))
"""
_ALARMS: Final = f"""
SELECT a.alarm_id, a.device_id, d.name AS device_name, a.rule, a.component_type, a.pin_position, a.severity, a.state,
       a.occurred_at, a.detected_at, a.cleared_at, a.value, a.unit, a.threshold, a.message
{_WANTED} AND ($8::timestamptz IS NULL OR (a.occurred_at, a.alarm_id) < ($8, $9))
ORDER BY a.occurred_at DESC, a.alarm_id DESC LIMIT $10
"""
_ALARMS_COUNT: Final = f"SELECT count(*) {_WANTED}"
_STANDING: Final = """
SELECT a.alarm_id, a.device_id, d.name AS device_name, a.rule, a.component_type, a.pin_position, a.severity, a.state, a.occurred_at,
       a.detected_at, a.cleared_at, a.value, a.unit, a.threshold, a.message, a.active, a.transition, a.shelved_until
FROM active_alarms a LEFT JOIN devices d USING (device_id) ORDER BY a.occurred_at DESC LIMIT $1
"""
_HISTORY: Final = """
(SELECT 'transition' AS what, e.detected_at AS at, e.transition AS name, e.state, e.alarm_id, e.severity, e.occurred_at,
        e.value, e.detail ->> 'message' AS message, e.detail ->> 'actor' AS actor, e.detail ->> 'comment' AS comment, NULL AS reason,
        (e.detail ->> 'sequence')::int AS sequence
 FROM alarms a JOIN alarm_events e USING (alarm_id)
 WHERE a.device_id = ANY ($1) AND (a.rule, a.pin_position) = ($2, $3) AND a.generation = 0 ORDER BY e.detected_at DESC LIMIT $4)
UNION ALL
-- An action that made a transition is told by it; what remains is what was refused, or done to an alarm that was not raised.
(SELECT 'action', at, action, state, alarm_id, NULL, NULL, NULL, NULL, actor, comment, CASE outcome WHEN 'refused' THEN reason END, 0
 FROM alarm_operations WHERE device_id = ANY ($1) AND (rule, pin_position) = ($2, $3) AND (outcome = 'refused' OR alarm_id = '')
 ORDER BY at DESC LIMIT $4)
ORDER BY at DESC, sequence DESC LIMIT $4
"""
_COMMANDS: Final = """
SELECT command_id, device_id, command, state, reason, attempt, priority, requested_at, requested_by, idempotency_key, cause,
       expires_at, ended_at, updated_at, content::text AS content, confirm::text AS confirm
FROM device_commands
WHERE (cardinality($1::text[]) = 0 OR device_id = ANY ($1)) AND (cardinality($2::text[]) = 0 OR state = ANY($2)) AND ($3 = '' OR command_id = $3)
  AND ($4::timestamptz IS NULL OR (requested_at, command_id) < ($4, $5))
ORDER BY requested_at DESC, command_id DESC LIMIT $6
"""
# What is under way is a few rows of many, and has an index of its own.
_COMMANDS_OPEN: Final = _COMMANDS.replace("WHERE ", "WHERE ended_at IS NULL AND ")
_DOCUMENTS: Final = """
SELECT d.device_id, d.doc::text AS device, d.enabled, d.type, t.doc::text AS type_doc, t.parser
FROM devices d LEFT JOIN device_types t ON t.name = d.type WHERE d.device_id = ANY ($1)
"""
_COMMAND_EVENTS: Final = """
SELECT sequence, event, state, at, actor, reason, attempt FROM command_events WHERE command_id = $1 ORDER BY sequence LIMIT $2
"""


class Views:
    """Reads for the console. Connects on first use; may be used again after `close`.

    Args:
        settings: asked at each connect.
    """

    def __init__(self, settings: Callable[[], PostgresSettings]) -> None:
        # No connection is made here: the first query makes it.
        self._pool = Pool(
            lambda: settings().dsn,
            connections_max=lambda: CONNECTIONS_MAX,
            connect_timeout_s=lambda: settings().connect_timeout_s,
            command_timeout_s=lambda: STATEMENT_TIMEOUT_S,
            server_settings={
                "application_name": "preservarium-console",
                "default_transaction_read_only": "on",
                "timezone": "UTC",
            },
        )

    async def alarms(
        self,
        *,
        active: bool | None,
        before: tuple[int, str] | None,
        limit: int,
        device_id: str = "",
        rule: str = "",
        severities: Sequence[str] = (),
        q: str = "",
    ) -> dict[str, Any]:
        """Alarms, newest first.

        Args:
            active: True for those that are not cleared, False for cleared ones, None for all.
            before: (occurred_at in µs, alarm_id) of the last one of the page before.
            limit: most alarms.
            device_id: of this device; "" for all.
            rule: of this rule; "" for all.
            severities: of these; none for all.
            q: part of an address, a name, a rule or a message, any case; "" for all.

        Returns:
            `alarms`; `next`: `before` of the next page or None; `total`: alarms that are wanted. Instants in µs.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        instant, alarm_id = (_EPOCH + timedelta(microseconds=before[0]), before[1]) if before else (None, None)
        devices = await self._spelled(device_id)
        wanted = (active, devices, rule, [*severities], q, _containing(q), await self._spelled(q))
        rows = await self._fetch(_ALARMS, *wanted, instant, alarm_id, limit + 1)
        page = [_document(row) for row in rows[:limit]]
        total = await self._fetch(_ALARMS_COUNT, *wanted)
        last = page[-1] if len(rows) > limit else None
        return {
            "alarms": page,
            "next": (last["occurred_at"], last["alarm_id"]) if last else None,
            "total": total[0][0],
        }

    async def standing(self, limit: int) -> list[dict[str, Any]]:
        """Alarms that are not normal, newest first, as the database has them. Instants in µs.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        return [_document(row) for row in await self._fetch(_STANDING, limit)]

    async def alarm_history(self, *, device_id: str, rule: str, pin_position: str, limit: int) -> list[dict[str, Any]]:
        """Transitions of one alarm, over all its occurrences, and the actions that made none; newest first.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        devices = await self._spelled(device_id)
        return [_document(row) for row in await self._fetch(_HISTORY, devices, rule, pin_position, limit)]

    async def commands(
        self, *, device_id: str, states: Sequence[str], before: tuple[int, str] | None, limit: int
    ) -> dict[str, Any]:
        """`{commands, next}`: commands, newest first. Instants in µs.

        Args:
            device_id: of this device; "" for all.
            states: in these states; empty for all.
            before: (requested_at, command_id) of the last command of the page before.
            limit: most commands.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        at = _EPOCH + timedelta(microseconds=before[0]) if before else None
        last = before[1] if before else ""
        query = _COMMANDS_OPEN if states and not OVER & {*states} else _COMMANDS
        devices = await self._spelled(device_id)
        rows = await self._fetch(query, devices, list(states), "", at, last, limit + 1)
        page = [_command(row) for row in rows[:limit]]
        following = (page[-1]["requested_at"], page[-1]["command_id"]) if len(rows) > limit else None
        return {"commands": page, "next": following}

    async def command(self, command_id: str, *, limit: int) -> dict[str, Any] | None:
        """One command with its events, oldest first; None where the database does not know it (yet).

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        rows = await self._fetch(_COMMANDS, [], [], command_id, None, "", 1)
        if not rows:
            return None
        events = [_document(row) for row in await self._fetch(_COMMAND_EVENTS, command_id, limit)]
        return {**_command(rows[0]), "events": events}

    async def registered(self, device_id: str) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """Documents of a device and of its type, as the registry has them; None where the device is not registered.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        rows = await self._fetch(_DOCUMENTS, await self._spelled(device_id))
        if not rows:
            return None
        row = rows[0]
        known = {name: row[name] for name in ("device_id", "type", "enabled")}
        device = {**orjson.loads(row["device"]), **known}
        return device, {**orjson.loads(row["type_doc"]), "parser": row["parser"]} if row["type_doc"] else None

    async def _spelled(self, device_id: str) -> list[str]:
        """How a device may be written in the tables that people name by any spelling of its address; none where none is named."""
        usual = spellings(device_id) if device_id else []
        if len(usual) < 2:
            return usual
        return [row["device_id"] for row in await self._fetch(SPELLED, canonical_address(device_id))] or usual

    async def close(self) -> None:
        """Give the connections back."""
        # Not close(): that waits for a query that may hang.
        self._pool.terminate()

    async def _fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        try:
            async with self._pool.acquire() as connection:
                rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
                return rows
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as e:
            message = f"PostgreSQL is not migrated: {e}"
            raise Retry(message) from e
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
            # OSError includes TimeoutError. A pool may hand out a connection that died; the next call gets another.
            message = f"PostgreSQL: {reason(e)}"
            raise Retry(message) from e


def _containing(text: str) -> str:
    """A LIKE pattern for texts that contain this one literally."""
    escaped = text.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
    return f"%{escaped}%"


def _document(row: asyncpg.Record) -> dict[str, Any]:
    return {key: _us(value) if isinstance(value, datetime) else value for key, value in row.items()}


def _command(row: asyncpg.Record) -> dict[str, Any]:
    found = _document(row)
    return {**found, "content": orjson.loads(found["content"]), "confirm": orjson.loads(found["confirm"])}


def _us(instant: datetime) -> int:
    return (instant - _EPOCH) // timedelta(microseconds=1)
