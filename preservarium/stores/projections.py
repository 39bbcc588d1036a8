"""What is read day by day, made anew of the events that it follows from, and compared with what stands.

| projection | follows from | in |
|---|---|---|
| registry | events of the streams of documents | the tables of the registry |
| actions | events of `alarm/…` | `alarm_operations` |
| alarms | `alarm_events` | `alarms` |
| commands | events of `command/…` | `device_commands` |

Tables are made anew in temporary ones of the same names, by the statements that the sink uses: PostgreSQL looks there first. Nothing that
stands is touched unless that is asked for. Functions work on a connection that the caller has, outside a transaction; instants are µs, UTC.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from preservarium.domain import folds
from preservarium.domain.registry import changes
from preservarium.domain.registry.documents import SECTIONS
from preservarium.stores import events, registry
from preservarium.stores.event_tables import EventTable
from preservarium.stores.journal import ALARM_OPERATIONS
from preservarium.stores.tables import ALARM_EVENTS, COMMAND_EVENTS

NAMES: Final = ("registry", "actions", "alarms", "commands")
#: Events that are taken at once.
EVENTS_AT_ONCE: Final = 1_000
#: Differences that are named; the rest is counted, and mended as well.
NAMED_MAX: Final = 100
#: The stream that says what was mended.
STREAM: Final = "projection/mended"

#: (projection, events taken, events)
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Rebuilt:
    """A projection that was made anew."""

    name: str
    events: int = 0  #: that it follows from
    rows: int = 0  #: that it makes
    different: int = 0  #: rows that stand, and say otherwise
    missing: int = 0  #: rows that do not stand
    extra: int = 0  #: rows that stand, and follow from no event
    untold: int = 0  #: rows of a time when the event store was not told of such, so that nothing can be said
    named: list[str] = field(default_factory=list)  #: a line each, at most `NAMED_MAX`
    mended: int = 0

    @property
    def equal(self) -> bool:
        """Whether what stands is what the events say."""
        return not (self.different or self.missing or self.extra)

    def name_one(self, text: str) -> None:
        """Note one difference."""
        if len(self.named) < NAMED_MAX:
            self.named.append(text)


@dataclass(frozen=True, slots=True)
class Mending:
    """Who has what differs written anew, and why."""

    actor: str
    reason: str
    at_us: int


async def rebuild(
    connection: Any, names: Sequence[str] = NAMES, *, mend: Mending | None = None, progress: Progress = lambda *_: None
) -> list[Rebuilt]:
    """Make projections anew and compare them with what stands.

    Args:
        connection: of asyncpg; no transaction is open.
        names: of `NAMES`.
        mend: write rows that differ or are missing; extra ones are left for people to look at. None: only compare.
        progress: told how far it is.

    Raises:
        asyncpg.SerializationError: somebody wrote the same rows meanwhile; nothing of that projection was mended.
        ValueError, KeyError, TypeError: events do not fit together; `events.verify` says which.
    """
    found = []
    for name in names:
        work = _registry if name == "registry" else _table
        found.append(await work(connection, name, mend, progress))
    return found


async def _note(connection: Any, rebuilt: Rebuilt, mend: Mending) -> None:
    version = (await events.heads(connection, [STREAM])).get(STREAM, (0, b""))[0]
    data = {"projection": rebuilt.name, "reason": mend.reason, "rows": rebuilt.mended, "differences": rebuilt.named}
    new = events.NewEvent(STREAM, version, "mended", data)
    await events.append(connection, [new], actor=mend.actor, at_us=mend.at_us)


# --- the registry


async def _registry(connection: Any, name: str, mend: Mending | None, progress: Progress) -> Rebuilt:
    rebuilt = Rebuilt(name)
    if mend is None:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await _compare_registry(connection, rebuilt, progress)
        return rebuilt
    # Not repeatable: what is seen must be what stood when the lock was taken, which a first statement would fix before.
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = '{registry.COMMIT_LOCK_WAIT_S}s'")
        await connection.execute("SELECT pg_advisory_xact_lock($1)", registry.COMMIT_LOCK_KEY)
        wrong, versions = await _compare_registry(connection, rebuilt, progress)
        if wrong:
            await registry.put(connection, wrong, versions, actor=mend.actor, at_us=mend.at_us)
            rebuilt.mended = len(wrong)
            await _note(connection, rebuilt, mend)
    return rebuilt


async def _compare_registry(
    connection: Any, rebuilt: Rebuilt, progress: Progress
) -> tuple[list[registry.Change], dict[str, int]]:
    """Count and name differences; gives what would put them right, and the versions to note."""
    current = {
        stream: (kind, stored)
        for kind, documents in (await registry.load(connection)).items()
        for stream, stored in documents.items()
    }
    wrong: list[registry.Change] = []
    versions: dict[str, int] = {}
    seen: set[str] = set()
    async for stream, state, version in _documents(connection, rebuilt, progress):
        seen.add(stream)
        kind, stored = current.get(stream, (folds.kind_of(stream), None))
        rebuilt.rows += state is not None
        before = None if stored is None else stored.document
        if stored is None and state is None:
            continue
        if stored is not None and state is not None:
            if changes.same(stored.document, state) and stored.version == version:
                continue
            rebuilt.different += 1
            fields = sorted(
                k for k in {*state, *stored.document} if not changes.same(state.get(k), stored.document.get(k))
            )
            what = ", ".join(fields) or f"version {stored.version} instead of {version}"
            rebuilt.name_one(f"{stream}: differs in {what}")
        elif stored is None:
            rebuilt.missing += 1
            rebuilt.name_one(f"{stream}: does not stand, and its events say it does")
        else:
            rebuilt.extra += 1
            rebuilt.name_one(f"{stream}: stands, and its events say that it was removed")
        action: registry.Action = "create" if before is None else "remove" if state is None else "change"
        if action != "remove":
            wrong.append(registry.Change(kind, stream, action, before, state, version, "", {}))
            versions[stream] = version
    for stream in current.keys() - seen:
        rebuilt.extra += 1
        rebuilt.name_one(f"{stream}: stands, and no event says so")
    return wrong, versions


async def _documents(
    connection: Any, rebuilt: Rebuilt, progress: Progress
) -> AsyncIterator[tuple[str, dict[str, Any] | None, int]]:
    """(stream, document, version) of every stream of documents, folded from its first event on: snapshots are not believed."""
    kinds = [f"{kind}/%" for kind in SECTIONS.values()]
    where = "FROM event_store WHERE stream_id LIKE ANY ($1)"
    total = await connection.fetchval(f"SELECT count(*) {where}", kinds)
    stream, state, version = "", None, 0
    async for row in connection.cursor(
        f"SELECT stream_id, version, type, data {where} ORDER BY stream_id, version", kinds, prefetch=EVENTS_AT_ONCE
    ):
        if row["stream_id"] != stream:
            if stream:
                yield stream, state, version
            stream, state = row["stream_id"], None
        state = folds.fold(stream, state, [(row["type"], orjson.loads(row["data"]))])
        version = row["version"]
        rebuilt.events += 1
        if rebuilt.events % EVENTS_AT_ONCE == 0:
            progress(rebuilt.name, rebuilt.events, total)
    if stream:
        yield stream, state, version


# --- tables


@dataclass(frozen=True, slots=True)
class _Table:
    """How a table is made anew."""

    declared: EventTable  #: whose rows make it, or are it
    table: str
    key: str
    events: str  #: the events, as `detail`, in the order in which they were stored
    ignored: frozenset[str]  #: columns that say when it was written
    #: a condition on a row that stands, `live`, under which nothing can be said where no event makes it
    untold: str = "false"
    #: a condition on a row that was made, `made`, under which it need not stand: it may have been deleted for its age
    pruned: str = "false"


_STORED: Final = "SELECT data AS detail FROM event_store WHERE stream_id LIKE '{kind}/%' ORDER BY stream_id, version"
_TABLES: Final[Mapping[str, _Table]] = {
    "actions": _Table(
        ALARM_OPERATIONS, "alarm_operations", "action_id", _STORED.format(kind="alarm"), frozenset({"stored_at"})
    ),
    "alarms": _Table(
        ALARM_EVENTS,
        "alarms",
        "alarm_id",
        "SELECT detail FROM {schema}.alarm_events"
        " ORDER BY alarm_id, (detail ->> 'sequence')::bigint NULLS FIRST, detected_at, stored_at",
        frozenset(),
    ),
    "commands": _Table(
        COMMAND_EVENTS,
        "device_commands",
        "command_id",
        _STORED.format(kind="command"),
        frozenset(),
        untold="NOT EXISTS (SELECT FROM event_store e WHERE e.stream_id = 'command/' || live.command_id)",
        pruned="NOT EXISTS (SELECT FROM {schema}.command_events e WHERE e.command_id = made.command_id)",
    ),
}


async def _table(connection: Any, name: str, mend: Mending | None, progress: Progress) -> Rebuilt:
    rebuilt, table = Rebuilt(name), _TABLES[name]
    transaction = connection.transaction(isolation="repeatable_read")
    await transaction.start()
    try:
        await _make(connection, rebuilt, table, progress)
        schema = await _schema(connection, "series")
        await _compare(connection, rebuilt, table, schema)
        if mend is not None and rebuilt.different + rebuilt.missing:
            rebuilt.mended = await _mend(connection, table, schema)
            await _note(connection, rebuilt, mend)
    except BaseException:
        await transaction.rollback()
        raise
    if rebuilt.mended:
        # What is temporary goes with the transaction, one way or the other.
        await transaction.commit()
    else:
        await transaction.rollback()
    return rebuilt


async def _schema(connection: Any, table: str) -> str:
    """The schema of our tables, quoted."""
    found: str = await connection.fetchval(
        "SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = $1::text::regclass", table
    )
    return found


async def _make(connection: Any, rebuilt: Rebuilt, table: _Table, progress: Progress) -> None:
    """Fill temporary tables with what the events say."""
    schema = await _schema(connection, table.table)
    for made in dict.fromkeys((table.declared.table, table.table)):
        await connection.execute(
            f"CREATE TEMP TABLE {made} (LIKE {schema}.{made} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES) ON COMMIT DROP"
        )
    declared, source = table.declared, table.events.format(schema=schema)
    total = await connection.fetchval(f"SELECT count(*) FROM ({source}) AS all_of_them")
    cursor = await connection.cursor(source)
    while rows := await cursor.fetch(EVENTS_AT_ONCE):
        found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for row in rows:
            values = declared.row(orjson.loads(row["detail"]))
            found.setdefault(tuple(values[n] for n in declared.key_at), values)
        await connection.execute(declared.insert, *map(list, zip(*found.values(), strict=True)))
        if declared.then:
            await connection.execute(declared.then, *map(list, zip(*found, strict=True)))
        rebuilt.events += len(rows)
        progress(rebuilt.name, rebuilt.events, total)


async def _columns(connection: Any, table: _Table, schema: str) -> list[str]:
    rows = await connection.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        f"{schema}.{table.table}",
    )
    return [row["attname"] for row in rows if row["attname"] not in table.ignored]


def _differing(columns: Sequence[str]) -> str:
    made, live = (", ".join(f"{side}.{column}" for column in columns) for side in ("made", "live"))
    return f"({made}) IS DISTINCT FROM ({live})"


async def _compare(connection: Any, rebuilt: Rebuilt, table: _Table, schema: str) -> None:
    columns = await _columns(connection, table, schema)
    untold, pruned = (text.format(schema=schema) for text in (table.untold, table.pruned))
    rebuilt.rows = await connection.fetchval(f"SELECT count(*) FROM pg_temp.{table.table}")
    rows = await connection.fetch(f"""
        SELECT kind, count(*) AS n, (array_agg(key ORDER BY key))[1:{NAMED_MAX}] AS keys FROM (
          SELECT coalesce(made.{table.key}, live.{table.key}) AS key,
                 CASE WHEN live.{table.key} IS NULL THEN CASE WHEN {pruned} THEN '' ELSE 'missing' END
                      WHEN made.{table.key} IS NULL THEN CASE WHEN {untold} THEN 'untold' ELSE 'extra' END
                      WHEN {_differing(columns)} THEN 'different' ELSE '' END AS kind
          FROM pg_temp.{table.table} made FULL JOIN {schema}.{table.table} live ON made.{table.key} = live.{table.key}) AS compared
        WHERE kind <> '' GROUP BY kind ORDER BY kind""")
    words = {
        "different": "says otherwise than its events",
        "missing": "does not stand, and its events say it does",
        "extra": "stands, and no event says so",
    }
    for row in rows:
        setattr(rebuilt, row["kind"], row["n"])
        if row["kind"] in words:
            for key in row["keys"]:
                rebuilt.name_one(f"{table.table} {key}: {words[row['kind']]}")


async def _mend(connection: Any, table: _Table, schema: str) -> int:
    columns = await _columns(connection, table, schema)
    pruned = table.pruned.format(schema=schema)
    names, sets = ", ".join(columns), ", ".join(f"{c} = excluded.{c}" for c in columns if c != table.key)
    status = await connection.execute(f"""
        INSERT INTO {schema}.{table.table} AS live ({names})
        SELECT {", ".join(f"made.{c}" for c in columns)} FROM pg_temp.{table.table} made
        LEFT JOIN {schema}.{table.table} AS stands USING ({table.key})
        WHERE stands.{table.key} IS NOT NULL OR NOT ({pruned})
        ON CONFLICT ({table.key}) DO UPDATE SET {sets}
        WHERE ({", ".join(f"live.{c}" for c in columns)}) IS DISTINCT FROM ({", ".join(f"excluded.{c}" for c in columns)})""")
    return int(status.rsplit(" ", 1)[1])
