"""`device_configs`: the registered devices of this worker's partitions."""

from preservarium.streaming.app import app

#: Device address -> its DeviceDoc as iot_device_registry has it (or the mark of its removal). Written by the registry
#: agent only; co-partitioned with the raw topic, so a device's row is where its messages are.
device_configs = app.state_table(
    "device_configs",
    key="device address",
    help="Registered devices: type, mapping, overrides, revision. Read by every stage that looks a device up.",
)
