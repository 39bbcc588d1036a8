"""The registry in PostgreSQL: what people edit, as projections of events.

A change is planned first (`plan`: reads, compares, writes nothing) and then committed (`commit`): each changed document
is one event, its projection and, where workers need it, one outbox row, all in ONE transaction. Between the two,
another change of the same document makes the commit fail as a whole (`ConflictError`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import asyncpg
import orjson

from preservarium import topics
from preservarium.domain.readings.address import canonical_address, spellings
from preservarium.domain.registry import changes as domain
from preservarium.domain.registry.checks import RegistryFile, check_meaning, check_references
from preservarium.domain.registry.documents import IDENTITY, SECTIONS, identity
from preservarium.errors import PreservariumError
from preservarium.stores import events

Document = dict[str, Any]
Action = Literal["create", "change", "remove"]

#: Serializes commits (not plans), so that the order of outbox ids is the order of commits.
COMMIT_LOCK_KEY: Final = 0x5052_4553_5247  # "PRESRG"
#: A commit waits this long for another one; the largest measured (100,000 devices) takes about 20 s.
COMMIT_LOCK_WAIT_S: Final = 60


class RegistryError(PreservariumError):
    """The registry cannot do this."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Where the documents of a kind are, and which of their fields are columns too."""

    name: str
    key: str  #: column that identifies a row
    columns: tuple[tuple[str, str], ...] = ()  #: (column, field of the document)


_TABLES: Final[Mapping[str, _Table]] = {
    "manufacturer": _Table("manufacturers", "name"),
    "datatype": _Table("datatypes", "name", (("kind", "kind"), ("unit", "unit"))),
    "parser": _Table("parsers", "name", (("parser_version", "version"), ("kind", "kind"), ("status", "status"), ("hash", "hash"))),
    "recipient": _Table("recipients", "name", (("channel", "channel"), ("address", "address"))),
    "rule": _Table("alarm_rules", "name", (("component_type", "component_type"), ("severity", "severity"), ("enabled", "enabled"))),
    "type": _Table("device_types", "name", (("manufacturer", "manufacturer"), ("parser", "parser"))),
    "experiment": _Table("experiments", "experiment_id"),
    "device": _Table(
        "devices", "device_id", (("type", "type"), ("name", "name"), ("enabled", "enabled"), ("experiment_id", "experiment_id"))
    ),
}  # fmt: skip

#: Kinds that workers follow on iot_type_registry. Devices have a topic of their own; the rest concerns no worker.
TYPE_KINDS: Final = frozenset({"datatype", "parser", "type", "rule", "recipient"})

_DEFAULTS: Final[Mapping[str, Any]] = {"enabled": True}


def stream_of(kind: str, document: Mapping[str, Any]) -> str:
    """The stream that holds a document's life: `device/…`, `parser/name@2`."""
    name = identity(kind, document)
    return f"{kind}/{name}@{document['version']}" if kind == "parser" else f"{kind}/{name}"


@dataclass(frozen=True, slots=True)
class Change:
    """One document that differs."""

    kind: str
    stream: str
    action: Action
    before: Document | None
    after: Document | None
    expected_version: int
    event: str
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The document's name within its kind."""
        return self.stream.split("/", 1)[1]

    @property
    def fields(self) -> list[str]:
        """Top-level fields that change."""
        return sorted([*self.data.get("set", ()), *self.data.get("unset", ())])


