"""`alarm_states`: the alarms of this worker's devices."""

from preservarium.streaming.app import app

#: Device address -> state document of preservarium/domain/alarms/state.py, with its watermark. Written by the alarm
#: agent only; people act through `alarm_actions`.
alarm_states = app.state_table(
    "alarm_states",
    key="device address",
    help="Alarms: state of each rule and pin, since when, what the rule needs of the past; next deadline; watermark.",
)
