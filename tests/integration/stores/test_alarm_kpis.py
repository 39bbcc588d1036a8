"""The alarm system's figures on a real PostgreSQL, beside the same by brute force in Python."""

import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from statistics import median

import asyncpg
import orjson
import pytest
from click.testing import CliRunner
from sink_support import batch, live, migrated_database, record
from thread_support import in_thread

from preservarium import topics
from preservarium.__main__ import cli
from preservarium.stages.sync import ALARM_EVENTS, EventSync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.dashboards import Dashboards
from preservarium.stores.kpis import kpis
from preservarium.stores.migrate import migrate_clickhouse

T = datetime(2026, 3, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
HOURS = 30
SEVERITIES = ("critical", "major", "minor")


def us(at: datetime) -> int:
    return int(at.timestamp()) * 1_000_000 + at.microsecond


def history() -> list[dict]:
    """Alarms with their answers: calm hours, bursts that are floods, one alarm that chatters."""
    rng = random.Random(11)
    found = []

    def add(at: datetime, device: int, severity: str | None = None, stands: bool = False) -> None:
        number = len(found)
        waited = timedelta(seconds=rng.randrange(1, 4_000)) if rng.random() < 0.7 else None
        found.append(
            {
                "alarm_id": f"a{number}", "device_id": f"dev-{device}", "rule": f"r{device % 3}", "pin_position": str(device % 2),
                "severity": severity or rng.choice(SEVERITIES), "occurred_at": at, "detected_at": at + timedelta(seconds=rng.randrange(20)),
                "acknowledged_at": None if waited is None else at + timedelta(seconds=20) + waited,
                "recipients": rng.sample(["day", "night", "chief"], rng.randrange(4)),
                "cleared_at": None if stands else at + timedelta(seconds=5),
            }
        )  # fmt: skip

    for _ in range(150):
        add(T + timedelta(seconds=rng.randrange(HOURS * 3_600)), rng.randrange(20))
    for start in (3, 9, 9.3, 21):
        for _ in range(rng.randrange(9, 40)):
            add(T + timedelta(hours=start, seconds=rng.randrange(900)), rng.randrange(20))
    for i in range(25):
        add(T + timedelta(hours=14, seconds=i * 17), 3)
    add(T + timedelta(hours=1), 19, "critical", stands=True)
    return found


async def fill(dsn: str, alarms: list[dict]) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        """
        INSERT INTO manufacturers VALUES ('m', 1, 1, '{}', now(), 'test');
        INSERT INTO device_types VALUES ('t', 'm', 'p', 2, 1, '{}', now(), 'test');
        INSERT INTO devices SELECT 'dev-' || n, 't', NULL, true, NULL, 10 + n, 1,
          CASE WHEN n < 5 THEN '{"meta": {"area": "north"}}' ELSE '{}' END::json, now(), 'test' FROM generate_series(0, 18) n;
        """
    )
    await connection.executemany(
        "INSERT INTO alarms (alarm_id, device_id, rule, pin_position, severity, state, transition, occurred_at, detected_at, cleared_at,"
        " updated_at, generation) VALUES ($1, $2, $3, $4, $5, $6, 'x', $7, $8, $9, now(), $10)",
        [
            (a["alarm_id"] + suffix, a["device_id"], a["rule"], a["pin_position"], a["severity"],
             "normal" if a["cleared_at"] else "unacknowledged", a["occurred_at"], a["detected_at"], a["cleared_at"], generation)
            for a in alarms for suffix, generation in (("", 0), ("-replayed", 3))
        ],
    )  # fmt: skip
    events = []
    for a in alarms:
        detail = orjson.dumps(
            {"pin_position": a["pin_position"], "recipients": a["recipients"], "actor": "ann"}
        ).decode()
        for generation, suffix in ((0, ""), (3, "-replayed")):
            events.append((f"{a['alarm_id']}{suffix}-1", a["alarm_id"] + suffix, a["device_id"], a["rule"], "raised", a["severity"],
                           a["occurred_at"], a["detected_at"], generation, detail))  # fmt: skip
        for n in (2, 3):  # the second acknowledgement changes nothing
            if a["acknowledged_at"]:
                at = a["acknowledged_at"] + (n - 2) * MINUTE
                events.append((f"{a['alarm_id']}-{n}", a["alarm_id"], a["device_id"], a["rule"], "acknowledged", a["severity"],
                               a["occurred_at"], at, 0, detail))  # fmt: skip
    await connection.executemany(
        "INSERT INTO alarm_events (transition_id, alarm_id, device_id, rule, transition, state, severity, occurred_at, detected_at, generation,"
        " detail) VALUES ($1, $2, $3, $4, $5, 'x', $6, $7, $8, $9, $10)",
        events,
    )
    await connection.close()


