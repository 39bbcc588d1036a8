"""Whether everything that came in is somewhere: an audit of a run from durable facts.

Nothing is taken from counters, which die with a worker. What counts is what Kafka and the stores hold:

1. every raw message of the run is standardized, or in `iot_errors`,
2. the readings in the standardized topic are those that the raw messages decode to, computed once more here,
3. every standardized reading is validated, or its message is in `iot_errors`,
4. the natural key of every validated reading that is to be stored is in PostgreSQL and in ClickHouse,
5. no store holds a key twice.

A message that a crash made a stage write twice is harmless, because the next stage knows its coordinates; such
duplicates are counted and shown.

A run begins at a `Window`: the end offsets of the topics before it. What an earlier run left unfinished in the same
data directory is worked off by this one, but has raw coordinates before the window, and is left out.

Memory: 16 bytes a reading and topic, 16 a row and store, some 100 an error; sets are made of one 64th at a time.
"""

import asyncio
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Protocol, cast

from preservarium import kafka_clients, records, topics
from preservarium.domain.decoders import ScriptParser
from preservarium.domain.errors import Reject
from preservarium.domain.normalize import CompiledDevice, compile_device, normalize, standardize
from preservarium.domain.reading import PIN_POSITION_NONE, ErrorLine, Message, Quality, RawMessage
from preservarium.normalizer import script_call, script_fields
from preservarium.sandbox.pool import Call, Limits, SandboxPool
from preservarium.settings import Kafka, Settings
from preservarium.stage import Batch
from preservarium.topics import Topic

#: Bags are compared one of so many parts at a time.
PARTS: Final = 64
_MASK: Final = (1 << 64) - 1

#: Topics that the audit reads, in the order of the flow.
AUDITED: Final[tuple[Topic, ...]] = (topics.RAW, topics.STANDARDIZED, topics.VALIDATED, topics.ERRORS)

#: Examples of what is missing that are named.
EXAMPLES_MAX: Final = 5
#: A read from Kafka that brings nothing for so long has failed.
SILENCE_S: Final = 30.0


def _hash(*parts: Any) -> int:
    """64 bits that stand for a tuple, for the life of this process.

    Among ten million keys the chance that any two of them collide is one in 370,000, and a collision could only hide
    a loss, not invent one.
    """
    return hash(parts) & _MASK


class Bag:
    """Keys with the identity of the message that each came from, as numbers, in bounded memory."""

    def __init__(self) -> None:
        self._parts = [array("Q") for _ in range(PARTS)]

    def add(self, key: int, identity: int) -> None:
        """Add a key; the same key may be added again."""
        part = self._parts[key % PARTS]
        part.append(key)
        part.append(identity)

    def __len__(self) -> int:
        """Keys added, duplicates included."""
        return sum(len(part) for part in self._parts) // 2

    def parts(self) -> Iterable[dict[int, int]]:
        """Distinct keys with an identity each, one part after the other."""
        for part in self._parts:
            yield dict(zip(part[::2], part[1::2], strict=True))

    def distinct(self) -> int:
        """Distinct keys."""
        return sum(len(part) for part in self.parts())

    def distinct_pairs(self) -> int:
        """Distinct keys with their identities: a key that two messages have counts twice."""
        return sum(len(set(zip(part[::2], part[1::2], strict=True))) for part in self._parts)

    def compare(self, other: "Bag", excused: AbstractSet[int] = frozenset()) -> "Comparison":
        """How the keys here compare with the keys of another bag.

        Args:
            other: where the keys should be too.
            excused: identities whose keys may be missing there.
        """
        both = missing = excuses = extra = 0
        examples: list[int] = []
        for mine, theirs in zip(self.parts(), other.parts(), strict=True):
            both += len(mine.keys() & theirs.keys())
            extra += len(theirs.keys() - mine.keys())
            for key in mine.keys() - theirs.keys():
                if mine[key] in excused:
                    excuses += 1
                else:
                    missing += 1
                    if len(examples) < EXAMPLES_MAX:
                        examples.append(mine[key])
        return Comparison(both, missing, excuses, extra, examples)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Distinct keys of one bag against another."""

    both: int
    missing: int  #: here, not there, and not excused
    excused: int  #: here, not there, and their message is in iot_errors
    extra: int  #: there, not here
    examples: list[int]  #: identities of some that are missing


@dataclass(frozen=True, slots=True)
class Window:
    """Where a run begins: per topic (declared name) and partition the first offset that belongs to it."""

    start: Mapping[str, Mapping[int, int]]

    def holds(self, raw_partition: Any, raw_offset: Any) -> bool:
        """Whether a message with these raw coordinates belongs to the run."""
        starts = self.start.get(topics.RAW.name, {})
        return isinstance(raw_offset, int) and raw_partition in starts and raw_offset >= starts[raw_partition]


#: What the raw topic's messages should have become: the pure normalizer with the registry of the run. None means that
#: it is refused.
Decode = Callable[[RawMessage], Message | None]


class ScriptDecode(Protocol):
    """The same for devices whose parser is a script: many at once, in the sandbox."""

    def wants(self, device_id: str) -> bool:
        """Whether this device's parser is a script."""
        ...

    async def decode(self, raws: Sequence[RawMessage]) -> list[Message | None]:
        """What each became; None: it is refused."""
        ...


