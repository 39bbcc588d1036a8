"""anomaly: iot_validated_data → anomaly_alerts. Waits for no database. It runs where `anomaly.enabled` says so."""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.detection import Detection
from preservarium.engine import app
from preservarium.stage import Batch, Effects

if app.live().anomaly.enabled:
    from tables.anomaly_states import anomaly_states

    _detection = Detection(anomaly_states, device_lookup.known, catalogue, app.live, app.clock)
    device_lookup.on_change(_detection.checks.forget)

    @app.stage(topics.VALIDATED, name="anomaly")
    async def anomaly(batch: Batch) -> Effects:
        """Tell of readings that are unlike their series."""
        return await _detection(batch)
