"""Tasks and employees out of a real PostgreSQL into a real Kafka: each change once, whatever its writers' clocks and commits."""

import asyncio
import random
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import orjson
import pytest
from extract_support import World
from sink_support import execute, live
from thread_support import in_thread

from preservarium import topics
from preservarium.domain.tasks import event_order
from preservarium.errors import Retry
from preservarium.extract.named import SourceError
from preservarium.extract.service import Extractor, ExtractService
from preservarium.extract.status import again
from preservarium.stores.migrate import MIGRATIONS, migrate_postgres
from preservarium.streaming.stage import Send

ROOT = Path(__file__).resolve().parents[3]
TABLES = """
CREATE TABLE tasks (
  id bigint PRIMARY KEY, file_id text, stage text NOT NULL, status text NOT NULL, employee_code text,
  assigned_at timestamptz NOT NULL DEFAULT now(), completed_at timestamp, updated_at timestamptz DEFAULT now());
CREATE TABLE employees (id serial PRIMARY KEY, employee_code text NOT NULL, name text NOT NULL, active boolean, updated_at timestamptz DEFAULT now());
CREATE INDEX ON tasks (updated_at, id);
"""


@pytest.fixture(scope="module")
def template(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Makes databases with the ledger's tables, and with the source's: one is enough for both."""
    made: list[str] = []

    def on(name: str) -> str:
        return urlunsplit(urlsplit(postgres)._replace(path=f"/{name}"))

    def new(template: str | None = None) -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        in_thread(execute(postgres, f'CREATE DATABASE "{name}"' + (f' TEMPLATE "{template}"' if template else "")))
        made.append(name)
        return name

    first = new()
    folder = tmp_path_factory.mktemp("migrations")
    (folder / "postgres").mkdir()
    shutil.copy(MIGRATIONS / "postgres" / "0012_extract.sql", folder / "postgres")
    in_thread(migrate_postgres(live(postgres={"url": on(first)})(), directory=folder))
    in_thread(execute(on(first), TABLES))
    yield lambda: on(new(first))
    for name in made:
        in_thread(execute(postgres, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


async def table(world: World) -> dict[str, tuple[Any, ...]]:
    """What the source has."""
    rows = await world.db.fetch(
        "SELECT id::text, file_id, stage, status, employee_code, (extract(epoch FROM assigned_at) * 1000000)::bigint FROM tasks"
    )
    return {r[0]: tuple(r)[1:] for r in rows}


@pytest.fixture
async def world(template: Callable[[], str], kafka: str, topic_prefix: str) -> AsyncIterator[World]:
    made = World(template(), kafka, topic_prefix)
    await made.start()
    yield made
    await made.stop()


async def fill(world: World, count: int, **columns: str) -> None:
    names = ", ".join(columns)
    await world.db.execute(
        f"INSERT INTO tasks (id, file_id, stage, status{', ' if names else ''}{names})"
        f" SELECT i, 'f' || i % 50, 's' || i % 3, 'open'{''.join(f', {v}' for v in columns.values())} FROM generate_series(1, {count}) i"
    )


async def test_every_field_of_tasks_and_employees_arrives(world: World) -> None:
    await world.db.execute(
        "INSERT INTO tasks VALUES (7, 'f1', 'scan', 'done', 'E1', '2026-01-02 03:04:05.000006+00', '2026-01-02 04:00', '2026-01-03 00:00+00');"
        "INSERT INTO employees VALUES (1, 'E1', 'Ünal', true, '2026-01-03 00:00+00'), (2, 'E2', 'Bo', false, NULL)"
    )
    assert await (await world.extractor()).turn() == 3
    ((key, task),) = await world.events()
    assert key == b"f1"
    assert task.pop("event_id").startswith("1767398400000000-")
    assert task == {
        "file_id": "f1", "stage": "scan", "status": "done", "employee_code": "E1", "assigned_at": 1767323045000006,
        "completed_at": 1767326400000000, "updated_at": 1767398400000000, "task_id": "7",
    }  # fmt: skip
    people = dict(await world.events(topics.EMPLOYEES))
    assert people[b"E1"]["name"] == "Ünal"
    assert (people[b"E2"]["active"], "updated_at" in people[b"E2"]) == (False, False)


async def test_nothing_changed_is_nothing_written(world: World) -> None:
    await fill(world, 1_200)
    extractor = await world.extractor()
    assert await extractor.turn() == 1_200
    written = "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_xact_user_tables"
    ours = extractor._ledger._connection
    async with ours.transaction():
        before = await ours.fetchval(written)
        assert [await extractor.turn() for _ in range(3)] == [0, 0, 0]
        assert await ours.fetchval(written) == before
    # Nor after a restart, which walks once more what is above the recorded position.
    assert await (await world.extractor()).turn() == 0
    assert len(await world.events()) == 1_200


async def test_a_step_leaves_when_the_one_before_it_is_recorded_and_it_is_planned(world: World) -> None:
    await fill(world, 2_300)
    acknowledged = 0
    under_way = 0

    async def publish(sends: Sequence[Send]) -> None:
        nonlocal acknowledged, under_way
        under_way += 1
        assert under_way == 1
        if acknowledged == 1_500:
            message = "no acknowledgement"
            raise Retry(message)
        assert await world.db.fetchval("SELECT count(*) FROM extract_rows") == acknowledged
        planned = await world.db.fetchval("SELECT pending FROM extract_positions WHERE source = 'tasks'")
        assert [e[0] for e in orjson.loads(planned)] == [orjson.loads(s.value or b"")["task_id"] for s in sends]
        await world.publisher.publish(sends)
        acknowledged += len(sends)
        under_way -= 1

    with pytest.raises(Retry):
        await (await world.extractor(publish)).turn()
    assert await world.db.fetchval("SELECT count(*) FROM extract_rows") == 1_500
    # The next one sends what was planned, and goes on.
    assert await (await world.extractor()).turn() == 800
    assert len(await world.events()) == 2_300
    assert await world.db.fetchval("SELECT pending FROM extract_positions WHERE source = 'tasks'") is None


async def test_equal_timestamps_across_the_borders_of_steps(world: World) -> None:
    await fill(world, 1_700, updated_at="'2026-01-01 00:00+00'")
    assert await (await world.extractor()).turn() == 1_700
    assert await world.state() == await table(world)


async def test_changes_with_the_same_timestamp_are_told_and_the_later_counts(world: World) -> None:
    """A clock of whole seconds, or a writer that sets the column itself."""
    await fill(world, 3, updated_at="now()")
    extractor = await world.extractor()
    await extractor.turn()
    for status in ("a", "b", "c"):
        await world.db.execute(f"UPDATE tasks SET status = '{status}' WHERE id = 2")
        assert await extractor.turn() == 1
    assert await world.state() == await table(world)


async def test_a_transaction_that_commits_late(world: World) -> None:
    """Open for longer than the overlap; its rows bear the time of its beginning, which was passed meanwhile."""
    world.extract["overlap_s"] = 1
    extractor = await world.extractor()
    late = await asyncpg.connect(world.dsn)
    transaction = late.transaction()
    await transaction.start()
    await late.execute("INSERT INTO tasks (id, file_id, stage, status) VALUES (1, 'f', 's', 'late')")
    for i in range(2, 14):
        await world.db.execute(f"INSERT INTO tasks (id, file_id, stage, status) VALUES ({i}, 'f', 's', 'x')")
        await extractor.turn()
        await asyncio.sleep(0.15)
    assert "1" not in await world.state()
    await transaction.commit()
    await late.close()
    assert await extractor.turn() == 1
    assert await world.state() == await table(world)


async def test_clocks_that_are_ahead_behind_or_not_there(world: World) -> None:
    extractor = await world.extractor()
    await extractor.turn()
    await fill(world, 1, updated_at="now() + INTERVAL '3 years'")
    await world.db.execute(
        "INSERT INTO tasks (id, file_id, stage, status, updated_at) VALUES (2, 'f', 's', 'x', now() - INTERVAL '2 s'),"
        " (3, 'f', 's', 'x', NULL), (4, 'f', 's', 'x', 'infinity'), (5, 'f', 's', 'x', '2020-01-01'), (6, 'f', 's', 'x', '-infinity')"
    )
    assert await extractor.turn() == 4
    await world.db.execute("UPDATE tasks SET status = 'y' WHERE id IN (1, 3)")
    assert await extractor.turn() == 2
    assert await extractor.turn() == 0
    # Beyond the overlap only the comparison of all keys finds them.
    assert set(await table(world)) - set(await world.state()) == {"5", "6"}
    assert await extractor.reconcile("tasks") == 2
    assert await extractor.reconcile("tasks") == 0
    assert await world.state() == await table(world)


async def test_what_was_deleted_is_told_and_may_come_again(world: World) -> None:
    await fill(world, 1_500)
    extractor = await world.extractor()
    await extractor.turn()
    await world.db.execute("DELETE FROM tasks WHERE id % 7 = 0 OR id BETWEEN 100 AND 800")
    assert await extractor.turn() == 0
    assert await extractor.reconcile("tasks") == 1_500 - await world.db.fetchval("SELECT count(*) FROM tasks")
    await fill(world, 0)
    await world.db.execute("INSERT INTO tasks (id, file_id, stage, status) VALUES (7, 'f7', 's', 'again')")
    assert await extractor.turn() == 1
    assert await world.state() == await table(world)


async def test_everything_is_sent_again_newer_than_before_and_what_is_gone_is_told(world: World) -> None:
    await fill(world, 700)
    await (await world.extractor()).turn()
    before = {line["task_id"]: event_order(line["event_id"]) for _, line in await world.events()}
    await world.db.execute("DELETE FROM tasks WHERE id <= 10")
    assert await again(world.settings(), ["tasks"]) == 700
    extractor = await world.extractor()
    assert await extractor.turn() == 690
    # As the service does: it is due.
    assert await extractor.due("tasks", 86_400) == 0
    assert await extractor.reconcile("tasks") == 10
    assert await world.state() == await table(world)
    newest = {
        line["task_id"]: event_order(line["event_id"])
        for _, line in sorted(await world.events(), key=lambda e: event_order(e[1]["event_id"]))
    }
    assert all(newest[id] > before[id] for id in before)
    assert await extractor.turn() == 0


async def test_a_task_that_goes_to_another_file_leaves_the_first(world: World) -> None:
    await fill(world, 2)
    extractor = await world.extractor()
    await extractor.turn()
    await world.db.execute("UPDATE tasks SET file_id = 'other', updated_at = now() WHERE id = 1")
    assert await extractor.turn() == 2
    assert await world.state() == await table(world)


async def test_columns_of_other_names_views_and_mistakes(world: World) -> None:
    await world.db.execute(
        'CREATE SCHEMA legacy; CREATE TABLE legacy."Work" ("Id" uuid PRIMARY KEY, doc text, step text, state text, given timestamp, changed timestamp);'
        "INSERT INTO legacy.\"Work\" SELECT gen_random_uuid(), 'd', 's', 'x', '2026-01-01 10:00', '2026-01-01 12:00' FROM generate_series(1, 600);"
        'CREATE VIEW work AS SELECT "Id" AS id, doc AS file_id, step AS stage, state AS status, given AS assigned_at, changed AS updated_at FROM legacy."Work"'
    )
    columns = "id=Id, file_id=doc, stage=step, status=state, assigned_at=given, updated_at=changed"
    world.extract |= {
        "tasks_table": "legacy.Work",
        "tasks_columns": columns,
        "employees_table": "",
        "time_zone": "Europe/Athens",
    }
    assert await (await world.extractor()).turn() == 600
    _, line = (await world.events())[0]
    assert line["assigned_at"] == 1767254400000000  # 10:00 in Athens
    await world.db.execute("TRUNCATE extract_rows, extract_positions")
    world.extract |= {"tasks_table": "work", "tasks_columns": ""}
    assert await (await world.extractor()).turn() == 600
    for wrong, told in (
        ({"tasks_table": "nowhere"}, "no table nowhere"),
        ({"tasks_columns": "file_id=nothing"}, "nothing"),
        ({"tasks_columns": "file_id"}, "field=column"),
        ({"tasks_columns": "updated_at=stage"}, "type text"),
        ({"tasks_table": 'x"; DROP TABLE tasks'}, "no name"),
    ):
        before = dict(world.extract)
        world.extract |= wrong
        with pytest.raises(SourceError, match=re.escape(told)):
            await world.extractor()
        world.extract.clear()
        world.extract |= before


@pytest.mark.parametrize("seed", range(2))
async def test_writers_at_random_and_an_extractor_that_is_killed(world: World, seed: int) -> None:
    """Shuffled transactions of several writers; the extractor dies between sending and recording, within steps, and anywhere."""
    rng = random.Random(seed)
    world.extract["overlap_s"] = 1
    done = asyncio.Event()

    async def writer(number: int) -> None:
        mine = random.Random(number)
        connection = await asyncpg.connect(world.dsn)
        for _ in range(40):
            async with connection.transaction():
                for _ in range(mine.randrange(1, 6)):
                    id = mine.randrange(200)
                    kind = mine.random()
                    try:
                        async with connection.transaction():
                            if kind < 0.15:
                                await connection.execute("DELETE FROM tasks WHERE id = $1", id)
                            else:
                                await connection.execute(
                                    "INSERT INTO tasks (id, file_id, stage, status, updated_at) VALUES ($1, $2, 's', $3, now())"
                                    " ON CONFLICT (id) DO UPDATE SET status = excluded.status, file_id = excluded.file_id,"
                                    " updated_at = excluded.updated_at",
                                    id, f"f{id % 40 if kind < 0.9 else mine.randrange(40)}", str(mine.random()),
                                )  # fmt: skip
                    except (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError):
                        continue
                    await asyncio.sleep(mine.choice([0, 0, 0.01, 0.1]))
        await connection.close()

    async def writers() -> None:
        await world.db.execute(
            "ALTER DATABASE CURRENT SET lock_timeout = '200ms'".replace("CURRENT", f'"{urlsplit(world.dsn).path[1:]}"')
        )
        await asyncio.gather(*(writer(10 * seed + i) for i in range(4)), return_exceptions=True)
        done.set()

    await world.publisher.publish(
        [Send(t, b"x", None, partition=p) for t in (topics.EMPLOYEES, topics.TASK_EVENTS) for p in (0, 1)][:2]
    )
    task = asyncio.create_task(writers())
    lives = 0
    while not done.is_set() or lives < 8:
        extractor = await world.extractor()
        lives += 1

        async def live_on(extractor: Extractor = extractor) -> None:
            while True:
                await extractor.turn()
                if rng.random() < 0.2:
                    await extractor.reconcile("tasks")
                await asyncio.sleep(0.02)

        life = asyncio.create_task(live_on())
        await asyncio.sleep(rng.uniform(0.05, 0.6))
        life.cancel()
        await asyncio.wait([life])
        assert life.cancelled() or life.exception() is None, life.exception()
        extractor._source._connection.terminate()  # type: ignore[attr-defined]
    await task
    extractor = await world.extractor()
    await extractor.turn()
    await extractor.reconcile("tasks")
    assert await world.state() == await table(world)
    assert await extractor.turn() == 0


async def test_the_service_is_woken_by_notices_and_one_of_two_leads(world: World) -> None:
    script = (ROOT / "examples" / "extract_notify.sql").read_text()
    await world.db.execute(script)
    # Without a notice nothing would be looked at for an hour.
    world.extract |= {"interval_min_s": 3_600, "interval_max_s": 3_600}
    services = [ExtractService(world.settings, world.publisher) for _ in range(2)]
    for service in services:
        await service.start()
    try:
        async with asyncio.timeout(60):
            while not await world.db.fetchval("SELECT count(*) FROM extract_positions WHERE source = 'tasks'"):
                await asyncio.sleep(0.05)
            await fill(world, 20)
            while await world.db.fetchval("SELECT count(*) FROM extract_rows") < 20:
                await asyncio.sleep(0.05)
            await world.db.execute("DELETE FROM tasks WHERE id < 5")
            while await world.db.fetchval("SELECT count(*) FROM extract_rows WHERE changed_us >= 0") > 16:
                await asyncio.sleep(0.05)
        leads = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND database ="
        assert await world.db.fetchval(f"{leads} (SELECT oid FROM pg_database WHERE datname = current_database())") == 1
    finally:
        for service in services:
            await service.stop()
    assert await world.state() == await table(world)
    assert len(await world.events()) == 24