class Ledger:
    """The audit's books: feed it every line of the run's topics, then every row, then ask for the account.

    Args:
        window: where the run begins.
        decode: makes readings of a raw message; None leaves check 2 out.
        scripts: the same for devices whose parser is a script.
        store_failed: whether values flagged fail are stored (`quality.store_failed`).
    """

    def __init__(
        self,
        window: Window,
        decode: Decode | None,
        *,
        scripts: ScriptDecode | None = None,
        store_failed: bool = False,
    ) -> None:
        self._window = window
        self._scripts = scripts
        self._script_messages: list[tuple[int, RawMessage]] = []
        self._decode = decode
        self._store_failed = store_failed
        self.raw = Bag()
        self.decoded = Bag()  # readings that the raw messages decode to
        self.standardized_messages = Bag()
        self.standardized = Bag()  # readings
        self.validated_messages = Bag()
        self.validated = Bag()  # readings
        self.stored_keys = Bag()  # natural keys of the readings that belong into the stores
        self.stores: dict[str, Bag] = {}
        self.unmerged: dict[str, int] = {}
        self.errors: Counter[tuple[str, str]] = Counter()  # (stage, code) -> lines that differ
        self.errors_by_identity: dict[str, set[int]] = {}  # stage -> identities
        self._error_lines: set[int] = set()
        self.errors_again = 0  # lines that were there already
        self.error_lines_unplaced = 0  # without raw coordinates
        self.earlier: Counter[str] = Counter()  # topic -> lines of messages from before the run
        self.timestamp_min: int | None = None
        self.timestamp_max: int | None = None

    # --- topics ---

    def add_raw(self, batch: Batch, *, payload_bytes_max: int) -> None:
        """Take records of `iot_raw_data`."""
        for record in batch.records:
            messages, refused = records.parse_raw(
                record, batch.topic, batch.partition, payload_bytes_max=payload_bytes_max
            )
            for line in refused:
                identity = self._identity(line["partition"], line["offset"], line["index"])
                self.raw.add(_hash(identity), identity)
            for raw in messages:
                identity = self._identity(raw["raw_partition"], raw["raw_offset"], raw["raw_index"])
                self.raw.add(_hash(identity), identity)
                if self._scripts is not None and self._scripts.wants(raw["device"]):
                    self._script_messages.append((identity, raw))
                elif self._decode is not None and (message := self._decode(raw)) is not None:
                    for reading in message["readings"]:
                        self.decoded.add(self._reading(identity, message, reading), identity)

    async def run_scripts(self) -> None:
        """Decode what `add_raw` has left to scripts."""
        if self._scripts is None or not self._script_messages:
            return
        waiting, self._script_messages = self._script_messages, []
        made = await self._scripts.decode([raw for _, raw in waiting])
        for (identity, _), message in zip(waiting, made, strict=True):
            for reading in message["readings"] if message is not None else ():
                self.decoded.add(self._reading(identity, cast(Message, message), reading), identity)

    def add_standardized(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take lines of `iot_standardized_data`."""
        for line in lines:
            if "silent_below" in line:
                continue  # says that a device is silent (validate), and holds no reading
            identity = self._of_run(line, topics.STANDARDIZED)
            if identity is None:
                continue
            self.standardized_messages.add(_hash(identity), identity)
            for reading in line["readings"]:
                self.standardized.add(self._reading(identity, line, reading), identity)

    def add_validated(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take lines of `iot_validated_data`."""
        for line in lines:
            identity = self._of_run(line, topics.VALIDATED)
            if identity is None:
                continue
            self.validated_messages.add(_hash(identity), identity)
            for reading in line.get("repeated", ()):  # the stores have it from the message that came before
                self.validated.add(self._reading(identity, line, reading), identity)
            for reading in line["readings"]:
                if reading.get("revised"):
                    continue  # a later verdict on a reading that stands before: no reading of its own
                if not reading.get("derived"):  # made by validate: nothing before it is like it
                    self.validated.add(self._reading(identity, line, reading), identity)
                if reading.get("quality") == Quality.FAIL and not self._store_failed:
                    continue
                if reading.get("value") is None and reading.get("value_text") is None:
                    continue
                timestamp = reading.get("timestamp", line["timestamp"])
                self.timestamp_min = min(timestamp, self.timestamp_min if self.timestamp_min is not None else timestamp)
                self.timestamp_max = max(timestamp, self.timestamp_max if self.timestamp_max is not None else timestamp)
                key = natural_key(
                    line["device_id"],
                    line["connector_mode"],
                    reading["component_type"],
                    reading.get("pin_position", PIN_POSITION_NONE),
                    timestamp,
                )
                self.stored_keys.add(key, identity)

    def add_errors(self, lines: Iterable[ErrorLine | Mapping[str, Any]]) -> None:
        """Take lines of `iot_errors`."""
        for line in lines:
            partition, offset = line.get("raw_partition"), line.get("raw_offset")
            if partition is None or offset is None:
                self.error_lines_unplaced += 1
                continue
            if not self._window.holds(partition, offset):
                self.earlier[topics.ERRORS.name] += 1
                continue
            identity = self._identity(partition, offset, line.get("raw_index", 0))
            self.errors_by_identity.setdefault(line["stage"], set()).add(identity)
            # What was refused stands in the line; only its times differ when a crash makes a stage say it again.
            same = _hash(identity, *(line.get(name) for name in ("stage", "code", "message", "raw", "raw_b64")))
            if same in self._error_lines:
                self.errors_again += 1
                continue
            self._error_lines.add(same)
            self.errors[line["stage"], line["code"]] += 1

    def _of_run(self, line: Mapping[str, Any], topic: Topic) -> int | None:
        if line.get("generation", 0) or not self._window.holds(line["raw_partition"], line["raw_offset"]):
            self.earlier[topic.name] += 1
            return None
        return self._identity(line["raw_partition"], line["raw_offset"], line["raw_index"])

    @staticmethod
    def _identity(partition: int, offset: int, index: int) -> int:
        # Packed, not hashed, so that an example can be named again: 12 bits partition, 36 offset, 16 index.
        return (partition & 0xFFF) << 52 | (offset & 0xFFFFFFFFF) << 16 | index & 0xFFFF

    @staticmethod
    def name(identity: int) -> str:
        """Raw coordinates of an identity: partition/offset/index."""
        return f"{identity >> 52}/{identity >> 16 & 0xFFFFFFFFF}/{identity & 0xFFFF}"

    @staticmethod
    def _reading(identity: int, message: Mapping[str, Any], reading: Mapping[str, Any]) -> int:
        return _hash(
            identity,
            reading["component_type"],
            reading.get("pin_position", PIN_POSITION_NONE),
            reading.get("timestamp", message["timestamp"]),
        )

    # --- stores ---

    def add_rows(self, store: str, rows: Iterable[Sequence[Any]]) -> None:
        """Take rows of a store: device_id, connector_mode, component_type, pin_position, timestamp in µs."""
        bag = self.stores.setdefault(store, Bag())
        for device_id, mode, component_type, pin_position, timestamp in rows:
            key = natural_key(device_id, mode, component_type, pin_position, timestamp)
            bag.add(key, key)

    # --- account ---

    def account(self) -> "Account":
        """Close the books."""
        normalize_errors = self.errors_by_identity.get("normalize", set())
        validate_errors = self.errors_by_identity.get("validate", set())
        account = Account()
        raw_messages = self.raw.distinct()
        readings_in: int | None = None

        messages = self.raw.compare(self.standardized_messages, normalize_errors)
        account.check(
            "raw messages neither standardized nor in iot_errors", messages.missing, map(self.name, messages.examples)
        )
        if self._decode is not None:
            readings_in = self.decoded.distinct()
            decoded = self.decoded.compare(self.standardized, normalize_errors)
            account.check(
                "readings that the raw messages hold and the standardized topic does not",
                decoded.missing,
                map(self.name, decoded.examples),
            )
            account.check("standardized readings that no raw message holds", decoded.extra, ())
        validated = self.standardized.compare(self.validated, validate_errors)
        account.check(
            "standardized readings neither validated nor in iot_errors",
            validated.missing,
            map(self.name, validated.examples),
        )
        to_store = self.stored_keys.distinct()
        rows: dict[str, int] = {}
        for store, bag in self.stores.items():
            stage = {"postgres": "sink", "clickhouse": "sync"}.get(store, store)
            stored = self.stored_keys.compare(bag, self.errors_by_identity.get(stage, set()))
            rows[store] = stored.both
            account.check(f"validated readings not in {store}", stored.missing, map(self.name, stored.examples))
            account.check(f"rows twice in {store}", len(bag) - bag.distinct(), ())

        account.facts = {
            "raw_messages": raw_messages,
            "readings_in": readings_in,
            "standardized": self.standardized.distinct(),
            "validated": self.validated.distinct(),
            "refused_by_validate": validated.excused,
            "to_store": to_store,
            "stored": rows,
            "errors": sum(self.errors.values()),
            "errors_by_code": {f"{stage}.{code}": n for (stage, code), n in sorted(self.errors.items())},
            "errors_unplaced": self.error_lines_unplaced,
            "duplicates_between_stages": {
                "standardized": len(self.standardized_messages) - self.standardized_messages.distinct(),
                "validated": len(self.validated_messages) - self.validated_messages.distinct(),
                "errors": self.errors_again,
            },
            "same_key_twice": self.stored_keys.distinct_pairs() - to_store,
            "unmerged_rows": dict(self.unmerged),
            "lines_of_earlier_runs": dict(self.earlier),
        }
        return account


def natural_key(device_id: str, mode: str, component_type: str, pin_position: str, timestamp_us: int) -> int:
    """The number that stands for a row's natural key."""
    return _hash(device_id, mode, component_type, pin_position, timestamp_us)


@dataclass(slots=True)
class Account:
    """The outcome."""

    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def check(self, what: str, count: int, examples: Iterable[str]) -> None:
        """Note something that must be zero."""
        self.checks.append({"what": what, "count": count, "examples": [*examples] if count else []})

    @property
    def adds_up(self) -> bool:
        """Whether everything that must be zero is."""
        return all(check["count"] == 0 for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The account as one object."""
        return {"adds_up": self.adds_up, **self.facts, "checks": self.checks}

    def lines(self) -> list[str]:
        """The account for people."""
        f = self.facts
        rows: list[tuple[str, Any, str]] = [
            ("raw messages", f["raw_messages"], ""),
            ("readings in", f["readings_in"], "decoded once more from the raw topic"),
            ("standardized", f["standardized"], ""),
            ("validated", f["validated"], f"{f['refused_by_validate']:,} refused" if f["refused_by_validate"] else ""),
            ("to be stored", f["to_store"], _note_same(f["same_key_twice"])),
        ]
        names = {"postgres": "PostgreSQL", "clickhouse": "ClickHouse"}
        for store, n in f["stored"].items():
            unmerged = f["unmerged_rows"].get(store)
            rows.append((f"stored in {names.get(store, store)}", n, f"{unmerged:,} not merged yet" if unmerged else ""))
        codes = ", ".join(f"{code} {n:,}" for code, n in f["errors_by_code"].items())
        rows.append(("errors", f["errors"], codes))
        twice = f["duplicates_between_stages"]
        rows.append(
            (
                "sent twice",
                sum(twice.values()),
                "between stages, after a crash; dropped by the next stage" if sum(twice.values()) else "",
            )
        )
        width = max(len(name) for name, _, _ in rows)
        out = []
        for name, value, note in rows:
            number = "–" if value is None else f"{value:,}"
            out.append(f"  {name:<{width}}  {number:>12}" + (f"  {note}" if note else ""))
        for check in self.checks:
            if check["count"]:
                examples = f" (raw {', '.join(check['examples'])})" if check["examples"] else ""
                out.append(f"  MISSING OR WRONG: {check['count']:,} {check['what']}{examples}")
        out.append(f"  adds up: {'yes' if self.adds_up else 'no'}")
        return out


def _note_same(n: int) -> str:
    return f"{n:,} more have the key of another (one row each)" if n else ""


# --- reading the facts -----------------------------------------------------------------------------------------------


async def open_window(kafka: Kafka) -> Window:
    """Note where a run begins: the end offsets now. Take it before anything of the run writes.

    Raises:
        TimeoutError: Kafka does not answer.
    """
    async with _Reader(kafka) as consumer:
        start: dict[str, dict[int, int]] = {}
        for topic in AUDITED:
            partitions = await _partitions(kafka, topic.full(kafka.topic_prefix))
            ends = await consumer.end_offsets(partitions)
            start[topic.name] = {tp.partition: offset for tp, offset in ends.items()}
        return Window(start)


async def read_topics(ledger: Ledger, window: Window, kafka: Kafka, *, payload_bytes_max: int) -> None:
    """Feed the run's topics to the ledger, from the window's start to the end that they have now.

    Raises:
        TimeoutError: Kafka stays silent.
    """
    async with _Reader(kafka) as consumer:
        for topic in AUDITED:
            async for batch in _scan(consumer, kafka, topic, window.start[topic.name]):
                if topic is topics.RAW:
                    ledger.add_raw(batch, payload_bytes_max=payload_bytes_max)
                    await ledger.run_scripts()
                    continue
                parsed, _ = records.parse_trusted(batch)
                lines = [line for lines in parsed for line in lines]
                if topic is topics.STANDARDIZED:
                    ledger.add_standardized(lines)
                elif topic is topics.VALIDATED:
                    ledger.add_validated(lines)
                else:
                    ledger.add_errors(lines)


class _Reader:
    """A consumer without a group: it reads beside the pipeline and commits nothing."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._consumer: Any = None

    async def __aenter__(self) -> Any:
        from aiokafka import AIOKafkaConsumer

        self._consumer = AIOKafkaConsumer(
            **kafka_clients.connection(self._kafka),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            # The audit runs after the work: large fetches cost nobody anything.
            max_partition_fetch_bytes=4 << 20,
        )
        await self._consumer.start()
        return self._consumer

    async def __aexit__(self, *_: object) -> None:
        await kafka_clients.stop(self._consumer)


async def _partitions(kafka: Kafka, topic: str) -> list[Any]:
    from aiokafka import TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(**kafka_clients.connection(kafka))
    await admin.start()
    try:
        # A topic that was made a moment ago may not be known at once.
        async with asyncio.timeout(SILENCE_S):
            while True:
                (found,) = await admin.describe_topics([topic])
                if found["partitions"]:
                    return [TopicPartition(topic, p) for p in sorted(p["partition"] for p in found["partitions"])]
                await asyncio.sleep(0.2)
    finally:
        await admin.close()


async def _scan(consumer: Any, kafka: Kafka, topic: Topic, start: Mapping[int, int]) -> AsyncIterator[Batch]:
    partitions = await _partitions(kafka, topic.full(kafka.topic_prefix))
    ends = await consumer.end_offsets(partitions)
    firsts = await consumer.beginning_offsets(partitions)
    todo = {tp: ends[tp] for tp in partitions if ends[tp] > start.get(tp.partition, 0)}
    for tp in todo:
        if firsts[tp] > start.get(tp.partition, 0):
            message = f"{tp.topic}[{tp.partition}]: the run's first records are past their retention already"
            raise ValueError(message)
    # One partition at a time: a bounded amount in memory, and records in their order.
    for tp, end in todo.items():
        consumer.assign([tp])
        consumer.seek(tp, start.get(tp.partition, 0))
        while await consumer.position(tp) < end:
            async with asyncio.timeout(SILENCE_S):
                got = await consumer.getmany(tp, timeout_ms=1_000, max_records=5_000)
            found = [record for record in got.get(tp, ()) if record.offset < end]
            if found:
                yield Batch(topic.name, tp.partition, found)


async def read_postgres(ledger: Ledger, dsn: str) -> None:
    """Feed the rows of the run's span of time to the ledger, from PostgreSQL."""
    import asyncpg

    ledger.stores.setdefault("postgres", Bag())
    if ledger.timestamp_min is None or ledger.timestamp_max is None:
        return
    connection = await asyncpg.connect(dsn, timeout=SILENCE_S)
    try:
        async with connection.transaction(readonly=True):
            cursor = await connection.cursor(_ROWS, _instant(ledger.timestamp_min), _instant(ledger.timestamp_max))
            while rows := await cursor.fetch(10_000):
                ledger.add_rows("postgres", rows)
    finally:
        await connection.close()


#: Rows that came too late for their chunk wait in a table of their own; one that is in both is merged already.
_ROWS: Final = """
SELECT device_id, connector_mode, component_type, pin_position,
       (extract(epoch FROM timestamp) * 1000000)::bigint AS timestamp_us
FROM iot_measurements WHERE timestamp BETWEEN $1 AND $2
UNION ALL
SELECT s.device_id, s.connector_mode, s.component_type, s.pin_position,
       (extract(epoch FROM l.timestamp) * 1000000)::bigint
FROM measurements_late l JOIN series s USING (series_id)
WHERE l.timestamp BETWEEN $1 AND $2 AND NOT EXISTS (
  SELECT FROM measurements m WHERE m.series_id = l.series_id AND m.timestamp = l.timestamp)
"""


async def read_clickhouse(ledger: Ledger, settings: Settings) -> None:
    """Feed the rows of the run's span of time to the ledger, from ClickHouse.

    FINAL: rows that a repeated insert left twice count once they are merged, which the engine does in its own time; how
    many wait for that is noted. What FINAL leaves twice is twice.
    """
    from preservarium.stores.migrate import connect_clickhouse

    ledger.stores.setdefault("clickhouse", Bag())
    if ledger.timestamp_min is None or ledger.timestamp_max is None:
        return
    client = await connect_clickhouse(settings, database=settings.clickhouse.database, wait_s=SILENCE_S)
    try:
        span = "timestamp BETWEEN fromUnixTimestamp64Micro({a:Int64}) AND fromUnixTimestamp64Micro({b:Int64})"
        bounds: dict[str, Any] = {"a": ledger.timestamp_min, "b": ledger.timestamp_max}
        counted = await client.query(f"SELECT count() FROM measurements WHERE {span}", parameters=bounds)
        found = 0
        # In slices, so that one answer stays small whatever the run was.
        for part in range(_SLICES):
            rows = await client.query(
                "SELECT device_id, connector_mode, component_type, pin_position, toUnixTimestamp64Micro(timestamp)"
                f" FROM measurements FINAL WHERE {span} AND cityHash64(device_id) % {_SLICES} = {part}",
                parameters=bounds,
            )
            ledger.add_rows("clickhouse", rows.result_rows)
            found += len(rows.result_rows)
        ledger.unmerged["clickhouse"] = counted.result_rows[0][0] - found
    finally:
        await client.close()


#: Parts that ClickHouse's rows are asked for in.
_SLICES: Final = 16


async def registry_decode(settings: Settings) -> "RegistryDecode":
    """The pure normalizer with the registry as it is now in PostgreSQL. To be closed: scripts run in processes.

    Raises:
        MigrationError: PostgreSQL cannot be reached.
    """
    from preservarium.stores import registry
    from preservarium.stores.migrate import connect_postgres

    connection = await connect_postgres(settings, wait_s=SILENCE_S)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            loaded = await registry.load(connection, ("datatype", "parser", "type", "device"))
    finally:
        await connection.close(timeout=5)
    documents = {
        kind: [{**stored.document, "rev": stored.rev} for stored in streams.values()]
        for kind, streams in loaded.items()
    }
    limits = Limits.of(settings)
    # Nothing is set aside here: what the worker refused stands in iot_errors, and the rest must be decoded. Nobody waits
    # either, so a script has more time than in the stream.
    sandbox = SandboxPool(
        replace(
            limits, cpu_s=limits.cpu_s * 5, wall_s=limits.wall_s * 5, hard_faults_max=1_000, soft_faults_max=1 << 62
        )
    )
    return RegistryDecode(documents, sandbox, readings_max=settings.normalize.readings_max)


class RegistryDecode:
    """What raw messages become with these registry documents (kind -> documents).

    Args:
        documents: datatypes, parsers, types and devices.
        sandbox: runs parser scripts; closed by `close`.
        readings_max: most readings that a message may become.
    """

    def __init__(
        self, documents: Mapping[str, Sequence[Mapping[str, Any]]], sandbox: SandboxPool, *, readings_max: int
    ) -> None:
        self._compiled = _compiler(documents)
        self._sandbox = sandbox
        self._readings_max = readings_max

    def __call__(self, raw: RawMessage) -> Message | None:
        """What a message became; None: it is refused."""
        configuration = self._compiled(raw["device"])
        if configuration is None:
            return None
        try:
            return normalize(raw, configuration, raw["received_at"], self._readings_max).message
        except Reject:
            return None

    def wants(self, device_id: str) -> bool:
        """Whether this device's parser is a script."""
        configuration = self._compiled(device_id)
        return configuration is not None and isinstance(configuration.decoder, ScriptParser)

    async def decode(self, raws: Sequence[RawMessage]) -> list[Message | None]:
        """What the scripts make of these messages.

        Raises:
            Fatal: the sandbox does not start.
        """
        made: list[Message | None] = [None] * len(raws)
        calls: list[tuple[int, CompiledDevice, ScriptParser, Call]] = []
        for i, raw in enumerate(raws):
            configuration = self._compiled(raw["device"])
            if (
                configuration is None
                or not isinstance(configuration.decoder, ScriptParser)
                or not configuration.enabled
            ):
                continue
            with suppress(Reject):
                calls.append((i, configuration, configuration.decoder, script_call(configuration.decoder, raw)))
        outcomes = await self._sandbox.run([call for *_, call in calls])
        for (i, configuration, parser, _), outcome in zip(calls, outcomes, strict=True):
            with suppress(Reject):
                fields = script_fields(parser, outcome)
                made[i] = standardize(raws[i], configuration, fields, self._readings_max).message
        return made

    async def close(self) -> None:
        """End the sandbox."""
        await self._sandbox.close()


def _compiler(documents: Mapping[str, Sequence[Mapping[str, Any]]]) -> Callable[[str], CompiledDevice | None]:
    datatypes: dict[str, Any] = {d["name"]: d for d in documents["datatype"]}
    parsers: dict[str, Any] = {p["name"]: p for p in documents["parser"] if p["status"] == "active"}
    types: dict[str, Any] = {t["name"]: t for t in documents["type"]}
    devices: dict[str, Any] = {d["device_id"]: d for d in documents["device"]}
    # Parsers are compiled once for all devices that have no variables of their own: compiling is the costly part.
    shared: dict[str, Any] = {}

    @lru_cache(maxsize=100_000)
    def compiled(device_id: str) -> CompiledDevice | None:
        device = devices.get(device_id)
        device_type = types.get(device["type"]) if device else None
        parser = parsers.get(device_type["parser"]) if device_type else None
        if device is None or device_type is None or parser is None:
            return None
        decoder = None if device.get("variables") else shared.get(parser["name"])
        try:
            found = compile_device(device, device_type, parser, datatypes.get, decoder)
        except Reject:
            return None
        if not device.get("variables"):
            shared[parser["name"]] = found.decoder
        return found

    return compiled


async def group_lag(settings: Settings, groups: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Records that consumer groups have not committed yet.

    Args:
        settings: where Kafka is.
        groups: (group, topic without prefix).

    Returns:
        The lag of each pair, read in the order of the flow: where all are 0, nothing is under way between them that
        was there when the first was read.
    """
    from aiokafka import TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient

    kafka, prefix = settings.kafka, settings.kafka.topic_prefix
    order = {topic.name: n for n, topic in enumerate(topics.TOPICS)}
    admin = AIOKafkaAdminClient(**kafka_clients.connection(kafka))
    await admin.start()
    try:
        async with _Reader(kafka) as consumer:
            lags: dict[tuple[str, str], int] = {}
            for group, topic in sorted(groups, key=lambda pair: (order.get(pair[1], len(order)), pair)):
                partitions = [
                    TopicPartition(prefix + topic, tp.partition) for tp in await _partitions(kafka, prefix + topic)
                ]
                committed = await admin.list_consumer_group_offsets(group, partitions=partitions)
                ends = await consumer.end_offsets(partitions)
                begins = await consumer.beginning_offsets(partitions)
                lag = 0
                for tp in partitions:
                    offset = committed[tp].offset if tp in committed else -1
                    # Nothing committed yet: everything that is there is still to be read.
                    lag += max(0, ends[tp] - (offset if offset >= 0 else begins[tp]))
                lags[group, topic] = lag
            return lags
    finally:
        await admin.close()


def _instant(us: int) -> datetime:
    # Whole microseconds: a float of seconds would round the last digit.
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