@dataclass(slots=True)
class Plan:
    """What would be done."""

    changes: list[Change] = field(default_factory=list)
    unchanged: int = 0  #: documents of the file that are already so
    #: documents that the file does not name, in sections that it has; left alone without prune
    extra: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Documents by action."""
        counted = {"create": 0, "change": 0, "remove": 0}
        for change in self.changes:
            counted[change.action] += 1
        return {**counted, "unchanged": self.unchanged}


@dataclass(frozen=True, slots=True)
class Committed:
    """What was done."""

    revisions: dict[str, int]  #: stream -> revision
    outbox_ids: list[int]  #: rows that become Kafka records


@dataclass(frozen=True, slots=True)
class Stored:
    """A document with what the registry knows of it."""

    document: Document
    rev: int
    version: int


# --- reading -------------------------------------------------------------------------------------------------------


async def load(connection: Any, kinds: Iterable[str] = tuple(SECTIONS.values())) -> dict[str, dict[str, Stored]]:
    """Load the current state: kind -> stream -> document."""
    found: dict[str, dict[str, Stored]] = {}
    for kind in kinds:
        table = _TABLES[kind]
        rows = await connection.fetch(f"SELECT doc, rev, version FROM {table.name} ORDER BY {table.key}, rev")
        found[kind] = {}
        for row in rows:
            document = orjson.loads(row["doc"])
            found[kind][stream_of(kind, document)] = Stored(document, row["rev"], row["version"])
    return found


async def plan(connection: Any, file: RegistryFile, *, prune: bool = False) -> Plan:
    """Compare a file with the registry. Writes nothing.

    Args:
        connection: outside a transaction.
        file: read and without errors; problems with references are added to it.
        prune: remove what the file does not name, in the sections that it has. Parsers are retired, not removed:
            lineage refers to their versions.

    Raises:
        RegistryFileError: the file has errors, or refers to what will not exist.
    """
    file.raise_for_errors()
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        current = await load(connection)
        wanted = _wanted(file, current, prune=prune)
        file.raise_for_errors()
        result = Plan()
        differing: list[tuple[str, str, Document | None, Document | None, int]] = []
        for kind in SECTIONS.values():
            for stream, after in wanted[kind].items():
                stored = current[kind].get(stream)
                if stored is None:
                    differing.append((kind, stream, None, after, 0))
                elif domain.difference(stored.document, after) is None:
                    result.unchanged += 1
                else:
                    differing.append((kind, stream, stored.document, after, stored.version))
        final = _final(current, wanted)
        if prune:
            # What depends on others goes first.
            for kind in reversed(tuple(SECTIONS.values())):
                for stream in _unnamed(kind, file, current, wanted):
                    stored = current[kind][stream]
                    differing.append((kind, stream, stored.document, None, stored.version))
                    del final[kind][stream]
        else:
            result.extra = [s for kind in SECTIONS.values() for s in _unnamed(kind, file, current, wanted)]
        _check(file, final)
        file.raise_for_errors()
        # A document that was removed once goes on in its old stream.
        known = await events.heads(connection, [d[1] for d in differing if d[2] is None])
    for kind, stream, before, new, version in differing:
        event = domain.difference(before, new)
        assert event is not None
        action: Action = "create" if before is None else "remove" if new is None else "change"
        expected = known.get(stream, (0, b""))[0] if before is None else version
        result.changes.append(Change(kind, stream, action, before, new, expected, event[0], event[1]))
    return result


def check(file: RegistryFile) -> None:
    """Note the references of a file that do not resolve within it (see `plan` for those against the registry)."""
    if not file.errors:
        empty: dict[str, dict[str, Stored]] = {kind: {} for kind in SECTIONS.values()}
        wanted = _wanted(file, empty, prune=False)
        if not file.errors:
            _check(file, wanted)


def _check(file: RegistryFile, final: Mapping[str, Mapping[str, Document]]) -> None:
    check_references(file, {kind: [identity(kind, d) for d in documents.values()] for kind, documents in final.items()})
    if not file.errors:
        datatypes, rules, types = (
            {d["name"]: d for d in final[kind].values()} for kind in ("datatype", "rule", "type")
        )
        check_meaning(file, datatypes, rules, types)


def _final(
    current: Mapping[str, Mapping[str, Stored]], wanted: Mapping[str, Mapping[str, Document]]
) -> dict[str, dict[str, Document]]:
    return {
        kind: {**{s: stored.document for s, stored in current[kind].items()}, **wanted[kind]}
        for kind in SECTIONS.values()
    }


def _unnamed(
    kind: str,
    file: RegistryFile,
    current: Mapping[str, Mapping[str, Stored]],
    wanted: Mapping[str, Mapping[str, Document]],
) -> list[str]:
    if kind not in file.sections or kind == "parser":
        return []
    return [s for s in current[kind] if s not in wanted[kind]]


def _wanted(
    file: RegistryFile, current: Mapping[str, Mapping[str, Stored]], *, prune: bool
) -> dict[str, dict[str, Document]]:
    """The documents as the file wants them: kind -> stream -> document."""
    wanted: dict[str, dict[str, Document]] = {kind: {} for kind in SECTIONS.values()}
    for kind, documents in file.documents.items():
        if kind == "parser":
            _wanted_parsers(file, documents, current["parser"], wanted["parser"], prune=prune)
        else:
            for document in documents:
                wanted[kind][stream_of(kind, document)] = document
    if "parser" in file.sections and "parser" not in file.documents:
        _wanted_parsers(file, [], current["parser"], wanted["parser"], prune=prune)
    return wanted


def _wanted_parsers(
    file: RegistryFile,
    documents: Sequence[Document],
    current: Mapping[str, Stored],
    wanted: dict[str, Document],
    *,
    prune: bool,
) -> None:
    """Give each parser its version: the one that has this source, or a new one."""
    versions: dict[str, dict[int, Document]] = {}
    for stored in current.values():
        versions.setdefault(stored.document["name"], {})[stored.document["version"]] = stored.document
    chosen: set[tuple[str, int]] = set()
    for i, document in enumerate(documents):
        name = document["name"]
        known = versions.get(name, {})
        newest = max(known, default=0)
        version = document.get("version")
        if version is None:
            same = [v for v, d in known.items() if d["hash"] == document["hash"] and d["kind"] == document["kind"]]
            active = [v for v in same if known[v]["status"] == "active"]
            version = (active or sorted(same, reverse=True) or [newest + 1])[0]
        elif version in known and known[version]["hash"] != document["hash"]:
            file.problem(
                "parser", i, ("version",),
                f"the source of {name}@{version} differs from the registry's, and a version does not change: "
                f"leave `version` out, or give {newest + 1}",
            )  # fmt: skip
            continue
        elif version not in known and version < newest:
            file.problem("parser", i, ("version",), f"the registry has {name}@{newest} already: give {newest + 1}")
            continue
        before = known.get(version)
        if before is not None and before["status"] != "draft" and document["status"] == "draft":
            file.problem(
                "parser", i, ("status",), f"{name}@{version} is {before['status']} and cannot become a draft again"
            )
            continue
        chosen.add((name, version))
        full = {"name": name, "version": version, **{k: v for k, v in document.items() if k not in {"name", "version"}}}
        wanted[stream_of("parser", full)] = full
        if full["status"] == "active":
            for other, there in known.items():
                if other != version and there["status"] == "active" and (name, other) not in chosen:
                    wanted.setdefault(stream_of("parser", there), {**there, "status": "retired"})
    if prune:
        for stream, stored in current.items():
            if stored.document["status"] != "retired":
                wanted.setdefault(stream, {**stored.document, "status": "retired"})


# --- writing -------------------------------------------------------------------------------------------------------


async def commit(connection: Any, planned: Plan, *, actor: str, at_us: int) -> Committed:
    """Write a plan in one transaction: events, projections, outbox.

    Args:
        connection: outside a transaction.
        planned: from `plan`; one without changes writes nothing.
        actor: who does it, for the history.
        at_us: when, µs since the epoch.

    Raises:
        ConflictError: a document was changed since the plan was made; nothing was written.
        RegistryError: a reference was taken away meanwhile; nothing was written.
    """
    changes = planned.changes
    if not changes:
        return Committed({}, [])
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{COMMIT_LOCK_WAIT_S}s'")
            await connection.execute("SELECT pg_advisory_xact_lock($1)", COMMIT_LOCK_KEY)
            new = [events.NewEvent(c.stream, c.expected_version, c.event, c.data, c.after) for c in changes]
            versions = await events.append(connection, new, actor=actor, at_us=at_us)
            # Taken under the lock: the revision of a later commit is larger.
            rows = await connection.fetch("SELECT nextval('registry_rev') FROM generate_series(1, $1)", len(changes))
            revisions = {c.stream: int(r[0]) for c, r in zip(changes, rows, strict=True)}
            for kind in SECTIONS.values():
                await _project(
                    connection, kind, [c for c in changes if c.kind == kind], versions, revisions, actor, at_us
                )
            ids = await _outbox(connection, changes, revisions)
            await _check_parsers(connection)
    except asyncpg.ForeignKeyViolationError as e:
        message = f"a reference does not hold: {e.detail or e}"
        raise RegistryError(message) from e
    except asyncpg.LockNotAvailableError as e:
        message = f"another change of the registry has been under way for more than {COMMIT_LOCK_WAIT_S} s"
        raise RegistryError(message) from e
    return Committed(revisions, ids)


async def _project(
    connection: Any,
    kind: str,
    changes: Sequence[Change],
    versions: Mapping[str, int],
    revisions: Mapping[str, int],
    actor: str,
    at_us: int,
) -> None:
    if not changes:
        return
    table = _TABLES[kind]
    id_field = IDENTITY.get(kind, "name")
    removed = [c.before for c in changes if c.after is None and c.before is not None]
    if removed:
        # Parsers are never removed: their key has two columns.
        await connection.execute(
            f"DELETE FROM {table.name} WHERE {table.key} = ANY ($1::text[])", [d[id_field] for d in removed]
        )
    columns = [table.key, *(column for column, _ in table.columns), "rev", "version", "doc", "updated_at", "updated_by"]
    key = "name, parser_version" if kind == "parser" else table.key
    updates = ", ".join(f"{c} = EXCLUDED.{c}" for c in columns if c != table.key)
    at = events.instant(at_us)
    rows = [
        (
            c.after[id_field],
            *(c.after.get(name, _DEFAULTS.get(name)) for _, name in table.columns),
            revisions[c.stream],
            versions[c.stream],
            orjson.dumps(c.after).decode(),
            at,
            actor,
        )
        # A parser that steps back does so before another becomes active: only one may be.
        for c in sorted(
            changes, key=lambda c: kind == "parser" and c.after is not None and c.after["status"] == "active"
        )
        if c.after is not None
    ]
    if rows:
        await connection.executemany(
            f"INSERT INTO {table.name} ({', '.join(columns)}) "
            f"VALUES ({', '.join(f'${i}' for i in range(1, len(columns) + 1))}) ON CONFLICT ({key}) DO UPDATE SET {updates}",
            rows,
        )


async def _outbox(connection: Any, changes: Sequence[Change], revisions: Mapping[str, int]) -> list[int]:
    rows = _records(changes, revisions)
    if not rows:
        return []
    inserted = await connection.fetch(
        """
        INSERT INTO registry_outbox (topic, key, value, rev)
        SELECT topic, key, value, rev FROM unnest($1::text[], $2::bytea[], $3::bytea[], $4::bigint[])
          WITH ORDINALITY AS u (topic, key, value, rev, n) ORDER BY n
        RETURNING id
        """,
        *(list(column) for column in zip(*rows, strict=True)),
    )
    return [r[0] for r in inserted]


#: What becomes a record on Kafka: (topic, key, value, revision).
Record = tuple[str, bytes, bytes | None, int]


async def current_records(connection: Any) -> list[Record]:
    """The records that say the whole registry as it is: for topics that are empty."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        current = await load(connection, [*TYPE_KINDS, "device"])
    changes = [
        Change(kind, stream, "create", None, stored.document, 0, "", {})
        for kind, documents in current.items()
        for stream, stored in documents.items()
    ]
    return _records(changes, {stream: s.rev for documents in current.values() for stream, s in documents.items()})


