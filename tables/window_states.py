"""`window_states`: the open windows of this worker's series, and what corrections need of the closed ones."""

from preservarium.streaming.app import app

#: Device address -> state document of preservarium/domain/windows.py, with its watermark. Written by aggregate only.
window_states = app.state_table(
    "window_states",
    key="device address",
    help="Windows: the open ones of each series, and of the closed ones what corrections need; watermark.",
)
