"""From a committed change to the workers: relay, catalogue, device lookup, on a real PostgreSQL and a real Kafka."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError

from preservarium import metrics, topics
from preservarium.clock import ManualClock
from preservarium.domain.registry.changes import fold_devices
from preservarium.embedded.service import free_port
from preservarium.registry.apply import apply, connect
from preservarium.registry.catalogue import Catalogue, header_rev
from preservarium.registry.device_lookup import DeviceLookup
from preservarium.registry.relay import Relay, RelayService
from preservarium.settings import Settings, load
from preservarium.stores.migrate import MIGRATIONS, migrate_postgres
from preservarium.streaming import topics_admin

REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes: [{name: temperature, kind: number, unit: degC}]
parsers: [{name: acme, kind: table, source: {fields: []}}]
rules: [{name: hot, kind: high, component_type: temperature, severity: major, threshold: 60}]
device_types: [{name: T1, manufacturer: Acme, parser: acme, rules: [hot]}]
devices: [{device_id: "0001", type: T1, name: Lab}]
"""
ROOT = Path(__file__).resolve().parents[3]
#: What the users are promised is 1 s; a machine that runs all tests at once gets more, and the figure is printed.
DEADLINE_S = 10.0


@pytest.fixture
async def settings(pg_dsn: str, kafka: str, topic_prefix: str, tmp_path: Path) -> Settings:
    settings = load(
        postgres={"url": pg_dsn},
        kafka={"bootstrap_servers": kafka, "topic_prefix": topic_prefix, "group": f"{topic_prefix}g", "partitions": 3},
        clickhouse={"enabled": False},
        breaker={"failures_max": 1, "open_s": 5.0},
    )
    (tmp_path / "migrations" / "postgres").mkdir(parents=True)
    shutil.copy(MIGRATIONS / "postgres" / "0001_registry.sql", tmp_path / "migrations" / "postgres")
    await migrate_postgres(settings, directory=tmp_path / "migrations")
    await topics_admin.create(settings)
    return settings


@pytest.fixture
async def connection(settings: Settings) -> AsyncIterator[Any]:
    connection = await connect(settings)
    yield connection
    await connection.close()


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(old: str = "", new: str = "") -> Path:
        path = tmp_path / "registry.yaml"
        path.write_text(REGISTRY.replace(old, new) if old else REGISTRY)
        return path

    return write


async def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.005)


