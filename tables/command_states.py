"""`command_states`: commands of this worker's devices that have not ended, and keys of those that have."""

from preservarium.engine import app

#: Device address -> state document of preservarium/domain/commands.py, with its watermark. Written by the command
#: stages only; people and rules ask through `device_commands`.
command_states = app.state_table("command_states", help="Commands: queue, what is under way, remembered keys.")
