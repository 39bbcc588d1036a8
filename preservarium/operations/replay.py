"""Reading topics again: positions set where they really are, or a new generation where that is what is wanted.

What a stage does when its offset is set back depends on where it keeps what it knows:

| stages | where they stand | what setting it back does |
|---|---|---|
| `sink…` | `sink_offsets` in PostgreSQL, moved with the rows | what is missing is stored; rows that stand stay |
| `sync…` | the offset of their consumer group | what is missing is inserted; rows that stand are left out |
| normalize, validate, alarm, aggregate, anomaly | the shared group, and what each has applied | nothing: they skip what they have applied |
| others | – | messages, commands or notices would go out again, or nothing would happen: refused |

For the third row a **generation** is opened: the raw records of a time are normalized again, here, with the registry as it is now,
and go through the stages beside the live ones, which keep a state of its own for each generation. They keep their raw coordinates, so
that every row still names the bytes that it came from, and a replay that was interrupted can be sent again from its beginning: the
stages skip what they have of it.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from time import monotonic
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import KafkaError

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.domain.readings.lineage import GENERATION_LIVE, GENERATIONS_MAX
from preservarium.errors import PreservariumError, reason
from preservarium.operations.raw_records import Records
from preservarium.operations.sync_status import STAGES as SYNC_STAGES
from preservarium.operations.sync_status import group_positions
from preservarium.registry.catalogue import Catalogue
from preservarium.sandbox.pool import Limits, SandboxPool
from preservarium.settings import LiveSettings, Settings
from preservarium.stages.normalize import Normalizer
from preservarium.stores import positions, registry
from preservarium.stores.tables import EVENT_TABLES
from preservarium.streaming import kafka_clients
from preservarium.streaming.publish import Publisher
from preservarium.streaming.records import GENERATION_HEADER, generation_of
from preservarium.streaming.records.metadata import GENERATION_MAX
from preservarium.streaming.stage import Batch
from preservarium.topics import Topic

#: Stages that are derived anew by a generation only.
DERIVING: Final = ("normalize", "validate", "aggregate", "anomaly", "alarm")
#: Stages that keep their positions in PostgreSQL, and the topic of each.
SINKS: Final[Mapping[str, Topic]] = {
    "sink": topics.VALIDATED,
    "sink-decoded": topics.DECODED,
    **{f"sink-{suffix}": declared.topic for suffix, declared in EVENT_TABLES.items()},
}
#: Stages of ClickHouse, and the topic of each.
SYNCS: Final[Mapping[str, Topic]] = {stage: topic for stage, topic, _ in SYNC_STAGES}
#: Why others are refused.
REFUSED: Final[Mapping[str, str]] = {
    "notify": "notices would be sent again",
    "notify-endpoints": "notices would be sent again",
    "downlink": "commands would be sent to devices again",
    "commands": "commands that are over are skipped: nothing would happen",
    "command-uplinks": "commands that are over are skipped: nothing would happen",
    "command-alarms": "commands of old alarms would be asked for again, and skipped",
    "route": "people would be told of old alarms",
    "group": "people would be told of old alarms",
    "registry": "it keeps the newest of each device already; `preservarium registry verify` says whether the registry is whole",
    "employees": "it keeps the newest of each employee already",
    "alarm-actions": "an action that was done is not done again: nothing would happen",
}
STAGES: Final = (*SINKS, *SYNCS, *DERIVING, *REFUSED)

#: Raw records that are normalized at once.
RECORDS_AT_ONCE: Final = 500
#: A group that is told of new positions shares its partitions out anew within this time; if not, it finds out by itself.
REBALANCE_S: Final = 20.0
#: Kafka answers within this time.
ASK_S: Final = 15.0


class ReplayError(PreservariumError):
    """It cannot be replayed; the message says why, and what can be done."""


class Way(StrEnum):
    """How a stage is made to read again."""

    DATABASE = "database"  #: positions in `sink_offsets`
    GROUP = "group"  #: the offset of its consumer group
    GENERATION = "generation"  #: the raw records once more, under a new generation


@dataclass(frozen=True, slots=True)
class Target:
    """Where to read from: the beginning, a time, or an offset of one partition."""

    earliest: bool = False
    at_us: int | None = None  #: by Kafka's time of the records, µs since the epoch, UTC
    offset: int | None = None

    def __str__(self) -> str:
        return (
            "earliest"
            if self.earliest
            else f"offset {self.offset}"
            if self.offset is not None
            else f"time {self.at_us}"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """One partition: where the stage stands, and where it will."""

    begin: int  #: what Kafka holds begins here
    end: int
    now: int | None  #: where the stage stands; None: nowhere yet, so that it begins at the beginning
    to: int

    @property
    def again(self) -> int:
        """Records that it will read a second time."""
        return max(0, (self.now or 0) - self.to) if self.now is not None else 0

    @property
    def skipped(self) -> int:
        """Records that it will never read."""
        return max(0, self.to - max(self.now if self.now is not None else self.begin, self.begin))


@dataclass(slots=True)
class Plan:
    """What would be done, before anybody is asked."""

    stage: str
    way: Way
    topic: str  #: declared name
    target: str
    places: dict[int, Place]
    group: str = ""  #: consumer group, where one is concerned
    members: int = 0  #: of the group, now
    generation: int | None = None  #: that would be opened, or gone on with
    resumed: bool = False  #: it was opened before
    says: list[str] = field(default_factory=list)  #: what will happen, for people

    @property
    def records(self) -> int:
        """Records that are read again: of a generation, raw ones."""
        if self.way is Way.GENERATION:
            return sum(max(0, place.end - place.to) for place in self.places.values())
        return sum(place.again for place in self.places.values())

    @property
    def skipped(self) -> int:
        """Records that are never read."""
        return 0 if self.way is Way.GENERATION else sum(place.skipped for place in self.places.values())

    @property
    def moves(self) -> dict[int, Place]:
        """Partitions whose position changes."""
        return {p: place for p, place in self.places.items() if place.to != place.now}

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "stage": self.stage,
            "way": str(self.way),
            "topic": self.topic,
            "to": self.target,
            "group": self.group or None,
            "members": self.members,
            "generation": self.generation,
            "records": self.records,
            "skipped": self.skipped,
            "partitions": {
                str(p): {"begin": at.begin, "end": at.end, "now": at.now, "to": at.to, "again": at.again}
                for p, at in sorted(self.places.items())
            },
            "says": self.says,
        }


Progress = Callable[[int, int, str], None]  #: (raw records done, raw records, where)


def way_of(stage: str) -> Way:
    """How a stage is made to read again.

    Raises:
        ReplayError: it is not, or there is no such stage.
    """
    if stage in SINKS:
        return Way.DATABASE
    if stage in SYNCS:
        return Way.GROUP
    if stage in DERIVING:
        return Way.GENERATION
    if stage in REFUSED:
        message = f"stage {stage} is not set back: {REFUSED[stage]}"
        raise ReplayError(message)
    message = f"there is no stage {stage}; there are: {', '.join(STAGES)}"
    raise ReplayError(message)


# --- planning


async def plan(
    settings: Settings,
    connection: Any,
    stage: str,
    target: Target,
    *,
    only: Sequence[int] = (),
    generation: int | None = None,
) -> Plan:
    """Say what setting a stage back would do. Changes nothing.

    Args:
        settings: where Kafka is.
        connection: of asyncpg.
        stage: which.
        target: where to.
        only: partitions; none: all.
        generation: of a replay that was interrupted, to go on with it; or a number of one's own.

    Raises:
        ReplayError: that stage is not set back, or there is nothing to read.
        RecordsError, StatusError: Kafka cannot be asked.
    """
    way = way_of(stage)
    topic = topics.RAW if way is Way.GENERATION else SINKS.get(stage) or SYNCS[stage]
    if generation is not None and way is not Way.GENERATION:
        message = f"stage {stage} has no generations of its own: leave --generation out"
        raise ReplayError(message)
    full = settings.normalize.decoded_topic if topic is topics.DECODED else topic.full(settings.kafka.topic_prefix)
    made = Plan(stage, way, topic.name, str(target), {})
    now: Mapping[int, int | None] = {}
    if way is not Way.GENERATION:
        made.group = f"{settings.kafka.group}-{stage}"
        made.members = await _members(settings, made.group)
    if way is Way.DATABASE:
        now = await positions.stored(connection, stage, topic.name, settings.sink.generation)
    elif way is Way.GROUP:
        found = (await group_positions(settings, [(stage, topic)]))[stage]
        now = {p: at.committed for p, at in found.items()}
    async with Records(settings) as records:
        there = await records.partitions(full)
        if not there:
            message = f"Kafka has no topic {full}"
            raise ReplayError(message)
        if wrong := sorted(set(only) - there):
            message = f"{full} has no partition {', '.join(map(str, wrong))}; it has {len(there)}"
            raise ReplayError(message)
        wanted = sorted(set(only) or there)
        if target.offset is not None and len(wanted) > 1:
            message = "an offset is of one partition: name it by --partition, or give a time"
            raise ReplayError(message)
        since = {} if target.at_us is None else await records.since(full, wanted, target.at_us)
        for partition in wanted:
            span = await records.span(full, partition)
            assert span is not None
            to = since.get(partition, span.begin) if target.offset is None else target.offset
            if target.offset is not None and not span.begin <= to <= span.end:
                message = f"{full}[{partition}] holds offsets {span.begin} to {span.end}, and not {to}"
                raise ReplayError(message)
            made.places[partition] = Place(span.begin, span.end, now.get(partition), max(to, span.begin))
    if way is Way.GENERATION:
        await _plan_generation(connection, made, generation)
    made.says = _says(made, settings)
    return made


async def _plan_generation(connection: Any, made: Plan, generation: int | None) -> None:
    opened = await positions.replays(connection)
    known = {one.generation: one for one in opened}
    if generation is not None and (one := known.get(generation)) is not None:
        if one.sent_at is not None:
            message = f"generation {generation} was sent whole: open another one"
            raise ReplayError(message)
        # From where it began: what the stages have of it they skip.
        made.resumed = True
        made.target = f"generation {generation}, as it was opened"
        made.places = {
            p: Place(place.begin, one.ends[p], None, max(one.starts[p], place.begin))
            for p, place in made.places.items()
            if p in one.ends
        }
        made.generation = generation
        return
    highest = max([*known, await _highest(connection)], default=GENERATION_LIVE)
    made.generation = highest + 1 if generation is None else generation
    if not GENERATION_LIVE < made.generation <= GENERATION_MAX:
        message = f"a generation is a number from 1 to {GENERATION_MAX}"
        raise ReplayError(message)
    if made.generation <= highest:
        message = f"generation {made.generation} would not count: rows of generation {highest} overwrite it"
        raise ReplayError(message)


async def _highest(connection: Any) -> int:
    """The highest generation of rows that somebody opened by hand: as far as it shows in what was received last."""
    found: int | None = await connection.fetchval(
        "SELECT max(m.generation) FROM series s CROSS JOIN LATERAL ("
        " SELECT generation FROM measurements WHERE series_id = s.series_id ORDER BY timestamp DESC LIMIT 20) AS m"
        " WHERE s.series_id IN (SELECT series_id FROM series ORDER BY series_id DESC LIMIT 500)"
    )
    return found or GENERATION_LIVE


def _says(made: Plan, settings: Settings) -> list[str]:
    if made.way is Way.GENERATION:
        says = [
            f"Setting back the offset of {made.stage} would derive nothing: the stages know what they have applied, and skip it.",
            f"So generation {made.generation} is {'gone on with' if made.resumed else 'opened'}: {made.records:,} raw records are normalized "
            "again, with the registry as it is now, and go through validate, alarm, aggregate, anomaly, sink and sync beside the live ones.",
            "What comes out overwrites the rows of lower generations, in both databases. What is refused this time goes to iot_errors, "
            "and the row that stands stays.",
            "Nobody is told of its alarms, and dashboards do not count it. Tests, counters and windows begin anew: the first reading of "
            "a counter tells no consumption, and windows that the time holds in part are made of that part.",
            f"A device keeps the state of {GENERATIONS_MAX - 1} replays: of more, the oldest must be over.",
        ]
        if gone := [p for p, place in made.places.items() if place.to == place.begin and place.begin > 0]:
            says.append(
                f"Kafka keeps raw records for {(topics.RAW.retention_ms or 0) // topics.HOUR_MS} hours unless told otherwise: partition "
                f"{', '.join(map(str, gone))} begins where its retention says."
            )
        return says
    says = []
    if made.way is Way.DATABASE:
        says.append(
            f"The position of {made.stage} is in PostgreSQL (sink_offsets, sink.generation {settings.sink.generation}); Kafka's offset of "
            f"group {made.group} does not count."
        )
        says.append(
            f"{made.records:,} records are read again: rows that stand stay as they are, what is missing is stored. "
            "Nothing is derived again, and nothing is overwritten."
        )
        if made.members:
            says.append(f"Workers run ({made.members} in the group): they go on from there at once.")
    else:
        says.append(f"The position of {made.stage} is the offset of group {made.group} in Kafka.")
        says.append(
            f"{made.records:,} records are read again: rows that ClickHouse holds are left out, what is missing is inserted."
            if made.stage == "sync"
            else f"{made.records:,} records are inserted again: the table keeps one row of each key."
        )
        if made.members:
            says.append(
                f"Workers run ({made.members} in the group): Kafka moves the offset of no group that has members. Stop them first, "
                "or bring ClickHouse to what PostgreSQL holds beside them: `preservarium sync verify --repair`."
            )
    if made.skipped:
        says.append(f"{made.skipped:,} records lie between the position and the target: they would NEVER be stored.")
    if not made.moves:
        says.append("It stands there already: nothing is to be done.")
    return says


async def _members(settings: Settings, group: str) -> int:
    """Members of a consumer group; 0 where there is none."""
    admin = AIOKafkaAdminClient(**kafka_clients.connection(settings.kafka))
    try:
        async with asyncio.timeout(ASK_S):
            await admin.start()
            if group not in {name for name, *_ in await admin.list_consumer_groups()}:
                return 0
            return sum(
                len(described[5])
                for answer in await admin.describe_consumer_groups([group])
                for described in answer.groups
            )
    except (KafkaError, OSError, TimeoutError) as e:
        message = f"Kafka cannot be asked at {settings.kafka.bootstrap_servers}: {reason(e)}"
        raise ReplayError(message) from None
    finally:
        await kafka_clients.stop(admin, 5.0)


# --- doing it


async def move(settings: Settings, connection: Any, made: Plan, *, skip: bool = False) -> bool:
    """Set positions as planned; whether a running group has taken them up already.

    Args:
        settings: where Kafka is.
        connection: of asyncpg.
        made: a plan of `Way.DATABASE` or `Way.GROUP`.
        skip: also where records would be skipped.

    Raises:
        ReplayError: records would be skipped, or the group has members and its offset is in Kafka.
    """
    if made.skipped and not skip:
        message = f"{made.skipped:,} records would never be stored: say --skip where that is what you want"
        raise ReplayError(message)
    to = {partition: place.to for partition, place in made.moves.items()}
    if not to:
        return True
    if made.way is Way.DATABASE:
        await positions.move(connection, made.stage, made.topic, settings.sink.generation, to)
        topic = SINKS[made.stage]
        full = settings.normalize.decoded_topic if topic is topics.DECODED else topic.full(settings.kafka.topic_prefix)
        # Who has nothing to write does not look at its position.
        return await _share_out_anew(settings, made.group, full) if made.members else False
    if made.members:
        message = f"group {made.group} has {made.members} members: stop the workers first"
        raise ReplayError(message)
    full = SYNCS[made.stage].full(settings.kafka.topic_prefix)
    consumer = AIOKafkaConsumer(**kafka_clients.reading(settings.kafka), group_id=made.group, enable_auto_commit=False)
    try:
        async with asyncio.timeout(ASK_S):
            await consumer.start()
            consumer.assign([TopicPartition(full, p) for p in to])
            # Nothing is noted beside it, so the stage takes what comes for what may be written already.
            await consumer.commit({TopicPartition(full, p): (offset, "") for p, offset in to.items()})
    except (KafkaError, OSError, TimeoutError) as e:
        message = f"the offset of group {made.group} was not moved: {reason(e)}"
        raise ReplayError(message) from None
    finally:
        await kafka_clients.stop(consumer)
    return False


async def _share_out_anew(settings: Settings, group: str, full: str) -> bool:
    """Join a group for a moment: its members share their partitions out anew, and look where the store stands. Best effort."""
    consumer = AIOKafkaConsumer(
        **kafka_clients.reading(settings.kafka),
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        session_timeout_ms=round(settings.kafka.session_timeout_s * 1000),
        rebalance_timeout_ms=60_000,
        partition_assignment_strategy=(RoundRobinPartitionAssignor,),
    )
    try:
        async with asyncio.timeout(REBALANCE_S):
            await consumer.start()
            consumer.subscribe([full])
            while not consumer.assignment():
                await consumer.getmany(timeout_ms=200, max_records=1)
        return True
    except (KafkaError, OSError, TimeoutError):
        return False
    finally:
        await kafka_clients.stop(consumer)


@dataclass(frozen=True, slots=True)
class _Again:
    """A raw record as it comes in a replay."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


