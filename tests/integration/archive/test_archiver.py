"""Between a log and files: each record once, whatever dies when, in a folder and in S3. With a real PostgreSQL and a real S3 server."""

import asyncio
import importlib.util
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import orjson
import pytest
from archive_support import PARTITIONS, VARIABLE, Log, archived, execute
from lineage_support import command
from s3_support import ACCESS_KEY, SECRET_KEY
from sink_support import migrated_database
from thread_support import in_thread
from worker_support import ROOT

from preservarium import metrics, topics
from preservarium.operations.archive.archiver import Archiver
from preservarium.operations.archive.reading import ArchivedRecords
from preservarium.settings import Settings, load
from preservarium.stores.archive_files import Files
from preservarium.streaming.records import raw_line

pytestmark = pytest.mark.postgres

RAW = topics.RAW.name
DAY_MS = 86_400_000


class World:
    """A log, an index and a folder."""

    def __init__(self, log: Log, dsn: str, folder: Path) -> None:
        self.log = log
        self.dsn = dsn
        self.folder = folder

    async def execute(self, statement: str, *arguments: Any) -> Any:
        return await execute(self.dsn, statement, *arguments)

    async def end_leases(self) -> None:
        await self.execute("UPDATE archive_positions SET leased_until = now() - interval '1 second'")

    def archived(self) -> dict[tuple[int, int], Any]:
        return archived(self.folder)

    async def whole(self) -> dict[str, Any]:
        """What `archive verify` says, of an archive that it finds whole."""
        found: dict[str, Any] = await command("archive", "verify", "--json")
        assert found["whole"], found
        return found


def with_archive(**other: Any) -> Settings:
    settings = load()
    return settings.model_copy(update={"archive": settings.archive.model_copy(update=other)})


@pytest.fixture(scope="module")
def database(postgres: str) -> Iterator[str]:
    with migrated_database(postgres) as dsn:
        yield dsn


@pytest.fixture
def world(database: str, tmp_path: Path) -> Iterator[World]:
    given = {
        "PRESERVARIUM_POSTGRES__URL": database,
        "PRESERVARIUM_CLICKHOUSE__ENABLED": "false",
        "PRESERVARIUM_ARCHIVE__URL": str(tmp_path / "archive"),
        "PRESERVARIUM_DATA_DIR": str(tmp_path / "state"),
        # Nobody asks it.
        "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1",
    }
    patch = Log(tmp_path / "log").install()
    for name, value in given.items():
        patch.setenv(name, value)
    in_thread(execute(database, "TRUNCATE archive_segments, archive_positions, archive_gaps"))
    yield World(Log(tmp_path / "log"), database, tmp_path / "archive")
    patch.undo()


async def run() -> Any:
    return await command("archive", "run", "--json")


async def test_records_are_archived_once_and_found_by_their_offsets(world: World) -> None:
    world.log.send(50)
    before = metrics.ARCHIVE_RECORDS.labels(RAW)._value.get()
    done = await run()
    assert (done["records"], len(done["files"])) == (50, PARTITIONS)
    assert metrics.ARCHIVE_RECORDS.labels(RAW)._value.get() == before + 50
    assert (await run())["records"] == 0
    world.log.send(21, at_ms=1_764_547_300_000)
    # What is not due waits.
    archiver = Archiver(load)
    assert (await archiver.turn()).records == 0
    assert metrics.ARCHIVE_LAG_RECORDS.labels(RAW)._value.get() == 21
    assert (await archiver.turn(now=True)).records == 21
    await archiver.close()
    log = world.log.records()
    assert world.archived() == log
    said = (await command("archive", "status", "--json"))["topics"][0]
    assert (said["topic"], said["files"], said["records"], said["lost"]) == (RAW, 2 * PARTITIONS, 71, 0)
    assert said["value_bytes"] == sum(len(r.key or b"") + len(r.value or b"") for r in log.values())
    assert said["file_bytes"] == sum(p.stat().st_size for p in world.folder.rglob("*.parquet"))
    text = await command("archive", "status")
    assert "PRESERVARIUM_ARCHIVE__KEEP_DAYS" in text
    assert "0 records are in Kafka and in no file yet" in text
    assert (await world.whole())["files"] == 2 * PARTITIONS

    reading = ArchivedRecords(load())
    for p in range(PARTITIONS):
        mine = {o: r for (q, o), r in log.items() if q == p}
        assert await reading.span(RAW, p) == (0, len(mine))
        for begin, end in ((0, 99), (3, 20), (16, 17), (17, 18), (90, 99)):
            found = [r async for some in reading.between(RAW, p, begin, end) for r in some]
            assert [
                tuple(getattr(r, n) for n in ("offset", "timestamp", "key", "value", "headers")) for r in found
            ] == [tuple(r) for o, r in sorted(mine.items()) if begin <= o < end]
        some = await reading.at(RAW, p, [22, 1, 16, 17, 999])
        assert sorted(some) == [1, 16, 17, 22]
        assert some[22].value == mine[22].value
        at_us = mine[19].timestamp * 1_000
        assert await reading.since(RAW, p, at_us) == 19
        assert await reading.since(RAW, p, at_us + 86_400_000_000) is None
        assert await reading.since(RAW, p, 0) == 0
    assert await reading.span("another_topic", 0) is None
    assert await reading.at("another_topic", 0, [1]) == {}
    await reading.close()