async def records(settings: Settings, topic: topics.Topic) -> list[Any]:
    consumer = AIOKafkaConsumer(
        topic.full(settings.kafka.topic_prefix),
        bootstrap_servers=settings.kafka.bootstrap_servers,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        ends = await consumer.end_offsets(list(consumer.assignment()))
        found: list[Any] = []
        while sum(ends.values()) and any([await consumer.position(tp) < end for tp, end in ends.items()]):
            for part in (await consumer.getmany(timeout_ms=200)).values():
                found += part
        return sorted(found, key=lambda r: r.timestamp)
    finally:
        await consumer.stop()


async def test_apply_relays_itself_where_no_worker_leads(settings: Settings, file: Any, connection: Any) -> None:
    done = await apply(settings, file())
    assert done.records == "sent"
    assert await connection.fetchval("SELECT count(*) FROM registry_outbox WHERE sent_at IS NULL") == 0
    types = await records(settings, topics.TYPE_REGISTRY)
    assert sorted(r.key.decode() for r in types) == ["datatype/temperature", "parser/acme", "rule/hot", "type/T1"]
    devices = await records(settings, topics.DEVICE_REGISTRY)
    assert [orjson.loads(r.value)["device_id"] for r in devices] == ["0001"]
    assert header_rev(devices[0].headers) == orjson.loads(devices[0].value)["rev"]


async def test_a_change_is_visible_to_every_worker_at_once(settings: Settings, file: Any, capsys: Any) -> None:
    await apply(settings, file())
    workers = [Catalogue(lambda: settings) for _ in range(2)]
    relays = [RelayService(lambda: settings) for _ in range(2)]
    for service in (*workers, *relays):
        await service.start()
    try:
        for worker in workers:
            await worker.ready()
            assert worker.rule("hot") is not None
        seen = [asyncio.Event() for _ in workers]
        for worker, event in zip(workers, seen, strict=True):
            worker.on_change(lambda _kind, _name, event=event: event.set())  # type: ignore[misc]
        latencies: list[float] = []
        for threshold in (61, 62, 63):
            for event in seen:
                event.clear()
            done = await apply(settings, file("threshold: 60", f"threshold: {threshold}"))
            assert done.committed is not None
            committed = time.monotonic() - done.relay_s
            async with asyncio.timeout(DEADLINE_S):
                for event in seen:
                    await event.wait()
            latencies.append(time.monotonic() - committed)
            for worker in workers:
                rule = worker.rule("hot")
                assert rule is not None
                assert rule["threshold"] == threshold
        with capsys.disabled():
            print(f" [commit to visible in 2 workers: {', '.join(f'{s * 1000:.0f} ms' for s in latencies)}]", end="")
    finally:
        for service in (*relays, *workers):
            await service.stop()


async def test_a_removed_document_leaves_every_worker(settings: Settings, file: Any) -> None:
    await apply(settings, file("rules: [hot]", "rules: []"))
    catalogue = Catalogue(lambda: settings)
    await catalogue.start()
    try:
        await catalogue.ready()
        without = file(
            "rules: [{name: hot, kind: high, component_type: temperature, severity: major, threshold: 60}]", "rules: []"
        )
        without.write_text(without.read_text().replace("rules: [hot]", "rules: []"))
        await apply(settings, without, prune=True)
        await until(lambda: catalogue.rule("hot") is None, "the rule is gone")
    finally:
        await catalogue.stop()


async def test_a_worker_that_starts_later_reads_everything_first(settings: Settings, file: Any) -> None:
    await apply(settings, file())
    for threshold in (61, 62):
        await apply(settings, file("threshold: 60", f"threshold: {threshold}"))
    catalogue = Catalogue(lambda: settings)
    await catalogue.start()
    try:
        await catalogue.ready()
        rule = catalogue.rule("hot")
        assert rule is not None
        assert rule["threshold"] == 62
        assert catalogue.parser("acme") is not None
    finally:
        await catalogue.stop()


class _Crash(Exception):
    pass


class _CrashingConnection:
    """A connection whose process dies when it is about to mark rows sent: Kafka has them, the database does not know."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def fetch(self, *args: Any) -> Any:
        return await self._connection.fetch(*args)

    async def execute(self, *_: Any) -> None:
        raise _Crash


async def test_a_crash_between_kafka_and_the_mark_sends_again_and_harms_nothing(
    settings: Settings, file: Any, connection: Any
) -> None:
    down = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})})
    # The worker died between the commit and the relay: everything waits in the outbox.
    done = await apply(down, file())
    assert done.records == "pending"
    assert await connection.fetchval("SELECT count(*) FROM registry_outbox WHERE sent_at IS NULL") == 5
    relay = Relay(lambda: settings)
    try:
        with pytest.raises(_Crash):
            await relay.drain(_CrashingConnection(connection))
        assert await relay.drain(connection) == 5
        assert await relay.drain(connection) == 0
    finally:
        await relay.close()
    twice = await records(settings, topics.DEVICE_REGISTRY)
    assert len(twice) == 2
    puts, faults = fold_devices([(r.key, r.value, header_rev(r.headers)) for r in twice], {}.get)
    assert (list(puts.values()), faults) == ([twice[0].value], {})
    catalogue = Catalogue()
    changed = [
        catalogue.apply(r.key, r.value, rev=header_rev(r.headers))
        for r in await records(settings, topics.TYPE_REGISTRY)
    ]
    assert (len(changed), sum(changed)) == (8, 4)


async def test_the_relay_leaves_rows_that_kafka_did_not_take(settings: Settings, file: Any, connection: Any) -> None:
    down = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})})
    await apply(down, file())
    relay = Relay(lambda: down)
    with pytest.raises((KafkaError, OSError)):
        await relay.drain(connection)
    assert await connection.fetchval("SELECT count(*) FROM registry_outbox WHERE sent_at IS NULL") == 5
    await relay.close()


async def test_another_relay_leads_when_the_leader_dies(settings: Settings, file: Any, connection: Any) -> None:
    first, second = RelayService(lambda: settings), RelayService(lambda: settings)
    await first.start()
    try:

        async def leader() -> int | None:
            return await connection.fetchval(
                "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())"
            )

        deadline = time.monotonic() + DEADLINE_S
        while (pid := await leader()) is None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await second.start()
        await connection.execute("SELECT pg_terminate_backend($1)", pid)
        await apply(settings, file())  # whoever leads sends; `apply` waits until it is sent
        while (other := await leader()) in {None, pid}:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert other != pid
        assert await connection.fetchval("SELECT count(*) FROM registry_outbox WHERE sent_at IS NULL") == 0
    finally:
        await first.stop()
        await second.stop()


# --- the device lookup


def _count(outcome: str) -> float:
    return metrics.CACHE.labels("device_config", outcome)._value.get()


class _Table(dict[bytes, bytes]):
    def at(self, _partition: int, key: bytes) -> bytes | None:
        return self.get(key)


async def test_the_table_answers_without_a_query(settings: Settings) -> None:
    # There is no database at all at this address.
    nowhere = settings.model_copy(
        update={
            "postgres": settings.postgres.model_copy(
                update={"url": type(settings.postgres.url)("postgresql://127.0.0.1:1/x")}
            ),
            "normalize": settings.normalize.model_copy(update={"registry_wait_s": 0.0}),
        }
    )
    table = _Table(
        {
            b"0001": b'{"device_id":"0001","rev":1,"type":"T1","enabled":true}',
            b"gone": b'{"device_id":"gone","rev":2,"deleted":true}',
        }
    )
    lookup = DeviceLookup(table.at, lambda: nowhere)
    before = _count("table")
    found = await lookup.lookup(0, "0001")
    assert found is not None
    assert found["type"] == "T1"
    assert await lookup.lookup(0, "gone") is None
    assert _count("table") == before + 1
    # Not in the table, and the database has been down for longer than it is waited for: unknown now, and not remembered.
    unavailable = _count("unavailable")
    for _ in range(3):
        assert await lookup.lookup(0, "new") is None
    assert _count("unavailable") == unavailable + 3
    await lookup.close()


async def test_one_query_serves_all_who_ask_and_feeds_the_catalogue(settings: Settings, file: Any) -> None:
    await apply(settings, file())
    catalogue = Catalogue()
    clock = ManualClock()
    table = _Table()
    lookup = DeviceLookup(table.at, lambda: settings, catalogue=catalogue, clock=clock)
    fetched: list[tuple[str, ...]] = []
    fetch = lookup._fetch

    async def counted(device_ids: Any) -> Any:
        fetched.append(tuple(device_ids))
        return await fetch(device_ids)

    lookup._fetch = counted  # type: ignore[method-assign]
    try:
        found = await asyncio.gather(
            *(lookup.lookup(0, "0001") for _ in range(20)), lookup.lookup_many(0, ["0001", "none"])
        )
        assert fetched == [("0001",), ("none",)]
        assert all(f is not None and ("0001" in f or f["device_id"] == "0001") for f in found)
        assert catalogue.type("T1") is not None
        assert catalogue.parser("acme") is not None
        assert catalogue.rule("hot") is not None

        # Neither answer is asked for again within its time ...
        assert await lookup.lookup(0, "none") is None
        assert await lookup.lookup(0, "0001") is not None
        assert len(fetched) == 2
        # ... unless the registry agent wrote the device, or the time is over.
        lookup.changed("none")
        assert await lookup.lookup(0, "none") is None
        assert fetched[2:] == [("none",)]
        clock.advance(settings.normalize.unknown_cache_ttl_s + 1)
        assert await lookup.lookup(0, "none") is None
        assert fetched[3:] == [("none",)]
    finally:
        await lookup.close()


async def test_a_caller_that_is_cancelled_leaves_the_answer_to_the_others(settings: Settings, file: Any) -> None:
    await apply(settings, file())
    lookup = DeviceLookup(_Table().at, lambda: settings)
    try:
        first = asyncio.create_task(lookup.lookup(0, "0001"))
        second = asyncio.create_task(lookup.lookup(0, "0001"))
        await asyncio.sleep(0)
        first.cancel()
        found = await second
        assert found is not None
        assert first.cancelled() or first.done()
    finally:
        await lookup.close()


async def test_listeners_hear_which_device_changed(settings: Settings) -> None:
    lookup = DeviceLookup(_Table().at, lambda: settings)
    heard: list[str] = []
    lookup.on_change(heard.append)
    lookup.changed("0001")
    assert heard == ["0001"]
    await lookup.close()


# --- a whole worker


async def test_a_device_reaches_the_table_of_a_running_worker(
    settings: Settings, file: Any, tmp_path: Path, capsys: Any
) -> None:
    await apply(settings, file())
    kafka = settings.kafka
    environment = {
        **os.environ,
        "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "PRESERVARIUM_KAFKA__TOPIC_PREFIX": kafka.topic_prefix,
        "PRESERVARIUM_KAFKA__GROUP": kafka.group,
        "PRESERVARIUM_KAFKA__PARTITIONS": str(kafka.partitions),
        "PRESERVARIUM_POSTGRES__URL": settings.postgres.dsn,
        "PRESERVARIUM_CLICKHOUSE__ENABLED": "false",
        "PRESERVARIUM_AGENTS__ENABLED": "registry",
        "PRESERVARIUM_WEB__PORT": str(free_port()),
        "PRESERVARIUM_DATA_DIR": str(tmp_path / "data"),
    }
    log = (tmp_path / "worker.log").open("wb")
    worker = subprocess.Popen(
        [sys.executable, "-m", "faust", "-A", "preservarium", "worker"],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=log,
    )
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest", metadata_max_age_ms=500
    )
    await consumer.start()
    try:
        # What the table holds is what its changelog says: the worker writes the one only after Kafka took the other.
        consumer.subscribe([f"{kafka.group}-device_configs-changelog"])

        async def seen(key: bytes, **expected: Any) -> None:
            async with asyncio.timeout(60):
                while True:
                    assert worker.poll() is None, (tmp_path / "worker.log").read_text()[-2000:]
                    for part in (await consumer.getmany(timeout_ms=50)).values():
                        for record in part:
                            document = orjson.loads(record.value) if record.value else {}
                            if record.key == key and expected.items() <= document.items():
                                return

        await seen(b"0001", name="Lab")
        started = time.monotonic()
        done = await apply(settings, file("name: Lab", "name: Yard"))
        committed = time.monotonic() - done.relay_s
        await seen(b"0001", name="Yard")
        with capsys.disabled():
            print(f" [commit to the worker's table: {(time.monotonic() - committed) * 1000:.0f} ms, with apply {(time.monotonic() - started) * 1000:.0f} ms]", end="")  # fmt: skip
        # What a stranger writes there is refused with a reason, and stops nothing.
        producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
        await producer.start()
        await producer.send_and_wait(topics.DEVICE_REGISTRY.full(kafka.topic_prefix), key=b"0001", value=b"{not json")
        await producer.stop()
        await apply(settings, file('devices: [{device_id: "0001", type: T1, name: Lab}]', "devices: []"), prune=True)
        await seen(b"0001", deleted=True)
        errors = [orjson.loads(r.value) for r in await records(settings, topics.ERRORS)]
        assert [(e["stage"], e["code"], e["raw"]) for e in errors] == [("registry", "envelope_invalid", "{not json")]
    finally:
        await consumer.stop()
        worker.send_signal(signal.SIGTERM)
        try:
            code = worker.wait(timeout=30)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            raise
        log.close()
    assert code == 0, (tmp_path / "worker.log").read_text()[-2000:]