def floods(instants: list[datetime]) -> list[tuple[datetime, datetime, int, int]]:
    """(begin, end, most in 10 minutes, annunciations) second by second."""
    found, begin, most = [], None, 0
    counts = Counter(instants)
    window = []
    at = min(instants)
    while at <= max(instants) + timedelta(minutes=11):
        window = [x for x in window if x + timedelta(minutes=10) > at] + [at] * counts[at]
        if begin is None and len(window) > 10:
            begin = at
        if begin is not None:
            most = max(most, len(window))
            if len(window) < 5:
                found.append((begin, at, most, sum(begin <= x < at for x in instants)))
                begin, most = None, 0
        at += timedelta(seconds=1)
    return found


@pytest.fixture(scope="module")
def alarms():
    return history()


@pytest.fixture(scope="module")
def filled(postgres, alarms):
    with migrated_database(postgres) as dsn:
        in_thread(fill(dsn, alarms))
        yield dsn


@pytest.fixture
async def connection(filled):
    connection = await asyncpg.connect(filled)
    yield connection
    await connection.close()


def bucket(at: datetime, minutes: int) -> datetime:
    return at - (at - T) % timedelta(minutes=minutes)


@pytest.mark.parametrize(("view", "minutes"), [("alarm_rate_10m", 10), ("alarm_rate_1h", 60)])
async def test_rates(connection, alarms, view, minutes):
    expected = Counter()
    for a in alarms:
        for operator in ("", *a["recipients"]):
            expected[bucket(a["detected_at"], minutes), operator, a["severity"]] += 1
    rows = await connection.fetch(
        f"SELECT bucket, operator, severity, sum(annunciations) AS n FROM {view} GROUP BY 1, 2, 3"
    )
    assert {tuple(row)[:3]: row["n"] for row in rows} == expected


async def test_areas(connection, alarms):
    rows = await connection.fetch(
        "SELECT area, sum(annunciations) AS n FROM alarm_rate_1h WHERE operator = '' GROUP BY 1"
    )
    north = sum(a["device_id"] in {f"dev-{n}" for n in range(5)} for a in alarms)
    assert {row["area"]: row["n"] for row in rows} == {"north": north, "": len(alarms) - north}


@pytest.mark.parametrize("operator", ["", "day", "night", "chief"])
async def test_floods_begin_above_ten_and_end_below_five_in_ten_minutes(connection, alarms, operator):
    instants = [a["detected_at"] for a in alarms if not operator or operator in a["recipients"]]
    rows = await connection.fetch("SELECT * FROM alarm_floods WHERE operator = $1 ORDER BY begins_at", operator)
    expected = floods(instants)
    assert [(r["begins_at"], r["ends_at"], r["most"], r["annunciations"]) for r in rows] == expected
    assert operator or len(expected) >= 4


async def test_chattering(connection, alarms):
    by_point = {}
    for a in alarms:
        by_point.setdefault((a["device_id"], a["rule"], a["pin_position"]), []).append(a["occurred_at"])
    expected = {}
    for point, instants in by_point.items():
        within = [(at, sum(at - MINUTE <= x <= at for x in instants)) for at in instants]
        if times := [n for _, n in within if n >= 3]:
            expected[point] = (len(times), max(times))
    rows = await connection.fetch(
        "SELECT device_id, rule, pin_position, count(*), max(raised_in_minute) FROM alarm_chatter GROUP BY 1, 2, 3"
    )
    assert {tuple(row)[:3]: tuple(row)[3:] for row in rows} == expected
    assert expected["dev-3", "r0", "1"][0] >= 23


async def test_stale(connection):
    rows = await connection.fetch("SELECT device_id, occurred_at, age > INTERVAL '24 hours' AS old FROM alarm_stale")
    assert [tuple(row) for row in rows] == [("dev-19", T + timedelta(hours=1), True)]


async def test_all_figures_of_a_time(connection, alarms):
    begin, end = T + timedelta(hours=2), T + timedelta(hours=20)
    found = await kpis(connection, us(begin) + 5, us(end) - 5)  # widened to whole intervals
    assert (found["from"], found["to"]) == (us(begin), us(end))
    mine = [a for a in alarms if begin <= a["detected_at"] < end]
    assert found["annunciations"] == len(mine)
    tens = Counter(bucket(a["detected_at"], 10) for a in mine)
    hours = Counter(bucket(a["detected_at"], 60) for a in mine)
    everybody = found["operators"][""]
    assert everybody["per_10min_mean"] == pytest.approx(len(mine) / (18 * 6))
    assert (everybody["per_10min_most"], everybody["per_hour_most"]) == (max(tens.values()), max(hours.values()))
    assert everybody["intervals_above_10"] == sum(n > 10 for n in tens.values())
    inside = [f for f in floods([a["detected_at"] for a in alarms]) if f[0] < end and f[1] > begin]
    spent = sum((min(f[1], end) - max(f[0], begin) for f in inside), timedelta())
    assert everybody["floods"] == len(inside)
    assert everybody["time_in_flood"] == pytest.approx(spent / (end - begin))
    assert {n: one["annunciations"] for n, one in found["priorities"].items()} == Counter(a["severity"] for a in mine)
    assert sum(one["share"] for one in found["priorities"].values()) == pytest.approx(1)
    points = Counter((a["device_id"], a["rule"], a["pin_position"]) for a in mine)
    top = [n for _, n in points.most_common(10)]
    assert [one["annunciations"] for one in found["top"]["listed"]] == top
    assert found["top"]["share"] == pytest.approx(sum(top) / len(mine))
    waited = [(a["acknowledged_at"] - a["detected_at"]).total_seconds() for a in mine if a["acknowledged_at"]]
    answers = found["acknowledgements"]
    assert (answers["acknowledged"], answers["never"]) == (len(waited), len(mine) - len(waited))
    assert answers["median_s"] == pytest.approx(median(waited))
    assert answers["longest_s"] == pytest.approx(max(waited))