async def test_what_is_due_is_archived_by_itself(world: World) -> None:
    world.log.send(30)
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        await world.execute("UPDATE archive_positions SET archived_at = now() - interval '2 hours'")

    archiver = Archiver(load)
    # What never was archived is due at once, what comes then an hour later.
    await archiver.run(wait, lambda: len(waits) == 1)
    assert world.archived() == world.log.records()
    world.log.send(9)
    await archiver.run(wait, lambda: len(waits) == 2)
    await archiver.close()
    assert world.archived() == world.log.records()
    # A place that cannot be written is tried again, and told once.
    os.environ["PRESERVARIUM_ARCHIVE__URL"] = str(world.folder.parent / "log" / "no")
    failures = metrics.ARCHIVE_FAILURES._value.get()
    archiver, waits[:] = Archiver(load), []
    await archiver.run(wait, lambda: len(waits) == 3)
    await archiver.close()
    assert metrics.ARCHIVE_FAILURES._value.get() == failures + 3
    assert waits == [2.0, 4.0, 8.0]


async def test_files_end_where_they_are_full_and_where_a_day_ends(world: World) -> None:
    now_ms = time.time_ns() // 1_000_000
    days = [
        now_ms - 2 * DAY_MS,
        now_ms - 2 * DAY_MS + 1,
        now_ms - 3 * DAY_MS,
        now_ms + 400 * DAY_MS,
        now_ms,
        now_ms - DAY_MS,
        -1,
    ]
    world.log.add(0, *((at, None, b"x", ()) for at in days))
    archiver = Archiver(lambda: with_archive(segment_records_max=3))
    done = await archiver.turn(now=True)
    assert [(s.first, s.next) for s in done.segments] == [(0, 3), (3, 6), (6, 7)]
    assert done.segments[0].day < done.segments[1].day == done.segments[2].day
    world.log.add(
        1, *((at, None, b"x", ()) for at in days[:2]), (now_ms, None, b"y" * 1_500_000, ()), (now_ms, None, b"z", ())
    )
    archiver._settings = lambda: with_archive(segment_bytes_max=1_048_576)
    done = await archiver.turn(now=True)
    await archiver.close()
    assert [(s.first, s.next, s.records) for s in done.segments] == [(0, 2, 2), (2, 3, 1), (3, 4, 1)]
    assert world.archived().keys() == world.log.records().keys()
    await world.whole()


async def test_offsets_without_a_record_are_no_hole(world: World) -> None:
    world.log.add(0, (1, None, b"a", ()), (2, None, b"b", ()))
    await run()
    world.log.add(0, skip=3)  # a transaction that was aborted
    assert (await run())["records"] == 0
    world.log.add(0, (3, None, b"c", ()), skip=2)
    await run()
    assert world.archived() == world.log.records()
    await world.whole()
    gaps = await world.execute("SELECT first_offset, next_offset, lost FROM archive_gaps")
    assert [tuple(gap) for gap in gaps] == [(2, 5, False)]


