"""`command_states`: commands of this worker's devices that have not ended, and keys of those that have."""

from preservarium.streaming.app import app

#: Device address -> state document of preservarium/domain/commands/device.py, with its watermark. Written by the command
#: stages only; people and rules ask through `device_commands`.
command_states = app.state_table(
    "command_states",
    key="device address",
    help="Commands: those that have not ended, keys of those that have; watermark.",
)