def _records(changes: Sequence[Change], revisions: Mapping[str, int]) -> list[Record]:
    rows: list[Record] = []
    # Of a device that is registered anew in another spelling, the old one's mark must not hide it.
    kept = {key for c in changes if c.kind == "device" and c.after for key in domain.device_keys(c.after["device_id"])}
    replaced = {c.after["name"] for c in changes if c.kind == "parser" and c.after and c.after["status"] == "active"}
    for change in changes:
        rev = revisions[change.stream]
        after = change.after
        document = after or change.before
        assert document is not None
        if change.kind == "parser":
            # The topic holds the active version of each parser, and no other.
            if after is None or after["status"] != "active":
                was_active = change.before is not None and change.before["status"] == "active"
                if not was_active or document["name"] in replaced:
                    continue
                after = None
        elif change.kind not in TYPE_KINDS and change.kind != "device":
            continue
        name = identity(change.kind, document)
        value = None if after is None else orjson.dumps({**after, "rev": rev})
        if change.kind != "device":
            rows.append((topics.TYPE_REGISTRY.name, f"{change.kind}/{name}".encode(), value, rev))
            continue
        rows += [
            (topics.DEVICE_REGISTRY.name, key.encode(), value, rev)
            for key in domain.device_keys(name)
            if value is not None or key not in kept
        ]
    return rows


