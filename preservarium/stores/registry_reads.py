"""What people look up in the registry: lists of documents by kind, one document with its versions, parsers to try.

Read only, paged, bounded in time, on a connection of its own, so that a slow look keeps no list of devices waiting.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
import orjson

from preservarium.domain.registry import changes
from preservarium.domain.registry.documents import SECTIONS
from preservarium.errors import Retry, reason
from preservarium.settings import Settings
from preservarium.stores import events
from preservarium.stores import registry as store
from preservarium.stores.connections import Pool

CONNECTIONS_MAX: Final = 2
STATEMENT_TIMEOUT_S: Final = 4.0
#: Versions of one document that are shown, the newest ones.
VERSIONS_MAX: Final = 100

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

#: Kind -> table, key, and what a list shows besides.
_LISTS: Final[Mapping[str, tuple[str, str, str]]] = {
    "manufacturer": ("manufacturers", "name", "NULL::text AS about, NULL::text AS status"),
    "datatype": ("datatypes", "name", "concat_ws(' ', kind, unit) AS about, NULL::text AS status"),
    "parser": ("parsers", "name", "concat_ws(' ', kind, 'version ' || parser_version) AS about, status"),
    "recipient": ("recipients", "name", "channel AS about, NULL::text AS status"),
    "rule": ("alarm_rules", "name", "concat_ws(' ', severity, component_type) AS about, CASE WHEN enabled THEN 'on' ELSE 'off' END AS status"),
    "type": ("device_types", "name", "concat_ws(', ', manufacturer, 'decoded by ' || parser) AS about, NULL::text AS status"),
    "experiment": ("experiments", "experiment_id", "NULL::text AS about, NULL::text AS status"),
    "device": ("devices", "device_id", "concat_ws(', ', name, type) AS about, CASE WHEN enabled THEN 'on' ELSE 'off' END AS status"),
}  # fmt: skip
KINDS: Final = tuple(SECTIONS.values())
#: Of a parser, a list has the version in force, else the newest.
_NEWEST: Final = "NOT EXISTS (SELECT FROM parsers p WHERE p.name = x.name AND p.parser_version <> x.parser_version AND (p.status = 'active' OR (x.status <> 'active' AND p.parser_version > x.parser_version)))"  # fmt: skip


class RegistryReads:
    """Reads of the registry. Connects on first use.

    Args:
        settings: asked at each connect.
    """

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._pool = Pool(
            dsn=lambda: settings().postgres.dsn,
            connections_max=lambda: CONNECTIONS_MAX,
            connect_timeout_s=lambda: settings().postgres.connect_timeout_s,
            command_timeout_s=lambda: STATEMENT_TIMEOUT_S,
            server_settings={
                "application_name": "preservarium-registry-pages",
                "default_transaction_read_only": "on",
                "timezone": "UTC",
            },
        )

    async def counts(self) -> dict[str, int]:
        """How many documents there are of each kind; of parsers, names.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        parts = ", ".join(
            f"(SELECT count({f'DISTINCT {key}' if kind == 'parser' else '*'}) FROM {table}) AS {kind}"
            for kind, (table, key, _) in _LISTS.items()
        )
        row = (await self._fetch(f"SELECT {parts}"))[0]
        return {kind: row[kind] for kind in KINDS}

    async def listed(self, kind: str, *, q: str, after: str, limit: int) -> dict[str, Any]:
        """Documents of a kind in the order of their names, of which name or description contains `q`, after one of them.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        table, key, more = _LISTS[kind]
        newest = _NEWEST if kind == "parser" else "true"
        escaped = q.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
        rows = await self._fetch(
            f"SELECT {key} AS name, {more}, rev, updated_at, updated_by FROM {table} x WHERE {newest} AND {key} > $1"
            f" AND ($2 = '' OR {key} ILIKE $3 OR doc ->> 'name' ILIKE $3 OR doc ->> 'description' ILIKE $3) ORDER BY {key} LIMIT $4",
            after, q, f"%{escaped}%", limit + 1,
        )  # fmt: skip
        page = [_shown(row) for row in rows[:limit]]
        return {"documents": page, "next": page[-1]["name"] if len(rows) > limit else None}

    async def document(self, kind: str, name: str) -> dict[str, Any] | None:
        """One document with what the registry knows of it; of a parser all versions. None where there is none.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        table, key, _ = _LISTS[kind]
        order = "ORDER BY (status = 'active') DESC, parser_version DESC" if kind == "parser" else ""
        rows = await self._fetch(
            f"SELECT doc, rev, version, updated_at, updated_by FROM {table} WHERE {key} = $1 {order}", name
        )
        if not rows:
            return None
        first = rows[0]
        document = orjson.loads(first["doc"])
        found = {
            "kind": kind,
            "name": name,
            "stream": store.stream_of(kind, document),
            "document": document,
            "rev": first["rev"],
            "version": first["version"],
            "updated_at": _us(first["updated_at"]),
            "updated_by": first["updated_by"],
        }
        if kind == "parser":
            found["parser_versions"] = [
                {
                    "version": (doc := orjson.loads(row["doc"]))["version"],
                    "status": doc["status"],
                    "stream": store.stream_of(kind, doc),
                    "updated_at": _us(row["updated_at"]),
                    "updated_by": row["updated_by"],
                    "document": doc,
                }
                for row in sorted(rows, key=lambda r: r["rev"], reverse=True)[:VERSIONS_MAX]
            ]
        return found

    async def versions(self, stream: str) -> list[dict[str, Any]]:
        """A document as it was after each of its events, newest first: `{version, at, actor, event, document}`; None: it was removed.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        try:
            async with self._pool.acquire() as connection:
                found = await events.read(connection, stream)
                states: list[dict[str, Any]] = []
                state: dict[str, Any] | None = None
                for event in found:
                    state = changes.fold(state, [(event.type, event.data)])
                    states.append(
                        {"version": event.version, "at": event.at_us, "actor": event.actor, "event": event.type, "document": state}
                    )  # fmt: skip
                return states[::-1][:VERSIONS_MAX]
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
            message = f"PostgreSQL: {reason(e)}"
            raise Retry(message) from e

    async def parser(self, name: str, version: int | None = None) -> dict[str, Any] | None:
        """A parser in force, or one of its versions.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        rows = await self._fetch(
            "SELECT doc, rev FROM parsers WHERE name = $1 AND ($2::int IS NULL AND status = 'active' OR parser_version = $2)",
            name, version,
        )  # fmt: skip
        return {**orjson.loads(rows[0]["doc"]), "rev": rows[0]["rev"]} if rows else None

    async def matching(self) -> dict[str, list[dict[str, Any]]]:
        """Parsers in force, device types and datatypes: what payloads are tried with.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        wanted = {"parser": "parsers WHERE status = 'active'", "type": "device_types", "datatype": "datatypes"}
        return {
            kind: [orjson.loads(row["doc"]) for row in await self._fetch(f"SELECT doc FROM {table}")]
            for kind, table in wanted.items()
        }

    async def registered(self, device_ids: list[str]) -> set[str]:
        """Those of the addresses that are registered, in the spelling that they were given in.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        try:
            async with self._pool.acquire() as connection:
                return {*await store.composite(connection, device_ids)}
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
            message = f"PostgreSQL: {reason(e)}"
            raise Retry(message) from e

    async def export(self) -> dict[str, list[dict[str, Any]]]:
        """Everything, as a file says it.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        try:
            async with self._pool.acquire() as connection:
                return await store.export(connection)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
            message = f"PostgreSQL: {reason(e)}"
            raise Retry(message) from e

    async def close(self) -> None:
        """Give the connections back."""
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
            message = f"PostgreSQL: {reason(e)}"
            raise Retry(message) from e


def _shown(row: asyncpg.Record) -> dict[str, Any]:
    return {key: _us(value) if isinstance(value, datetime) else value for key, value in row.items()}


def _us(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)
