"""The consumers of `decoded_iot_data`, switched over from the replaced service's group.

`sink-decoded` and `sync-decoded` begin where the old service's group stands, so that what it has stored is not read once more, and what it has not
is. It committed by the clock, whether it had stored or not, so they begin some records earlier: rows that stand are told apart by their keys.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from preservarium import topics
from preservarium.errors import PreservariumError, reason
from preservarium.operations.sync_status import committed_by
from preservarium.settings import Settings
from preservarium.stores import positions
from preservarium.streaming import kafka_clients

#: The replaced service's consumer group, as its manual says.
GROUP: Final = "timescale_sink_group"
#: Records that are read once more: what the old service held in its hand when it ended, ten batches of its largest.
OVERLAP: Final = 10_000
ASK_S: Final = 15.0
SINK: Final = "sink-decoded"
SYNC: Final = "sync-decoded"


class OffsetsError(PreservariumError):
    """The consumers cannot be switched over; the message says why, and what can be done."""


@dataclass(frozen=True, slots=True)
class Place:
    """One partition of the topic."""

    begin: int  #: what Kafka holds begins here
    end: int
    old: int | None  #: where the old group stands; None: nowhere
    sink: int | None  #: where the sink stands
    sync: int | None  #: where ClickHouse's stage stands
    to: int  #: where both are to begin


@dataclass(slots=True)
class Plan:
    """What would be done."""

    topic: str
    group: str
    members: int = 0  #: of the old group
    workers: int = 0  #: members of our groups
    clickhouse: bool = True
    places: dict[int, Place] = field(default_factory=dict)

    @property
    def begun(self) -> list[int]:
        """Partitions that our sink has begun already."""
        return sorted(p for p, place in self.places.items() if place.sink is not None or place.sync is not None)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "topic": self.topic,
            "group": self.group,
            "members": self.members,
            "workers": self.workers,
            "partitions": {
                str(p): {"begin": a.begin, "end": a.end, "old": a.old, "sink": a.sink, "sync": a.sync, "to": a.to}
                for p, a in sorted(self.places.items())
            },
        }


async def plan(settings: Settings, connection: Any, *, group: str = GROUP, overlap: int = OVERLAP) -> Plan:
    """Where the old group stands, and where ours would begin.

    Raises:
        OffsetsError: there is no such topic or group, or Kafka cannot be asked.
    """
    full = settings.normalize.decoded_topic
    if not full:
        msg = "normalize.decoded_topic is empty: the old service's topic is not read"
        raise OffsetsError(msg)
    made = Plan(full, group, clickhouse=settings.clickhouse.enabled)
    ours = {name: f"{settings.kafka.group}-{name}" for name in (SINK, SYNC)}
    consumer = AIOKafkaConsumer(**kafka_clients.reading(settings.kafka), enable_auto_commit=False)
    admin = AIOKafkaAdminClient(**kafka_clients.connection(settings.kafka))
    try:
        async with asyncio.timeout(4 * ASK_S):
            await consumer.start()
            await admin.start()
            # All topics are asked for: naming one that is missing makes it on brokers that auto-create.
            there = {t["topic"]: t["partitions"] for t in await admin.describe_topics(None) if not t["error_code"]}
            if full not in there:
                msg = f"Kafka has no topic {full}"
                raise OffsetsError(msg)
            tps = [TopicPartition(full, p) for p in sorted(p["partition"] for p in there[full])]
            begins, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
            committed = {name: await committed_by(admin, name, tps) for name in (group, *ours.values())}
            made.members = await _members(admin, group)
            made.workers = sum([await _members(admin, name) for name in ours.values()])
    except (KafkaError, OSError, TimeoutError) as e:
        msg = f"Kafka cannot be asked at {settings.kafka.bootstrap_servers}: {reason(e)}"
        raise OffsetsError(msg) from e
    finally:
        for client in (consumer, admin):
            await kafka_clients.stop(client, ASK_S)
    stored = await positions.stored(connection, SINK, topics.DECODED.name, settings.sink.generation)
    for tp in tps:
        old = _offset(committed[group], tp)
        # A partition that the old group has read nothing of: all that there is.
        to = begins[tp] if old is None else max(begins[tp], min(old, ends[tp]) - overlap)
        made.places[tp.partition] = Place(
            begins[tp], ends[tp], old, stored.get(tp.partition), _offset(committed[ours[SYNC]], tp), to
        )
    if all(place.old is None for place in made.places.values()):
        msg = f"the group {group} has committed nothing of {full}: name it by --group; without one, stages begin at the beginning"
        raise OffsetsError(msg)
    return made


async def switch(settings: Settings, connection: Any, made: Plan, *, force: bool = False) -> None:
    """Have our stages begin there.

    Args:
        settings: where Kafka is.
        connection: of PostgreSQL.
        made: by `plan`.
        force: although our stages have begun somewhere.

    Raises:
        OffsetsError: the old service runs, or workers do, or our stages have begun already; Kafka does not take it.
    """
    if made.members:
        msg = f"the group {made.group} has {made.members} members: stop the old service first"
        raise OffsetsError(msg)
    if made.workers:
        msg = f"{made.workers} workers read {made.topic}: stop them, and start them again afterwards"
        raise OffsetsError(msg)
    if made.begun and not force:
        named = ", ".join(map(str, made.begun[:20]))
        msg = f"our stages stand somewhere in partition {named} already: say --force where they are to be set all the same"
        raise OffsetsError(msg)
    to = {partition: place.to for partition, place in made.places.items()}
    if made.clickhouse:
        await _commit(settings, f"{settings.kafka.group}-{SYNC}", made.topic, to)
    await positions.move(connection, SINK, topics.DECODED.name, settings.sink.generation, to)


async def _commit(settings: Settings, group: str, full: str, to: dict[int, int]) -> None:
    consumer = AIOKafkaConsumer(**kafka_clients.reading(settings.kafka), group_id=group, enable_auto_commit=False)
    try:
        async with asyncio.timeout(ASK_S):
            await consumer.start()
            consumer.assign([TopicPartition(full, p) for p in to])
            # Nothing is noted beside it, so the stage takes what comes for what may be written already.
            await consumer.commit({TopicPartition(full, p): (offset, "") for p, offset in to.items()})
    except (KafkaError, OSError, TimeoutError) as e:
        msg = f"the offsets of group {group} were not set: {reason(e)}"
        raise OffsetsError(msg) from None
    finally:
        await kafka_clients.stop(consumer)


def _offset(committed: Any, tp: TopicPartition) -> int | None:
    found = committed.get(tp)
    return None if found is None or found.offset < 0 else int(found.offset)


async def _members(admin: Any, group: str) -> int:
    """Members of a consumer group; 0 where there is none."""
    if group not in {name for name, *_ in await admin.list_consumer_groups()}:
        return 0
    described = await admin.describe_consumer_groups([group])
    return sum(len(each[5]) for answer in described for each in answer.groups)
