"""`series_states`: what quality control remembers of the series of this worker's devices."""

from preservarium.streaming.app import app

#: Device address -> state document of preservarium/domain/quality/validation.py, with its watermark. Written by validate only.
series_states = app.state_table(
    "series_states",
    key="device address",
    help="Quality control: what the tests need of each series' past; messages held back; watermark.",
)
