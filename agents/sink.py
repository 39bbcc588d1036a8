"""sink: validated readings, the old service's messages and every declared topic of events into PostgreSQL, exactly once.

Stages with a consumer group each, so that none holds up another, and a timer for the storage's upkeep. The database's
offsets say where each partition starts; a database that is down pauses these stages and nothing else.
"""

import structlog

from preservarium import metrics, topics
from preservarium.breaker import Breaker
from preservarium.errors import Retry
from preservarium.stages.sink import EventSink, LegacySink, ReadingSink
from preservarium.stores.event_tables import EventStore, EventTable
from preservarium.stores.journal import ALARM_OPERATIONS, Journal
from preservarium.stores.postgres import PostgresPing, PostgresPool
from preservarium.stores.tables import EVENT_TABLES
from preservarium.stores.timescale import STAGING, TimescaleStore
from preservarium.streaming.app import app

_log = structlog.get_logger(__name__)

#: Partitions, retention, roll-ups and the late lane are looked at this often.
UPKEEP_S = 30.0
#: TimescaleDB's jobs that its own workers do not run.
JOBS_S = 60.0

_pool = app.resource(PostgresPool(app.live, temporary=STAGING))
_ping = app.resource(PostgresPing(app.live))
_breaker = Breaker("postgres", lambda: app.live().breaker, clock=app.clock, probe=_ping)


def _patience_s() -> float:
    """A transaction waits for a connection and then, in turn, for each of its statements; one or two of them may be slow."""
    s = app.live().postgres
    return s.connect_timeout_s + 2 * s.command_timeout_s


def _store(sink: str) -> TimescaleStore:
    return TimescaleStore(app.live, sink=sink, pool=_pool, clock=app.clock, breaker=_breaker)


store = _store("sink")
_readings = ReadingSink("sink", topics.VALIDATED.name, store, app.publisher.publish, app.live, clock=app.clock)
_decoded = LegacySink(
    "sink-decoded", topics.DECODED.name, _store("sink-decoded"), app.publisher.publish, app.live, clock=app.clock
)

app.group_stage(
    topics.VALIDATED,
    name="sink",
    group="sink",
    writes=("PostgreSQL: measurements",),
    records_max=lambda: app.live().sink.transaction_rows_max,
    linger_s=lambda: app.live().sink.linger_s,
    flights=app.live().sink.flights,
    on_assigned=_readings.on_assigned,
    patience_s=_patience_s,
)(_readings)


def _event_stage(suffix: str, declared: EventTable) -> EventStore:
    """A stage and a consumer group of its own for one topic of events."""
    name = f"sink-{suffix}"
    # What operators did goes into the event store, too.
    kind = Journal if declared is ALARM_OPERATIONS else EventStore
    events = kind(declared, app.live, sink=name, pool=_pool, clock=app.clock, breaker=_breaker)
    stage = EventSink(name, declared.topic.name, events, app.publisher.publish, app.live, clock=app.clock)
    app.group_stage(
        declared.topic,
        name=name,
        group=name,
        writes=(f"PostgreSQL: {', '.join(events.tables)}",),
        records_max=lambda: app.live().sink.rows_max,
        # An event is to be seen at once, and they are few.
        linger_s=lambda: 0.0,
        on_assigned=stage.on_assigned,
        patience_s=_patience_s,
    )(stage)
    return events


event_stores = [_event_stage(suffix, declared) for suffix, declared in EVENT_TABLES.items()]

if app.live().normalize.decoded_topic:
    app.group_stage(
        topics.DECODED,
        name="sink-decoded",
        group="sink-decoded",
        writes=("PostgreSQL: measurements",),
        records_max=lambda: app.live().sink.transaction_rows_max,
        linger_s=lambda: app.live().sink.linger_s,
        on_assigned=_decoded.on_assigned,
        patience_s=_patience_s,
        kafka_topic=app.live().normalize.decoded_topic,  # its owner is another system: the name is as it is given
    )(_decoded)


@app.timer(interval=UPKEEP_S)
async def sink_upkeep() -> None:
    """Partitions ahead, retention, roll-ups, late rows; and see that background jobs work."""
    try:
        await store.maintain()
        for events in event_stores:
            await events.prune()
        failing = await store.failing_jobs()
    except Retry as e:
        _log.warning("storage upkeep put off", error=str(e))
        return
    metrics.STORAGE_JOBS_FAILING.set(len(failing))
    if failing:
        _log.warning("storage jobs fail", jobs=failing)


@app.timer(interval=JOBS_S)
async def sink_jobs() -> None:
    """Run what TimescaleDB should have run: for minutes perhaps, so apart from the rest of the upkeep."""
    try:
        await store.upkeep.run_overdue()
    except Retry as e:
        _log.warning("overdue jobs put off", error=str(e))


@app.task
async def sink_policies() -> None:
    """Bring the storage policies to what the settings say."""
    try:
        await store.apply_policies()
    except Retry as e:
        _log.warning("storage policies not applied", error=str(e), action="applied at the next start")
