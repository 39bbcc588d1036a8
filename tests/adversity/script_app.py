"""A worker with the normalize stage alone, its registry in memory: devices `bomb-*`, `script-*`, `python-*`, `table-*`.

faust -A script_app worker
"""

from collections.abc import Iterable
from typing import Any

from preservarium import topics
from preservarium.sandbox.pool import Limits, SandboxPool
from preservarium.stages.normalize import Normalizer
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects

PARSERS: dict[str, tuple[str, Any]] = {
    "bomb": ("javascript", "function decodeUplink(i) {\n return {data: {n: /^(a+)+$/.test('a'.repeat(40) + 'b')}}; }"),
    "script": ("javascript", "function decodeUplink(i) { return {data: {n: i.bytes[0]}}; }"),
    "python": ("python", "def decode(payload, context):\n    return [{'name': 'n', 'value': payload[0]}]\n"),
    "table": ("table", {"fields": [{"name": "n", "type": "u8"}]}),
}


class World:
    """Types and devices; the first part of a device's address is its type."""

    rev = 1

    def datatype(self, name: str) -> None:
        return None

    def parser(self, name: str) -> Any:
        kind, source = PARSERS[name]
        return {"name": name, "version": 1, "rev": 1, "kind": kind, "status": "active", "source": source, "hash": name}

    def type(self, name: str) -> Any:
        return {"name": name, "rev": 1, "manufacturer": "m", "parser": name}

    async def lookup_many(self, partition: int, ids: Iterable[str]) -> Any:
        return {i: {"device_id": i, "rev": 1, "type": i.split("-")[0], "enabled": True} for i in ids}

    async def ready(self) -> None:
        return


sandbox = app.resource(SandboxPool(Limits.of(app.live())))
normalizer = Normalizer(World(), World(), app.clock, app.live, sandbox)


@app.stage(topics.RAW, name="normalize", writes=(topics.STANDARDIZED,))
async def normalize(batch: Batch) -> Effects:
    """As agents/normalize.py does."""
    return await normalizer(batch)
