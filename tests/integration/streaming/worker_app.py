"""Workers for tests/integration/streaming/test_worker.py: WORKER_MODE says what the one in this process declares."""

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path

from preservarium import topics
from preservarium.errors import Fatal, Retry
from preservarium.registry.catalogue import Catalogue
from preservarium.stages.alarm import Alarming
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects, Send

MODE = os.environ["WORKER_MODE"]
REPORT = Path(os.environ["WORKER_REPORT"])

if MODE in ("state", "fatal"):
    states = app.state_table("states", help="The last value of each key.")

    @app.stage(topics.RAW, name="remember", state=states)
    async def remember(batch: Batch) -> Effects:
        """Keep the last value of each key."""
        if MODE == "fatal":
            raise Fatal("the test says so")
        effects = Effects()
        for record in batch.records:
            assert record.key is not None
            effects.put("states", record.key, record.value)
        return effects


if MODE in ("group", "down"):
    down = MODE == "down"

    @app.group_stage(topics.STANDARDIZED, name="keep", group="keep", writes=(topics.VALIDATED,), linger_s=lambda: 0.01)
    async def keep(batches: Sequence[Batch]) -> Effects:
        """Pass on, unless the database is down."""
        if down and Path(os.environ["WORKER_DOWN"]).exists():
            raise Retry("the database is down")
        return Effects([Send(topics.VALIDATED, r.key, r.value, b.partition) for b in batches for r in b.records])


if MODE == "stuck":

    @app.stage(topics.RAW, name="hang")
    async def hang(batch: Batch) -> Effects:
        """Never come back."""
        await asyncio.Event().wait()
        return Effects()

    @app.group_stage(topics.STANDARDIZED, name="hang-too", group="hang", linger_s=lambda: 0.01)
    async def hang_too(batches: Sequence[Batch]) -> Effects:
        """Never come back."""
        await asyncio.Event().wait()
        return Effects()


if MODE == "down":

    @app.stage(topics.RAW, name="forward", writes=(topics.STANDARDIZED,))
    async def forward(batch: Batch) -> Effects:
        """Pass on; depends on Kafka alone."""
        return Effects([Send(topics.STANDARDIZED, r.key, r.value, batch.partition) for r in batch.records])


if MODE == "held":

    @app.stage(topics.RAW, name="forward", writes=(topics.VALIDATED,))
    async def forward_later(batch: Batch) -> Effects:
        """Pass on, unless what it needs is down."""
        if Path(os.environ["WORKER_DOWN"]).exists():
            raise Retry("what it needs is down")
        return Effects([Send(topics.VALIDATED, r.key, r.value, batch.partition) for r in batch.records])


if MODE in ("silence", "held"):
    catalogue = Catalogue()
    catalogue.offer("datatype", {"name": "temp", "rev": 1, "kind": "number", "unit": "°C"})
    rule = {"name": "gone", "rev": 2, "component_type": "temp", "kind": "no_data", "severity": "minor", "no_data_s": 8}
    catalogue.offer("rule", rule)
    catalogue._ready.set()
    alarm_states = app.state_table("alarm_states", help="Alarms.")
    alarming = Alarming(
        alarm_states,
        lambda _, device_id: {"device_id": device_id, "rev": 1, "type": "t", "enabled": True, "rules": {"gone": {}}},
        catalogue,
        app.live,
        app.clock,
    )

    before = (topics.RAW,) if MODE == "held" else ()

    @app.stage(
        topics.VALIDATED,
        name="alarm",
        writes=(topics.ALERTS, topics.ALARM_STANDING),
        state=alarm_states,
        on_tick=alarming.tick,
        tick_s=lambda: 0.2,
        after=before,
    )
    async def alarm(batch: Batch) -> Effects:
        """Watch for silence."""
        return await alarming.observe(batch)


class Closed:
    """A resource."""

    async def close(self) -> None:
        """Say so."""
        REPORT.with_suffix(".closed").touch()


app.resource(Closed())


@app.task
async def write_reports() -> None:
    """The health report and what the tables hold, twice a second."""
    while True:
        report = app.health_report()
        report["loop"] = type(asyncio.get_running_loop()).__module__
        report["tables"] = {
            name: {p: sum(1 for _ in table.items(p)) for p in table.partitions()}
            for name, table in app.state_tables.items()
        }
        report["uptime_s"] = round(report["uptime_s"], 2)
        part = REPORT.with_suffix(".part")
        part.write_text(json.dumps(report))
        part.rename(REPORT)
        await asyncio.sleep(0.5)
