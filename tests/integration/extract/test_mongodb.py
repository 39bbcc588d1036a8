"""Tasks and employees out of a server that speaks MongoDB's protocol into a real Kafka, the ledger in a real PostgreSQL.

The server is mongo-java-server and not MongoDB's own (tests/mongodb_support.py); the driver is PyMongo's.
"""

import asyncio
import random
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from extract_support import World
from sink_support import live

from preservarium import topics
from preservarium.extract.service import ExtractService
from preservarium.extract.source import STEP_ROWS
from preservarium.stores.migrate import MIGRATIONS, migrate_postgres

if TYPE_CHECKING:
    from mongodb_support import MongoStandIn

pymongo = pytest.importorskip("pymongo")

AT = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
AT_US = 1_767_323_045_678_000


class MongoWorld(World):
    """A database of this test's own."""

    def __init__(self, server: "MongoStandIn", dsn: str, kafka: str, prefix: str) -> None:
        name = f"test_{uuid.uuid4().hex[:12]}"
        super().__init__(dsn, kafka, prefix, f"{server.url}{name}")
        self.server = server
        self.client = pymongo.AsyncMongoClient(server.url, tz_aware=True)
        self.tasks = self.client[name]["tasks"]
        self.employees = self.client[name]["employees"]

    async def answers(self) -> bool:
        """Whether our own client has a connection again."""
        try:
            await self.client.admin.command("ping")
        except pymongo.errors.ConnectionFailure:
            return False
        return True

    async def forget(self) -> None:
        """The server's log has no place of before this any more."""
        await self.client.local["oplog.rs"].delete_many({})
        await self.client.other.notes.insert_one({})

    async def table(self) -> dict[str, tuple[Any, ...]]:
        """What the source has."""
        return {
            str(d["_id"]): (d["file_id"], d["stage"], d["status"], d.get("employee_code"), AT_US)
            async for d in self.tasks.find()
        }


def task(id: Any, status: str = "open", **fields: Any) -> dict[str, Any]:
    return {"_id": id, "file_id": f"f{id}", "stage": "s", "status": status, "assigned_at": AT} | fields


@pytest.fixture
async def world(
    mongodb_service: "MongoStandIn", pg_dsn: str, kafka: str, topic_prefix: str, tmp_path: Path
) -> AsyncIterator[MongoWorld]:
    (tmp_path / "postgres").mkdir()
    shutil.copy(MIGRATIONS / "postgres" / "0012_extract.sql", tmp_path / "postgres")
    await migrate_postgres(live(postgres={"url": pg_dsn})(), directory=tmp_path)
    made = MongoWorld(mongodb_service, pg_dsn, kafka, topic_prefix)
    await made.start()
    yield made
    await made.stop()
    await made.client.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_documents_and_their_changes_arrive(world: MongoWorld) -> None:
    await world.tasks.insert_many([task(i, updated_at=AT, employee_code="E1") for i in range(STEP_ROWS + 20)])
    await world.employees.insert_one({"_id": 1, "employee_code": "E1", "name": "Ünal", "active": True})
    extractor = await world.extractor()
    assert await extractor.turn() == STEP_ROWS + 21
    assert await world.state() == await world.table()
    ((key, person),) = await world.events(topics.EMPLOYEES)
    assert (key, person["name"], person["active"]) == (b"E1", "Ünal", True)
    assert await extractor.turn() == 0

    id = (await world.tasks.insert_one({k: v for k, v in task("x").items() if k != "_id"})).inserted_id
    await world.tasks.update_one({"_id": 1}, {"$set": {"status": "done"}, "$unset": {"employee_code": ""}})
    await world.tasks.replace_one({"_id": 2}, task(2, "replaced"))
    await world.tasks.update_many({"_id": {"$in": [3, 4]}}, {"$set": {"file_id": "other"}})
    await world.tasks.delete_one({"_id": 5})
    await world.tasks.insert_one(task(9_000))
    await world.tasks.update_one({"_id": 9_000}, {"$set": {"status": "short"}})
    await world.tasks.delete_one({"_id": 9_000})
    # Two that change their file are told of twice: gone from one, and in the other.
    assert await extractor.turn() == 8
    assert await world.state() == await world.table()
    assert str(id) in await world.state()
    assert await extractor.turn() == 0
    assert await (await world.extractor()).turn() == 0


async def test_a_change_that_says_nothing_new_is_not_sent(world: MongoWorld) -> None:
    await world.tasks.insert_one(task(1))
    extractor = await world.extractor()
    await extractor.turn()
    await world.tasks.update_one({"_id": 1}, {"$set": {"note": "of no field of ours"}})
    assert await extractor.turn() == 0