@dataclass(slots=True)
class Sent:
    """What a generation has sent."""

    generation: int
    records: int = 0  #: raw records that were normalized
    passed: int = 0  #: raw records of a replay before: not replayed
    messages: int = 0  #: records of standardized messages
    errors: int = 0  #: error lines
    gone: int = 0  #: offsets without a record by now: deleted by Kafka's retention meanwhile, or never one

    def document(self) -> dict[str, int]:
        """As JSON."""
        return {
            "generation": self.generation,
            "records": self.records,
            "passed": self.passed,
            "messages": self.messages,
            "errors": self.errors,
            "gone": self.gone,
        }


class _Devices:
    """Devices out of the database, by any spelling; and the catalogue of all that they need."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._known: dict[str, Any] = {}

    async def lookup_many(self, partition: int, device_ids: Any) -> Mapping[str, Any]:
        """Documents of those devices that are registered."""
        wanted = list(device_ids)
        missing = [one for one in wanted if one not in self._known]
        if missing:
            found = await registry.composite(self._connection, missing)
            self._known.update({one: found[one].device if one in found else None for one in missing})
        return {one: self._known[one] for one in wanted if self._known[one] is not None}


class _Registry(Catalogue):
    """The registry as it is in the database now."""

    async def ready(self, timeout_s: float = 0.0) -> None:
        """At once."""


async def send(
    settings: Settings,
    connection: Any,
    made: Plan,
    *,
    actor: str,
    rate: float | None = None,
    progress: Progress = lambda *_: None,
) -> Sent:
    """Open the planned generation, or go on with it, and send all of it.

    Args:
        settings: where Kafka is, and limits.
        connection: of asyncpg.
        made: a plan of `Way.GENERATION`.
        actor: who asked for it.
        rate: raw records a second at most; None: as fast as it goes.
        progress: told how far it is.

    Raises:
        ConflictError: somebody else opened a generation meanwhile.
        Retry: Kafka does not take the records. Go on with `plan(generation=…)`.
    """
    assert made.generation is not None
    clock = SystemClock()
    if not made.resumed:
        await positions.open_replay(
            connection,
            made.generation,
            {p: place.to for p, place in made.places.items()},
            {p: place.end for p, place in made.places.items()},
            actor=actor,
            at_us=clock.now_us(),
        )
    catalogue = _Registry()
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        loaded = await registry.load(connection, ("datatype", "parser", "type"))
    for kind, documents in loaded.items():
        for stored in documents.values():
            if kind != "parser" or stored.document["status"] == "active":
                catalogue.offer(kind, {**stored.document, "rev": stored.rev})
    live = LiveSettings(settings)
    sandbox = SandboxPool(Limits.of(settings))
    publisher = Publisher(live)
    normalizer = Normalizer(_Devices(connection), catalogue, clock, live, sandbox)
    done, total, began_s = Sent(made.generation), made.records, monotonic()
    header = GENERATION_HEADER, b"%d" % made.generation
    full = topics.RAW.full(settings.kafka.topic_prefix)
    try:
        async with Records(settings) as records:
            progress(0, total, "")
            for partition, place in sorted(made.places.items()):
                async for some in records.between(full, partition, place.to, place.end):
                    live_ones = [one for one in some if generation_of(one) == GENERATION_LIVE]
                    done.passed += len(some) - len(live_ones)
                    if live_ones:
                        again = [
                            _Again(one.offset, one.timestamp, one.key, one.value, (*_without(one.headers), header))
                            for one in live_ones
                        ]
                        effects = await normalizer(Batch(topics.RAW.name, partition, again))
                        await publisher.publish(effects.sends)
                        errors = sum(one.topic is topics.ERRORS for one in effects.sends)
                        done.errors += errors
                        done.messages += len(effects.sends) - errors
                        done.records += len(again)
                    progress(done.records + done.passed, total, f"raw {partition}:{some[-1].offset}")
                    if rate is not None:
                        await asyncio.sleep(max(0.0, began_s + done.records / rate - monotonic()))
            done.gone = total - done.records - done.passed
        await positions.close_replay(
            connection, made.generation, {k: v for k, v in done.document().items() if k != "generation"},
            actor=actor, at_us=clock.now_us(),
        )  # fmt: skip
    finally:
        await publisher.on_stop()
        await sandbox.close()
    return done


def _without(headers: Any) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, value) for name, value in headers or () if name != GENERATION_HEADER)
