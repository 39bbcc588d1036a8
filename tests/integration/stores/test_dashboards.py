"""Every dashboard's query on real rows in ClickHouse's engine, beside the same computed in Python; API and command."""

import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from sink_support import DAY_US, batch, live, message, record

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.console.dashboards import DashboardViews
from preservarium.stages.sync import AGGREGATES, ALARM_EVENTS, ANOMALIES, EmployeeSync, EventSync, ReadingSync, TaskSync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.dashboards import DASHBOARDS, Dashboards
from preservarium.stores.migrate import migrate_clickhouse

HOUR_US = 3_600_000_000
#: Noon of yesterday, UTC, so that what the tests place around it is of one day.
NOON_US = time.time_ns() // 1000 // DAY_US * DAY_US - DAY_US // 2
DAY = time.strftime("%Y-%m-%d", time.gmtime(NOON_US / 1e6))


def task(file_id: str, stage: str, at: int, number: int, **fields: Any) -> dict[str, Any]:
    return {
        "file_id": file_id, "stage": stage, "status": "assigned", "employee_code": "E1", "employee_name": "A.",
        "assigned_at": at, "event_id": number,
    } | fields  # fmt: skip


TASKS = [
    task("F1", "scan", NOON_US, 1, status="done", completed_at=NOON_US + HOUR_US),
    task("F1", "ocr", NOON_US + HOUR_US, 2),
    task("F2", "scan", NOON_US, 3, status="done", completed_at=NOON_US + 3 * HOUR_US, employee_code="E2"),
    task("F3", "scan", NOON_US + 5, 4, employee_code="E2", employee_name="Bo"),
    task("F4", "ocr", NOON_US + 6, 5, employee_code="E2", employee_name="Bo"),
    task("F5", "ocr", NOON_US + 7, 6),
    task("F5", "ocr", NOON_US + 8, 7, deleted=True),
]


@pytest.fixture
async def filled(clickhouse: str, clickhouse_database: str) -> AsyncIterator[ClickHouseStore]:
    settings = live(clickhouse={"url": clickhouse, "database": clickhouse_database})
    await migrate_clickhouse(settings())
    store = ClickHouseStore(settings)
    await TaskSync(store, settings)([batch(topics.TASK_EVENTS.name, 0, [record(i, t) for i, t in enumerate(TASKS)])])
    await EmployeeSync(store, settings)(
        [batch(topics.EMPLOYEES.name, 0, [record(0, {"employee_code": "E1", "name": "Ada", "updated_at": NOON_US})])]
    )
    readings = [
        record(
            i, message("d1", {"value": float(i), "quality": 4 if i == 9 else 1}, at=NOON_US + i * 1_000_000, offset=i)
        )
        for i in range(10)
    ]
    readings.append(record(10, message("d2", {"value_text": "open", "unit": ""}, at=NOON_US, offset=10)))
    await ReadingSync(store, settings)([batch(topics.VALIDATED.name, 0, readings)])
    turning = [
        record(
            i,
            message("d3", float((1, 359)[i % 2]), at=NOON_US + i * 1_000_000, offset=i),
        )
        for i in range(10)
    ]
    turning += [
        record(10 + i, message("d4", hour, at=NOON_US + i, offset=10 + i))
        for i, hour in enumerate((23.0, 2.0, 6.0, 18.0))
    ]
    await ReadingSync(store, settings)([batch(topics.VALIDATED.name, 1, turning)])
    window = {
        "window_id": "w", "revision": 0, "device_id": "d1", "connector_mode": "LoRaWAN", "component_type": "temperature",
        "pin_position": "0", "unit": "Cel", "window_start": NOON_US, "window_end": NOON_US + HOUR_US, "size_s": 3600,
        "hop_s": 3600, "count": 9, "min": 0.0, "max": 8.0, "mean": 4.0, "sum": 36.0, "last": 8.0, "last_at": NOON_US + 8,
        "closed_by": "watermark", "generation": 0,
    }  # fmt: skip
    directions = [
        {k: v for k, v in window.items() if k not in ("min", "max", "sum")}
        | {"window_id": device, "device_id": device, "circular": period, "mean": 0.0, "spread": 1.0}
        for device, period in (("d3", 360.0), ("d4", 24.0))
    ]
    await EventSync(AGGREGATES, store, settings)([batch(topics.AGGREGATES.name, 1, [record(0, *directions)])])
    await EventSync(AGGREGATES, store, settings)(
        [batch(topics.AGGREGATES.name, 0, [record(0, window), record(1, window | {"revision": 1, "max": 8.5})])]
    )
    anomaly = {
        "anomaly_id": "a1", "device_id": "d1", "connector_mode": "LoRaWAN", "component_type": "temperature",
        "pin_position": "0", "state": "begins", "timestamp": NOON_US, "value": 9.0, "unit": "Cel", "expected": 4.0,
        "score": 7.5, "threshold": 6.0, "raw_partition": 0, "raw_offset": 9, "raw_index": 0, "generation": 0,
    }  # fmt: skip
    await EventSync(ANOMALIES, store, settings)([batch(topics.ANOMALIES.name, 0, [record(0, anomaly)])])
    alarm = {
        "alarm_id": "x", "transition_id": "t1", "device_id": "d1", "rule": "hot", "rule_rev": 1, "severity": "major",
        "component_type": "temperature", "pin_position": "0", "transition": "raised", "state": "unacknowledged",
        "occurred_at": NOON_US, "detected_at": NOON_US, "cleared_at": None, "value": 9.0, "unit": "Cel", "threshold": 8.0,
        "message": "hot", "generation": 0, "raw_partition": None, "raw_offset": None, "raw_index": None,
    }  # fmt: skip
    await EventSync(ALARM_EVENTS, store, settings)([batch(topics.ALERTS.name, 0, [record(0, alarm)])])
    yield store
    await store.close()


