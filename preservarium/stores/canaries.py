"""Canaries in PostgreSQL: each change is an event of `canary/<name>`, the projection and a record for the workers, in one transaction.

Functions work on a connection that the caller has, outside a transaction; instants are µs, UTC.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, cast

import asyncpg
import orjson

from preservarium import topics
from preservarium.domain.canary import CANARIES_MAX, EXAMPLES_MAX, KINDS, CanaryDoc, Counts, LimitsDoc, checked
from preservarium.domain.registry import changes
from preservarium.errors import PreservariumError
from preservarium.stores import events, registry

#: Counts of canaries that ended are kept so long.
COUNTS_KEPT: Final = timedelta(days=90)


class CanaryError(PreservariumError):
    """A canary cannot be started, moved or ended."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A canary with what is known of it."""

    document: CanaryDoc
    version: int


def stream_of(name: str) -> str:
    """The stream of a canary."""
    return f"canary/{name}"


async def all_of_them(connection: Any) -> list[Stored]:
    """The canaries that are under way."""
    rows = await connection.fetch("SELECT doc, version FROM canaries ORDER BY name")
    return [Stored(cast(CanaryDoc, orjson.loads(row["doc"])), row["version"]) for row in rows]


async def get(connection: Any, name: str) -> Stored:
    """One of them.

    Raises:
        CanaryError: there is none of that name.
    """
    for one in await all_of_them(connection):
        if one.document["name"] == name:
            return one
    message = f"there is no canary {name}: `preservarium canary list` names those under way"
    raise CanaryError(message)


async def start(
    connection: Any, kind: str, of: str, candidate: Mapping[str, Any], percent: int, limits: LimitsDoc, *, actor: str, reason: str, at_us: int
) -> CanaryDoc:  # fmt: skip
    """Start a canary.

    Args:
        connection: any.
        kind: parser or datatype.
        of: its name.
        candidate: the document that the share is to see.
        percent: of the devices.
        limits: when it is rolled back, or goes on.
        actor: who.
        reason: why, for the history.
        at_us: when.

    Raises:
        CanaryError: there is one already, too many, or something does not fit.
        ConflictError: somebody did the same meanwhile.
    """
    if kind not in KINDS:
        message = f"a canary is of one of these: {', '.join(KINDS)}"
        raise CanaryError(message)
    if wrong := checked(limits, percent):
        raise CanaryError("; ".join(wrong))
    name = f"{kind}/{of}"
    async with _locked(connection):
        there = await all_of_them(connection)
        if any(one.document["name"] == name for one in there):
            message = f"canary {name} is under way: promote it or roll it back before"
            raise CanaryError(message)
        if len(there) >= CANARIES_MAX:
            message = f"{CANARIES_MAX} canaries are under way, and no more are taken"
            raise CanaryError(message)
        document = {
            "name": name, "kind": kind, "of": of, "candidate": dict(candidate), "percent": percent, "started_at": at_us, "step_at": at_us,
            "limits": dict(limits),
        }  # fmt: skip
        return await _write(connection, name, None, document, {"reason": reason}, actor=actor, at_us=at_us)


async def step(
    connection: Any, name: str, percent: int, *, actor: str, reason: str, at_us: int, expected: int | None = None
) -> CanaryDoc:
    """Show the candidate to another share of the devices.

    Args:
        connection: any.
        name: of the canary.
        percent: of the devices.
        actor: who.
        reason: why.
        at_us: when.
        expected: the version that this was decided on; None: whatever it is now.

    Raises:
        CanaryError: there is none, or the share is none.
        ConflictError: it was changed meanwhile.
    """
    async with _locked(connection):
        stored = await _expected(connection, name, expected)
        if wrong := checked(stored.document["limits"], percent):
            raise CanaryError("; ".join(wrong))
        document: dict[str, Any] = {**stored.document, "percent": percent, "step_at": at_us}
        return await _write(connection, name, stored, document, {"reason": reason}, actor=actor, at_us=at_us)


async def end(
    connection: Any, name: str, *, promote: bool, actor: str, reason: str, at_us: int, expected: int | None = None
) -> None:
    """Put the candidate in force for all (`promote`), or take it back from those who saw it; in one transaction with the registry.

    Raises:
        CanaryError: there is none, or the registry has not what is to be promoted any more.
        ConflictError: it, or what it is about, was changed meanwhile.
    """
    async with _locked(connection):
        stored = await _expected(connection, name, expected)
        counted = await counts(connection, stored.document)
        if promote:
            await _promote(connection, stored.document, actor=actor, at_us=at_us)
        more = {
            "outcome": "promoted" if promote else "rolled_back", "reason": reason, "percent": stored.document["percent"],
            "compared": counted.compared, "different": counted.different, "broken": counted.broken, "examples": counted.examples,
        }  # fmt: skip
        await _write(connection, name, stored, None, more, actor=actor, at_us=at_us)


def _locked(connection: Any) -> "_Locked":
    return _Locked(connection)


