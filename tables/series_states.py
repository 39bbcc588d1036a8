"""`series_states`: what quality control remembers of the series of this worker's devices."""

from preservarium.engine import app

#: Device address -> state document of preservarium/domain/quality.py, with its watermark. Written by validate only.
series_states = app.state_table("series_states", help="Quality control: last values of each series, watermarks.")
