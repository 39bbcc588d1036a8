"""`anomaly_states`: what the detectors remember of this worker's series."""

from preservarium.engine import app

#: Device address -> state document of preservarium/detection.py, with its watermark. Written by anomaly only.
anomaly_states = app.state_table("anomaly_states", help="Anomalies: last readings, spread and profile of each series.")
