"""Shadow replay: what a candidate (a parser's version, bounds, alarm rules) makes of raw records that were stored, beside the live stream.

Each process reads some raw partitions and writes what it derives to `shadow_rows`; nothing goes to a topic, and no group is touched. What differs from
what is stored is looked for by PostgreSQL. Of the devices where something does, the records are derived once more with the registry as it was: a
difference that this makes as well is not the candidate's (rows that were lost, a corrected value, a past that began before the records), and is only counted.
So the list of rows is what the candidate changes, and nothing else.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import orjson

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.lineage import GENERATION_LIVE
from preservarium.domain.registry.device import DeviceDoc
from preservarium.domain.registry.documents import SECTIONS
from preservarium.operations.changes.deriving import Configuration, Counts, Deriver, Documents, Reading, Registry, Span
from preservarium.operations.changes.shadow_rows import COLUMNS, Encoder, alarm_row
from preservarium.operations.raw_records import Records
from preservarium.operations.rederive import LEARNT_US, Rederiver
from preservarium.registry.file import read as read_registry
from preservarium.sandbox.pool import Limits as SandboxLimits
from preservarium.sandbox.pool import SandboxPool
from preservarium.settings import Settings
from preservarium.stores import changes, positions, registry
from preservarium.stores.changes import Change, ChangeError, State
from preservarium.stores.connections import connect
from preservarium.stores.events import instant
from preservarium.stores.registry_past import Past
from preservarium.stores.tables import ALARM_EVENTS
from preservarium.streaming.records import generation_of

#: More processes than that wait for PostgreSQL and Kafka.
PROCESSES_MAX: Final = 8
#: Rows that go to PostgreSQL at once: some 4 MB.
COPY_ROWS: Final = 20_000
#: Records of devices that write to several partitions, which are put in order in memory.
SCATTERED_RECORDS_MAX: Final = 2_000_000
#: Transitions of one shadow replay; of more, better rules are needed and no list.
ALARMS_MAX: Final = 200_000
#: A connection must stand within this time.
CONNECT_S: Final = 60.0
#: Rows older than the compression horizon wait for their chunk: merged first, so many pieces at most.
LATE_PIECES_MAX: Final = 500
#: Devices that an error names.
SHOWN_MAX: Final = 20

Progress = Callable[[int, int, str], None]  #: (raw records done, raw records, what is done)


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is tried instead of what stands; documents as the registry has them."""

    parser: Mapping[str, Any] | None = None
    datatypes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def documents(self) -> Documents:
        """By kind and name."""
        parsers = {} if self.parser is None else {str(self.parser["name"]): {**self.parser, "status": "active"}}
        return {"parser": parsers, "datatype": self.datatypes, "rule": self.rules}

    def named(self) -> dict[str, Any]:
        """For people."""
        return {
            "parser": None if self.parser is None else f"{self.parser['name']}@{self.parser['version']}",
            "bounds": sorted(self.datatypes),
            "rules": sorted(self.rules),
        }


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which messages of which devices. Instants µs since the epoch, UTC, of their receipt."""

    from_us: int
    to_us: int
    devices: tuple[str, ...] = ()  #: none: all that the candidate concerns
    types: tuple[str, ...] = ()
    warm_us: int = 86_400_000_000  #: read before, so that tests, counters and alarms have a past
    run_on_us: int = 0  #: read after, with what stands: what the candidate changes of later messages
    reach_us: int = 7 * 86_400_000_000  #: readings may be so much older than their receipt


@dataclass(frozen=True, slots=True)
class _Job:
    """What a process needs; crosses the border between processes."""

    settings: Settings
    change_id: int
    side: int
    span: Span
    warm_from_us: int
    documents: Documents
    candidate: Documents
    devices: tuple[str, ...]  #: ids
    partitions: tuple[tuple[int, int, int], ...]  #: (raw partition, first offset, end)
    scattered: bool = False  #: the devices write to several partitions: these are put in order
    without: frozenset[str] = frozenset()  #: addresses of devices that are derived apart


@dataclass(slots=True)
class _Done:
    counts: Counts
    left_out: int
    seen: dict[str, set[int]] = field(default_factory=dict)  #: device -> raw partitions


@dataclass(slots=True)
class Found:
    """What a shadow replay found."""

    change: Change
    counts: Counts


# --- in a process ----------------------------------------------------------------------------------------------------

_counter: Any = None
_stopped: Any = None


class _StoppedError(Exception):
    """The others have ended."""


def _begin(counter: Any, stopped: Any) -> None:
    global _counter, _stopped
    _counter, _stopped = counter, stopped
    # Ctrl-C goes to all processes; the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_process(job: _Job) -> _Done:
    def told(count: int) -> None:
        if _stopped.is_set():
            raise _StoppedError
        with _counter.get_lock():
            _counter.value += count

    gc.freeze()
    return asyncio.run(_derive(job, told))


async def _derive(job: _Job, told: Callable[[int], None]) -> _Done:
    settings = job.settings
    connection = await connect(settings.postgres.session_dsn, what="a shadow replay", timeout=CONNECT_S)
    rederiver: Rederiver | None = None
    try:
        rows = await connection.fetch(
            "SELECT device_id, rev, doc FROM devices WHERE device_id = ANY($1)", list(job.devices)
        )
        devices = {row["device_id"]: cast(DeviceDoc, {**orjson.loads(row["doc"]), "rev": row["rev"]}) for row in rows}
        standing = Configuration(settings, Registry(job.documents), alarms=True)
        candidate = standing
        as_of = None
        if job.side == 0:
            candidate = Configuration(settings, Registry(job.documents, job.candidate), alarms=True)
        else:
            past = Past(connection)
            await past.prepare(job.span.from_us - 2 * LEARNT_US)
            rederiver = Rederiver(settings, past)
            as_of = _as_of(rederiver, standing, devices)
        encoder = Encoder(job.change_id, job.side)
        alarms: list[tuple[Any, ...]] = []

        def tell_alarms(transitions: Sequence[Mapping[str, Any]]) -> None:
            alarms.extend(alarm_row(job.change_id, job.side, line) for line in transitions)
            if len(alarms) > ALARMS_MAX:
                message = f"more than {ALARMS_MAX:,} alarm transitions: name fewer devices or a shorter time"
                raise ChangeError(message)

        deriver = Deriver(
            settings, candidate, standing, devices, job.span, encoder.take, tell_alarms,
            sandbox=lambda: SandboxPool(_patient(SandboxLimits.of(settings))), as_of=as_of,
        )  # fmt: skip
        done = _Done(deriver.counts, 0)

        async def write(*, all_: bool = False) -> None:
            if encoder.rows >= COPY_ROWS or (all_ and encoder.rows):
                await connection.copy_to_table(
                    "shadow_rows", source=encoder.message(), columns=COLUMNS, format="binary"
                )

        try:
            async with Records(settings) as records:
                await _read(job, records, deriver, write, told, done)
            await deriver.finish()
            await write(all_=True)
            if alarms:
                await connection.executemany(
                    "INSERT INTO shadow_alarms (change_id, side, device_id, transition_id, line) VALUES ($1, $2, $3, $4, $5::jsonb)"
                    " ON CONFLICT DO NOTHING",
                    alarms,
                )
        finally:
            await deriver.close()
        done.left_out = encoder.left_out
        return done
    finally:
        if rederiver is not None:
            await rederiver.close()
        await connection.close(timeout=5)


def _patient(limits: SandboxLimits) -> SandboxLimits:
    # Nobody waits for the next message here, and no version is set aside: each message says what it says.
    return replace(
        limits, cpu_s=limits.cpu_s * 5, wall_s=limits.wall_s * 5, hard_faults_max=1_000, soft_faults_max=1 << 62
    )


def _as_of(rederiver: Rederiver, standing: Configuration, devices: Mapping[str, DeviceDoc]) -> Any:
    """How messages were read at their time, with the alarm rules as they are: of those no row names a version."""
    rules = {}
    known: dict[int, Reading | None] = {}

    async def look(device_id: str, received_at: int) -> Reading:
        if device_id not in rules:
            rules[device_id] = standing.of(devices[device_id])
        found = await rederiver.configuration(device_id, received_at, None)
        if isinstance(found, str):
            return rules[device_id]
        one = known.get(id(found))
        if one is None:
            one = known[id(found)] = Reading(found.compiled, found.checks, rules[device_id].rules)
            kept.append(found)
        return one

    kept: list[Any] = []  # so that no other one has its id
    return look


async def _read(
    job: _Job,
    records: Records,
    deriver: Deriver,
    write: Callable[..., Any],
    told: Callable[[int], None],
    done: _Done,
) -> None:
    full = topics.RAW.full(job.settings.kafka.topic_prefix)
    apart = {canonical_address(device_id) for device_id in job.without}
    scattered: list[tuple[int, int, Any]] = []
    for partition, begin, end in job.partitions:
        before = deriver.counts.seen
        deriver.counts.seen = set()
        async for some in records.between(full, partition, begin, end):
            chosen = [one for one in some if generation_of(one) == GENERATION_LIVE]
            if apart:
                chosen = [
                    one
                    for one in chosen
                    if one.key is None or canonical_address(one.key.decode("utf-8", "replace")) not in apart
                ]
            if job.scattered:
                scattered += [(one.timestamp, partition, one) for one in chosen]
                if len(scattered) > SCATTERED_RECORDS_MAX:
                    message = f"{len(job.devices)} devices write to several partitions, with more than {SCATTERED_RECORDS_MAX:,} records: name fewer"
                    raise ChangeError(message)
            elif chosen:
                await deriver.take(chosen, partition)
                await write()
            told(len(some))
        for device_id in deriver.counts.seen:
            done.seen.setdefault(device_id, set()).add(partition)
        deriver.counts.seen |= before
    scattered.sort(key=lambda one: (one[0], one[1], one[2].offset))
    for _, partition, record in scattered:
        await deriver.take([record], partition)
        await write()


# --- the whole -------------------------------------------------------------------------------------------------------


def default_processes() -> int:
    """As many as there are cores, within reason."""
    return min(PROCESSES_MAX, os.cpu_count() or 1)


async def make(
    settings: Settings,
    connection: Any,
    candidate: Candidate,
    wanted: Wanted,
    *,
    actor: str,
    reason: str = "",
    processes: int | None = None,
    progress: Progress = lambda *_: None,
) -> Found:
    """Derive, and find what the candidate changes: a change that is ready to be looked at, promoted or discarded.

    Args:
        settings: where Kafka is, and limits.
        connection: of asyncpg; a session.
        candidate: what is tried.
        wanted: which messages.
        actor: who asked.
        reason: why, for the history.
        processes: how many; None: `default_processes`.
        progress: told how far it is.

    Raises:
        ChangeError: there is nothing to derive, or too much.
        RecordsError: Kafka cannot be asked.
    """
    if wanted.to_us <= wanted.from_us:
        message = "the time is empty: --to is not after --from"
        raise ChangeError(message)
    documents = await _documents(connection)
    devices = await _devices(connection, documents, candidate, wanted)
    clock = SystemClock()
    now_us = clock.now_us()
    # What is received from now on goes through the live stages alone.
    until_us = min(wanted.to_us + wanted.run_on_us, now_us)
    span = Span(wanted.from_us, min(wanted.to_us, until_us), until_us)
    warm_from_us = max(0, wanted.from_us - wanted.warm_us)
    partitions, gone = await _partitions(settings, warm_from_us, until_us)
    if not any(end > begin for _, begin, end in partitions):
        message = "Kafka holds no raw records of that time"
        raise ChangeError(message)
    plan = {
        "candidate": candidate.named(), "from": span.from_us, "to": span.to_us, "until": span.until_us, "warm_from": warm_from_us,
        "devices": sorted(wanted.devices), "types": sorted(wanted.types), "reason": reason, "incomplete": gone,
    }  # fmt: skip
    change = await changes.create(
        connection, "replay", plan, await next_generation(connection), actor=actor, at_us=now_us
    )
    job = _Job(
        settings, change.change_id, 0, span, warm_from_us, documents, candidate.documents(), tuple(sorted(devices)), tuple(partitions)
    )  # fmt: skip
    await merge_late(settings, connection)
    done = await _all(job, processes, progress, "deriving")
    progress(done.counts.records, done.counts.records, "comparing")
    await connection.execute("ANALYZE shadow_rows")
    await _compare(connection, settings, change, job, wanted)
    alarmed = await _alarms(connection, change, job)
    different = [row[0] for row in await connection.fetch("SELECT DISTINCT device_id FROM change_found")]
    again = sorted({*different, *(line["device_id"] for line in alarmed["differ"])})
    unexplained = 0
    if again:
        # Read again what stood then, for these devices alone.
        await _all(replace(job, side=1, devices=tuple(again), candidate={}), processes, progress, "as it stood")
        await connection.execute("ANALYZE shadow_rows")
        unexplained = await _of_candidate(connection, change)
    told = await _note_rows(connection, change)
    told_alarms = await _note_alarms(connection, change, alarmed)
    rows = await changes.lay_out(connection, change.change_id)
    for table in ("shadow_rows", "shadow_alarms"):
        await connection.execute(f"DELETE FROM {table} WHERE change_id = $1", change.change_id)
    summary = {
        "raw_records": done.counts.records, "messages": done.counts.messages, "readings": done.counts.readings, "refused": done.counts.refused,
        "left_out": done.left_out, "rows": rows, **told, "unexplained": unexplained, "alarms": told_alarms,
    }  # fmt: skip
    change = await changes.becomes(
        connection, change, State.READY, expected=(State.DERIVING,), event="derived", data=summary, summary=summary, actor=actor,
        at_us=clock.now_us(),
    )  # fmt: skip
    return Found(change, done.counts)


async def next_generation(connection: Any) -> int:
    """A generation that is higher than all that were opened."""
    opened = [one.generation for one in await positions.replays(connection)]
    return max([*opened, await changes.highest_generation(connection)], default=GENERATION_LIVE) + 1


async def _documents(connection: Any) -> Documents:
    loaded = await registry.load(connection, ("datatype", "parser", "type", "rule"))
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for kind, stored in loaded.items():
        found[kind] = {
            str(one.document["name"]): {**one.document, "rev": one.rev}
            for one in stored.values()
            if kind != "parser" or one.document["status"] == "active"
        }
    return found


async def parser_document(connection: Any, named: str) -> Mapping[str, Any]:
    """A version of a parser, whatever its status.

    Raises:
        ChangeError: the registry has none of that name and version.
    """
    name, _, version = named.rpartition("@")
    row = None
    if name and version.isdigit() and len(version) < 10:
        row = await connection.fetchrow(
            "SELECT doc, rev FROM parsers WHERE name = $1 AND parser_version = $2", name, int(version)
        )
    if row is None:
        there = [r[0] for r in await connection.fetch(
            "SELECT name || '@' || parser_version FROM parsers WHERE name = $1 ORDER BY parser_version LIMIT 50", name or named
        )]  # fmt: skip
        message = f"the registry has no parser {named}; write NAME@VERSION" + (
            f": there are {', '.join(there)}" if there else ""
        )
        raise ChangeError(message)
    return {**orjson.loads(row["doc"]), "rev": row["rev"]}


def documents_of(path: Path, section: str) -> dict[str, Mapping[str, Any]]:
    """The documents of a section of a registry file, by name; with a revision above all that the registry has.

    Raises:
        ChangeError: it has none, or one that is wrong.
        RegistryFileError: it cannot be read.
    """
    file = read_registry(path)
    if errors := [problem for problem in file.errors if not problem.path or problem.path.startswith(section)]:
        raise ChangeError("; ".join(map(str, errors[:5])))
    found: dict[str, Mapping[str, Any]] = {
        str(doc["name"]): {**doc, "rev": (1 << 62)} for doc in file.documents.get(SECTIONS[section], [])
    }
    if not found:
        message = f"{path}: has no {section}"
        raise ChangeError(message)
    return found


async def _devices(connection: Any, documents: Documents, candidate: Candidate, wanted: Wanted) -> list[str]:
    """Ids of the devices that are asked for, and that the candidate concerns."""
    types = set(documents["type"])
    if unknown := sorted(set(wanted.types) - types):
        message = f"the registry has no device type {', '.join(unknown)}"
        raise ChangeError(message)
    if wanted.types:
        types &= set(wanted.types)
    if candidate.parser is not None:
        name = candidate.parser["name"]
        types = {one for one in types if documents["type"][one]["parser"] == name}
        if not types:
            message = f"no device type{' of these' if wanted.types else ''} has the parser {name}"
            raise ChangeError(message)
    rows = await connection.fetch("SELECT device_id FROM devices WHERE type = ANY ($1)", list(types))
    found = {row["device_id"] for row in rows}
    if wanted.devices:
        asked = {await registry.spelled(connection, device_id) for device_id in wanted.devices}
        if missing := sorted(asked - found):
            message = (
                f"not registered, or of a type that the candidate does not concern: {', '.join(missing[:SHOWN_MAX])}"
            )
            raise ChangeError(message)
        found = asked
    if not found:
        message = "the registry has no such devices"
        raise ChangeError(message)
    return sorted(found)


async def _partitions(settings: Settings, from_us: int, until_us: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """(partition, first offset, end) of the raw records of a time, and partitions of which Kafka has deleted its beginning."""
    full = topics.RAW.full(settings.kafka.topic_prefix)
    found: list[tuple[int, int, int]] = []
    gone: list[int] = []
    async with Records(settings) as records:
        there = sorted(await records.partitions(full))
        begins = await records.since(full, there, from_us)
        for partition in there:
            span = await records.span(full, partition)
            assert span is not None
            begin = min(max(begins.get(partition, span.begin), span.begin), span.end)
            if begin == span.begin and span.begin > 0:
                gone.append(partition)
            found.append((partition, begin, span.end))
    return found, gone


async def merge_late(settings: Settings, connection: Any) -> None:
    """Bring rows that wait for their chunk where the others are: a change works on one table."""
    sink = settings.sink
    for _ in range(LATE_PIECES_MAX):
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM measurements_late)"):
            return
        moved = await connection.fetchval(
            "SELECT merge_late($1::text::interval, 20000, now() - make_interval(days => $2))",
            f"{sink.chunk_days} days",
            sink.retention_days,
        )
        if not moved:
            await asyncio.sleep(0.2)  # upkeep is at it


async def _all(job: _Job, processes: int | None, progress: Progress, what: str) -> _Done:
    """Derive everything; devices that write to several partitions once more, in the order of their messages."""
    parts = [one for one in job.partitions if one[2] > one[1]]
    done = await _run([replace(job, partitions=(one,)) for one in parts], processes, progress, what)
    scattered = sorted(device_id for device_id, seen in done.seen.items() if len(seen) > 1)
    if scattered:
        connection = await connect(job.settings.postgres.session_dsn, what="a shadow replay", timeout=CONNECT_S)
        try:
            for table in ("shadow_rows", "shadow_alarms"):
                await connection.execute(
                    f"DELETE FROM {table} WHERE change_id = $1 AND side = $2 AND device_id = ANY ($3)",
                    job.change_id,
                    job.side,
                    scattered,
                )
        finally:
            await connection.close(timeout=5)
        their = {partition for device_id in scattered for partition in done.seen[device_id]}
        again = replace(
            job, partitions=tuple(p for p in parts if p[0] in their), devices=tuple(scattered), scattered=True
        )
        await _run([again], 1, progress, f"{what}: devices of several partitions")
    return done


async def _run(jobs: Sequence[_Job], processes: int | None, progress: Progress, what: str) -> _Done:
    total = sum(end - begin for job in jobs for _, begin, end in job.partitions)
    result = _Done(Counts(), 0)
    workers = max(1, min(len(jobs), processes or default_processes()))
    progress(0, total, what)
    context = multiprocessing.get_context("spawn")
    counter, stopped = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(counter, stopped)) as pool:
        waiting = {pool.submit(_in_process, job) for job in jobs}
        try:
            while waiting:
                finished, waiting = await asyncio.to_thread(wait, waiting, 0.2, FIRST_COMPLETED)
                for one in finished:
                    part = one.result()
                    result.counts.add(part.counts)
                    result.left_out += part.left_out
                    for device_id, seen in part.seen.items():
                        result.seen.setdefault(device_id, set()).update(seen)
                progress(counter.value, max(counter.value, total), what)
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return result


# --- comparing -------------------------------------------------------------------------------------------------------

#: One derived row of each key, as the stores keep it: a later verdict, and of these the last; else what came first.
_DERIVED: Final = """
SELECT DISTINCT ON (device_id, component_type, pin_position, connector_mode, at) *
FROM shadow_rows WHERE change_id = $1 AND side = {side}
ORDER BY device_id, component_type, pin_position, connector_mode, at, revised DESC,
  CASE WHEN revised THEN -received_at ELSE received_at END, CASE WHEN revised THEN -raw_partition ELSE raw_partition END,
  CASE WHEN revised THEN -raw_offset ELSE raw_offset END, CASE WHEN revised THEN -raw_index ELSE raw_index END"""
_KEY: Final = "device_id, component_type, pin_position, connector_mode"
_EPOCH: Final = "'1970-01-01 00:00+00'::timestamptz"


def _at(name: str) -> str:
    return f"({_EPOCH} + {name} * INTERVAL '1 microsecond')"


def _content(alias: str, *, unit: str = "", topic: str = "") -> str:
    """What a row says; where two rows say the same, nothing is changed."""
    return (
        f"(float8send({alias}.value), nullif({alias}.value_text, ''), {unit or f'{alias}.unit'}, {topic or f'{alias}.topic'},"
        f" {alias}.quality, nullif({alias}.flags, '{{}}'))"
    )


async def _compare(connection: Any, settings: Settings, change: Change, job: _Job, wanted: Wanted) -> None:
    """Fill `change_found` with every key at which what is derived is not what is stored."""
    await connection.execute("DROP TABLE IF EXISTS change_found")
    await connection.execute(
        "CREATE TEMP TABLE change_found (device_id text, component_type text, pin_position text, connector_mode text, at bigint, op text,"
        " series_id integer)"
    )
    low, high = instant(job.span.from_us), instant(job.span.until_us)
    reach = timedelta(microseconds=wanted.reach_us)
    ahead = timedelta(seconds=settings.quality.future_skew_s)
    await connection.execute("DROP TABLE IF EXISTS change_derived")
    await connection.execute(
        f"CREATE TEMP TABLE change_derived AS {_DERIVED.format(side=0).replace('$1', str(change.change_id))}"
    )
    await connection.execute(f"CREATE INDEX ON change_derived ({_KEY}, at)")
    await connection.execute("ANALYZE change_derived")
    await connection.execute(
        f"INSERT INTO change_found SELECT d.device_id, d.component_type, d.pin_position, d.connector_mode, d.at,"
        f" CASE WHEN m.received_at IS NULL THEN 'added' ELSE 'changed' END, s.series_id"
        f" FROM change_derived d LEFT JOIN series s USING ({_KEY})"
        f" LEFT JOIN LATERAL (SELECT * FROM measurements WHERE series_id = s.series_id AND timestamp = {_at('d.at')}) m ON true"
        f" WHERE m.received_at IS NULL OR (m.received_at >= $1 AND m.received_at < $2"
        f"  AND {_content('d')} IS DISTINCT FROM {_content('m', unit='coalesce(m.unit, s.unit)', topic='coalesce(m.topic, s.topic)')})",
        low, high,
    )  # fmt: skip
    await connection.execute(
        "INSERT INTO change_found SELECT s.device_id, s.component_type, s.pin_position, s.connector_mode,"
        " (extract(epoch FROM m.timestamp) * 1000000)::bigint, 'removed', s.series_id"
        " FROM series s CROSS JOIN LATERAL (SELECT timestamp FROM measurements WHERE series_id = s.series_id"
        "  AND timestamp >= $3 AND timestamp < $4 AND received_at >= $1 AND received_at < $2) m"
        " WHERE s.device_id = ANY ($5) AND NOT EXISTS (SELECT FROM change_derived d WHERE (d.device_id, d.component_type, d.pin_position, d.connector_mode)"
        "  = (s.device_id, s.component_type, s.pin_position, s.connector_mode) AND d.at = (extract(epoch FROM m.timestamp) * 1000000)::bigint)",
        low, high, low - reach, high + ahead, list(job.devices),
    )  # fmt: skip


async def _of_candidate(connection: Any, change: Change) -> int:
    """Leave in `change_found` what the standing configuration does not make as well; how many rows that takes out."""
    await connection.execute("DROP TABLE IF EXISTS change_stood")
    await connection.execute(
        f"CREATE TEMP TABLE change_stood AS {_DERIVED.format(side=1).replace('$1', str(change.change_id))}"
    )
    await connection.execute(f"CREATE INDEX ON change_stood ({_KEY}, at)")
    await connection.execute("ANALYZE change_stood")
    found = await connection.execute(
        f"DELETE FROM change_found f USING (SELECT x.*, d.device_id IS NOT NULL AS is_derived, b.device_id IS NOT NULL AS has_stood,"
        f"  {_content('d')} IS NOT DISTINCT FROM {_content('b')} AS is_same FROM change_found x"
        f"  LEFT JOIN change_derived d USING ({_KEY}, at) LEFT JOIN change_stood b USING ({_KEY}, at)) w"
        f" WHERE (w.device_id, w.component_type, w.pin_position, w.connector_mode, w.at)"
        f"  = (f.device_id, f.component_type, f.pin_position, f.connector_mode, f.at)"
        # Of what was added nothing stood; of the others something did, and another.
        f" AND CASE f.op WHEN 'added' THEN w.has_stood WHEN 'removed' THEN NOT w.has_stood ELSE NOT w.has_stood OR w.is_same END"
    )
    return int(found.rpartition(" ")[2])


async def _note_rows(connection: Any, change: Change) -> dict[str, Any]:
    """Make rows of the change of what was found; what people corrected stays. Returns the counts."""
    corrected: int = int((await connection.execute(
        f"DELETE FROM change_found f USING measurements m WHERE f.op <> 'added' AND m.series_id = f.series_id AND m.timestamp = {_at('f.at')}"
        f" AND m.generation IN (SELECT generation FROM changes WHERE kind = 'correction')"
    )).rpartition(" ")[2])  # fmt: skip
    async with connection.transaction():
        await connection.execute(
            f"INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit, topic)"
            f" SELECT DISTINCT ON ({_KEY}) d.device_id, d.connector_mode, d.component_type, d.pin_position, d.unit, d.topic"
            f" FROM change_found f JOIN change_derived d USING ({_KEY}, at) WHERE f.op = 'added' AND f.series_id IS NULL ORDER BY {_KEY}, at"
            f" ON CONFLICT (device_id, component_type, pin_position, connector_mode) DO NOTHING"
        )
        await connection.execute(
            f"INSERT INTO derivations (parser, config_rev, experiment_id) SELECT DISTINCT d.parser, d.config_rev, d.experiment_id"
            f" FROM change_found f JOIN change_derived d USING ({_KEY}, at) WHERE f.op <> 'removed' ORDER BY 1, 2, 3"
            f" ON CONFLICT (parser, config_rev, experiment_id) DO NOTHING"
        )
        await connection.execute(
            f"INSERT INTO change_rows (change_id, series_id, timestamp, before, after)"
            f" SELECT $1, s.series_id, {_at('f.at')},"
            f"  (SELECT {changes.AS_ROW} FROM measurements m WHERE m.series_id = s.series_id AND m.timestamp = {_at('f.at')}),"
            f"  CASE WHEN d.device_id IS NOT NULL THEN ROW({_at('d.received_at')}, d.raw_offset, d.value, v.derivation_id, d.raw_index, $2::integer,"
            f"   d.raw_partition::smallint, d.quality, nullif(d.value_text, ''), nullif(d.flags, '{{}}'), nullif(d.unit, s.unit), nullif(d.topic, s.topic),"
            f"   NULL::timestamptz, CASE WHEN d.revised THEN true END)::change_row END"
            f" FROM change_found f JOIN series s USING ({_KEY}) LEFT JOIN change_derived d USING ({_KEY}, at)"
            f" LEFT JOIN derivations v ON (v.parser, v.config_rev, v.experiment_id) = (d.parser, d.config_rev, d.experiment_id)"
            f" WHERE (f.op = 'removed') = (d.device_id IS NULL)",
            change.change_id, change.generation,
        )  # fmt: skip
    counted = {row[0]: row[1] for row in await connection.fetch("SELECT op, count(*) FROM change_found GROUP BY 1")}
    devices: int = await connection.fetchval("SELECT count(DISTINCT device_id) FROM change_found")
    return {
        "added": counted.get("added", 0),
        "removed": counted.get("removed", 0),
        "changed": counted.get("changed", 0),
        "devices": devices,
        "corrected_kept": corrected,
    }


# --- alarms ----------------------------------------------------------------------------------------------------------

#: What of a transition may differ; when it was told by a clock may.
_SAID: Final = (
    "transition",
    "state",
    "severity",
    "value",
    "unit",
    "threshold",
    "message",
    "occurred_at",
    "transition_at",
)


def _said(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in _SAID)


async def _alarms(connection: Any, change: Change, job: _Job) -> dict[str, Any]:
    """What the candidate would have told, what was told, and the lines in which they differ."""
    derived = {
        row["transition_id"]: orjson.loads(row["line"])
        for row in await connection.fetch(
            "SELECT transition_id, line FROM shadow_alarms WHERE change_id = $1 AND side = 0", change.change_id
        )
    }
    rows = await connection.fetch(
        "SELECT transition_id, detail FROM alarm_events WHERE device_id = ANY ($1) AND generation = 0 AND detected_at >= $2 AND detected_at < $3 LIMIT $4",
        list(job.devices), instant(job.span.from_us), instant(job.span.until_us), ALARMS_MAX,
    )  # fmt: skip
    stored = {row["transition_id"]: orjson.loads(row["detail"]) for row in rows}
    # What operators did is their word, whatever the readings say.
    told = {name: line for name, line in stored.items() if not line.get("actor")}
    differ = [line for name, line in derived.items() if name not in told or _said(told[name]) != _said(line)]
    differ += [line for name, line in told.items() if name not in derived]
    return {"derived": derived, "stored": stored, "differ": differ}


async def _note_alarms(connection: Any, change: Change, alarmed: Mapping[str, Any]) -> dict[str, Any]:
    """Note the transitions that the candidate takes out of the history of alarms, and puts into it. Returns the counts."""
    derived, stored = alarmed["derived"], alarmed["stored"]
    devices = {line["device_id"] for line in alarmed["differ"]}
    stood = {
        row["transition_id"]: orjson.loads(row["line"])
        for row in await connection.fetch(
            "SELECT transition_id, line FROM shadow_alarms WHERE change_id = $1 AND side = 1", change.change_id
        )
    }
    added, removed = [], []
    for name, line in derived.items():
        if line["device_id"] not in devices or (name in stood and _said(stood[name]) == _said(line)):
            continue
        if name not in stored or _said(stored[name]) != _said(line):
            added.append(line)
            if name in stored:
                removed.append(stored[name])
    removed += [
        stored[name]
        for name, line in stood.items()
        if name in stored and name not in derived and line["device_id"] in devices
    ]
    touched = {line["alarm_id"] for line in (*added, *removed)}
    rows = await connection.fetch(
        "SELECT a.alarm_id, a.cleared_at IS NULL AS stands, EXISTS (SELECT FROM alarm_events e WHERE e.alarm_id = a.alarm_id"
        " AND e.detail ->> 'actor' IS NOT NULL) AS answered FROM alarms a WHERE a.alarm_id = ANY ($1)",
        list(touched),
    )
    standing = {row["alarm_id"] for row in rows if row["stands"]}
    answered = {row["alarm_id"] for row in rows if row["answered"]}
    over = {line["alarm_id"] for line in (*derived.values(), *stored.values()) if line.get("cleared_at")}
    # Those that stand are the live stage's; what people have answered was told to them.
    kept = {
        one
        for one in touched
        if one in answered or one in standing or (one not in over and one not in {row["alarm_id"] for row in rows})
    }
    columns = [column.name for column in ALARM_EVENTS.columns]
    for op, lines in (("added", added), ("removed", removed)):
        chosen = [line for line in lines if line["alarm_id"] not in kept]
        if op == "added":
            listed = ", ".join(f"${n}::{column.type}" for n, column in enumerate(ALARM_EVENTS.columns, 3))
            await connection.executemany(
                f"INSERT INTO change_alarm_events (change_id, op, {', '.join(columns)}, stored_at) VALUES ($1, $2, {listed}, now()) ON CONFLICT DO NOTHING",
                [(change.change_id, op, *ALARM_EVENTS.row(line)) for line in chosen],
            )
        else:
            await connection.execute(
                f"INSERT INTO change_alarm_events (change_id, op, {', '.join(columns)}, stored_at)"
                f" SELECT $1, 'removed', {', '.join(columns)}, stored_at FROM alarm_events WHERE transition_id = ANY ($2) ON CONFLICT DO NOTHING",
                change.change_id, [line["transition_id"] for line in chosen],
            )  # fmt: skip
    by_rule: dict[str, dict[str, int]] = {}
    for op, lines in (("added", added), ("removed", removed)):
        for line in lines:
            one = by_rule.setdefault(line["rule"], {"raised_added": 0, "raised_removed": 0, "added": 0, "removed": 0})
            one[op] += 1
            one[f"raised_{op}"] += line["transition"] == "raised"
    return {
        "added": len(added),
        "removed": len(removed),
        "kept": len(kept),
        "rules": by_rule,
    }


def shown(names: Iterable[str]) -> str:
    """Some names, for people."""
    some = list(names)
    return ", ".join(some[:SHOWN_MAX]) + (f" and {len(some) - SHOWN_MAX} more" if len(some) > SHOWN_MAX else "")