async def test_what_kafka_deleted_before_it_was_archived_is_told(world: World) -> None:
    world.log.send(30)
    assert (await run())["records"] == 30
    world.log.send(30)
    world.log.delete(before=15)
    lag = (await command("archive", "status", "--json"))["lags"][0]
    assert lag["about_to_be_lost"] == 5 * PARTITIONS
    lost = metrics.ARCHIVE_LOST.labels(RAW)._value.get()
    done = await run()
    assert (done["records"], done["lost"]) == (5 * PARTITIONS, 5 * PARTITIONS)
    assert metrics.ARCHIVE_LOST.labels(RAW)._value.get() == lost + 5 * PARTITIONS
    checked = await world.whole()
    assert checked["lost"] == 5 * PARTITIONS
    # A hole that nobody noted is one.
    await world.execute("DELETE FROM archive_gaps WHERE partition = 1")
    checked = await command("archive", "verify", "--json", code=1)
    assert [hole["what"] for hole in checked["holes"]] == ["offsets 10 to 14 are in no file"]
    assert "10 to 14" in await command("archive", "verify", code=1)


STEPS = ("made", "planned", "half", "put", "recorded")
#: Dies at a step, as by kill -9: nothing is closed, nothing is given back.
VICTIM = f"""
import asyncio, os, signal, sys
from pathlib import Path
from archive_support import Log
Log(Path(os.environ["{VARIABLE}"])).install()
from preservarium.operations.archive import archiver as module
from preservarium.settings import load
from preservarium.stores import archive_files, archive_index

def die(): os.kill(os.getpid(), signal.SIGKILL)
step = sys.argv[1]
plan, record, put, into = archive_index.plan, archive_index.record, archive_files.Files.put, archive_files._into_folder
async def planned(*a):
    if step == "made": die()
    await plan(*a)
    if step == "planned": die()
async def recorded(*a):
    done = await record(*a)
    if step == "recorded": die()
    return done
def half(local, to):
    if step == "half":
        to.parent.mkdir(parents=True, exist_ok=True)
        to.with_name(to.name + ".99-ab.part").write_bytes(local.read_bytes()[:100])
        die()
    into(local, to)
def putting(self, local, path):
    put(self, local, path)
    if step == "put": die()
archive_index.plan, archive_index.record = planned, recorded
archive_files._into_folder, archive_files.Files.put = half, putting
asyncio.run(module.Archiver(load).turn(now=True))
"""


@pytest.mark.parametrize("step", STEPS)
async def test_whenever_it_is_killed_each_record_is_archived_once(world: World, step: str) -> None:
    world.log.send(10)
    await run()
    world.log.send(12)
    victim = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", VICTIM, step],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", VARIABLE: str(world.log.path)},
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert victim.returncode == -9, victim.stderr.decode()
    # Nobody else comes while the dead one's lease lasts; the other partitions go on.
    held = await world.execute("SELECT partition FROM archive_positions WHERE leased_until > now()")
    assert len(held) == 1
    world.log.send(6)
    await run()
    assert len(world.archived()) < 28
    await world.end_leases()
    # What it had planned is gone on with, although Kafka has it no more.
    if step in ("put", "recorded"):
        world.log.delete(before=7)
    log = world.log.records()
    await run()
    there = world.archived()
    assert {at: r for at, r in there.items() if at in log} == log
    assert len(there) == 28
    checked = await world.whole()
    assert (checked["records"], checked["lost"]) == (28, 0)
    assert list((Path(load().data_dir) / "archive-spool").iterdir()) == []
    assert not list(world.folder.rglob("*.part"))


async def test_several_that_archive_at_once_do_it_once(world: World) -> None:
    archivers = [Archiver(load) for _ in range(3)]
    for _ in range(4):
        world.log.send(30)
        await asyncio.gather(*(one.turn(now=True) for one in archivers))
    for one in archivers:
        await one.turn(now=True)
        await one.close()
    assert world.archived() == world.log.records()
    await world.whole()


@pytest.mark.parametrize("records_max", [3, 250_000])
async def test_who_was_taken_for_dead_does_no_harm(world: World, records_max: int) -> None:
    world.log.send(30)
    stale = Archiver(load)
    put, seen = stale.files.put, []

    async def overtake() -> None:
        await world.end_leases()
        # The other one makes other files of the same records, or the same.
        fast = Archiver(lambda: with_archive(segment_records_max=records_max))
        await fast.turn(now=True)
        await fast.close()

    def slow(local: Path, path: str) -> None:
        # While it uploads, its lease runs out, and another one finds its plan without a file.
        in_thread(overtake())
        put(local, path)
        seen.append(path)

    stale.files.put = slow  # type: ignore[method-assign]
    await stale.turn(now=True)
    await stale.close()
    assert len(seen) == 1
    assert (world.folder / seen[0]).exists() == (records_max > 3)
    assert world.archived() == world.log.records()
    await world.whole()


