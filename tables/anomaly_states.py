"""`anomaly_states`: what the detectors remember of this worker's series."""

from preservarium.streaming.app import app

#: Device address -> state document of preservarium/stages/anomaly.py, with its watermark. Written by anomaly only.
anomaly_states = app.state_table(
    "anomaly_states",
    key="device address",
    help="Anomalies: last readings, spread and profile of the hours of each series; watermark.",
)
