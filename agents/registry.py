"""registry: iot_device_registry into the worker's table; and the services that keep the worker's registry current.

Agents that need the registry import `catalogue` and `device_lookup` from here.
"""

from preservarium import topics
from preservarium.domain.registry.changes import fold_devices
from preservarium.errors import ReasonCode
from preservarium.registry.catalogue import Catalogue, header_rev
from preservarium.registry.device_lookup import DeviceLookup
from preservarium.registry.relay import RelayService
from preservarium.streaming.app import app
from preservarium.streaming.records import error_line, error_send
from preservarium.streaming.stage import Batch, Effects
from tables.device_configs import device_configs

#: Started with the worker, before any batch is handed over.
catalogue = Catalogue(app.live)
app.add_dependency(catalogue)
app.add_dependency(RelayService(app.live))

device_lookup = DeviceLookup(device_configs.get, app.live, catalogue=catalogue, clock=app.clock)
app.resource(device_lookup)


@app.stage(topics.DEVICE_REGISTRY, name="registry", state=device_configs)
async def registry(batch: Batch) -> Effects:
    """Keep the newest configuration of each device; then let caches forget the old one."""
    effects = Effects()
    records = [(r.key, r.value, header_rev(r.headers)) for r in batch.records]
    puts, faults = fold_devices(records, lambda key: device_configs.get(batch.partition, key))
    for key, value in puts.items():
        effects.put(device_configs.name, key, value)
        device_id = key.decode()
        effects.after.append(lambda device_id=device_id: device_lookup.changed(device_id))  # type: ignore[misc]
    for index, message in faults.items():
        record = batch.records[index]
        line = error_line(
            "registry",
            ReasonCode.ENVELOPE_INVALID,
            message,
            topic=batch.topic,
            partition=batch.partition,
            now_us=app.clock.now_us(),
            record=record,
        )
        effects.sends.append(error_send(line))
        effects.refused[ReasonCode.ENVELOPE_INVALID] = effects.refused.get(ReasonCode.ENVELOPE_INVALID, 0) + 1
    return effects
