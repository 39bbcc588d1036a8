"""What people and programs did at the door, in the event store: who logged in, who was refused, who there is, who closed a fuse.

The stream is `people/NAME`; of names that nobody has `people/?`, of the file of users `people`. Instants are µs since the epoch, UTC.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import asyncpg
import orjson

from preservarium.errors import Retry, reason
from preservarium.settings import Postgres as PostgresSettings
from preservarium.stores import events
from preservarium.stores.connections import Pool

PREFIX: Final = "people"
#: Of names that nobody has. Which they were is not kept: some are passwords in the wrong field.
UNKNOWN: Final = "?"
#: Writers of one stream that meet: the workers that all read a new file of users.
TRIES_MAX: Final = 5
STATEMENT_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Done:
    """Something that was done."""

    id: str  #: random: the same again is stored once
    event: str  #: logged_in, login_refused, logged_out, users_changed, fuse_closed
    name: str  #: of whom; UNKNOWN, or "" for the file
    at_us: int
    data: Mapping[str, Any]

    @property
    def stream(self) -> str:
        """Where it stands."""
        return f"{PREFIX}/{self.name}" if self.name else PREFIX


class PeopleLog:
    """Writes and reads it. Connects on first use; may be used again after `close`."""

    def __init__(self, settings: Callable[[], PostgresSettings]) -> None:
        self._pool = Pool(
            lambda: settings().dsn,
            connections_max=lambda: 1,
            connect_timeout_s=lambda: settings().connect_timeout_s,
            command_timeout_s=lambda: STATEMENT_TIMEOUT_S,
            server_settings={"application_name": "preservarium-people", "timezone": "UTC"},
        )

    async def close(self) -> None:
        """Give the connection back."""
        self._pool.terminate()

    async def append(self, done: Done) -> bool:
        """Store it once, however often it is called with the same; whether it was new.

        An event of the file that says what the last one said is not new.

        Raises:
            Retry: PostgreSQL cannot be asked, or others wrote the same stream again and again.
        """
        try:
            for _ in range(TRIES_MAX):
                try:
                    async with self._pool.acquire() as connection, connection.transaction():
                        return await self._append(connection, done)
                except events.ConflictError:
                    continue
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
            message = f"PostgreSQL: {reason(e)}"
            raise Retry(message) from e
        message = f"{done.stream} is written by others all the time"
        raise Retry(message)

    async def _append(self, connection: Any, done: Done) -> bool:
        row = await connection.fetchrow(
            "SELECT version, data::text AS data FROM event_store WHERE stream_id = $1 ORDER BY version DESC LIMIT 1",
            done.stream,
        )
        # A commit whose answer was lost is found here: of one worker the events of a stream come in turn. Of several, another's
        # may stand behind it.
        if row is not None:
            last = orjson.loads(row["data"])
            if not done.name and last.get("digest") == done.data.get("digest"):
                return False
            if last.get("id") == done.id or await connection.fetchval(
                "SELECT true FROM event_store WHERE stream_id = $1 AND version > $2 AND data ->> 'id' = $3 LIMIT 1",
                done.stream, row["version"] - TRIES_MAX, done.id,
            ):  # fmt: skip
                return False
        event = events.NewEvent(done.stream, row["version"] if row else 0, done.event, {"id": done.id, **done.data})
        await events.append(connection, [event], actor=done.name or "preservarium", at_us=done.at_us)
        return True

    async def newest(self, *, before: int | None, limit: int, name: str = "") -> list[dict[str, Any]]:
        """What was done, newest first.

        Args:
            before: `position` of the last one of the page before.
            limit: most events.
            name: of this name alone; "" for all.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        try:
            async with self._pool.acquire() as connection:
                rows = await connection.fetch(
                    "SELECT position, stream_id, type, data::text AS data, at FROM event_store "
                    "WHERE (stream_id = 'people' AND $3 = '' OR starts_with(stream_id, 'people/')) AND ($3 = '' OR stream_id = 'people/' || $3) "
                    "AND ($1::bigint IS NULL OR position < $1) ORDER BY position DESC LIMIT $2",
                    before, limit, name,
                )  # fmt: skip
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
            message = f"PostgreSQL: {reason(e)}"
            raise Retry(message) from e
        return [_document(row) for row in rows]


def _document(row: Any) -> dict[str, Any]:
    data = orjson.loads(row["data"])
    data.pop("id", None)
    name = row["stream_id"].partition("/")[2]
    return {
        "position": row["position"],
        "event": row["type"],
        "name": name,
        "at": events.microseconds(row["at"]),
        "detail": data,
    }