async def test_a_token_that_is_too_old_reads_and_compares_everything(world: MongoWorld) -> None:
    """Also documents whose `updated_at` nobody moves, or that have none."""
    await world.tasks.insert_many([task(i) for i in range(30)])
    await (await world.extractor()).turn()
    await world.tasks.update_one({"_id": 3}, {"$set": {"status": "changed meanwhile"}})
    await world.tasks.delete_one({"_id": 4})
    await world.tasks.insert_one(task(100))
    await world.forget()
    service = ExtractService(world.settings, world.publisher)
    await service.start()
    try:

        async def same() -> bool:
            return await world.state() == await world.table()

        await until(same)
        await world.tasks.insert_one(task(101))
        await until(same)
    finally:
        await service.stop()
    # What is as it was is not sent again.
    assert len(await world.events()) == 30 + 4


async def test_a_collection_that_is_dropped_is_told_as_gone(world: MongoWorld) -> None:
    await world.tasks.insert_many([task(i) for i in range(5)])
    extractor = await world.extractor()
    await extractor.turn()
    await world.tasks.drop()
    await world.tasks.insert_one(task(3))
    await extractor.turn()
    assert (await extractor._source.wait(0)).overflow
    await extractor.turn()
    assert await extractor.reconcile("tasks") == 4
    assert await world.state() == await world.table()


async def test_the_server_dies_and_comes_again(world: MongoWorld) -> None:
    await world.tasks.insert_many([task(i) for i in range(5)])
    service = ExtractService(world.settings, world.publisher)
    await service.start()
    try:

        async def same() -> bool:
            return await world.state() == await world.table()

        await until(same)
        await world.tasks.update_one({"_id": 1}, {"$set": {"status": "just before"}})
        world.server.kill()
        # Long enough for the service to have met it: its questions come every second.
        await asyncio.sleep(1.5)
        await asyncio.to_thread(world.server.start)
        await until(world.answers)
        await world.tasks.update_one({"_id": 2}, {"$set": {"status": "after"}})
        await world.tasks.delete_one({"_id": 3})
        await until(same)
    finally:
        await service.stop()
    assert len(await world.events()) == 5 + 3


@pytest.mark.parametrize("seed", range(2))
async def test_writers_at_random_and_an_extractor_that_is_killed(world: MongoWorld, seed: int) -> None:
    """The extractor dies between sending and recording, within steps, and anywhere; the log is lost once, too."""
    rng = random.Random(seed)
    done = asyncio.Event()

    async def writer(number: int) -> None:
        mine = random.Random(number)
        for _ in range(150):
            id = mine.randrange(60)
            kind = mine.random()
            if kind < 0.2:
                await world.tasks.delete_one({"_id": id})
            elif kind < 0.5:
                await world.tasks.update_one({"_id": id}, {"$set": {"status": str(mine.random())}})
            else:
                file = f"f{mine.randrange(9)}" if kind > 0.9 else f"f{id}"
                await world.tasks.replace_one({"_id": id}, task(id, str(mine.random()), file_id=file), upsert=True)
            await asyncio.sleep(mine.choice([0, 0, 0.01, 0.05]))

    async def writers() -> None:
        await asyncio.gather(*(writer(10 * seed + i) for i in range(3)))
        done.set()

    task_ = asyncio.create_task(writers())
    lives = 0
    while not done.is_set() or lives < 8:
        extractor = await world.extractor()
        lives += 1

        async def live_on(extractor: Any = extractor) -> None:
            while True:
                await extractor.turn()
                if (await extractor._source.wait(0.02)).overflow:
                    await extractor.turn()
                    await extractor.reconcile("tasks")

        life = asyncio.create_task(live_on())
        await asyncio.sleep(rng.uniform(0.05, 0.9))
        life.cancel()
        await asyncio.wait([life])
        assert life.cancelled() or life.exception() is None, life.exception()
        if lives == 4:
            await world.forget()
    await task_
    extractor = await world.extractor()
    await extractor.turn()
    if (await extractor._source.wait(0)).overflow:
        await extractor.turn()
    await extractor.reconcile("tasks")
    assert await world.state() == await world.table()
    assert await extractor.turn() == 0
    # An event that was sent twice says the same twice.
    said: dict[tuple[Any, ...], dict[str, Any]] = {}
    for key, line in await world.events():
        assert said.setdefault((key, line["task_id"], line["event_id"]), line) == line