SERIES = {"device": "d1", "component": "temperature", "pin": "0", "start": NOON_US, "end": NOON_US + 10_000_000}

TIMES = {"start": NOON_US, "end": NOON_US + HOUR_US}

EXPECTED: dict[str, tuple[dict[str, Any], list[list[Any]]]] = {
    "stages": (
        {},
        [
            ["ocr", "assigned", 2, NOON_US + 6],
            ["scan", "assigned", 1, NOON_US + 5],
            ["scan", "done", 1, NOON_US],
        ],
    ),
    "files": (
        {"after": "F1", "limit": 2},
        [
            ["F2", "scan", "done", "E2", "A.", NOON_US, NOON_US + 3 * HOUR_US],
            ["F3", "scan", "assigned", "E2", "Bo", NOON_US + 5, None],
        ],
    ),
    "waiting": (
        {"stage": "ocr"},
        [
            ["F4", "ocr", "assigned", "E2", "Bo", NOON_US + 6],
            ["F1", "ocr", "assigned", "E1", "A.", NOON_US + HOUR_US],
        ],
    ),
    "file": (
        {"file_id": "F1"},
        [
            ["scan", NOON_US, NOON_US, NOON_US + HOUR_US, 1, 1, "done", "E1"],
            ["ocr", NOON_US + HOUR_US, NOON_US + HOUR_US, None, 1, 1, "assigned", "E1"],
        ],
    ),
    "history": (
        {"file_id": "F5"},
        [
            [NOON_US + 8, "7", "ocr", "assigned", "E1", "A.", None, NOON_US + 8, 1],
            [NOON_US + 7, "6", "ocr", "assigned", "E1", "A.", None, NOON_US + 7, 0],
        ],
    ),
    "load": ({}, [["E2", "Bo", 2, NOON_US + 5], ["E1", "Ada", 1, NOON_US + HOUR_US]]),
    "throughput": ({}, [[DAY, "scan", 2, 2]]),
    "time_in_stage": ({"days": 3}, [["scan", 2, 7200.0, 7200.0, 10080.0]]),
    "latest": (
        {},
        [
            ["d1", "temperature", "0", "LoRaWAN", NOON_US + 9_000_000, 9.0, "", "Cel", 4],
            ["d2", "temperature", "0", "LoRaWAN", NOON_US, None, "open", "", 1],
            ["d3", "temperature", "0", "LoRaWAN", NOON_US + 9_000_000, 359.0, "", "Cel", 1],
            ["d4", "temperature", "0", "LoRaWAN", NOON_US + 3, 18.0, "", "Cel", 1],
        ],
    ),
    "series": (
        SERIES | {"points": 2},
        [[NOON_US, 5, 0.0, 2.0, 4.0], [NOON_US + 5_000_000, 4, 5.0, 6.5, 8.0]],
    ),
    "windows": (SERIES, [[NOON_US, 9, 0.0, 4.0, 8.5, 36.0, 8.0, None]]),
    "fleet": ({}, [[DAY, 25, 4, 0.04]]),
    "alarms": ({}, [[DAY, "major", "raised", 1, 1]]),
    "alarm_rate": (TIMES, [[NOON_US, "major", 1]]),
    "alarm_top": (TIMES, [["d1", "hot", "0", 1, 1.0]]),
    "alarm_chatter": (TIMES, []),  # more of these in test_alarm_kpis.py
    "alarm_answers": (TIMES, [[0, 1, None, None, None]]),
    "alarm_floods": (TIMES, []),
    "anomalies": ({"device": "d1"}, [[NOON_US, "d1", "temperature", "0", "begins", 9.0, "Cel", 4.0, 7.5]]),
}  # fmt: skip


