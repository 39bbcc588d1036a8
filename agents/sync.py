"""sync: validated readings and alarm transitions into ClickHouse, exactly once and as columns.

Two stages with a consumer group each. Nothing is read again that was written: the group's offset and the bounds of the
batch under way are all that sync remembers, and Kafka keeps them.
"""

from preservarium import topics
from preservarium.engine import app
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.sync import AlarmSync, ReadingSync

#: Readings of one message, taken for turning the limit on rows into one on records. A message with more makes a larger
#: insert, which is cut.
_READINGS_PER_MESSAGE = 5

if app.live().clickhouse.enabled:
    store = app.resource(ClickHouseStore(app.live, clock=app.clock))
    readings = ReadingSync("sync", store, app.live, clock=app.clock)
    alarms = AlarmSync("sync-alarms", store, app.live, clock=app.clock)

    app.group_stage(
        topics.VALIDATED,
        name="sync",
        group="sync",
        records_max=lambda: max(1, app.live().sync.rows_max // _READINGS_PER_MESSAGE),
        linger_s=lambda: app.live().sync.linger_s,
        flights=1,
        planned=True,
        memory=readings,
    )(readings)

    app.group_stage(
        topics.ALERTS,
        name="sync-alarms",
        group="sync-alarms",
        records_max=lambda: 1_000,
        linger_s=lambda: app.live().sync.linger_s,
        flights=1,
        planned=True,
    )(alarms)
