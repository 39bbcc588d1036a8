"""alarm: iot_validated_data and alarm_actions → iot_alerts. Waits for no database.

Two stages on one state: the app gives a partition to one of them at a time.
"""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.alarming import Alarming
from preservarium.engine import app
from preservarium.stage import Batch, Effects
from tables.alarm_states import alarm_states

_alarming = Alarming(alarm_states, device_lookup.known, catalogue, app.live, app.clock)
device_lookup.on_change(_alarming.rules.forget)


@app.stage(
    topics.VALIDATED,
    name="alarm",
    shares=alarm_states.name,
    on_tick=_alarming.tick,
    tick_s=_alarming.tick_s,
    after=(topics.RAW, topics.STANDARDIZED),
)
async def alarm(batch: Batch) -> Effects:
    """Raise and clear alarms in event time, and those of silence when their time has come."""
    return await _alarming.observe(batch)


@app.stage(topics.ALARM_ACTIONS, name="alarm-actions", shares=alarm_states.name)
async def alarm_actions(batch: Batch) -> Effects:
    """Acknowledge, shelve and comment on alarms."""
    return await _alarming.act(batch)