async def test_a_series_is_circular_from_its_first_reading_on(filled):
    given = [
        record(i, message("d5", (1.0, 359.0)[i % 2], at=NOON_US + i, offset=i) | {"circular": {"temperature": 360.0}})
        for i in range(4)
    ]
    given.append(record(4, message("d6", 5.0, at=NOON_US, offset=4) | {"circular": {"heading": 360.0}}))
    await ReadingSync(filled, filled._settings)([batch(topics.VALIDATED.name, 3, given)])
    dashboards = Dashboards(filled, filled._settings)

    async def rows(device: str) -> Any:
        return orjson.loads(await dashboards.answer("series", SERIES | {"device": device, "points": 1}))["rows"]

    assert await rows("d5") == [[NOON_US, 4, None, pytest.approx(0.0, abs=1e-6), None]]
    assert await rows("d6") == [[NOON_US, 1, 5.0, 5.0, 5.0]]
    assert (await filled.select("SELECT DISTINCT circular FROM measurements WHERE device_id = 'd1'"))[1] == [(0.0,)]


async def test_a_device_is_named_by_any_spelling_of_its_address(filled):
    spelled = "70B3D57ED0AA0001"
    given = [record(i, message(spelled, float(i), at=NOON_US + i, offset=i)) for i in range(3)]
    await ReadingSync(filled, filled._settings)([batch(topics.VALIDATED.name, 2, given)])
    dashboards = Dashboards(filled, filled._settings)
    for asked in (spelled, "70b3d57ed0aa0001", "70:b3:d5:7e:d0:aa:00:01"):
        latest = orjson.loads(await dashboards.answer("latest", {"device": asked}))
        assert (latest["parameters"]["device"], [row[0] for row in latest["rows"]]) == (asked, [spelled])
        series = orjson.loads(await dashboards.answer("series", SERIES | {"device": asked, "points": 1}))
        assert [row[1:] for row in series["rows"]] == [[3, 0.0, 1.0, 2.0]]
        for name in ("windows", "anomalies"):
            assert (
                orjson.loads(
                    await dashboards.answer(
                        name, SERIES | {"device": asked} if name == "windows" else {"device": asked}
                    )
                )["rows"]
                == []
            )


async def test_a_series_of_directions_has_their_mean_and_no_extremes(filled):
    dashboards = Dashboards(filled, filled._settings)

    async def rows(device: str, **given: Any) -> Any:
        return orjson.loads(await dashboards.answer("series", SERIES | {"device": device, **given}))["rows"]

    assert await rows("d3", points=2) == [[NOON_US, 5, None, pytest.approx(0.2, abs=0.01), None],
                                          [NOON_US + 5_000_000, 5, None, pytest.approx(359.8, abs=0.01), None]]  # fmt: skip
    assert await rows("d3", points=1) == [[NOON_US, 10, None, 0.0, None]]
    assert await rows("d4", points=1) == [[NOON_US, 4, None, 0.5, None]]
    assert await rows("d4", start=NOON_US + 2, points=1) == [[NOON_US + 2, 2, None, None, None]]


async def test_every_dashboard_on_real_rows(filled):
    assert set(EXPECTED) == set(DASHBOARDS)
    dashboards = Dashboards(filled, filled._settings)
    wrong = {}
    for name, (given, rows) in EXPECTED.items():
        found = orjson.loads(await dashboards.answer(name, given))
        assert found["name"] == name
        assert all(len(row) == len(found["columns"]) for row in found["rows"])
        if found["rows"] != rows:
            wrong[name] = found["rows"]
    assert wrong == {}


class Host:
    def __init__(self, settings: Any) -> None:
        self.live = settings
        self.clock = SystemClock()
        self.resources: list[Any] = []

    def resource(self, closable: Any) -> Any:
        self.resources.append(closable)
        return closable


async def test_the_api_and_the_command(filled, clickhouse, clickhouse_database):
    host = Host(filled._settings)
    application = web.Application()
    DashboardViews(host).mount(application)
    async with TestClient(TestServer(application)) as client:
        response = await client.get("/api/dashboards/files", params={"stage": "ocr"})
        assert response.status == 200
        assert [row[0] for row in (await response.json())["rows"]] == ["F1", "F4"]
        response = await client.get("/api/dashboards/files", params={"limit": "many"})
        assert (response.status, (await response.json())["error"][:5]) == (400, "limit")
        assert (await client.get("/api/dashboards/sales")).status == 404
        listed = (await (await client.get("/api/dashboards")).json())["dashboards"]
        assert [d["name"] for d in listed] == list(DASHBOARDS)
        refused = await client.get("/api/dashboards", headers={"X-Forwarded-For": "10.0.0.1"})
        assert refused.status == 403
    for resource in reversed(host.resources):
        await resource.close()
    done = subprocess.run(
        [sys.executable, "-m", "preservarium", "sync", "query", "stages", "--json"],
        env={
            "PRESERVARIUM_ENV_FILE": "/dev/null", "PRESERVARIUM_CLICKHOUSE__URL": clickhouse, "PATH": "",
            "PRESERVARIUM_CLICKHOUSE__DATABASE": clickhouse_database, "PYTHONPATH": ":".join(sys.path),
        },
        capture_output=True,
        timeout=60,
        check=True,
    )  # fmt: skip
    assert orjson.loads(done.stdout)["rows"] == EXPECTED["stages"][1]
