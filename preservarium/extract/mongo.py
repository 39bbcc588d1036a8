"""Collections of a MongoDB replica set or sharded cluster, by change streams.

A stream is opened before the first reading of a collection, so that nothing is missed in between; its resume token is the
watermark, recorded with each step. An update is told with the document as it is when the stream looks it up
(`updateLookup`), which may be newer than the change: the last event of a document always has its last state. When the server
no longer has the place of a token (its log is limited), or the collection was dropped or renamed, everything is read once
more, and all keys are compared.

Needs the extra `mongodb`, MongoDB 4.2 or newer, and a database in the URL.

The tests run it against a server that speaks the protocol and has change streams, which is not MongoDB's own: none can be
had where they run.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final

import orjson
import structlog

from preservarium.extract.named import NamedTables, SourceError
from preservarium.extract.source import (
    FIELDS,
    KEYS,
    STEP_ROWS,
    Change,
    Position,
    Step,
    Table,
    Version,
    Woken,
)
from preservarium.settings import Settings

log = structlog.get_logger(__name__)

#: The server holds a question for news so long, and the last one of a look finds nothing: four cheap questions a second
#: while nothing happens, and a change is on its way in twice this time.
AWAIT_MS: Final = 250
CONNECT_MS: Final = 10_000
#: The server cannot go on from a token (MongoDB, error codes): ChangeStreamFatalError, ChangeStreamHistoryLost,
#: InvalidResumeToken.
LOST_CODES: Final = frozenset({280, 286, 260})
#: Change streams are for replica sets: CommandNotSupported and the older Location40573.
NO_STREAM_CODES: Final = frozenset({115, 40573})
_ENDED: Final = frozenset({"drop", "rename", "dropDatabase", "invalidate"})


class MongoSource(NamedTables):
    """A database in MongoDB. See preservarium/extract/source.py."""

    def __init__(self, settings: Callable[[], Settings], *, client: Callable[..., Any] | None = None) -> None:
        super().__init__(settings)
        self._make = client
        self._client: Any = None
        self._database: Any = None
        self._columns: dict[Table, dict[str, str]] = {}
        self._streams: dict[Table, Any] = {}
        self._waiting: dict[Table, Any] = {}  #: a change that `wait` took from a stream
        self._compare = False
        self._now_us = 0

    async def open(self) -> None:
        """See `Source`."""
        make = self._make
        if make is None:
            try:
                from pymongo import AsyncMongoClient
            except ImportError as e:
                message = "MongoDB needs the extra: pip install 'preservarium[mongodb]'"
                raise SourceError(message) from e
            make = AsyncMongoClient
        s = self._settings().extract
        self._streams, self._waiting, self._compare = {}, {}, False
        from pymongo.errors import ConfigurationError

        self._client = make(
            s.dsn,
            tz_aware=True,
            serverSelectionTimeoutMS=CONNECT_MS,
            connectTimeoutMS=CONNECT_MS,
            appname="preservarium-extract",
        )
        try:
            self._database = self._client.get_default_database()
        except ConfigurationError as e:
            message = "the URL names no database: mongodb://host/database"
            raise SourceError(message) from e
        hello = await self._client.admin.command("hello")
        if "setName" not in hello and hello.get("msg") != "isdbgrid":
            message = "change streams need a replica set; a single server becomes one with --replSet and rs.initiate()"
            raise SourceError(message)
        for table in self.tables:
            given = self._mapped(table)
            if unknown := given.keys() - {"id", "updated_at", *FIELDS[table]}:
                message = f"there is no field {', '.join(sorted(unknown))} of {table}"
                raise SourceError(message)
            self._columns[table] = {"id": "_id", "updated_at": "updated_at"} | {f: f for f in FIELDS[table]} | given

    def _collection(self, table: Table) -> Any:
        return self._database[self._name(table)]

    async def close(self) -> None:
        """See `Source`."""
        for stream in self._streams.values():
            await stream.close()
        self._streams = {}
        if self._client is not None:
            await self._client.close()
            self._client = None

    # --- reading

    async def read(self, table: Table, position: Position | None) -> AsyncIterator[Step]:
        """See `Source`."""
        from bson import json_util
        from pymongo.errors import OperationFailure

        try:
            token = position.get("token") if position else None
            if table not in self._streams:
                self._streams[table] = await self._collection(table).watch(
                    full_document="updateLookup",
                    resume_after=None if token is None else json_util.loads(token),
                    max_await_time_ms=AWAIT_MS,
                    batch_size=STEP_ROWS,
                )
            stream = self._streams[table]
            if token is None or (position and "after" in position):
                if token is None:
                    # The server gives a token for the beginning of the stream with its first, empty answer.
                    self._waiting[table] = await stream.try_next() if stream.resume_token is None else None
                    token = json_util.dumps(stream.resume_token)
                    if self._waiting[table] is not None:
                        # That change is read with the collection, and once more after it.
                        self._waiting[table] = None
                after = json_util.loads(position["after"]) if position and "after" in position else None
                await self.now_us()
                async for step in self._snapshot(table, after, token):
                    yield step
                yield Step(position={"token": token})
            async for step in self._changes(table, stream):
                yield step
        except OperationFailure as e:
            await self._drop(table)
            if e.code in NO_STREAM_CODES:
                message = f"the server has no change streams: {e}"
                raise SourceError(message) from e
            if e.code not in LOST_CODES:
                raise
            log.warning("extract_stream_lost", table=table, error=str(e), action="everything is read once more")
            self._compare = True
            yield Step(position={"again": True})

    async def _snapshot(self, table: Table, after: Any, token: str) -> AsyncIterator[Step]:
        from bson import json_util

        cursor = self._collection(table).find({} if after is None else {"_id": {"$gt": after}}).sort("_id", 1)
        page: list[Any] = []
        async for document in cursor.batch_size(STEP_ROWS):
            page.append(document)
            if len(page) == STEP_ROWS:
                at = json_util.dumps(page[-1]["_id"])
                yield Step(
                    [self._change(table, d, None) for d in page],
                    position={"token": token, "after": at},
                    observed_us=self._now_us,
                )
                page = []
        if page:
            at = json_util.dumps(page[-1]["_id"])
            yield Step(
                [self._change(table, d, None) for d in page],
                position={"token": token, "after": at},
                observed_us=self._now_us,
            )

    async def _changes(self, table: Table, stream: Any) -> AsyncIterator[Step]:
        from bson import json_util

        while True:
            changes: dict[str, Change] = {}
            gone: dict[str, None] = {}
            ended = False
            seen = 0
            while seen < STEP_ROWS and not ended:
                event = self._waiting.pop(table, None) or await stream.try_next()
                if event is None:
                    break
                seen += 1
                if event["operationType"] in _ENDED:
                    ended = True
                    continue
                id = _text(event["documentKey"]["_id"])
                changes.pop(id, None)
                gone.pop(id, None)
                if event["operationType"] == "delete":
                    gone[id] = None
                elif (document := event.get("fullDocument")) is not None:
                    # Without one the document has gone since, and its deletion follows.
                    changes[id] = self._change(table, document, event["clusterTime"])
            if seen:
                position = {"again": True} if ended else {"token": json_util.dumps(stream.resume_token)}
                yield Step(list(changes.values()), list(gone), position, await self.now_us())
            if ended:
                log.warning("extract_collection_ended", table=table, action="everything is read once more")
                self._compare = True
                await self._drop(table)
            if ended or seen < STEP_ROWS:
                return

    async def _drop(self, table: Table) -> None:
        self._waiting.pop(table, None)
        stream = self._streams.pop(table, None)
        if stream is not None:
            await stream.close()

    def _change(self, table: Table, document: dict[str, Any], at: Any) -> Change:
        """A document as a change; `at` is the cluster time, None where it was read from the collection."""
        columns = self._columns[table]
        fields = {f: _value(document[columns[f]]) for f in FIELDS[table] if document.get(columns[f]) is not None}
        # Absent is not the same as null for what tells of a field that was emptied.
        fields |= {f: None for f in FIELDS[table] if columns[f] in document and f not in fields}
        fields.setdefault(KEYS[table], None)
        changed = _value(document.get(columns["updated_at"]))
        # Whether it is the same is seen from what it says: writers need not move `updated_at`, and a document that is read
        # from the collection has no place in the log.
        version = changed if type(changed) is int else 0, _digest(fields)
        # By the log's time, and not by what writers say: a stream tells changes in the order in which they happened.
        order = (self._now_us, 0) if at is None else (at.time * 1_000_000, at.time << 32 | at.inc)
        return Change(_text(document["_id"]), version, order, fields)

    async def now_us(self) -> int:
        """See `Source`."""
        hello = await self._client.admin.command("hello")
        self._now_us = _value(hello.get("localTime")) or time.time_ns() // 1_000
        return self._now_us

    async def versions(self, table: Table) -> AsyncIterator[list[tuple[str, Version | None]]]:
        """See `Source`. A stream misses nothing, so only which documents there are is compared."""
        page: list[tuple[str, Version | None]] = []
        async for document in self._collection(table).find({}, {"_id": 1}).batch_size(STEP_ROWS):
            page.append((_text(document["_id"]), None))
            if len(page) == STEP_ROWS:
                yield page
                page = []
        if page:
            yield page

    async def rows(self, table: Table, ids: Sequence[str]) -> list[Change]:
        """See `Source`."""
        await self.now_us()
        wanted = [candidate for id in ids for candidate in _candidates(id)]
        found = self._collection(table).find({"_id": {"$in": wanted}}).batch_size(STEP_ROWS)
        return [self._change(table, document, None) async for document in found]

    async def wait(self, timeout_s: float) -> Woken:
        """See `Source`. A question is never broken off: a cursor that was cancelled may have lost its place."""
        deadline = time.monotonic() + timeout_s
        woken = Woken(overflow=self._compare)
        self._compare = False
        while not woken.overflow and self._streams and time.monotonic() < deadline:
            for table, stream in self._streams.items():
                if self._waiting.get(table) is None:
                    self._waiting[table] = await stream.try_next()
                if self._waiting[table] is not None:
                    return woken
        return woken


def _digest(fields: dict[str, Any]) -> int:
    """63 bits, as PostgreSQL's bigint takes them."""
    return int.from_bytes(blake2b(orjson.dumps(fields), digest_size=8).digest()) >> 1


def _text(id: Any) -> str:
    return id if isinstance(id, str) else str(id)


def _candidates(id: str) -> list[Any]:
    """What a key may be that reads like this."""
    from uuid import UUID

    from bson import ObjectId

    found: list[Any] = [id]
    if ObjectId.is_valid(id):
        found.append(ObjectId(id))
    if id.removeprefix("-").isdecimal():
        found.append(int(id))
    with suppress(ValueError):
        found.append(UUID(id))
    return found


def _value(value: Any) -> Any:
    if isinstance(value, datetime):
        # MongoDB's instants are UTC, in milliseconds.
        at = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return round(at.timestamp() * 1_000) * 1_000
    return value if value is None or isinstance(value, bool | int) else str(value)
