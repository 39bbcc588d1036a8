"""`window_states`: the open windows of this worker's series, and what corrections need of the closed ones."""

from preservarium.engine import app

#: Device address -> state document of preservarium/domain/aggregate.py, with its watermark. Written by aggregate only.
window_states = app.state_table("window_states", help="Windows: open panes, recently closed ones, watermarks.")
