"""normalize: raw messages to readings (iot_raw_data → iot_standardized_data, iot_errors)."""

import structlog

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.errors import Retry
from preservarium.registry.proving import check_active
from preservarium.sandbox.pool import Limits, SandboxPool
from preservarium.stages.normalize import Normalizer
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects

_log = structlog.get_logger(__name__)

#: Its processes start with the first call; a worker without script devices has none.
sandbox = SandboxPool(Limits.of(app.live()), monotonic=app.clock.monotonic_s)
app.resource(sandbox)
_normalizer = Normalizer(device_lookup, catalogue, app.clock, app.live, sandbox)
device_lookup.on_change(_normalizer.forget)


@app.task
async def check_parsers() -> None:
    """Run the examples of the parsers in force; what fails is logged and counted, and the worker goes on."""
    try:
        await catalogue.ready()
    except Retry as e:
        _log.warning("parsers_not_checked", error=str(e))
        return
    await check_active(list(catalogue.documents()["parser"].values()), app.live())


@app.stage(topics.RAW, name="normalize", writes=(topics.STANDARDIZED,))
async def normalize(batch: Batch) -> Effects:
    """Decode each device's payloads, map fields to datatypes, convert units; what cannot be used becomes an error line."""
    return await _normalizer(batch)