async def _check_parsers(connection: Any) -> None:
    """The one reference that is no foreign key."""
    missing = await connection.fetchval(
        "SELECT t.name || ' needs parser ' || t.parser FROM device_types t "
        "WHERE NOT EXISTS (SELECT FROM parsers p WHERE p.name = t.parser) LIMIT 1"
    )
    if missing:
        message = f"a reference does not hold: device type {missing}"
        raise RegistryError(message)


# --- export, history, verification ---------------------------------------------------------------------------------


async def export(connection: Any) -> dict[str, list[Document]]:
    """Give the documents by kind, as a file says them; applying them changes nothing. Retired parser versions are left out."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        current = await load(connection)
    return {
        kind: [s.document for s in documents.values() if kind != "parser" or s.document["status"] != "retired"]
        for kind, documents in current.items()
    }


async def history(connection: Any, stream: str) -> list[events.Event]:
    """The events of a document, oldest first. `parser/name` gives those of all its versions."""
    names = [stream]
    if stream.startswith("parser/") and "@" not in stream:
        names = await events.streams(connection, f"{stream}@")
    found = [e for name in names for e in await events.read(connection, name)]
    return sorted(found, key=lambda e: e.position)


async def verify(connection: Any) -> events.Verified:
    """Check the hash chain, and that every projection is the fold of its events.

    The second finds what the chain cannot: events cut off at the end of a stream, and projections edited by hand.
    """
    found = await events.verify(connection)
    faults = list(found.faults)
    current = await load(connection)
    for documents in current.values():
        for stream, stored in documents.items():
            if len(faults) >= events.FAULTS_MAX:
                break
            try:
                state, version = await events.state_at(connection, stream)
            except (ValueError, KeyError) as e:
                faults.append(f"{stream}: its events do not fit together: {e}")
                continue
            if version != stored.version:
                faults.append(f"{stream}: the projection is at version {stored.version}, the events end at {version}")
            elif state is None or not domain.same(state, stored.document):
                faults.append(f"{stream}: the projection is not what its events say")
    return events.Verified(found.streams, found.events, faults)


# --- one device with everything ------------------------------------------------------------------------------------

#: A device with its type, the active parser, the datatypes that the two name, the rules that watch it and their
#: recipients: one round trip. $1: addresses.
COMPOSITE: Final = """
SELECT d.device_id, d.doc AS device, d.rev,
  json_build_object('rev', t.rev, 'doc', t.doc) AS type,
  (SELECT json_build_object('rev', p.rev, 'doc', p.doc) FROM parsers p WHERE p.name = t.parser AND p.status = 'active')
    AS parser,
  (SELECT json_agg(json_build_object('rev', x.rev, 'doc', x.doc) ORDER BY x.name) FROM datatypes x WHERE x.name IN (
     SELECT m.value ->> 'component_type' FROM json_each(t.doc -> 'mapping') m
     UNION SELECT m.value ->> 'component_type' FROM json_each(d.doc -> 'mapping') m
     UNION SELECT json_object_keys(t.doc -> 'datatypes')
     UNION SELECT json_object_keys(d.doc -> 'datatypes')
     UNION SELECT r.component_type FROM alarm_rules r WHERE r.name = ANY (n.rules))) AS datatypes,
  (SELECT json_agg(json_build_object('rev', r.rev, 'doc', r.doc) ORDER BY r.name)
     FROM alarm_rules r WHERE r.name = ANY (n.rules)) AS rules,
  (SELECT json_agg(json_build_object('rev', c.rev, 'doc', c.doc) ORDER BY c.name) FROM recipients c WHERE c.name IN (
     SELECT json_array_elements_text(r.doc -> 'recipients') FROM alarm_rules r WHERE r.name = ANY (n.rules)))
    AS recipients