async def test_files_whose_time_is_over_are_deleted(world: World) -> None:
    now_ms = time.time_ns() // 1_000_000
    world.log.add(0, (now_ms, None, b"a", ()))
    world.log.add(1, (now_ms - 40 * DAY_MS, None, b"b", ()), (now_ms - 39 * DAY_MS, None, b"c", ()))
    # Its first record is as old, its last one is not.
    world.log.add(2, (now_ms - 40 * DAY_MS, None, b"d", ()), (now_ms + 99 * DAY_MS, None, b"e", ()))
    assert len((await run())["files"]) == 4
    archiver = Archiver(lambda: with_archive(keep_days=30))
    assert (await archiver.turn()).deleted == 2
    assert (await archiver.turn()).deleted == 0
    await archiver.close()
    assert world.archived().keys() == {(0, 0), (2, 0), (2, 1)}
    # Its position stays: it is not archived again.
    assert (await run())["records"] == 0


async def test_an_index_that_was_lost_is_made_anew(world: World) -> None:
    world.log.send(20)
    await run()
    world.log.send(20)
    await run()
    before = await world.execute(
        "SELECT path, records, value_bytes, min_time, max_time, sha256 FROM archive_segments ORDER BY 1"
    )
    await world.execute("TRUNCATE archive_segments, archive_positions, archive_gaps")
    checked = await command("archive", "verify", "--json", code=1)
    assert len(checked["orphans"]) == 2 * PARTITIONS
    assert len((await command("archive", "reindex", "--json"))["adopted"]) == 2 * PARTITIONS
    after = await world.execute(
        "SELECT path, records, value_bytes, min_time, max_time, sha256 FROM archive_segments ORDER BY 1"
    )
    assert after == before
    assert (await run())["records"] == 0
    await world.whole()
    # What is none of ours, or damaged, is left, and told.
    one = next(world.folder.rglob("*.parquet"))
    (one.parent / f"{'0' * 20}-{1:020d}-{'0' * 16}.parquet").write_bytes(one.read_bytes())
    (world.folder / "notes.parquet").write_bytes(b"")
    left = await command("archive", "reindex", "--json", code=1)
    assert sorted(fault["what"].split(":")[0] for fault in left["left"]) == ["its name is none of the archive's", "the file's SHA-256 is " + next(
        s["sha256"] for s in after if str(one).endswith(s["path"]))]  # fmt: skip


async def test_a_topic_that_was_made_anew_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.log.send(12)
    await run()
    await world.execute("UPDATE archive_positions SET next_offset = 100 WHERE partition = 0")
    assert "was the topic made anew" in await command("archive", "run", code=1)
    monkeypatch.setenv("PRESERVARIUM_ARCHIVE__EPOCH", "1")
    assert (await run())["records"] == 12


async def test_files_are_restored_to_another_place(world: World, tmp_path: Path) -> None:
    world.log.send(30)
    await run()
    place = tmp_path / "elsewhere"
    dry = await command("archive", "restore", "--to-place", str(place), "--dry-run", "--json")
    assert (dry["files"], dry["records_at_most"], dry["restored"]) == (PARTITIONS, 30, None)
    assert not place.exists()
    copied = await command("archive", "restore", "--to-place", str(place), "--yes", "--json")
    assert (copied["restored"]["files"], copied["restored"]["there"]) == (PARTITIONS, 0)
    again = await command("archive", "restore", "--to-place", str(place), "--yes", "--json")
    assert (again["restored"]["files"], again["restored"]["there"]) == (0, PARTITIONS)
    assert archived(place) == world.log.records()
    assert "is the archive itself" in await command(
        "archive", "restore", "--to-place", str(world.folder), "--yes", code=1
    )
    # A damaged file is not copied.
    one = sorted(world.folder.rglob("*.parquet"))[0]
    one.write_bytes(one.read_bytes()[:-1] + b"?")
    assert "is damaged" in await command("archive", "restore", "--to-place", str(tmp_path / "third"), "--yes", code=1)


