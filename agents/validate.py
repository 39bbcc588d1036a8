"""validate: iot_standardized_data → iot_validated_data; what failed goes to iot_errors.

Waits for no database; where it does not know a device, which another worker may have normalized, the database is asked.
"""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.stages.validate import Validation
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects
from tables.series_states import series_states

_validation = Validation(series_states, device_lookup.known, catalogue, app.live, app.clock, device_lookup.lookup_many)
device_lookup.on_change(_validation.checks.forget)


@app.stage(
    topics.STANDARDIZED,
    name="validate",
    # Its own input too: of a device that has fallen silent, a tick hands on what was held back.
    writes=(topics.VALIDATED, topics.STANDARDIZED),
    state=series_states,
    on_tick=_validation.tick,
)
async def validate(batch: Batch) -> Effects:
    """Say how far each reading can be trusted."""
    return await _validation(batch)
