"""alarm: iot_validated_data and alarm_actions → iot_alerts. Waits for no database; where it does not know a device,
which another worker may have normalized, the database is asked.

Two stages on one state: the app gives a partition to one of them at a time.
"""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.stages.alarm import Alarming
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects
from tables.alarm_states import alarm_states

_alarming = Alarming(
    alarm_states,
    device_lookup.known,
    catalogue,
    app.live,
    app.clock,
    device_lookup.lookup_many,
    removed=device_lookup.removed,
)
device_lookup.on_change(_alarming.changed)


@app.stage(
    topics.VALIDATED,
    name="alarm",
    writes=(topics.ALERTS, topics.ALARM_STANDING),
    state=alarm_states,
    on_tick=_alarming.tick,
    tick_s=_alarming.tick_s,
    after=(topics.RAW, topics.STANDARDIZED),
)
async def alarm(batch: Batch) -> Effects:
    """Raise and clear alarms in event time, and those of silence when their time has come."""
    return await _alarming.observe(batch)


@app.stage(
    topics.ALARM_ACTIONS,
    name="alarm-actions",
    # An action whose device is spelled otherwise than it is registered is sent on to where it is.
    writes=(topics.ALERTS, topics.ALARM_STANDING, topics.ALARM_ANSWERS, topics.ALARM_ACTIONS),
    state=alarm_states,
)
async def alarm_actions(batch: Batch) -> Effects:
    """Acknowledge, shelve and comment on alarms."""
    return await _alarming.act(batch)
