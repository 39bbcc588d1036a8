"""lineage: a few stored readings a minute, derived again from their bytes: the share that comes out identical is a metric."""

from preservarium.operations.lineage_sampling import Sampler
from preservarium.streaming.app import app

#: Between two samples.
SAMPLE_S = 60.0

_sampler = app.resource(Sampler(app.live, app.clock))


@app.timer(interval=SAMPLE_S)
async def lineage_sample() -> None:
    """Derive a sample again."""
    await _sampler.turn()
