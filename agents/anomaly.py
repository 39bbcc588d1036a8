"""anomaly: iot_validated_data → anomaly_alerts. It runs where `anomaly.enabled` says so.

Waits for no database; where it does not know a device, which another worker may have normalized, the database is asked.
"""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.stages.anomaly import Detection
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects

if app.live().anomaly.enabled:
    from tables.anomaly_states import anomaly_states

    _detection = Detection(
        anomaly_states, device_lookup.known, catalogue, app.live, app.clock, device_lookup.lookup_many
    )
    device_lookup.on_change(_detection.checks.forget)

    @app.stage(topics.VALIDATED, name="anomaly", writes=(topics.ANOMALIES,), state=anomaly_states)
    async def anomaly(batch: Batch) -> Effects:
        """Tell of readings that are unlike their series."""
        return await _detection(batch)
