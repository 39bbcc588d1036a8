"""sync: what the topics hold into ClickHouse, exactly once and as columns.

A stage with a consumer group for each topic, so that none holds up another. Nothing is read again that was written: the
group's offset and the bounds of the batch under way are all that sync remembers, and Kafka keeps them.
"""

from preservarium.breaker import Breaker
from preservarium.stages.sync import (
    EMPLOYEES,
    EVENTS,
    EVENTS_MAX,
    MEASUREMENTS,
    TASK_EVENTS,
    EmployeeSync,
    EventSync,
    ReadingSync,
    Table,
    TaskSync,
)
from preservarium.stores.clickhouse import ClickHousePing, ClickHouseStore
from preservarium.streaming.app import app
from preservarium.streaming.feeds import Memory
from preservarium.streaming.stage import GroupHandler

#: Readings of one message, taken for turning the limit on rows into one on records. A message with more makes a larger
#: insert, which is cut.
_READINGS_PER_MESSAGE = 5


def _declare(table: Table, handler: GroupHandler, records_max: int | None = None, memory: Memory | None = None) -> None:
    app.group_stage(
        table.topic,
        name=table.stage,
        group=table.stage,
        writes=(f"ClickHouse: {table.name}",),
        records_max=lambda: records_max or max(1, app.live().sync.rows_max // _READINGS_PER_MESSAGE),
        linger_s=lambda: app.live().sync.linger_s,
        flights=app.live().sync.flights,
        planned=True,
        memory=memory,
        # To connect, and for one insert.
        patience_s=lambda: 2 * app.live().clickhouse.timeout_s,
    )(handler)


if app.live().clickhouse.enabled:
    ping = app.resource(ClickHousePing(app.live))
    breaker = Breaker("clickhouse", lambda: app.live().breaker, clock=app.clock, probe=ping)
    store = app.resource(ClickHouseStore(app.live, breaker=breaker, clock=app.clock))
    readings = ReadingSync(store, app.live, clock=app.clock)
    _declare(MEASUREMENTS, readings, memory=readings)
    for _table in EVENTS:
        _declare(_table, EventSync(_table, store, app.live, clock=app.clock), EVENTS_MAX)
    _declare(TASK_EVENTS, TaskSync(store, app.live, clock=app.clock), EVENTS_MAX)
    _declare(EMPLOYEES, EmployeeSync(store, app.live, clock=app.clock), EVENTS_MAX)
