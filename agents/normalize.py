"""normalize: raw messages to readings (iot_raw_data → iot_standardized_data, iot_errors)."""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.engine import app
from preservarium.normalizer import Normalizer
from preservarium.stage import Batch, Effects

_normalizer = Normalizer(device_lookup, catalogue, app.clock, app.live)
device_lookup.on_change(_normalizer.forget)


@app.stage(topics.RAW, name="normalize")
async def normalize(batch: Batch) -> Effects:
    """Decode each device's payloads, map fields to datatypes, convert units; what cannot be used becomes an error line."""
    return await _normalizer(batch)
