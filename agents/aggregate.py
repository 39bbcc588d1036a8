"""aggregate: iot_validated_data → iot_aggregates. Without `aggregate.windows` it does not run.

Waits for no database; where it does not know a device, which another worker may have normalized, the database is asked.
"""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.stages.aggregate import Aggregation
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects

if app.live().aggregate.windows.strip():
    from tables.window_states import window_states

    _aggregation = Aggregation(
        window_states, device_lookup.known, catalogue, app.live, app.clock, device_lookup.lookup_many
    )
    device_lookup.on_change(_aggregation.checks.forget)

    @app.stage(
        topics.VALIDATED,
        name="aggregate",
        writes=(topics.AGGREGATES,),
        state=window_states,
        on_tick=_aggregation.tick,
    )
    async def aggregate(batch: Batch) -> Effects:
        """Make windows in event time."""
        return await _aggregation(batch)
