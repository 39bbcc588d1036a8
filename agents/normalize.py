"""normalize: raw messages to readings (iot_raw_data → iot_standardized_data, iot_errors)."""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.engine import app
from preservarium.normalizer import Normalizer
from preservarium.sandbox.pool import Limits, SandboxPool
from preservarium.stage import Batch, Effects

#: Its processes start with the first call; a worker without script devices has none.
sandbox = SandboxPool(Limits.of(app.live()), monotonic=app.clock.monotonic_s)
app.resource(sandbox)
_normalizer = Normalizer(device_lookup, catalogue, app.clock, app.live, sandbox)
device_lookup.on_change(_normalizer.forget)


@app.stage(topics.RAW, name="normalize")
async def normalize(batch: Batch) -> Effects:
    """Decode each device's payloads, map fields to datatypes, convert units; what cannot be used becomes an error line."""
    return await _normalizer(batch)
