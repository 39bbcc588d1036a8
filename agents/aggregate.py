"""aggregate: iot_validated_data → iot_aggregates. Waits for no database. Without `aggregate.windows` it does not run."""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.aggregation import Aggregation
from preservarium.engine import app
from preservarium.stage import Batch, Effects

if app.live().aggregate.windows.strip():
    from tables.window_states import window_states

    _aggregation = Aggregation(window_states, device_lookup.known, catalogue, app.live, app.clock)
    device_lookup.on_change(_aggregation.checks.forget)

    @app.stage(topics.VALIDATED, name="aggregate", on_tick=_aggregation.tick)
    async def aggregate(batch: Batch) -> Effects:
        """Make windows in event time."""
        return await _aggregation(batch)