class _Locked:
    """A transaction that holds the registry's lock: revisions are in the order of commits."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._transaction = connection.transaction()

    async def __aenter__(self) -> None:
        await self._transaction.start()
        try:
            await self._connection.execute(f"SET LOCAL lock_timeout = '{registry.COMMIT_LOCK_WAIT_S}s'")
            await self._connection.execute("SELECT pg_advisory_xact_lock($1)", registry.COMMIT_LOCK_KEY)
        except asyncpg.LockNotAvailableError as e:
            await self._transaction.rollback()
            message = f"a change of the registry has been under way for more than {registry.COMMIT_LOCK_WAIT_S} s"
            raise CanaryError(message) from e
        except BaseException:
            await self._transaction.rollback()
            raise

    async def __aexit__(self, kind: Any, error: Any, _trace: Any) -> None:
        await (self._transaction.commit() if kind is None else self._transaction.rollback())


async def _expected(connection: Any, name: str, expected: int | None) -> Stored:
    stored = await get(connection, name)
    if expected is not None and stored.version != expected:
        message = f"canary {name} was changed by someone else meanwhile; nothing was done"
        raise events.ConflictError(message)
    return stored


async def _write(
    connection: Any, name: str, before: Stored | None, after: dict[str, Any] | None, more: dict[str, Any], *, actor: str, at_us: int
) -> CanaryDoc:  # fmt: skip
    """Event, projection and outbox."""
    rev = await connection.fetchval("SELECT nextval('registry_rev')")
    document = None if after is None else {**after, "rev": rev}
    found = changes.difference(None if before is None else before.document, document)
    assert found is not None
    kind, data = found
    version = (await events.heads(connection, [stream_of(name)])).get(stream_of(name), (0, b""))[0]
    new = events.NewEvent(stream_of(name), version, kind, {**data, **more}, document)
    versions = await events.append(connection, [new], actor=actor, at_us=at_us)
    if document is None:
        await connection.execute("DELETE FROM canaries WHERE name = $1", name)
    else:
        await connection.execute(
            "INSERT INTO canaries (name, rev, version, doc, updated_at, updated_by) VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (name) DO UPDATE"
            " SET rev = excluded.rev, version = excluded.version, doc = excluded.doc, updated_at = excluded.updated_at, updated_by = excluded.updated_by",
            name, rev, versions[stream_of(name)], orjson.dumps(document).decode(), events.instant(at_us), actor,
        )  # fmt: skip
    await connection.execute(
        "INSERT INTO registry_outbox (topic, key, value, rev) VALUES ($1, $2, $3, $4)",
        topics.TYPE_REGISTRY.name, f"canary/{name}".encode(), None if document is None else orjson.dumps(document), rev,
    )  # fmt: skip
    return cast(CanaryDoc, document or {})


async def _promote(connection: Any, canary: CanaryDoc, *, actor: str, at_us: int) -> None:
    kind, of, candidate = canary["kind"], canary["of"], canary["candidate"]
    current = (await registry.load(connection, [kind]))[kind]
    wanted: list[tuple[registry.Stored, dict[str, Any]]] = []
    if kind == "parser":
        chosen = current.get(f"parser/{of}@{candidate['version']}")
        if chosen is None:
            message = f"the registry has no {of}@{candidate['version']} any more"
            raise CanaryError(message)
        wanted = [
            (one, {**one.document, "status": "retired"})
            for one in current.values()
            if one is not chosen and one.document["name"] == of and one.document["status"] == "active"
        ]
        wanted.append((chosen, {**chosen.document, "status": "active"}))
    else:
        there = current.get(f"{kind}/{of}")
        if there is None:
            message = f"the registry has no {kind} {of} any more"
            raise CanaryError(message)
        wanted = [(there, {k: v for k, v in candidate.items() if k != "rev"})]
    plan = registry.Plan()
    for one, after in wanted:
        event = changes.difference(one.document, after)
        if event is not None:
            stream = registry.stream_of(kind, after)
            plan.changes.append(
                registry.Change(kind, stream, "change", one.document, after, one.version, event[0], event[1])
            )
    await registry.commit(connection, plan, actor=actor, at_us=at_us)


# --- what is counted

_ADD: Final = """
INSERT INTO canary_counts AS c (canary, started_at, percent, worker, compared, different, broken, mended, skipped, examples)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
ON CONFLICT (canary, started_at, percent, worker) DO UPDATE
SET compared = c.compared + excluded.compared, different = c.different + excluded.different, broken = c.broken + excluded.broken,
    mended = c.mended + excluded.mended, skipped = c.skipped + excluded.skipped, updated_at = now(),
    examples = CASE WHEN jsonb_array_length(c.examples) > 0 THEN c.examples ELSE excluded.examples END"""
_SUM: Final = """
SELECT coalesce(sum(compared), 0)::bigint AS compared, coalesce(sum(different), 0)::bigint AS different, coalesce(sum(broken), 0)::bigint AS broken,
       coalesce(sum(mended), 0)::bigint AS mended, coalesce(sum(skipped), 0)::bigint AS skipped,
       coalesce(jsonb_agg(examples) FILTER (WHERE jsonb_array_length(examples) > 0), '[]') AS examples
FROM canary_counts WHERE canary = $1 AND started_at = $2 AND percent = $3"""


async def add_counts(connection: Any, canary: CanaryDoc, worker: str, new: Counts) -> None:
    """Add what a worker has compared since it last said so."""
    examples = orjson.dumps(new.examples[:EXAMPLES_MAX]).decode().replace("\\u0000", "\\ufffd")
    await connection.execute(
        _ADD, canary["name"], events.instant(canary["started_at"]), canary["percent"], worker, new.compared, new.different, new.broken,
        new.mended, new.skipped, examples,
    )  # fmt: skip


async def counts(connection: Any, canary: CanaryDoc) -> Counts:
    """What all workers have compared of the present share."""
    row = await connection.fetchrow(_SUM, canary["name"], events.instant(canary["started_at"]), canary["percent"])
    examples = [one for some in orjson.loads(row["examples"]) for one in some][:EXAMPLES_MAX]
    numbers = {name: row[name] for name in ("compared", "different", "broken", "mended", "skipped")}
    return Counts(**numbers, examples=examples)


async def prune(connection: Any) -> None:
    """Delete counts of canaries that ended long ago."""
    await connection.execute(
        "DELETE FROM canary_counts c WHERE updated_at < now() - $1::interval AND NOT EXISTS (SELECT FROM canaries WHERE name = c.canary)",
        COUNTS_KEPT,
    )
