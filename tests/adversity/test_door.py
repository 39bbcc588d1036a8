"""From the broker to both stores: messages without a time of their own, in bursts, while the worker is killed. Directly, and with
PostgreSQL behind a PgBouncer in transaction mode."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from pooler_support import pgbouncer
from up_support import Run, data_directory, left_behind

from preservarium.embedded.running import find

pytestmark = [pytest.mark.kafka, pytest.mark.postgres, pytest.mark.clickhouse, pytest.mark.timeout(600)]

REGISTRY = """
manufacturers: [{name: Own}]
datatypes: [{name: counter_x, kind: number, unit: ""}]
parsers: [{name: own, kind: json, source: {}}]
device_types: [{name: own, manufacturer: Own, parser: own}]
devices: [{device_id: d1, type: own}, {device_id: d2, type: own}]
"""
#: Messages of a device, in so many bursts.
MESSAGES, BURSTS = 200, 20
#: The worker is killed after these bursts; whatever it has in its hands then is delivered again.
KILLS = (5, 12)
#: A worker that was killed is missed by its group for a while, and starts again.
STORED_WITHIN_S = 180.0


@pytest.fixture(params=["direct", "pooled"])
def system(request: Any, tmp_path_factory: Any) -> Iterator[Run]:
    directory: Path = data_directory(tmp_path_factory, "door")
    (directory / "registry.yaml").write_text(REGISTRY)
    arguments = ("--no-sample", "--no-simulator", "--mqtt", f"--registry={directory / 'registry.yaml'}")
    if request.param == "direct":
        yield from running(Run(directory / "data", *arguments))
        return
    dsn = request.getfixturevalue("pg_dsn")
    folder = tmp_path_factory.mktemp("pooler")
    with pgbouncer(folder, dsn, "transaction") as pooled:
        environment = {"PRESERVARIUM_POSTGRES__URL": pooled, "PRESERVARIUM_POSTGRES__DIRECT_URL": dsn}
        yield from running(Run(directory / "data", *arguments, **environment))


def running(run: Run) -> Iterator[Run]:
    run.until(lambda: run.get("/ready"), 240)
    # Before its first subscription the broker keeps nothing for it.
    run.until(lambda: "mqtt connected" in (run.data_dir / "workers" / "0" / "worker-0.log").read_text())
    try:
        yield run
    finally:
        run.process.send_signal(signal.SIGTERM)
        code, _ = run.end()
        assert (code, left_behind(run.data_dir)) == (0, [])


async def send(run: Run) -> None:
    """Bursts of QoS 1, each acknowledged by the broker; the worker dies on the way."""
    note = find(run.data_dir)
    assert note is not None
    host, _, port = note.addresses["mqtt"].partition(":")
    async with aiomqtt.Client(host, int(port), identifier="field", timeout=30) as client:
        for burst in range(BURSTS):
            size = MESSAGES // BURSTS
            for n in range(burst * size, (burst + 1) * size):
                for device in ("d1", "d2"):
                    await client.publish(f"devices/{device}/up", json.dumps({"counter_x": n}), qos=1)
            if burst in KILLS:
                # What dies while it starts has nothing in its hands.
                await asyncio.to_thread(run.until, lambda: run.get("/ready"), 240)
                os.kill(await asyncio.to_thread(run.worker), signal.SIGKILL)
            await asyncio.sleep(0.7)


def rows(run: Run, store: str, device: str) -> list[tuple[int, int]]:
    """(µs, value) of a device, in the order of time."""
    sql = {
        "postgres": "SELECT (extract(epoch FROM timestamp) * 1000000)::bigint AS at, value::int AS n FROM iot_measurements"
        f" WHERE device_id = '{device}' AND component_type = 'counter_x' ORDER BY timestamp",
        "clickhouse": "SELECT toUnixTimestamp64Micro(timestamp) AS at, toInt64(value) AS n FROM measurements FINAL"
        f" WHERE device_id = '{device}' AND component_type = 'counter_x' ORDER BY timestamp",
    }[store]
    return [(int(row["at"]), int(row["n"])) for row in json.loads(run.shell("db", store, "--json", "-c", sql))]


def test_every_message_of_a_burst_is_stored_in_its_order_whatever_dies(system: Run) -> None:
    asyncio.run(send(system))
    deadline = time.monotonic() + STORED_WITHIN_S
    for device in ("d1", "d2"):
        found: dict[str, list[tuple[int, int]]] = {}
        for store in ("postgres", "clickhouse"):
            found[store] = []
            while len({n for _, n in found[store]}) < MESSAGES:
                assert time.monotonic() < deadline, (
                    store,
                    device,
                    len(found[store]),
                    system.errors.read_text()[-2_000:],
                )
                found[store] = rows(system, store, device)
        # A message that the worker died with is delivered again, and nothing tells it from another reading of the same value. But
        # the first of each came in order, and no two share an instant.
        for stored in found.values():
            assert list(dict.fromkeys(n for _, n in stored)) == [*range(MESSAGES)]
            assert len({at for at, _ in stored}) == len(stored)
        system.until(lambda d=device: rows(system, "postgres", d) == rows(system, "clickhouse", d))
        # Which is the last one is the same wherever it is asked.
        last = rows(system, "postgres", device)[-1]
        latest = json.loads(system.shell("sync", "query", "latest", f"device={device}", "--json"))
        assert next(row for row in latest["rows"] if row[1] == "counter_x")[4:6] == [last[0], last[1]]
        (shown,) = system.get(f"/api/devices?q={device}")["devices"]
        assert [(v["timestamp"], v["value"]) for v in shown["values"]] == [last]
    errors = json.loads(system.shell("dlq", "list", "--json"))
    assert errors == []