FROM devices d
JOIN device_types t ON t.name = d.type
CROSS JOIN LATERAL (
  SELECT array(SELECT json_array_elements_text(t.doc -> 'rules') UNION SELECT json_object_keys(d.doc -> 'rules'))
) AS n (rules)
WHERE d.device_id = ANY ($1::text[])
"""


@dataclass(frozen=True, slots=True)
class Composite:
    """A device with everything that decoding, checking and watching it takes. Documents carry their `rev`."""

    device: Document
    type: Document
    parser: Document | None
    datatypes: list[Document]
    rules: list[Document]
    recipients: list[Document]

    def documents(self) -> list[tuple[str, Document]]:
        """(kind, document) of all but the device."""
        return [
            ("type", self.type),
            *([("parser", self.parser)] if self.parser else []),
            *(("datatype", d) for d in self.datatypes),
            *(("rule", d) for d in self.rules),
            *(("recipient", d) for d in self.recipients),
        ]


#: How the device is registered that has an address, given its canonical form. It looks at every device: for people, who name one.
SPELLED: Final = "SELECT device_id FROM devices WHERE lower(translate(device_id, '-:. ', '')) = $1"


async def spelled(connection: Any, device_id: str) -> str:
    """How a device is registered that may be named by another spelling of its address; as it is given where none is known."""
    if len(spellings(device_id)) < 2:
        return device_id
    found = [row["device_id"] for row in await connection.fetch(SPELLED, canonical_address(device_id))]
    return device_id if device_id in found or not found else found[0]


async def composite(
    connection: Any, device_ids: Sequence[str], *, timeout_s: float | None = None
) -> dict[str, Composite]:
    """Load devices with all that belongs to them, in one round trip; unknown ones are left out.

    A device may be asked for by another spelling of its address than it is registered with; the answer is by what was asked.
    """
    asked = list(dict.fromkeys(spelling for device_id in device_ids for spelling in spellings(device_id)))
    rows = await connection.fetch(COMPOSITE, asked, timeout=timeout_s)
    found = {r["device_id"]: _composite(r) for r in rows}
    by_address = {canonical_address(device_id): one for device_id, one in found.items()}
    answers = {i: found.get(i) or by_address.get(canonical_address(i)) for i in device_ids}
    return {device_id: one for device_id, one in answers.items() if one is not None}


def _composite(row: Any) -> Composite:
    def one(text: str | None) -> Document | None:
        return _with_rev(orjson.loads(text)) if text else None

    def many(text: str | None) -> list[Document]:
        return [_with_rev(item) for item in orjson.loads(text)] if text else []

    device_type = one(row["type"])
    assert device_type is not None
    return Composite(
        {**orjson.loads(row["device"]), "rev": row["rev"]},
        device_type,
        one(row["parser"]),
        many(row["datatypes"]),
        many(row["rules"]),
        many(row["recipients"]),
    )


def _with_rev(item: Mapping[str, Any]) -> Document:
    return {**item["doc"], "rev": item["rev"]}
