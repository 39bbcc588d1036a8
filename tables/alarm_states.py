"""`alarm_states`: the alarms of this worker's devices."""

from preservarium.engine import app

#: Device address -> state document of preservarium/domain/device_alarms.py, with its watermark. Written by the alarm
#: agent only; people act through `alarm_actions`.
alarm_states = app.state_table("alarm_states", help="Alarms: state of each rule and pin, delays, watermarks.")
