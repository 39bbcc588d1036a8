"""Whether ClickHouse holds what Kafka's topic holds, for the tables of which PostgreSQL has nothing: tasks and employees.

The topic is read again, from its beginning to where the group of sync stands, by the stage's own code; each of its rows must be
in ClickHouse, or a newer one of the same key. What is missing, older or altered is inserted again. What ClickHouse has besides
stays: Kafka may have deleted the record that it came from.

A topic keeps its records for days, so this is a matter of those days; the tables that views fill (preservarium/operations/derived.py)
are compared with all that ClickHouse holds. Memory depends on a batch, never on the topic. Inserts can be repeated: of one
key the newest row stays.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from preservarium.errors import reason
from preservarium.operations.derived import Drift
from preservarium.settings import Settings
from preservarium.stages import sync
from preservarium.stores.maintenance import Maintenance, VerificationError, literal
from preservarium.streaming import kafka_clients
from preservarium.streaming.stage import Batch

#: Rows compared by one query: their keys are some 50 KiB, below the server's limit for a statement.
ROWS_MAX: Final = 500
#: The broker answers a fetch within this time, or is told as not to be asked.
FETCH_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Replayed:
    """A table whose truth is a topic."""

    table: sync.Table
    stage: Callable[..., sync._Stage]
    owner: str
    key: tuple[str, ...]
    at: str
    #: A ReplacingMergeTree(version, deleted): readers with FINAL do not see what is deleted.
    hides_deleted: bool = False
    #: ClickHouse drops rows after `sync.retention_days`.
    expires: bool = False

    @property
    def name(self) -> str:
        """Of the table."""
        return self.table.name


TASK_EVENTS: Final = Replayed(
    sync.TASK_EVENTS,
    sync.TaskSync,
    "file_id",
    ("file_id", "assigned_at", "event_id"),
    "assigned_at",
    expires=True,
)
EMPLOYEES: Final = Replayed(
    sync.EMPLOYEES,
    sync.EmployeeSync,
    "employee_code",
    ("employee_code",),
    "updated_at",
    hides_deleted=True,
)
TABLES: Final = {t.name: t for t in (TASK_EVENTS, EMPLOYEES)}

Row = dict[str, Any]
#: (records read, records, what is read)
Progress = Callable[[int, int, str], None]


async def rows_of(
    settings: Settings, replayed: Replayed, ends: Mapping[int, int], progress: Progress
) -> AsyncIterator[list[Row]]:
    """Rows of a topic up to the offsets in `ends`, in batches, of each key in a batch the newest.

    Raises:
        VerificationError: Kafka cannot be asked.
    """
    kafka = settings.kafka
    stage = replayed.stage(None, lambda: settings)
    consumer = AIOKafkaConsumer(
        **kafka_clients.reading(kafka),
        enable_auto_commit=False,
        max_partition_fetch_bytes=kafka.fetch_bytes_max,
    )
    topic = replayed.table.topic
    try:
        await consumer.start()
        tps = [TopicPartition(topic.full(kafka.topic_prefix), partition) for partition in ends]
        begins = await consumer.beginning_offsets(tps) if tps else {}
        total = sum(max(0, ends[tp.partition] - begins[tp]) for tp in tps)
        done = 0
        # A partition at a time: what is fetched ahead is of one.
        for tp in tps:
            begin, end = begins[tp], ends[tp.partition]
            if begin >= end:
                continue
            consumer.assign([tp])
            consumer.seek(tp, begin)
            at = begin
            while at < end:
                progress(done + at - begin, total, f"{replayed.name} {tp.partition}")
                fetched = (await consumer.getmany(timeout_ms=round(FETCH_S * 1000), max_records=ROWS_MAX)).get(tp)
                # A compacted topic may have nothing up to its end.
                at = await consumer.position(tp)
                if not fetched and at < end:
                    message = f"Kafka gave nothing of {tp.topic}-{tp.partition} from {at} for {FETCH_S:.0f} s"
                    raise VerificationError(message)
                records = [record for record in fetched or () if record.offset < end]
                if records:
                    columns: sync.Columns = {name: [] for name in replayed.table.types}
                    stage._fill(columns, Batch(topic.name, tp.partition, records), {})
                    newest: dict[tuple[Any, ...], Row] = {}
                    for values in zip(*columns.values(), strict=True):
                        row = dict(zip(columns, values, strict=True))
                        key = tuple(row[name] for name in replayed.key)
                        if key not in newest or newest[key]["version"] <= row["version"]:
                            newest[key] = row
                    found = list(newest.values())
                    for start in range(0, len(found), ROWS_MAX):
                        yield found[start : start + ROWS_MAX]
            done += end - begin
        progress(total, total, "")
    except (KafkaError, OSError, TimeoutError) as e:
        message = f"Kafka cannot be asked at {kafka.bootstrap_servers}: {reason(e)}"
        raise VerificationError(message) from e
    finally:
        await kafka_clients.stop(consumer, 5.0)


async def compare(engine: Maintenance, replayed: Replayed, rows: list[Row], *, repair: bool) -> list[Drift]:
    """What of these rows ClickHouse does not hold, by owner; inserted where `repair`.

    Raises:
        VerificationError: ClickHouse refuses a statement.
    """
    wrong = await _missing(engine, replayed, rows)
    if repair and wrong:
        await insert(engine, replayed, [row for row, _ in wrong])
    left = (
        {_key_of(replayed, row) for row, _ in await _missing(engine, replayed, [r for r, _ in wrong])}
        if repair and wrong
        else set()
    )
    owners: dict[str, list[tuple[Row, bool]]] = {}
    for row, there in wrong:
        owners.setdefault(row[replayed.owner], []).append((row, there))
    return [
        Drift(
            owner,
            max(row[replayed.at] for row, _ in of),
            len(of),
            sum(there for _, there in of),
            repair and not any(_key_of(replayed, row) in left for row, _ in of),
        )
        for owner, of in owners.items()
    ]


async def insert(engine: Maintenance, replayed: Replayed, rows: list[Row]) -> None:
    """Insert rows again."""
    types = replayed.table.types
    await engine.insert(replayed.name, types, [[row[name] for name in types] for row in rows])


def _key_of(replayed: Replayed, row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in replayed.key)


async def _missing(engine: Maintenance, replayed: Replayed, rows: list[Row]) -> list[tuple[Row, bool]]:
    """Rows that are not there as they should be, and whether there is another one in their place."""
    owners = ", ".join(literal(owner) for owner in {row[replayed.owner] for row in rows})
    types = replayed.table.types
    selected = ", ".join(
        f"toUnixTimestamp64Micro({name})" if "DateTime" in kind else name for name, kind in types.items()
    )
    keys = ", ".join(f"tuple({', '.join(map(literal, _key_of(replayed, row)))})" for row in rows)
    key = ", ".join(f"toUnixTimestamp64Micro({n})" if "DateTime" in types[n] else n for n in replayed.key)
    found: dict[tuple[Any, ...], Row] = {}
    for values in await engine.query(
        f"SELECT {selected} FROM {replayed.name} FINAL WHERE {replayed.owner} IN ({owners}) AND tuple({key}) IN ({keys})"
    ):
        row = dict(zip(types, values, strict=True))
        found[_key_of(replayed, row)] = row
    wrong = []
    for row in rows:
        there = found.get(_key_of(replayed, row))
        if there is None:
            if not (replayed.hides_deleted and row["deleted"]):
                wrong.append((row, False))
        elif there["version"] < row["version"] or (there["version"] == row["version"] and there != row):
            wrong.append((row, True))
    return wrong
