"""What the console reads from a real, migrated PostgreSQL."""

import asyncpg
import pytest

from preservarium.errors import Retry
from preservarium.settings import load
from preservarium.stores import registry as store
from preservarium.stores.migrate import migrate_postgres
from preservarium.stores.views import Views


@pytest.fixture
async def settings(pg_dsn):
    settings = load(postgres={"url": pg_dsn}, kafka={"bootstrap_servers": "127.0.0.1:1"}, clickhouse={"enabled": False})
    await migrate_postgres(settings)
    return settings


@pytest.fixture
async def connection(settings):
    connection = await asyncpg.connect(settings.postgres.dsn)
    await connection.execute(
        """
        INSERT INTO manufacturers VALUES ('m', nextval('registry_rev'), 1, '{}', now(), 'test');
        INSERT INTO device_types VALUES ('t', 'm', 'p', nextval('registry_rev'), 1, '{}', now(), 'test');
        INSERT INTO devices
          SELECT format('dev-%s', to_char(n, 'FM000')), 't', CASE n WHEN 7 THEN '50% of_it\\' ELSE 'Name ' || n END,
                 n <> 3, NULL, nextval('registry_rev'), 1, '{}', now(), 'test'
          FROM generate_series(1, 25) AS n;
        INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit)
          SELECT device_id, 'HTTP', c, '-1', '°C' FROM devices, unnest(ARRAY['b', 'a']) AS c;
        INSERT INTO latest SELECT series_id, to_timestamp(1760000000) + interval '123456 microseconds', series_id, NULL, 3,
          to_timestamp(1760000001) FROM series;
        INSERT INTO alarms (alarm_id, device_id, rule, severity, state, transition, occurred_at, detected_at, cleared_at,
                            updated_at)
          SELECT 'a' || to_char(n, 'FM00'), 'dev-001', 'r', 'major', 's', 'raised', to_timestamp(1760000000 + n / 3), now(),
                 CASE WHEN n % 2 = 0 THEN now() END, now()
          FROM generate_series(1, 20) AS n;
        """
    )
    yield connection
    await connection.close()


@pytest.fixture
async def views(settings, connection):
    views = Views(lambda: settings.postgres)
    yield views
    await views.close()


async def test_alarms_come_newest_first_without_gap_or_repeat(views):
    seen, before = [], None
    while True:
        page = await views.alarms(active=None, before=before, limit=7)
        seen += page["alarms"]
        if (before := page["next"]) is None:
            break
    assert len(seen) == len({a["alarm_id"] for a in seen}) == page["total"] == 20
    order = [(a["occurred_at"], a["alarm_id"]) for a in seen]
    assert order == sorted(order, reverse=True)
    active = await views.alarms(active=True, before=None, limit=100)
    assert active["total"] == len(active["alarms"]) == 10
    assert {a["cleared_at"] for a in active["alarms"]} == {None}
    assert active["alarms"][0]["device_name"] == "Name 1"


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"device_id": "dev-001"}, 20), ({"device_id": "dev-002"}, 0), ({"rule": "r"}, 20), ({"rule": "s"}, 0), ({"severities": ["major"]}, 20),
        ({"severities": ["minor", "critical"]}, 0), ({"q": "NAME 1"}, 20), ({"q": "DEV-0"}, 20), ({"q": "%"}, 0), ({"q": "'; --"}, 0),
    ],
)  # fmt: skip
async def test_past_alarms_are_filtered_and_counted(views, wanted, found):
    page = await views.alarms(active=None, before=None, limit=100, **wanted)
    assert len(page["alarms"]) == page["total"] == found


async def test_it_can_only_read(views):
    with pytest.raises(Retry, match="read-only"):
        await views._fetch("DELETE FROM alarms")


async def test_a_lost_connection_is_said_and_then_made_anew(views, connection):
    await views.alarms(active=None, before=None, limit=1)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'preservarium-console'"
    )
    for _ in range(20):
        try:
            page = await views.alarms(active=None, before=None, limit=1)
        except Retry:
            continue
        assert page["total"] == 20
        return
    pytest.fail("never connected again")


async def test_a_database_that_is_away_or_empty_is_a_retry(pg_dsn):
    views = Views(lambda: load(postgres={"host": "127.0.0.1", "port": 1}).postgres)
    with pytest.raises(Retry, match="PostgreSQL"):
        await views.alarms(active=True, before=None, limit=1)
    await views.close()
    views = Views(lambda: load(postgres={"url": pg_dsn}).postgres)
    with pytest.raises(Retry, match="not migrated"):
        await views.alarms(active=None, before=None, limit=1)
    await views.close()


@pytest.mark.parametrize(
    "registered", ["70b3d57ed0aa0001", "70B3D57ED0AA0001", "70-B3-D5-7E-D0-AA-00-01", "70b3D57eD0aA0001"]
)
@pytest.mark.parametrize("spelled", ["70b3d57ed0aa0001", "70B3D57ED0AA0001", "70b3.d57e.d0aa.0001"])
async def test_a_device_is_named_by_any_spelling_of_its_address(views, connection, registered, spelled):
    await connection.execute(
        f"""
        INSERT INTO devices VALUES ('{registered}', 't', 'Box', true, NULL, nextval('registry_rev'), 1, '{{}}', now(), 'test');
        INSERT INTO alarms (alarm_id, device_id, rule, pin_position, severity, state, transition, occurred_at, detected_at, updated_at)
          VALUES ('eui', '{registered}', 'r', '-1', 'major', 's', 'raised', now(), now(), now());
        INSERT INTO alarm_events (transition_id, alarm_id, device_id, rule, transition, state, severity, occurred_at, detected_at, detail)
          VALUES ('e1', 'eui', '{registered}', 'r', 'raised', 's', 'major', now(), now(), '{{"sequence": 1}}');
        INSERT INTO device_commands (command_id, device_id, command, state, reason, attempt, priority, requested_at, requested_by, idempotency_key, cause,
                                     expires_at, updated_at, content, confirm, sequence)
          VALUES ('c1', '{registered}', 'on', 'queued', '', 0, 0, now(), 'ann', 'k', '', now(), now(), '{{}}', '{{}}', 1);
        """
    )
    found = await views.registered(spelled)
    assert (found[0]["device_id"], found[0]["type"]) == (registered, "t")
    for wanted in ({"device_id": spelled}, {"q": spelled}):
        assert [a["alarm_id"] for a in (await views.alarms(active=None, before=None, limit=9, **wanted))["alarms"]] == [
            "eui"
        ]
    history = await views.alarm_history(device_id=spelled, rule="r", pin_position="-1", limit=9)
    assert [line["name"] for line in history] == ["raised"]
    page = await views.commands(device_id=spelled, states=[], before=None, limit=9)
    assert [c["device_id"] for c in page["commands"]] == [registered]
    assert await views.registered("70b3d57ed0aa0002") is None
    assert [await store.spelled(connection, name) for name in (spelled, "70b3d57ed0aa0002", "dev-001")] == [
        registered, "70b3d57ed0aa0002", "dev-001",
    ]  # fmt: skip
    # What is gone from the registry is found by the usual spellings.
    await connection.execute("DELETE FROM devices WHERE device_id = $1", registered)
    page = await views.commands(device_id=registered, states=[], before=None, limit=9)
    assert [c["device_id"] for c in page["commands"]] == [registered]
