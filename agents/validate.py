"""validate: iot_standardized_data → iot_validated_data; what failed goes to iot_errors. Waits for no database."""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.engine import app
from preservarium.stage import Batch, Effects
from preservarium.validation import Validation
from tables.series_states import series_states

_validation = Validation(series_states, device_lookup.known, catalogue, app.live, app.clock)
device_lookup.on_change(_validation.checks.forget)


@app.stage(topics.STANDARDIZED, name="validate", on_tick=_validation.tick)
async def validate(batch: Batch) -> Effects:
    """Say how far each reading can be trusted."""
    return await _validation(batch)
