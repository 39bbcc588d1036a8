"""`preservarium storage`: chunks, compression, retention, on plain PostgreSQL and on TimescaleDB where the server has it."""

import asyncio
import json
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner
from sink_support import DAY_US, NOW_US, execute, fetch, live, message

from preservarium.__main__ import cli
from preservarium.settings import load
from preservarium.stores.storage import Storage
from preservarium.stores.timescale import TimescaleStore


@pytest.fixture
async def filled(dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """DSN of a database with rows of twelve days."""
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__URL", dsn)
    store = TimescaleStore(live(postgres={"url": dsn}), late_lane=False)
    await store.write([message("a", float(i), at=NOW_US - i * DAY_US) for i in range(12)], {})
    await store.close()
    return dsn


async def run(*arguments: str) -> Any:
    """The exit code, and the JSON or the text."""
    done = await asyncio.to_thread(CliRunner().invoke, cli, ["storage", *arguments])
    return done.exit_code, json.loads(done.output) if "--json" in arguments and done.exit_code == 0 else done.output


async def is_plain(dsn: str) -> bool:
    return bool((await fetch(dsn, "SELECT storage_engine() = 'plain'"))[0][0])


async def test_chunks_are_listed_the_newest_first(filled):
    code, found = await run("chunks", "--json")
    assert code == 0
    starts = [chunk["range_start"] for chunk in found]
    assert starts == sorted(starts, reverse=True)
    assert sum(chunk["bytes"] for chunk in found) > 12 * 8192
    code, text = await run("chunks", "--limit", "3")
    assert code == 0
    assert " chunks, 0 compressed, " in text
    assert text.count("measurements") + text.count("_hyper_") == 3


async def test_old_chunks_are_compressed_by_command(filled):
    code, done = (
        await run("compress", "--older-than-days", "5", "--json") if not await is_plain(filled) else (None, None)
    )
    if code is None:
        code, text = await run("compress", "--older-than-days", "5")
        assert code == 1
        assert "does not compress" in text
        return
    assert code == 0
    assert 5 <= len(done["compressed"]) <= 7
    _, found = await run("chunks", "--json")
    assert sorted(c["name"] for c in found if c["compressed"]) == sorted(done["compressed"])
    assert all(c["before_bytes"] for c in found if c["compressed"])
    # What is compressed is found so.
    assert await run("compress", "--older-than-days", "5", "--json") == (0, {"compressed": []})
    assert (await fetch(filled, "SELECT count(*) FROM measurements"))[0][0] == 12


async def test_policies_are_those_of_the_settings_once_they_are_applied(filled, monkeypatch):
    _, before = await run("retention", "--json")
    assert (before["in_force_days"], before["wanted_days"], before["so"]) == (90, 90, True)
    monkeypatch.setenv("PRESERVARIUM_SINK__RETENTION_DAYS", "40")
    monkeypatch.setenv("PRESERVARIUM_SINK__COMPRESS_AFTER_DAYS", "4")
    _, text = await run("retention")
    assert "kept for 90 days; PRESERVARIUM_SINK__RETENTION_DAYS=40" in text
    assert "--apply" in text
    for name in ("retention", "compress", "interval"):
        code, after = await run(name, "--apply", "--json")
        assert code == 0
        assert after["so"] or (name == "compress" and after["engine"] == "plain")


async def test_what_is_too_old_is_dropped_at_once_on_demand(filled, monkeypatch):
    # The shortest retention is more than eight days; what TimescaleDB drops by its own policy is as good.
    monkeypatch.setenv("PRESERVARIUM_SINK__RETENTION_DAYS", "9")
    assert (await run("retention", "--now", "--json"))[0] == 2  # it does not ask
    code, done = await run("retention", "--now", "--yes", "--json")
    assert code == 0
    assert done["dropped"] >= 1
    left = await fetch(filled, "SELECT count(*) FROM measurements")
    assert 9 <= left[0][0] <= 11


async def test_a_chunk_that_is_read_is_told_and_what_was_done_stays(filled, monkeypatch):
    if await is_plain(filled):
        pytest.skip("missing: TimescaleDB (give TEST_POSTGRES_URL of a server that has it)")
    monkeypatch.setattr("preservarium.stores.storage.LOCK_S", 0.3)
    reader = await asyncpg.connect(filled)
    transaction = reader.transaction()
    await transaction.start()
    await reader.execute("SELECT FROM measurements WHERE timestamp < now() - INTERVAL '7 days'")
    code, text = await run("compress", "--older-than-days", "5")
    assert code == 1
    assert "chunks are compressed" in text
    await transaction.rollback()
    await reader.close()
    assert (await run("compress", "--older-than-days", "5", "--json"))[0] == 0


async def test_a_database_that_is_not_migrated_is_told(pg_dsn):
    await execute(pg_dsn, "SELECT 1")
    connection = await asyncpg.connect(pg_dsn)
    with pytest.raises(Exception, match="run `preservarium migrate`"):
        await Storage(connection, load()).engine()
    await connection.close()