async def test_clickhouse_says_the_same(clickhouse, clickhouse_database, alarms):
    settings = live(clickhouse={"url": clickhouse, "database": clickhouse_database})
    await migrate_clickhouse(settings())
    store = ClickHouseStore(settings)
    lines = []
    for a in alarms:
        line = {
            "alarm_id": a["alarm_id"], "device_id": a["device_id"], "rule": a["rule"], "rule_rev": 1, "severity": a["severity"],
            "component_type": "temperature", "pin_position": a["pin_position"], "state": "unacknowledged", "cleared_at": None,
            "occurred_at": us(a["occurred_at"]), "value": 1.0, "unit": "", "threshold": 1.0, "message": "", "generation": 0,
            "raw_partition": None, "raw_offset": None, "raw_index": None,
        }  # fmt: skip
        lines.append(
            {**line, "transition_id": f"{a['alarm_id']}-1", "transition": "raised", "detected_at": us(a["detected_at"])}
        )
        lines.append(
            {**lines[-1], "alarm_id": a["alarm_id"] + "r", "transition_id": f"{a['alarm_id']}-r", "generation": 3}
        )
        if a["acknowledged_at"]:
            for n in (2, 3):
                at = us(a["acknowledged_at"] + (n - 2) * MINUTE)
                lines.append(
                    {**line, "transition_id": f"{a['alarm_id']}-{n}", "transition": "acknowledged", "detected_at": at}
                )
    records = [record(i, line) for i, line in enumerate(lines)]
    await EventSync(ALARM_EVENTS, store, settings)([batch(topics.ALERTS.name, 0, records)])
    dashboards = Dashboards(store, settings)
    begin, end = T + timedelta(hours=2), T + timedelta(hours=20)

    async def ask(name):
        return orjson.loads(await dashboards.answer(name, {"start": us(begin), "end": us(end)}))["rows"]

    mine = [a for a in alarms if begin <= a["detected_at"] < end]
    rates = Counter((us(bucket(a["detected_at"], 10)), a["severity"]) for a in mine)
    assert {(at, severity): n for at, severity, n in await ask("alarm_rate")} == rates
    top = Counter((a["device_id"], a["rule"], a["pin_position"]) for a in mine)
    found = await ask("alarm_top")
    assert [n for *_, n, _ in found] == [n for _, n in top.most_common(10)]
    assert all(share == pytest.approx(n / len(mine)) for *_, n, share in found)
    by_point = {}
    for a in alarms:
        by_point.setdefault((a["device_id"], a["rule"], a["pin_position"]), []).append(a["occurred_at"])
    chatter = {}
    for point, instants in by_point.items():
        within = [sum(at - MINUTE <= x <= at for x in instants) for at in instants if begin <= at < end]
        if times := [n for n in within if n >= 3]:
            chatter[point] = (len(times), max(times))
    assert {tuple(row[:3]): tuple(row[3:]) for row in await ask("alarm_chatter")} == chatter
    waited = [(a["acknowledged_at"] - a["detected_at"]).total_seconds() for a in mine if a["acknowledged_at"]]
    answered, never, median_s, _, longest_s = (await ask("alarm_answers"))[0]
    assert (answered, never) == (len(waited), len(mine) - len(waited))
    assert (median_s, longest_s) == (pytest.approx(median(waited)), pytest.approx(max(waited)))
    expected = [
        [us(f[0]), us(f[1]), f[2]] for f in floods([a["detected_at"] for a in alarms]) if f[0] < end and f[1] > begin
    ]
    assert len(expected) >= 2
    assert await ask("alarm_floods") == expected
    await store.close()


def test_the_command_prints_them(filled, monkeypatch):
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__URL", filled)
    arguments = ["alarms", "kpis", "--from", T.isoformat(), "--to", (T + timedelta(hours=HOURS)).isoformat()]
    as_json = CliRunner().invoke(cli, [*arguments, "--json"])
    assert as_json.exit_code == 0, as_json.output
    found = orjson.loads(as_json.stdout)
    assert found["chattering"]["alarms"] >= 1
    printed = CliRunner().invoke(cli, arguments)
    assert printed.exit_code == 0, printed.output
    assert f"{found['annunciations']} annunciations" in printed.stdout
    assert "dev-3 r0 1 chatters" in printed.stdout
    assert CliRunner().invoke(cli, [*arguments, "--to", "2020-01-01"]).exit_code == 2