async def test_an_archive_in_s3(world: World, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow.fs import S3FileSystem

    bucket = f"b{uuid.uuid4().hex[:12]}"
    made = S3FileSystem(
        access_key=ACCESS_KEY, secret_key=SECRET_KEY, endpoint_override=s3.removeprefix("http://"), scheme="http",
        region="us-east-1", allow_bucket_creation=True,
    )  # fmt: skip
    monkeypatch.setenv("PRESERVARIUM_ARCHIVE__URL", f"s3://{bucket}/plant")
    monkeypatch.setenv("PRESERVARIUM_ARCHIVE__S3_ENDPOINT", s3)
    monkeypatch.setenv("PRESERVARIUM_ARCHIVE__S3_ACCESS_KEY", ACCESS_KEY)
    monkeypatch.setenv("PRESERVARIUM_ARCHIVE__S3_SECRET_KEY", SECRET_KEY)
    world.log.send(40, at_ms=time.time_ns() // 1_000_000 - 9 * DAY_MS)
    assert "NO_SUCH_BUCKET" in await command("archive", "run", code=1)
    made.create_dir(bucket)
    assert (await run())["records"] == 40
    assert (await world.whole())["files"] == PARTITIONS
    log = world.log.records()
    world.log.delete()
    reading = ArchivedRecords(load())
    for p in range(PARTITIONS):
        found = [r async for some in reading.between(RAW, p, 0, 99) for r in some]
        assert {(p, r.offset): r.value for r in found} == {at: r.value for at, r in log.items() if at[0] == p}
        assert (await reading.at(RAW, p, [7]))[7].headers == log[p, 7].headers
    await reading.close()
    # Brought down to a folder, where it says the same.
    await command("archive", "restore", "--to-place", str(world.folder), "--yes", "--json")
    assert world.archived() == log
    # Damage in the store is found; a file without a row, too.
    files = Files(load().archive)
    path = next(iter(files.list()))[0]
    with made.open_output_stream(f"{bucket}/plant/{path}") as out:
        out.write(b"damaged")
    with made.open_output_stream(f"{bucket}/plant/stray.parquet") as out:
        out.write(b"stray")
    checked = await command("archive", "verify", "--json", code=1)
    assert [fault["path"] for fault in checked["faults"]] == [path]
    assert checked["orphans"] == ["stray.parquet"]
    archiver = Archiver(lambda: with_archive(keep_days=1))
    assert (await archiver.turn()).deleted == PARTITIONS
    await archiver.close()
    assert [name for name, _ in files.list()] == ["stray.parquet"]


async def test_clickhouse_and_duckdb_ask_the_archive(world: World) -> None:
    """The queries of docs/ARCHIVE.md."""
    world.log.send(5)  # also what is no text
    for n in range(20):
        line = raw_line("d1", {"t": n}, received_at=1_764_547_200_000_000 + n, connector="test", mode="LAN")
        world.log.add(n % PARTITIONS, (1_764_547_200_000 + n, b"d1", line, ()))
    await run()
    text = (ROOT / "docs" / "ARCHIVE.md").read_text()
    queries = [
        block.split("```", 1)[0].replace("/srv/archive", str(world.folder)) for block in text.split("```sql\n")[1:]
    ]
    duck = [query for query in queries if "read_parquet" in query]
    house = [query for query in queries if ", Parquet)" in query]
    assert len(duck) + len(house) == len(queries) > 3
    asked = [duckdb.sql(query).fetchall() for query in duck]
    assert sum(row[2] for row in asked[0]) == 25
    assert [row[2] for row in asked[1]].count('{"t":7}') == 1
    if importlib.util.find_spec("chdb") is None:
        pytest.skip("missing: chDB (extra `embedded`)")
    # In a process of its own: the engine takes over signals and threads of the one that it is in.
    script = "import chdb, sys; [print(chdb.query(q, 'JSONCompact').bytes().decode().replace('\\n', '')) for q in sys.argv[1:]]"
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, *house], capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    counted, found = (orjson.loads(line)["data"] for line in done.stdout.splitlines())
    assert sum(int(row[1]) for row in counted) == 25
    assert [row[2] for row in found].count('{"t":7}') == 1
